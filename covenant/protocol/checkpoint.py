"""Checkpoints: everything that makes a resumed run the uninterrupted one.

Orbax writes them in the background, each complete or not there at all, and
keeps the newest few. Arrays are written and read shard by shard, so a run may
go on with another mesh than it was saved on.

What `save_tree` was given may be donated as soon as it returns. By then Orbax
has what is on an accelerator on the host, and holds the rest: views of what is
in host memory, with which JAX copies instead of donating, or leaves it alone.
"""

import math
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

# v1 has an option of this type, but not the type.
from orbax.checkpoint._src.serialization import types as orbax_types

from covenant import config as config_lib
from covenant import errors
from covenant.train import local as local_lib
from covenant.train import shared_state as shared_state_lib

# Bytes that are read or written at the same time, beside what is in memory
# anyway; more where a single tensor (of what is read) or shard (of what is
# written) has more.
_IN_FLIGHT = 2 << 30
# What is read to have a part of it: small, as other meshes cut otherwise.
_CHUNK = 64 << 20
_HOST = 'pinned_host'


class CheckpointError(errors.CovenantError, OSError):
  """The disk did not take a checkpoint. Those before it are still there."""


class Position(NamedTuple):
  """Where a run stands.

  The round and the seed are the position in the data and the state of every
  random choice: both are functions of them (covenant/data/assignment.py).
  """

  round: int  # rounds completed
  seed: int
  tokens: int  # trained since the start, all miners
  bytes_up: int  # payload bytes sent since the start, all miners


class State(NamedTuple):
  """All state of a run between two rounds."""

  position: Position
  shared: shared_state_lib.SharedState
  miners: dict[int, local_lib.MinerState]  # by uid
  protocol: str  # JSON: the chain, the history root, what validators remember


class Checkpoints:
  """The checkpoints of one run, in `directory`. Use as a context manager."""

  def __init__(
    self, directory: str | os.PathLike[str], config: config_lib.Checkpoint
  ):
    policies: Any = ocp.training.preservation_policies
    self._every = config.every
    self._directory = os.path.abspath(directory)
    self._checkpointer = ocp.training.Checkpointer(
      self._directory,
      preservation_policy=policies.LatestN(config.keep),
      cleanup_tmp_directories=True,  # of a process that was killed
    )

  def due(self, completed: int) -> bool:
    return completed % self._every == 0

  def save(self, state: State) -> None:
    """As `save_tree`, after as many rounds as `state` says."""
    self.save_tree(state.position.round, _to_tree(state))

  def save_tree(self, completed: int, tree: Any) -> None:
    """Starts to write a tree; returns once training may go on.

    That is when all of it is in host memory. Where it does not fit there, it
    is when all of it is written.

    Args:
      completed: rounds; nothing is written where there is a checkpoint of as
        many.
      tree: nested dicts and tuples of arrays and text.

    Raises:
      CheckpointError: this one or, as it is written in the background, the last one.
    """
    latest = self._checkpointer.latest
    if latest is not None and latest.step == completed:
      return
    tree = writable(tree)
    try:
      with writing(tree):
        saving = self._checkpointer.save_async(completed, tree, force=True)
      if saving is not None and not _fits(tree):
        saving.result()
    except Exception as e:  # whatever Orbax makes of a full disk
      raise CheckpointError(
        f'no checkpoint after round {completed}: {e}'
      ) from e

  def restore_tree(self, like: Any) -> Any | None:
    """The newest tree, or None if there is none.

    Args:
      like: a tree of this form, of arrays or of `jax.ShapeDtypeStruct`, on
        whose devices, in whose shards and kind of memory it is placed. Their
        values do not matter. `...` is left out.

    Raises:
      ConfigError: it is of another run, or damaged.
    """
    latest = self._checkpointer.latest
    if latest is None:
      return None
    abstract = jax.tree.map(_abstract, like)
    folder = f'{self._directory}/{latest.step}'
    try:
      stored: Any = self._checkpointer.metadata(latest).metadata
      # Nothing is what it makes of files that it cannot read; loading says why.
      differs = _difference(stored, abstract) if stored else ''
      if not differs:
        with reading(abstract):
          return self._checkpointer.load(latest, abstract_state=abstract)
    except Exception as e:  # whatever Orbax makes of such files
      raise config_lib.ConfigError(
        f'{folder} is damaged: {reason(e)}. Remove it to go on from the '
        'checkpoint before, or from the beginning'
      ) from e
    raise config_lib.ConfigError(
      f'{folder} is not of this run: {differs}. Expected the config it was '
      'made with, or another --workdir'
    )

  def restore(self, like: State) -> State | None:
    """The newest state, or None; `like` is one of the same run."""
    tree = self.restore_tree(_to_tree(like))
    if tree is None:
      return None
    position = Position(*map(int, tree['position']))
    miners = {int(uid): m for uid, m in tree['miners'].items()}
    return State(position, tree['shared'], miners, tree['protocol'])

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_: object) -> None:
    """Waits for the write under way."""
    try:
      self._checkpointer.close()
    except Exception as e:
      raise CheckpointError(f'the last checkpoint: {e}') from e


def _to_tree(state: State) -> dict[str, Any]:
  return {
    'position': np.array(state.position, np.int64),
    'shared': state.shared,
    'miners': {str(uid): m for uid, m in state.miners.items()},
    'protocol': state.protocol,
  }


def writable(tree: Any) -> Any:
  """A tree as Orbax can write it, that stays as it is.

  With several processes the first alone writes, and whole arrays, as Orbax
  takes none there whose devices are of one process. Of a small model on one
  device it is given NumPy arrays, with which it needs half the time.
  """
  small = _total(tree) <= _IN_FLIGHT

  def as_it_is(x: Any) -> bool:
    if not isinstance(x, jax.Array) or jax.process_count() > 1:
      return isinstance(x, str)
    return not small or len(x.sharding.device_set) > 1

  def one(x: Any) -> Any:
    if as_it_is(x):
      return x
    if jax.process_index():
      return np.broadcast_to(np.zeros((), x.dtype), x.shape)
    return np.asarray(x) if isinstance(x, jax.Array) else np.array(x)

  return jax.tree.map(one, tree)


def writing(tree: Any) -> ocp.Context:
  """How to write what `writable` made, in bounded memory."""
  context = ocp.Context()
  # Parameters shrink by 7 percent, which costs buffers and most of the time.
  context.array.saving.use_compression = False
  context.array.saving.storage_options.chunk_byte_size = _CHUNK
  memory = context.memory
  memory.deepcopy_host_arrays = False
  if _total(tree) > _IN_FLIGHT:
    shards = [_shard_bytes(x) for x in _arrays(tree)]
    memory.write_concurrent_bytes = max(_IN_FLIGHT, 1 + max(shards))
  if not _fits(tree):
    memory.transfer_concurrent_bytes = _IN_FLIGHT
    memory.serialization_status_callback = _InTurn()
  return context


def reading(abstract: Any) -> ocp.Context:
  """How to read a tree, in bounded memory beside its own."""
  context = ocp.Context()
  if _total(abstract) > _IN_FLIGHT:
    # A shard may lie across all chunks of its tensor.
    tensors = [_bytes(x) for x in _arrays(abstract)]
    context.memory.read_concurrent_bytes = max(_IN_FLIGHT, 1 + max(tensors))
  return context


def reason(error: BaseException) -> str:
  """What Orbax stumbled over, in a line."""
  while error.__cause__ is not None:
    error = error.__cause__
  line = next(iter(str(error).splitlines()), '')
  return f'{type(error).__name__}: {line[:200]}'


class _InTurn(orbax_types.DefaultSerializationStatusCallback):
  """Arrays come to the host as those before them are written."""

  def key_priority(self, _: Any) -> orbax_types.TransferPriority:
    return orbax_types.TransferPriority.ASYNCHRONOUS_DEPRIORITIZED


def _fits(tree: Any) -> bool:
  """Whether the host has twice the memory for what is not yet in it."""
  staged = [_bytes(x) for x in _arrays(tree) if not _on_host(x)]
  return 2 * sum(staged) <= _free_bytes()


def _on_host(x: Any) -> bool:
  if not isinstance(x, jax.Array) or x.sharding.memory_kind == _HOST:
    return True
  return all(device.platform == 'cpu' for device in x.devices())


def _free_bytes() -> int:
  """Of this host's memory; all of it where that is not known."""
  try:
    text = pathlib.Path('/proc/meminfo').read_text()
  except OSError:
    text = ''
  if found := re.search(r'MemAvailable: *(\d+) kB', text):
    return 1024 * int(found[1])
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def _arrays(tree: Any) -> list[Any]:
  return [x for x in jax.tree.leaves(tree) if hasattr(x, 'shape')]


def _bytes(x: Any) -> int:
  return x.size * x.dtype.itemsize


def _shard_bytes(x: Any) -> int:
  if not isinstance(x, jax.Array):
    return _bytes(x)
  return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def _total(tree: Any) -> int:
  return sum(map(_bytes, _arrays(tree)))


def _difference(stored: Any, like: Any) -> str:
  """The first leaf in which trees differ, in words; empty if none does."""
  there, here = _by_name(stored), _by_name(like)
  for name in sorted(there.keys() | here.keys()):
    if here.get(name) is ...:
      continue
    is_there, is_here = (_form(leaves, name) for leaves in (there, here))
    if is_there != is_here:
      return f'{name} is {is_there} there, {is_here} here'
  return ''


def _by_name(tree: Any) -> dict[str, Any]:
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): x
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def _form(leaves: dict[str, Any], name: str) -> str:
  if name not in leaves:
    return 'missing'
  x = leaves[name]
  return f'{x.dtype}{list(x.shape)}' if hasattr(x, 'shape') else 'text'


def _abstract(x: Any) -> Any:
  """How a leaf is to be restored: where it is now, NumPy as NumPy."""
  if isinstance(x, jax.Array):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  return x
