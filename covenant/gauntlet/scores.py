"""The effect of a peer's update on the loss, on its own data and on other data.

An update is measured in the company of all others: a fraction of the step that
the round took has been made, and a message is applied at the same fraction of
the outer learning rate. What others have sent as well gains less then.

A score is a function of (parameters, message, sequences) alone: validators
with the same inputs get the same numbers, bit for bit. Every difference is
paired: it compares a sequence before and after, so that its difficulty cancels.
"""

import dataclasses
import hashlib
import types
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from covenant import config as config_lib
from covenant import errors
from covenant import typing as ct
from covenant.data import assignment
from covenant.data import tokens as tokens_lib
from covenant.gauntlet import units
from covenant.models import evaluation
from covenant.models import sharding
from covenant.optim import algorithm as algorithm_lib
from covenant.optim import reduce
from covenant.optim import sharded_leaf
from covenant.optim import trial_step
from covenant.optim import weight as weight_lib

_WHOLE = weight_lib.Weight()
_EQUAL: Mapping[int, weight_lib.Weight] = types.MappingProxyType({})


class NotFiniteError(errors.CovenantError, ValueError):
  """The loss of the shared parameters is not finite."""


@dataclasses.dataclass(frozen=True)
class Score:
  """The score of one peer's message in one round, in nats per token.

  The gain of a sequence is its loss before minus its loss after the peer's
  update. Each error is a standard error.
  """

  loss_random: float  # before the update, on data that no peer was assigned
  loss_own: float  # before the update, on data that the peer was assigned
  gain: float  # mean on random data
  gain_error: float
  own_gain: float  # mean on own data
  own_gain_error: float
  # Own minus random data, each the mean of the half of all units that gains
  # less: one that trained on half of them gains little on the other half.
  proof: float
  proof_error: float
  # Own minus random data by stretch of positions, from the first on.
  parts: tuple[float, ...] = (0.0,) * units.PARTS
  noise: float = 0.0  # standard deviation of a unit of random data
  # Own minus random data: the mean over the units, and that of their squares
  # over the noise. For one mean, the fewer units gain, the larger the square.
  level: float = 0.0
  square: float = 0.0
  work: float = 1.0  # see the function of this name


class HostMemory(Protocol):
  """Moves arrays from the memory of a host, if they are there."""

  def load(self, tree: ct.PyTree) -> ct.PyTree: ...


class Placement(Protocol):
  """The devices of a node (covenant/train/placement.py), as a scorer sees them.

  Attributes:
    mesh: all devices; None is one.
    host: the memory of their host.
  """

  @property
  def mesh(self) -> jax.sharding.Mesh | None: ...

  @property
  def host(self) -> HostMemory: ...

  def replicate(self, tree: ct.PyTree) -> ct.PyTree: ...


@dataclasses.dataclass
class RoundBaseline:
  """The data that all evaluations of one round share; see `Scorer.open`."""

  # After a fraction of the round's step; changed in place, and taken back.
  params: ct.Params
  median_P: ct.Array  # median norm of each tensor; inf: nothing is clipped
  median_size: float  # training data of the median peer, see `weight.Weight`
  random_NxL1: np.ndarray
  before_NxS: ct.Array  # losses of params on parts of the random sequences


class Scorer:
  """Evaluates messages; compiled once for a run, holds no state.

  Cost, in forward passes over one sequence, with n = gauntlet.sequences:
  n per round and 3 n per evaluated peer. A miner's training is about
  3 * inner_steps * batch_size of them. Memory beside the shared parameters: one
  copy of them, and the values that one message touches (trial_step.py).

  Args:
    config: the config of the run.
    method: the training method of the run.
    abstract_params: the shapes of the parameters.
    placement: the devices of the node, which share the sequences and hold the
      parameters; None is one device.
    budget: elements of a slice on a device, see `trial_step.TrialStep`.
  """

  def __init__(
    self,
    config: config_lib.Config,
    method: algorithm_lib.Algorithm,
    abstract_params: ct.Params,
    placement: Placement | None = None,
    budget: int = sharded_leaf.BUDGET,
  ):
    self._method = method
    self._abstract_params = abstract_params
    self._placement = placement
    mesh = None if placement is None else placement.mesh
    # A step of plain SGD: the momentum belongs to the run, not to the peer.
    self._fraction = config.gauntlet.step_fraction
    self.losses = evaluation.SequenceLosses(config, mesh, units.PARTS)
    self.trial = trial_step.TrialStep(
      abstract_params,
      method.compression,
      self._fraction * config.optim.outer.learning_rate,
      mesh,
      None if mesh is None else sharding.specs(abstract_params, mesh),
      budget,
    )

  def open(
    self,
    before: ct.Params,
    after: ct.Params,
    messages: Mapping[int, ct.Message],
    random_NxL1: np.ndarray,
    weights: Mapping[int, weight_lib.Weight] = _EQUAL,
    consume: bool = False,
  ) -> RoundBaseline:
    """Starts the evaluations of a round.

    Args:
      before: the shared parameters before the outer step.
      after: those after it.
      messages: the messages of the manifest, by uid. An evaluated message is
        clipped to the median of their norms, as in the outer step. Empty:
        nothing is clipped.
      random_NxL1: the sequences `random_ids`, int32.
      weights: the weights of the messages, by uid; the default is whole.
      consume: True if `before` is not needed any more, so that it can be
        changed in place.

    Raises:
      NotFiniteError: the loss between them is not finite: nothing can be
        compared.
    """
    tensors = len(jax.tree.leaves(self._abstract_params))
    median_P = np.full((tensors,), np.inf, np.float32)
    median_size = 1.0
    if messages and self._method.clip != 'none':
      norms_RxP = np.stack([self.trial.norms(m) for m in messages.values()])
      median_P = reduce.lower_median(norms_RxP)
      weighed = [weights.get(uid, weight_lib.Weight()) for uid in messages]
      _, sizes_R = weight_lib.columns(weighed)
      median_size = float(reduce.lower_median(sizes_R))
    params = self._between(before, after, consume)
    before_NxS = self.losses(params, random_NxL1)
    if not np.isfinite(before_NxS).all():
      raise NotFiniteError(
        'the shared parameters have a loss that is not finite; the run has '
        'diverged: go back to a checkpoint and lower the learning rates'
      )
    return RoundBaseline(params, median_P, median_size, random_NxL1, before_NxS)

  def score(
    self,
    shared: RoundBaseline,
    message: ct.Message,
    own_NxL1: np.ndarray,
    weight: weight_lib.Weight = _WHOLE,
  ) -> Score:
    """Scores one peer's message on its sequences `own_ids`.

    The weight of the message limits its norm, but does not scale this step.
    """
    reach = reduce.reach(np.float32(weight.size), shared.median_size)
    limits_P = np.asarray(reach * shared.median_P, np.float32)
    factors_P = reduce.limit_factors(self.trial.norms(message), limits_P)
    before_own_NxS = self.losses(shared.params, own_NxL1)
    params, touched = self.trial.apply(shared.params, message, factors_P)
    after_own_NxS = self.losses(params, own_NxL1)
    after_NxS = self.losses(params, shared.random_NxL1)
    shared.params = self.trial.undo(params, message, touched)
    before_NxS = np.asarray(shared.before_NxS, np.float64)
    gain_NxS = units.gains(before_NxS, after_NxS)
    own_gain_NxS = units.gains(before_own_NxS, after_own_NxS)
    gain, gain_error = units.mean(gain_NxS.mean(1))
    own_gain, own_gain_error = units.mean(own_gain_NxS.mean(1))
    # Later tokens gain less; relative to the usual, no part is the worse one.
    usual_S = gain_NxS.mean(0)
    gain_NxQ, own_gain_NxQ = map(
      units.split, (gain_NxS - usual_S, own_gain_NxS - usual_S)
    )
    worse, worse_error = units.worse_half(gain_NxQ)
    worse_own, worse_own_error = units.worse_half(own_gain_NxQ)
    noise = float(gain_NxQ.std())
    level, square = units.moments(gain_NxQ, noise)
    own_level, own_square = units.moments(own_gain_NxQ, noise)
    return Score(
      loss_random=float(before_NxS.mean()),
      loss_own=float(np.asarray(before_own_NxS, np.float64).mean()),
      gain=gain,
      gain_error=gain_error,
      own_gain=own_gain,
      own_gain_error=own_gain_error,
      proof=worse_own - worse,
      proof_error=float(np.hypot(worse_error, worse_own_error)),
      parts=tuple(map(float, own_gain_NxS.mean(0) - usual_S)),
      noise=noise,
      level=own_level - level,
      square=own_square - square,
    )

  def loss(self, params: ct.Params, tokens_NxL1: np.ndarray) -> float:
    """Returns the mean loss of parameters, nats per token."""
    here = self._between(params, params, consume=False)
    return float(np.mean(np.asarray(self.losses(here, tokens_NxL1))))

  def _between(
    self, before: ct.Params, after: ct.Params, consume: bool
  ) -> ct.Params:
    """Returns parameters of their own, after a fraction of the step."""
    place, offloaded = self._placement, sharding.is_on_host(before)
    between = _between_in_place if consume or offloaded else _between
    if place is None or (place.mesh is None and not offloaded):
      return between(before, after, self._fraction)
    load = place.host.load
    # Leaf by leaf, so that a copy of no more than one comes from the host.
    params = jax.tree.map(
      lambda b, a: between(load(b), load(a), self._fraction), before, after
    )
    return place.replicate(params)


def own_ids(
  config: config_lib.Config,
  uid: int,
  round_index: int,
  num_sequences: assignment.Sequences,
  assigned_by: int | bytes,
  seed: bytes,
  claimed: int | None = None,
) -> np.ndarray:
  """Draws the assigned sequences on which to evaluate a peer.

  Args:
    config: the config of the run, whose sizes determine the assignment.
    uid: the peer.
    round_index: the round.
    num_sequences: the training sequences of the round, as for
      `assignment.assign`.
    assigned_by: the seed of the round's assignment.
    seed: unknown while the peer trained, such as a later block's hash.
    claimed: the number of sequences that the peer declares, the first ones of
      the assignment; None: all. A peer that trained on fewer has not seen all
      of the drawn ones.

  Returns:
    int64 [n], all different, n = gauntlet.sequences or all if fewer.
  """
  assigned = assignment.assign(
    assigned_by,
    uid,
    round_index,
    assignment.per_miner(config),
    num_sequences,
  )
  count = min(config.gauntlet.sequences, assigned.size)
  if claimed is not None:
    # Always as many as are drawn: another shape would compile another program.
    assigned = assigned[: max(claimed, count)]
  draw = _generator(seed, 'own', round_index, uid)
  return assigned[np.sort(draw.permutation(assigned.size)[:count])]


def random_ids(
  config: config_lib.Config,
  uids: int,
  round_index: int,
  num_sequences: assignment.Sequences,
  assigned_by: int | bytes,
  seed: bytes,
) -> np.ndarray:
  """Draws training sequences that no peer was assigned in this round.

  Args:
    config: the config of the run.
    uids: an upper bound of all registered uids, plus 1.
    round_index: the round.
    num_sequences: the training sequences of the round, as for
      `assignment.assign`.
    assigned_by: the seed of the round's assignment.
    seed: unknown while the peers trained.

  Returns:
    int64 [n], all different, n as in `own_ids`.

  Raises:
    ValueError: fewer than n sequences are left over.
  """
  each = assignment.per_miner(config)
  taken = uids * each
  count = min(config.gauntlet.sequences, each)
  most = assignment.capacity(assigned_by, round_index, num_sequences)
  if most - taken < count:
    raise ValueError(
      f'gauntlet.sequences: expected {count} training sequences beyond the '
      f'{taken} of {uids} miners; there are {most} in all. Bring '
      'more data, or lower the batch size, the inner steps or the context'
    )
  draw = _generator(seed, 'random', round_index)
  chosen = set()
  while len(chosen) < count:
    chosen.add(int(draw.integers(taken, most)))
  # With a count of 1, uid u is assigned exactly position u.
  ids = [
    assignment.assign(assigned_by, position, round_index, 1, num_sequences)
    for position in sorted(chosen)
  ]
  return np.concatenate(ids)


def seats(config: config_lib.Config, split: tokens_lib.Split) -> int:
  """Returns the number of uids for which there is training data, from uid 0.

  What is left over is enough to draw `random_ids` from. Validators do not look
  at uids from this one on, however many are registered.
  """
  each = assignment.per_miner(config)
  count = min(config.gauntlet.sequences, each)
  most = assignment.least_capacity(split, config.data.context)
  return max((most - count) // each, 0)


def work(config: config_lib.Config, claimed: int) -> float:
  """Returns the declared number of sequences, relative to the usual one.

  The usual work is inner_steps * batch_size sequences.
  """
  optim = config.optim
  return claimed / (optim.inner_steps * optim.inner.batch_size)


def _generator(seed: bytes, *what: str | int) -> np.random.Generator:
  text = '/'.join(map(str, what)).encode()
  key = hashlib.blake2b(seed, digest_size=16, key=text).digest()
  return np.random.Generator(np.random.Philox(int.from_bytes(key, 'little')))


def _step_between(before: ct.Params, after: ct.Params, part: float) -> Any:
  return jax.tree.map(lambda a, b: a + part * (b - a), before, after)


_between = jax.jit(_step_between)
_between_in_place = jax.jit(_step_between, donate_argnames=('before',))
