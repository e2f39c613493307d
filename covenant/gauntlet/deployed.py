"""The deployed scoring formulas, number for number, for comparison.

The formulas are restated as they are, without repairs. docs/gauntlet.md says
how ours differ, and why. Thresholds are inclusive exactly where the deployed
ones are.
"""

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence

import numpy as np

MISSING_SCORE = -99.0  # in the ranking, of peers without a valid message
WARMUP = 10  # rounds from the start in which no average is too small
BURN_UID, BURN = 1, 0.5
CONTRIBUTORS, RESERVES = 20, 10
NAUGHTY_ROUNDS = 20
HISTORY = 8  # gathers or evaluations


@dataclasses.dataclass(frozen=True)
class Peer:
  """The record of one peer; a reset leaves the defaults."""

  final: float = 0.0
  average: float = 0.0  # moving average of own-beats-random
  mu: float = 25.0
  sigma: float = 25 / 3
  sync: float = 0.0


def gradient_score(before: float, after: float) -> float:
  """Relative improvement of the loss; also of the one on own data."""
  return (before - after) / before


def moving_average(
  average: float, own: float, other: float, alpha: float = 0.05
) -> float:
  """Moving average of +1 where own data improved more, else -1.

  Kept in float32, as deployed.

  >>> x = moving_average(0.0, own=2.0, other=1.0)
  >>> y = moving_average(x, own=2.0, other=1.0)
  >>> round(x, 6), round(y, 6), round(moving_average(y, 2.0, 1.0), 6)
  (0.05, 0.0975, 0.142625)
  """
  sign = np.float32(1 if own > other else -1)
  return float(
    np.float32(1 - alpha) * np.float32(average) + np.float32(alpha) * sign
  )


def plackett_luce(
  ratings: Sequence[tuple[float, float]],
  scores: Sequence[float],
  ties: str = 'average',
) -> list[tuple[float, float]]:
  """New (mu, sigma) of single players after one game.

  Args:
    ratings: (mu, sigma) of each.
    scores: of each; more is better.
    ties: 'average' as openskill 6.2, which the rest of this room uses;
      'inflate' as 6.1.3, which was deployed: a tie lifts all that tied.

  >>> [round(mu, 3) for mu, _ in plackett_luce([(25, 25 / 3)] * 2, [1, 1])]
  [25.0, 25.0]
  >>> inflated = plackett_luce([(25, 25 / 3)] * 2, [1, 1], ties='inflate')
  >>> [round(mu, 3) for mu, _ in inflated]
  [27.256, 27.256]
  """
  beta, tau, kappa = 7.0, 0.1, 1e-4
  if ties not in ('average', 'inflate'):
    raise ValueError(f"ties: expected 'average' or 'inflate', got {ties!r}")
  players = range(len(ratings))
  variances = [sigma**2 + tau**2 for _, sigma in ratings]
  c = math.sqrt(sum(v + beta**2 for v in variances))
  strengths = [math.exp(mu / c) for mu, _ in ratings]
  ranks = [sum(other > s for other in scores) for s in scores]
  tied = [ranks.count(rank) for rank in ranks]
  rest = [
    sum(strengths[i] for i in players if ranks[i] >= ranks[q]) for q in players
  ]
  new = []
  for i in players:
    omega = delta = 0.0
    for q in players:
      if ranks[q] > ranks[i]:
        continue
      p = strengths[i] / rest[q]
      won = ranks[q] == ranks[i] if ties == 'inflate' else q == i
      omega += ((1 - p) if won else -p) / tied[q]
      delta += p * (1 - p) / tied[q]
    sigma = math.sqrt(variances[i])
    shrink = max(1 - variances[i] / c**2 * sigma / c * delta, kappa)
    mu = ratings[i][0] + variances[i] / c * omega
    new.append((mu, sigma * math.sqrt(shrink)))
  return new


def steps_behind(
  theirs: Sequence[np.ndarray],
  ours: Sequence[np.ndarray],
  step_sizes: Sequence[np.ndarray | None],
  outer_lr: float,
) -> float:
  """Returns the distance of a peer's parameters in outer steps.

  The mean, between the quartiles inclusive, of |difference| / step size.

  Args:
    theirs: published slices of each tensor.
    ours: the same slices of the validator's.
    step_sizes: moving averages of what an outer step changes there; where
      None, the outer learning rate stands in.
    outer_lr: the outer learning rate.

  Returns:
    Infinity where there is nothing to compare.
  """
  steps = []
  for their, our, size in zip(theirs, ours, step_sizes, strict=True):
    difference = np.abs(np.asarray(their, float) - np.asarray(our, float))
    if size is None:
      steps.append(difference / outer_lr)
    else:
      steps.append(difference / np.maximum(np.asarray(size, float), 1e-9))
  x = np.concatenate([np.ravel(s) for s in steps]) if steps else np.zeros(0)
  if not x.size:
    return math.inf
  low, high = np.quantile(x, [0.25, 0.75])
  return float(x[(x >= low) & (x <= high)].mean())


def sync_score(steps: float) -> float:
  """Converts steps behind to a factor.

  >>> [round(sync_score(x), 3) for x in (0, 0.5, 1, 2, 3, math.inf)]
  [1.0, 0.634, 0.363, 0.064, 0.0, 0.0]
  """
  return max(0.0, (1 - min(steps, 3.0) / 3) ** 2.5)


def final_score(peer: Peer, rounds: int) -> float:
  """(mu - 3 sigma) * average * sync, `rounds` after the start."""
  average = max(0.0, peer.average)
  if rounds >= WARMUP and average < 0.10:
    average = 0.0
  return (peer.mu - 3 * peer.sigma) * average * peer.sync


def bins(ordinals: Mapping[int, float], count: int = 5) -> list[list[int]]:
  """Peers in `count` bins of equal size, the best first.

  The first bins get one more where it does not divide; with fewer than
  20 peers a bin, there is one bin of all.
  """
  ranked = sorted(ordinals, key=lambda u: -ordinals[u])
  if len(ranked) < count * CONTRIBUTORS:
    return [ranked]
  size, more = divmod(len(ranked), count)
  ends = np.cumsum([0, *(size + (i < more) for i in range(count))])
  return [ranked[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def weighted_sample(
  waits: Mapping[int, float], count: int, draw: random.Random
) -> list[int]:
  """`count` uids without replacement, in proportion to their waits."""
  left, chosen = dict(waits), []
  while left and len(chosen) < count:
    (uid,) = draw.choices([*left], weights=[*left.values()])
    chosen.append(uid)
    del left[uid]
  return chosen


def weights(scores: Mapping[int, float]) -> dict[int, float]:
  """Converts final scores of all peers that were ever evaluated to weights.

  >>> weights({3: 5.0})
  {3: 0.5, 1: 0.5}
  >>> weights({3: -5.0})
  {1: 1.0}
  """
  ranked = sorted(
    (u for u in scores if scores[u] > 0), key=lambda u: -scores[u]
  )
  if not ranked:
    return {BURN_UID: 1.0}
  top = ranked[:CONTRIBUTORS]
  reserves = ranked[CONTRIBUTORS : CONTRIBUTORS + RESERVES]
  ramp = np.linspace(2.0, 1.0, len(top))
  top_pay = ramp / ramp.sum() * (1 - BURN) * 0.75
  halves = 0.5 ** np.arange(len(reserves))
  reserve_pay = halves / max(halves.sum(), 1e-12) * (1 - BURN) * 0.25
  if reserves and reserve_pay.max() > top_pay.min():
    reserve_pay *= 0.5 * top_pay.min() / reserve_pay.max()
  paid = dict(zip([*top, *reserves], [*top_pay, *reserve_pay], strict=True))
  paid.pop(BURN_UID, None)
  total = sum(paid.values())
  result = {u: float(x / total * (1 - BURN)) for u, x in paid.items()}
  return result | {BURN_UID: BURN if paid else 1.0}


def slash(peer: Peer, factor: float) -> Peer:
  """Final score and average of a peer above zero, multiplied."""
  if peer.final <= 0:
    return peer
  final = peer.final * factor
  return dataclasses.replace(
    peer,
    final=final if final >= 1e-4 else 0.0,
    average=peer.average * factor,
  )


def missing_factor(consecutive: int, success_rate: float) -> float:
  """Returns the factor of the `consecutive`-th miss in the gather, from 1.

  >>> [missing_factor(n, success_rate=0.4) for n in (1, 2, 3, 4)]
  [0.75, 0.5, 0.0, 0.0]
  >>> missing_factor(1, success_rate=0.39)
  0.0
  """
  if success_rate < 0.4:
    return 0.0
  return {1: 0.75, 2: 0.5}.get(consecutive, 0.0)


def mostly_missing(missed: Sequence[bool]) -> bool:
  """Half or more of the last 8 gathers, once there are 8: banned."""
  last = missed[-HISTORY:]
  return len(last) == HISTORY and 2 * sum(last) >= HISTORY


def spared(gradient_scores: Sequence[float]) -> bool:
  """Returns whether a round's 5th best score, or its last, is negative.

  Then negative evaluations of this round count against no peer.
  """
  ranked = sorted(gradient_scores, reverse=True)
  return bool(ranked) and ranked[min(4, len(ranked) - 1)] < 0


def negative_factor(negative: Sequence[bool]) -> float:
  """0.25 where more than half of the last 8 evaluations were negative."""
  last = negative[-HISTORY:]
  often = len(last) == HISTORY and 2 * sum(last) > HISTORY
  return 0.25 if often else 1.0


def excluded(negative: Sequence[bool]) -> bool:
  """Three negative evaluations in a row and no other since."""
  run, out = 0, False
  for bad in negative:
    run = run + 1 if bad else 0
    out = bad and (out or run >= 3)
  return out


def inactive(peer: Peer, rounds: int) -> Peer:
  """Returns a peer after the `rounds`-th round of inactivity, from 1."""
  if rounds > 3:
    return Peer()
  final = peer.final * 0.75 if peer.final > 0 else peer.final
  return dataclasses.replace(peer, final=final)


def overlap(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
  """Share of indices in common, vectors included, as deployed.

  Args:
    a: indices of each tensor of one peer, [chunks, k].
    b: of another peer.

  >>> index = np.array([[0, 1, 2, 3]])
  >>> overlap([index, index], [index, index + 2])
  0.75
  """
  shared = [
    np.mean([np.isin(x, y).mean() for x, y in zip(p, q, strict=True)])
    for p, q in zip(a, b, strict=True)
  ]
  return float(np.average(shared, weights=[p.size for p in a]))


def overlap_level(share: float) -> str:
  """'' below 0.4; 'high' halves, 'max' resets, 'mega' bans 20 rounds.

  >>> [overlap_level(x) for x in (0.39, 0.4, 0.5, 0.6)]
  ['', 'high', 'max', 'mega']
  """
  for least, level in ((0.6, 'mega'), (0.5, 'max'), (0.4, 'high')):
    if share >= least:
      return level
  return ''


def offender(
  first: int, second: int, uploaded: Mapping[int, float | None]
) -> int:
  """Returns the later of two similar peers; `first` in a tie.

  Args:
    first: the uid with the lower position in the list of peers.
    second: the other one.
    uploaded: time by uid; one that is missing counts as 0.
  """
  times = [uploaded.get(uid) or 0.0 for uid in (first, second)]
  return second if times[1] > times[0] else first
