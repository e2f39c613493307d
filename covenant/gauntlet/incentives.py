"""The weights of the uids from their scores.

'gain' pays in proportion to the score, which is verified work: at most what was
declared, at most what the gain is worth, and as far as it is proven. Model: a
worker with effort e splits it as e = e_1 + ... + e_n over n uids. Each uid is
paid min(g(e_i), e_i), where g(e_i) is its gain in units of what as much work
usually gains, so that together they are paid for at most e, whatever g is. If
one message is sent under n uids, each proves 1/n of its data, and together they
are paid less than one. A cut-off (top N) or a pay by rank breaks this: 'ramp',
as deployed, pays a second uid almost like the first.
"""

from covenant import config as config_lib
from covenant.gauntlet import ratings

RESERVES = 10  # of 'ramp': uids after the contributors that are paid as well


def weights(
  state: ratings.Ratings, config: config_lib.Gauntlet
) -> dict[int, float]:
  """Returns the weight of each uid; they sum to 1, or there are none.

  Uids without a score are left out. The fraction `config.burn` goes to
  `config.burn_uid`, or everything if no uid has a score. Until proof of work
  is common (`Ratings.has_proof`), the raw score is paid instead of the score.
  """
  deserved = {
    u: s.score if state.has_proof else s.raw_score
    for u, s in state.standings.items()
  }
  deserved = {u: x for u, x in deserved.items() if x > 0}
  if config.burn:
    deserved.pop(config.burn_uid, None)
  if not deserved:
    return {config.burn_uid: 1.0} if config.burn else {}
  if config.incentive == 'ramp':
    deserved = ramp(deserved, config.contributors)
  ordered = sorted(deserved)
  total = sum(deserved[u] for u in ordered)
  shares = {u: (1 - config.burn) * deserved[u] / total for u in ordered}
  return shares | ({config.burn_uid: config.burn} if config.burn else {})


def ramp(scores: dict[int, float], places: int) -> dict[int, float]:
  """Pays by rank: the first `places` from 2 to 1, each of the next ten half.

  >>> ramp({0: 3.0, 1: 9.0, 2: 5.0, 3: 1.0}, places=2)
  {1: 2.0, 2: 1.0, 0: 0.5, 3: 0.25}
  """
  ranked = sorted(scores, key=lambda u: (-scores[u], u))
  top = min(places, len(ranked))
  paid = {}
  for rank, uid in enumerate(ranked[: places + RESERVES]):
    if rank < top:
      paid[uid] = 2 - rank / max(top - 1, 1)
    else:
      paid[uid] = 0.5 ** (rank - top + 1)
  return paid
