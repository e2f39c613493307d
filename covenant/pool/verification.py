"""Which deltas of a sub-round are merged: a pool does not trust its workers.

All deltas of a sub-round begin at the same parameters, on data drawn alike,
and a lease decides what its delta must be. So beside the checks of the network
(covenant/gauntlet/checks.py: form, receipt, norms, copies) a pool has two that
the network cannot have:

- each delta is held against the mean of the others'. Honest ones point the
  same way by far more than chance; noise does not, and a flipped one points
  the other way. This takes no forward pass.
- a few leases, drawn at random after they are back, are computed again. On
  equal hardware the delta must be the same, on other hardware nearly so. It
  costs what the lease cost, about as much as the network's evaluation, and
  proves what that only makes likely.
"""

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from covenant import config as config_lib
from covenant.gauntlet import checks
from covenant.gauntlet import similarity
from covenant.optim import sparseloco
from covenant.pool import leases as leases_lib
from covenant.pool import merge as merge_lib

# Of a delta's norm to the median, or the inverse. Nobody here is a newcomer
# without error feedback, so it is held closer than in the network.
_NORMS = 4.0
_SAMPLE = 1 << 16  # elements of a delta that are compared with other deltas
_FEW = 3  # deltas of others without which nothing is said of one's direction
_LEAST_AGREEMENT = 0.02  # of the median: below, nobody knows where to go
_APART = 0.25  # of the median's agreement: less is not of this lease
_COPY = 0.6  # similarity beyond what is usual
# Of a delta computed again, relative to its norm. Measured on Shakespeare,
# four steps: on the same machine 0; with bfloat16 in place of float32, more
# than other hardware does, 0.16 to 0.26; the last step left out 0.42; half of
# the steps 0.70; other data 1.2.
TOLERANCE = 0.3


class Verdict(enum.Enum):
  """A closed list; the value is for people."""

  VALID = 'valid'
  STALE = 'too late: the lease was given to another, or its sub-round is over'
  REFUSED = 'the payload was refused'
  RECEIPT = 'trained on other data than was leased'
  TINY = 'the delta holds next to nothing'
  HUGE = 'the delta is absurdly large'
  COPY = 'the delta copies another'
  APART = 'the delta has nothing to do with those of others'
  FALSE = 'the lease, computed again, leads elsewhere'


class Delta(NamedTuple):
  """What came of a lease."""

  lease: leases_lib.Lease
  message: Any  # of NumPy arrays
  loss: float  # as the worker says, nats a token
  at: float  # seconds, when it came


class Inspector:
  """Compiled once for a run; holds no state."""

  def __init__(
    self, config: config_lib.Config, like: Any, merger: merge_lib.Merger
  ):
    self._merger = merger
    self._sizes = [int(np.prod(x.shape)) for x in jax.tree.leaves(like)]
    compression = merge_lib.compression(config)

    def sample(message: Any, places: list[jax.Array]) -> jax.Array:
      dense = sparseloco.decompress(message, like, compression)
      leaves = [x.reshape(-1) for x in jax.tree.leaves(dense)]
      picked = [x[i] for x, i in zip(leaves, places, strict=True)]
      return jnp.concatenate(picked)

    def distance(one: Any, two: Any) -> jax.Array:
      a = sparseloco.decompress(one, like, compression)
      b = sparseloco.decompress(two, like, compression)
      leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
      sums_2 = sum(
        (jnp.stack([jnp.sum((x - y) ** 2), jnp.sum(y * y)]) for x, y in leaves),
        jnp.zeros(2),
      )
      return jnp.sqrt(sums_2)

    self._sample = jax.jit(sample)
    self._distance = jax.jit(distance)

  def inspect(
    self, deltas: Sequence[Delta], draw: np.random.Generator
  ) -> dict[int, Verdict]:
    """The verdicts on the deltas of a sub-round, by number of the lease."""
    norms = {
      d.lease.number: float(np.linalg.norm(self._merger.norms(d.message)))
      for d in deltas
    }
    verdicts = dict.fromkeys(norms, Verdict.VALID)
    for number, found in checks.judge_norms(norms).items():
      relative = found['relative_norm']
      if 'verdict' in found:
        verdicts[number] = Verdict[found['verdict'].name]
      elif relative is not None and relative > _NORMS:
        verdicts[number] = Verdict.HUGE
      elif relative is not None and relative < 1 / _NORMS:
        verdicts[number] = Verdict.TINY
    deltas = [d for d in deltas if verdicts[d.lease.number] is Verdict.VALID]
    if not deltas:
      return verdicts
    places = self._places(draw)
    unit_NxM = np.stack(
      [np.asarray(self._sample(d.message, places)) for d in deltas]
    ).astype(np.float64)
    unit_NxM /= np.maximum(np.linalg.norm(unit_NxM, axis=1), 1e-30)[:, None]
    alike_NxN = unit_NxM @ unit_NxM.T
    verdicts |= _apart(deltas, alike_NxN, verdicts)
    # What is usual among the honest, noise does not say.
    valid_n = [
      n
      for n, d in enumerate(deltas)
      if verdicts[d.lease.number] is Verdict.VALID
    ]
    alike_nxn = alike_NxN[np.ix_(valid_n, valid_n)]
    return verdicts | _copies([deltas[n] for n in valid_n], alike_nxn)

  def agrees(self, message: Any, again: Any) -> bool:
    """Whether a delta is what its lease leads to."""
    apart, norm = map(float, self._distance(message, again))
    return apart <= TOLERANCE * norm

  def _places(self, draw: np.random.Generator) -> list[np.ndarray]:
    """Which elements of each tensor are compared: fewer of large models."""
    share = min(_SAMPLE / sum(self._sizes), 1.0)
    return [
      draw.integers(0, size, max(round(share * size), 1)).astype(np.int32)
      for size in self._sizes
    ]


def _copies(
  deltas: Sequence[Delta], alike_NxN: np.ndarray
) -> dict[int, Verdict]:
  """Of two that are alike the one that came later."""
  others_NxN = ~np.eye(len(deltas), dtype=bool)
  similarity_NxN = similarity.similarities(alike_NxN, others_NxN)
  found = {}
  for row, column in zip(*np.nonzero(similarity_NxN >= _COPY), strict=True):
    late = max(deltas[row], deltas[column], key=lambda d: (d.at, d.lease))
    found[late.lease.number] = Verdict.COPY
  return found


def _apart(
  deltas: Sequence[Delta],
  alike_NxN: np.ndarray,
  verdicts: dict[int, Verdict],
) -> dict[int, Verdict]:
  """Who agrees with the mean of the others' by far less than the median.

  Twice: those found first do not count for the mean of the second time.
  """
  found: dict[int, Verdict] = {}
  workers_N = np.array([d.lease.worker for d in deltas])
  weights_N = np.array([float(d.lease.sequences) for d in deltas])
  for _ in range(2):
    verdicts = verdicts | found
    valid_N = np.array(
      [verdicts[d.lease.number] is Verdict.VALID for d in deltas]
    )
    agreement_N = np.full(len(deltas), np.nan)
    for row, worker in enumerate(workers_N):
      others_N = np.where(valid_N & (workers_N != worker), weights_N, 0.0)
      if np.count_nonzero(others_N) >= _FEW:
        norm = np.sqrt(others_N @ alike_NxN @ others_N)
        agreement_N[row] = alike_NxN[row] @ others_N / max(norm, 1e-30)
    known_N = valid_N & ~np.isnan(agreement_N)
    if not known_N.any():
      return found
    median = float(np.median(agreement_N[known_N]))
    if median < _LEAST_AGREEMENT:
      return found
    for delta, agreement, known in zip(
      deltas, agreement_N, known_N, strict=True
    ):
      if known and agreement < _APART * median:
        found[delta.lease.number] = Verdict.APART
  return found
