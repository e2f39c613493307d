"""Who counts in a round, and who is evaluated."""

import hashlib
import math
from collections.abc import Iterable
from typing import NamedTuple

from covenant import config as config_lib
from covenant.gauntlet import ratings

NEWCOMER = 3  # a uid with fewer evaluations is one
_BARRED = 0.25  # from this penalty on a uid is not heard
_USEFUL = 0.1  # average gain below which it is not: noise is around 0


class Selection(NamedTuple):
  uids: list[int]  # who counts, rising
  reserves: list[int]  # who would be next, best first
  reasons: dict[int, str]  # of every uid asked for, for people


def contributors(
  state: ratings.State,
  eligible: Iterable[int],
  config: config_lib.Gauntlet,
  round_index: int,
  seed: bytes,
) -> Selection:
  """Whose messages the manifest lists: `config.contributors` at most.

  The best rated; a share of the places is for newcomers, by lot. A place that
  one side leaves is the other's. Not heard are uids whose last evaluation was
  clearly negative, whose average gain is next to none, or who are under a
  heavy penalty. If that leaves nobody, the best rated of all is heard: the
  round must not be empty while someone honest is there.

  Args:
    state: of `ratings.admit` in this round.
    eligible: uids with a valid submission (`checks.Report.valid`), all of
      them in `state`.
    config: the section of the run's config.
    round_index: which round.
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
  new = [u for u in free if standings[u].evaluations < NEWCOMER]
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
    reasons[uid] = f'not among the {places} who count this round'
  return Selection(sorted(chosen), reserves, reasons)


def to_evaluate(
  state: ratings.State,
  uids: Iterable[int],
  count: int,
  round_index: int,
  seed: bytes,
) -> list[int]:
  """Who is evaluated this round: at most `count` of `uids`, rising.

  Half of the places, rounded up, go to those not evaluated the longest, the
  others by lot, in proportion to sigma squared. So, with n uids registered,
  none of them sends more than ceil(n / ceil(count / 2)) valid messages without
  one being evaluated: who waits longer goes first, a uid that registers
  queues behind those who wait, so at most n - 1 are ever before it, and every
  round serves ceil(count / 2) of these.

  Args:
    state: of `ratings.admit` in this round.
    uids: with a valid message, all of them in `state`.
    count: how many; 0 is none.
    round_index: which round.
    seed: for the lots. Unknown before the put window closed: who knows that
      its message will not be looked at can send anything.
  """
  standings = state.standings
  lots = {u: _lot(seed, round_index, u) for u in uids}
  queue = sorted(lots, key=lambda u: (standings[u].evaluated, u))
  first = min(count, -(-count // 2))
  chosen, rest = queue[:first], queue[first:]
  # Of weighted lots without replacement: the largest lot ** (1 / weight).
  rest.sort(key=lambda u: (math.log(lots[u]) / -(standings[u].sigma ** 2), u))
  return sorted(chosen + rest[: count - len(chosen)])


def _barred(s: ratings.Standing, round_index: int) -> str:
  """Why a uid is not heard; '' if it is."""
  if s.signs and s.signs[-1] < 0:
    return 'its last evaluation was clearly negative'
  if s.evaluations and s.gain < _USEFUL:
    return f'its average gain is below {_USEFUL} of the median'
  if s.factor(round_index) <= _BARRED:
    reasons = ', '.join(p.reason for p in s.penalties)
    return f'under penalty: {reasons}'
  return ''


def _lot(seed: bytes, round_index: int, uid: int) -> float:
  """Uniform in (0, 1), drawn for a uid."""
  text = f'{round_index}/{uid}'.encode()
  digest = hashlib.blake2b(seed, digest_size=8, key=text).digest()
  return ((int.from_bytes(digest, 'little') >> 12) + 0.5) / 2**52
