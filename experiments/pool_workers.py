"""The workers of an emulated pool: honest ones, faulty ones, and cheaters."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from covenant import typing as ct
from covenant.chain import keys
from covenant.node import connect
from covenant.pool import pool as pool_lib
from covenant.pool import worker as worker_lib

_ECHO_NOISE = 0.3  # relative to the step
_SLOWEST, _FASTEST = 1.0, 8.0  # sequences per second


class Member(NamedTuple):
  """A worker of an emulated pool."""

  key: keys.Key
  kind: str  # a name in `KINDS`
  speed: float  # sequences per second


class Sent(NamedTuple):
  """The result of a lease."""

  data: bytes | None  # None: the worker crashed
  seconds: float  # duration, in units of that of honest work


class Scene(NamedTuple):
  """The objects that all workers of a pool share."""

  trainer: worker_lib.LeaseTrainer
  draw: np.random.Generator
  seen: dict[str, Any]  # memory of cheaters
  held: Callable[[str], int]  # worker -> its held pay, rao


@dataclasses.dataclass
class Worker:
  """A worker with its own count of leases."""

  member: Member
  scene: Scene
  leases: int = 0

  @property
  def name(self) -> str:
    """The address that it asks by; some use each key once."""
    address = self.member.key.address
    if self.member.kind in NAMELESS:
      return f'{address}/{self.leases}'
    return address

  def work(self, params: ct.Params, job: pool_lib.Job) -> Sent:
    """Does a lease in the way of the worker's kind."""
    self.leases += 1
    return KINDS[self.member.kind](self, params, job)

  def train(self, params: ct.Params, job: pool_lib.Job) -> ct.Message:
    message, _ = self.scene.trainer.train(params, job)
    return message

  def send(
    self, job: pool_lib.Job, message: ct.Message, seconds: float = 1.0
  ) -> Sent:
    sign = self.member.key.sign
    return Sent(self.scene.trainer.encode(job, message, sign), seconds)


Kind: TypeAlias = Callable[[Worker, ct.Params, pool_lib.Job], Sent]


def _honest(worker: Worker, params: ct.Params, job: pool_lib.Job) -> Sent:
  """Trains as the lease says."""
  return worker.send(job, worker.train(params, job))


def _crashes(worker: Worker, params: ct.Params, job: pool_lib.Job) -> Sent:
  """Loses every second lease."""
  if worker.leases % 2:
    return Sent(None, 50.0)
  return _honest(worker, params, job)


def _late(worker: Worker, params: ct.Params, job: pool_lib.Job) -> Sent:
  """Returns everything ten times too late."""
  return _honest(worker, params, job)._replace(seconds=10.0)


def _malformed(worker: Worker, params: ct.Params, job: pool_lib.Job) -> Sent:
  """Changes a byte of its honest payload."""
  data = bytearray(_honest(worker, params, job).data or b'')
  data[len(data) // 2] ^= 0xFF
  return Sent(bytes(data), 1.0)


def _noise(worker: Worker, params: ct.Params, job: pool_lib.Job) -> Sent:
  """Sends random codes at honest indices, with honest scales."""

  def random(codes: Any) -> Any:
    return worker.scene.draw.integers(0, 4, codes.shape, np.uint8)

  return worker.send(job, _changed(worker.train(params, job), 'codes', random))


def _flipped(worker: Worker, params: ct.Params, job: pool_lib.Job) -> Sent:
  """Flips the sign of every value."""
  message = worker.train(params, job)
  return worker.send(job, _changed(message, 'codes', lambda codes: codes ^ 1))


def _scaled(worker: Worker, params: ct.Params, job: pool_lib.Job) -> Sent:
  """Scales every value by 20."""
  return worker.send(job, _times(worker.train(params, job), 20.0))


def _zeros(worker: Worker, params: ct.Params, job: pool_lib.Job) -> Sent:
  """Scales every value by 0."""
  return worker.send(job, _times(worker.train(params, job), 0.0))


def _lazy(worker: Worker, params: ct.Params, job: pool_lib.Job) -> Sent:
  """Trains one step of each lease and scales it as if it were all steps."""
  first = job._replace(steps=1, tokens_NxL1=job.tokens_NxL1[: job.batch])
  message = _times(worker.train(params, first), float(job.steps))
  return worker.send(job, message, 1 / job.steps)


def _copier(worker: Worker, params: ct.Params, job: pool_lib.Job) -> Sent:
  """Sends what one of its kind trained on other data, once per round."""
  kept = worker.scene.seen.get('copy')
  if kept is None or kept[0] != job.round:
    other = job._replace(tokens_NxL1=job.tokens_NxL1[::-1])
    kept = job.round, worker.train(params, other)
    worker.scene.seen['copy'] = kept
  return worker.send(job, kept[1], 0.5)


def _stale(worker: Worker, params: ct.Params, job: pool_lib.Job) -> Sent:
  """Trains from the first parameters that its kind ever got."""
  old = worker.scene.seen.setdefault('stale', params)
  return worker.send(job, worker.train(old, job))


def _squatter(worker: Worker, params: ct.Params, job: pool_lib.Job) -> Sent:
  """Takes leases and returns nothing."""
  return Sent(None, 1.0)


def _echo(worker: Worker, params: ct.Params, job: pool_lib.Job) -> Sent:
  """Sends the pool's own last step and some noise, once it has seen one."""
  seen, who = worker.scene.seen, worker.member.key.address
  old, new = seen.get(who, (None, (b'', None)))
  if new[0] != job.base:
    old, new = new, (job.base, params)
    seen[who] = old, new
  if old is None or old[1] is None:
    return _honest(worker, params, job)

  def noisy(start: ct.Array, end: ct.Array) -> Any:
    spread = _ECHO_NOISE * np.std(np.asarray(start) - np.asarray(end))
    noise = worker.scene.draw.normal(0.0, spread, np.shape(end))
    return np.asarray(end) + noise.astype(np.float32)

  end = jax.tree.map(noisy, old[1], new[1])
  return worker.send(job, worker.scene.trainer.compress(old[1], end), 0.01)


def _timed_echo(worker: Worker, params: ct.Params, job: pool_lib.Job) -> Sent:
  """Echoes while nothing is held that it could lose."""
  held = worker.scene.held(worker.member.key.address)
  return (_honest if held else _echo)(worker, params, job)


def _changed(
  message: ct.Message, part: str, change: Callable[[Any], Any]
) -> ct.Message:
  """Changes the arrays of that name in all compressed tensors."""

  def leaf(path: Any, x: Any) -> Any:
    return change(x) if getattr(path[-1], 'name', '') == part else x

  return jax.tree_util.tree_map_with_path(leaf, message)


def _times(message: ct.Message, factor: float) -> ct.Message:
  """Scales all values of a message."""

  def scales(x: Any) -> Any:
    y = np.array(x)
    # The first two scales are levels, which multiply the others.
    y[:2] = (y[:2].astype(np.float32) * factor).astype(y.dtype)
    return y

  return _changed(message, 'scales', scales)


KINDS: Mapping[str, Kind] = {
  'honest': _honest,
  'noise': _noise,
  'copier': _copier,
  'lazy': _lazy,
  'zeros': _zeros,
  'stale': _stale,
  'scaled': _scaled,
  'flipped': _flipped,
  'malformed': _malformed,
  'crashes': _crashes,
  'late': _late,
  'squatter': _squatter,
  'squatter with new keys': _squatter,
  'echo': _echo,
  'timed echo': _timed_echo,
}
NAMELESS = ('squatter with new keys',)
# In experiments/chaos/pools.py only; the study of pools was made without them.
ATTACKS = ('squatter', *NAMELESS, 'echo', 'timed echo')
FAULTY = ('crashes', 'late')  # harmless, paid for all leases that count
CHEATS = tuple(k for k in KINDS if k not in ('honest', *FAULTY, *ATTACKS))


def members(count: int, bad: float, seed: int) -> list[Member]:
  """Returns workers whose speeds spread 8:1; a share is bad, in all kinds."""
  draw = np.random.default_rng(seed)
  chosen = draw.permutation(count)[: round(bad * count)]
  kinds = [*CHEATS, *FAULTY]
  kind = {int(i): kinds[n % len(kinds)] for n, i in enumerate(chosen)}
  spread = np.linspace(0, math.log(_FASTEST / _SLOWEST), count)
  speeds_W = _SLOWEST * np.exp(draw.permutation(spread))
  return [
    Member(
      connect.local_key(seed, f'worker-{i}'),
      kind.get(i, 'honest'),
      float(speeds_W[i]),
    )
    for i in range(count)
  ]
