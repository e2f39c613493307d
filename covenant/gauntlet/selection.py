"""The selection of the uids that count in a round, and of those to evaluate."""

import hashlib
import math
from collections.abc import Iterable
from typing import NamedTuple

from covenant import config as config_lib
from covenant.gauntlet import ratings

NEWCOMER = 3  # evaluations below which a uid is a newcomer
_BARRED = 0.25  # penalty factor up to which a uid is excluded
_USEFUL = 0.1  # average gain below which it is excluded: noise is around 0


class Selection(NamedTuple):
  """The uids whose messages count in a round."""

  uids: list[int]  # selected, in order
  reserves: list[int]  # next in line, best first
  reasons: dict[int, str]  # reason for every eligible uid, for people


def contributors(
  state: ratings.Ratings,
  eligible: Iterable[int],
  config: config_lib.Gauntlet,
  round_index: int,
  seed: bytes,
) -> Selection:
  """Selects the messages of the manifest, at most `config.contributors`.

  The best rated uids are selected; a share of the places goes to newcomers, by
  lot. Places that one group leaves go to the other. Uids are excluded if their
  last evaluation was clearly negative, their average gain is next to none, or
  they are under a heavy penalty. If that excludes all, the best rated of all
  is selected: a round must not be empty while an honest uid is there.

  Args:
    state: the ratings, after `ratings.admit` in this round.
    eligible: uids with a valid submission (`checks.CheckReport.valid`), all of
      them in `state`.
    config: the section of the run's config.
    round_index: the round.
    seed: for the lots; must be unknown before the put window closed.
  """
  standings = state.standings
  eligible = sorted(set(eligible))
  best = sorted(eligible, key=lambda u: (-standings[u].ordinal, u))
  reasons = {}
  if config.evaluate:
    for uid in eligible:
      why = _barred(standings[uid], round_index)
      if why:
        reasons[uid] = why
  free = [u for u in best if u not in reasons] or best[:1]

  lots = {u: _lot(seed, round_index, u) for u in free}
  if not config.evaluate:
    free = sorted(free, key=lots.__getitem__)
  new = [u for u in free if is_newcomer(standings[u])]
  new = sorted(new, key=lots.__getitem__) if config.evaluate else []
  known = [u for u in free if u not in set(new)]
  places = min(config.contributors, len(free))
  for_new = min(len(new), math.ceil(config.probation * places))
  for_known = min(len(known), places - for_new)
  for_new = min(len(new), places - for_known)
  chosen = known[:for_known] + new[:for_new]
  reserves = known[for_known:] + new[for_new:]
  for uid in chosen:
    reasons[uid] = 'counts' + (', as a newcomer' if uid in new else '')
  for uid in reserves:
    reasons[uid] = f'not among the {places} that count this round'
  return Selection(sorted(chosen), reserves, reasons)


def to_evaluate(
  state: ratings.Ratings,
  uids: Iterable[int],
  count: int,
  round_index: int,
  seed: bytes,
) -> list[int]:
  """Selects at most `count` of `uids` to evaluate this round, in order.

  Half of the places, rounded up, go to the uids that have waited longest for
  an evaluation, the others by lot in proportion to sigma squared. So none of n
  registered uids sends more than ceil(n / ceil(count / 2)) valid messages
  without one being evaluated: a new uid queues behind those that wait, so at
  most n - 1 are ever before it, and every round serves ceil(count / 2) of them.

  Args:
    state: the ratings, after `ratings.admit` in this round.
    uids: uids with a valid message, all of them in `state`.
    count: the number of places; may be 0.
    round_index: the round.
    seed: for the lots. Unknown before the put window closed: a miner that
      knows that its message will not be evaluated could send anything.
  """
  standings = state.standings
  lots = {u: _lot(seed, round_index, u) for u in uids}
  queue = sorted(lots, key=lambda u: (standings[u].evaluated, u))
  first = min(count, -(-count // 2))
  chosen, rest = queue[:first], queue[first:]
  # Weighted lots without replacement: the largest lot ** (1 / weight) first.
  rest.sort(key=lambda u: (math.log(lots[u]) / -(standings[u].sigma ** 2), u))
  return sorted(chosen + rest[: count - len(chosen)])


def is_newcomer(standing: ratings.Standing) -> bool:
  """Returns whether a uid has been evaluated too seldom for a rating."""
  return standing.evaluations < NEWCOMER


def _barred(s: ratings.Standing, round_index: int) -> str:
  """Returns the reason to exclude a uid, or ''."""
  if s.gain_signs and s.gain_signs[-1] < 0:
    return 'its last evaluation was clearly negative'
  if s.evaluations and s.gain < _USEFUL:
    return f'its average gain is below {_USEFUL} of what is usual'
  if s.factor(round_index) <= _BARRED:
    reasons = ', '.join(p.reason for p in s.penalties)
    return f'under penalty: {reasons}'
  return ''


def _lot(seed: bytes, round_index: int, uid: int) -> float:
  """Draws a uid's lot, uniform in (0, 1)."""
  text = f'{round_index}/{uid}'.encode()
  digest = hashlib.blake2b(seed, digest_size=8, key=text).digest()
  return ((int.from_bytes(digest, 'little') >> 12) + 0.5) / 2**52
