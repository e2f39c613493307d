"""The deltas of a pool's workers: their form, verification and merging.

A worker has no state that outlives a lease: its optimizer begins anew, and
what compression leaves out is lost, not fed back. So a delta is a function of
the pool's parameters and of the lease alone, anybody can compute it again, and
workers come and go. That is bought with bandwidth: a quarter of all elements
travel, with two bits each, where a pool's own payload has one in 64.

All deltas of a sub-round start from the same parameters. Beside the network's
checks (covenant/gauntlet/checks.py: form, receipt, norms, copies) a pool
therefore has two of its own:

- Each delta is compared with the mean of the others. Honest deltas agree far
  more than chance, noise does not, and a flipped delta disagrees. This needs no
  forward pass.
- Some leases, drawn at random after their return, are recomputed. On equal
  hardware the delta must be equal, on other hardware nearly so. The cost is
  that of the lease.
"""

import enum
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from covenant import config as config_lib
from covenant import typing as ct
from covenant.gauntlet import checks
from covenant.gauntlet import similarity
from covenant.optim import compression as compression_lib
from covenant.optim import exact
from covenant.optim import outer_step
from covenant.optim import quantize
from covenant.optim import reduce
from covenant.optim import sparseloco
from covenant.optim import weight
from covenant.pool import leases as leases_lib
from covenant.wire import payload

_SENT = 4  # elements per transmitted one
# Largest ratio of a norm to the median, or the inverse; tighter than in the
# network, where newcomers have no error feedback yet.
_NORMS = 4.0
_SAMPLE = 1 << 16  # sampled elements per delta
_FEW = 3  # fewest other deltas for a verdict on direction
_LEAST_AGREEMENT = 0.02  # smallest median agreement for a verdict
_APART = 0.25  # smallest agreement relative to the median
_COPY = 0.6  # similarity above the usual level
# Largest distance to a recomputed delta, relative to its norm. Between the
# effect of bfloat16 (0.26) and that of one omitted step of four (0.42).
TOLERANCE = 0.3


def compression(config: config_lib.Config) -> compression_lib.TopK:
  """Returns the compressor of a worker's delta."""
  height, width = config.optim.compression.block
  return compression_lib.TopK(
    k=max(height * width // _SENT, 1),
    block=(height, width),
    quantizer=quantize.SignMagnitude(),
  )


def spec(config: config_lib.Config, abstract_params: ct.Params) -> payload.Spec:
  """Returns the layout of the payloads inside a pool."""
  return payload.make_spec(abstract_params, compression(config))


class Merger:
  """Merges deltas into parameters; compiled once for a run, holds no state."""

  def __init__(self, config: config_lib.Config, abstract_params: ct.Params):
    self._outer = reduce.nesterov(1.0)
    self._step = outer_step.OuterStep(
      abstract_params,
      compression(config),
      self._outer,
      mean_over='all',
    )

  def norms(self, message: ct.Message) -> np.ndarray:
    """Returns the L2 norm of each tensor of a message: float32 [P]."""
    return self._step.norms([message])[0]

  def merge(
    self,
    params: ct.Params,
    messages: Sequence[ct.Message],
    sequences: Sequence[int],
    scale: float = 1.0,
  ) -> ct.Params:
    """Returns the parameters moved by the mean delta, weighted by sequences.

    Each tensor of a message is clipped to the (lower) median norm, as in the
    outer step of the network.

    Args:
      params: the parameters at which all deltas begin.
      messages: one per lease, in the order of their sequences: whoever merges
        the same gets the same bits.
      sequences: the number that each was trained on.
      scale: a factor of the mean.
    """
    if not messages:
      return params
    weights_R = np.asarray(sequences, np.float32) / np.float32(sum(sequences))
    weights_R *= np.float32(scale)
    clip_RxP = reduce.clip_factors(self._step.norms(messages))
    factors_RxP = exact.product(clip_RxP, weights_R[:, None])
    whole_R = np.full(len(messages), weight.WHOLE, np.uint16)
    # The factors hold the weights, so the divisor is that of one message.
    return self._step.apply_sum(
      params,
      self._outer.init(params),
      messages,
      factors_RxP,
      whole_R,
      weight.totals(whole_R[:1]),
    ).params


class LeaseVerdict(enum.Enum):
  """The verdict on a lease; a closed list with texts for people."""

  VALID = 'valid'
  STALE = 'too late: the lease was given to another, or its sub-round is over'
  LOST = 'the lease did not come back'
  REFUSED = 'the payload was refused'
  RECEIPT = 'trained on other data than was leased'
  TINY = 'the delta holds next to nothing'
  HUGE = 'the delta is absurdly large'
  COPY = 'the delta copies another'
  APART = 'the delta has nothing to do with those of others'
  FALSE = 'the lease, computed again, leads elsewhere'


class Delta(NamedTuple):
  """A delivered delta of a lease."""

  lease: leases_lib.Lease
  message: ct.Message  # of NumPy arrays
  loss: float  # as reported by the worker, nats per token
  at: float  # arrival, seconds


class Inspector:
  """The compiled checks of a run, without state."""

  def __init__(
    self, config: config_lib.Config, abstract_params: ct.Params, merger: Merger
  ):
    self._merger = merger
    self._sizes = [
      int(np.prod(x.shape)) for x in jax.tree.leaves(abstract_params)
    ]
    topk = compression(config)

    def sample(message: ct.Message, places: list[jax.Array]) -> jax.Array:
      dense = sparseloco.decompress(message, abstract_params, topk)
      leaves = [x.reshape(-1) for x in jax.tree.leaves(dense)]
      picked = [x[i] for x, i in zip(leaves, places, strict=True)]
      return jnp.concatenate(picked)

    def distance(one: ct.Message, two: ct.Message) -> jax.Array:
      a = sparseloco.decompress(one, abstract_params, topk)
      b = sparseloco.decompress(two, abstract_params, topk)
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
  ) -> dict[int, LeaseVerdict]:
    """Returns the verdicts on the deltas of a sub-round, by lease number."""
    norms = {
      d.lease.number: float(np.linalg.norm(self._merger.norms(d.message)))
      for d in deltas
    }
    verdicts = dict.fromkeys(norms, LeaseVerdict.VALID)
    for number, found in checks.judge_norms(norms).items():
      relative = found.relative_norm
      if not found.valid:
        verdicts[number] = LeaseVerdict[found.finding.name]
      elif relative is not None and relative > _NORMS:
        verdicts[number] = LeaseVerdict.HUGE
      elif relative is not None and relative < 1 / _NORMS:
        verdicts[number] = LeaseVerdict.TINY
    deltas = [
      d for d in deltas if verdicts[d.lease.number] is LeaseVerdict.VALID
    ]
    if not deltas:
      return verdicts
    places = self._places(draw)
    unit_NxM = np.stack(
      [np.asarray(self._sample(d.message, places)) for d in deltas]
    ).astype(np.float64)
    unit_NxM /= np.maximum(np.linalg.norm(unit_NxM, axis=1), 1e-30)[:, None]
    alike_NxN = unit_NxM @ unit_NxM.T
    verdicts |= _apart(deltas, alike_NxN, verdicts)
    # The usual similarity is taken over deltas that agree.
    valid_n = [
      n
      for n, d in enumerate(deltas)
      if verdicts[d.lease.number] is LeaseVerdict.VALID
    ]
    alike_nxn = alike_NxN[np.ix_(valid_n, valid_n)]
    return verdicts | _copies([deltas[n] for n in valid_n], alike_nxn)

  def agrees(self, message: ct.Message, again: ct.Message) -> bool:
    """Returns True if a delta matches its recomputation."""
    apart, norm = map(float, self._distance(message, again))
    return apart <= TOLERANCE * norm

  def _places(self, draw: np.random.Generator) -> list[np.ndarray]:
    """Draws the sampled indices of each tensor."""
    share = min(_SAMPLE / sum(self._sizes), 1.0)
    return [
      draw.integers(0, size, max(round(share * size), 1)).astype(np.int32)
      for size in self._sizes
    ]


def _copies(
  deltas: Sequence[Delta], alike_NxN: np.ndarray
) -> dict[int, LeaseVerdict]:
  """Returns a verdict on the later one of each similar pair."""
  others_NxN = ~np.eye(len(deltas), dtype=bool)
  similarity_NxN = similarity.similarities(alike_NxN, others_NxN)
  found = {}
  for row, column in zip(*np.nonzero(similarity_NxN >= _COPY), strict=True):
    late = max(deltas[row], deltas[column], key=lambda d: (d.at, d.lease))
    found[late.lease.number] = LeaseVerdict.COPY
  return found


def _apart(
  deltas: Sequence[Delta],
  alike_NxN: np.ndarray,
  verdicts: dict[int, LeaseVerdict],
) -> dict[int, LeaseVerdict]:
  """Finds deltas that agree with the mean of the others too little.

  Runs twice; the second mean excludes those found first.
  """
  found: dict[int, LeaseVerdict] = {}
  workers_N = np.array([d.lease.worker for d in deltas])
  weights_N = np.array([float(d.lease.sequences) for d in deltas])
  for _ in range(2):
    verdicts = verdicts | found
    valid_N = np.array(
      [verdicts[d.lease.number] is LeaseVerdict.VALID for d in deltas]
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
        found[delta.lease.number] = LeaseVerdict.APART
  return found
