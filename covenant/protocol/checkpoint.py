"""Checkpoints: all state that makes a resumed run equal an uninterrupted one.

Orbax writes them in the background, each complete or not at all, and keeps the
newest few. Arrays are written and read shard by shard, so a run may resume on
another mesh.

The arrays given to `save_tree` may be donated as soon as it returns. By then
Orbax has copied the arrays on accelerators to the host. It holds views of
arrays in host memory, which JAX then copies instead of donating.
"""

import contextlib
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np

from covenant import config as config_lib
from covenant import errors
from covenant import extras
from covenant import typing as ct
from covenant.protocol import checksums
from covenant.protocol import disk
from covenant.protocol import orbax_context
from covenant.protocol import tree_difference
from covenant.train import local as local_lib
from covenant.train import shared_state as shared_state_lib

with extras.needed('run'):
  from orbax.checkpoint import v1 as ocp


class CheckpointError(errors.CovenantError, OSError):
  """A checkpoint could not be written. Earlier checkpoints are unharmed."""


Report = Callable[[str], None]
_PAYLOADS = 'payloads'


def _print(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


class RunCounters(NamedTuple):
  """The counters of a run.

  The position in the data and every random choice are functions of the round
  and the seed (covenant/data/assignment.py).
  """

  round: int  # rounds completed
  seed: int
  tokens: int  # tokens trained since the start, all miners
  bytes_up: int  # payload bytes sent since the start, all miners


class RunState(NamedTuple):
  """The whole state of a run between two rounds."""

  counters: RunCounters
  shared: shared_state_lib.SharedState
  miners: dict[int, local_lib.MinerState]  # by uid
  protocol: str  # JSON: the chain, the history root, what validators remember
  payloads: ct.Array | None = None  # bytes of those that `protocol` lists


class Checkpoints:
  """The checkpoints of one run. Use as a context manager.

  Args:
    directory: the folder, which has one folder per checkpoint.
    config: how often they are due, and how many stay.
    report: called with a line about each checkpoint that is damaged, or is
      restored without checksums.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    config: config_lib.Checkpoint,
    report: Report = _print,
  ):
    policies: Any = ocp.training.preservation_policies
    self._every = config.every
    self._directory = os.path.abspath(directory)
    self._report = report
    self._pool = futures.ThreadPoolExecutor(1)
    self._summing: futures.Future[None] | None = None
    self._checkpointer = ocp.training.Checkpointer(
      self._directory,
      preservation_policy=policies.LatestN(config.keep),
      cleanup_tmp_directories=True,  # of a process that was killed
    )

  def due(self, completed: int) -> bool:
    """Returns whether a checkpoint is due after `completed` rounds."""
    return completed % self._every == 0

  def save(self, state: RunState, *, overwrite: bool = False) -> None:
    """Starts to write a state; see `save_tree`."""
    completed = state.counters.round
    self.save_tree(completed, _to_tree(state), overwrite=overwrite)

  def save_tree(
    self, completed: int, tree: ct.PyTree, *, overwrite: bool = False
  ) -> None:
    """Starts to write a tree; returns once training may go on.

    That is once the tree is in host memory or, if it does not fit there, once
    it is written.

    Args:
      completed: rounds completed; nothing is written if the newest checkpoint
        is of this round.
      tree: nested dicts and tuples of arrays and text.
      overwrite: replace a checkpoint of this round.

    Raises:
      CheckpointError: this or, since writing goes on in the background, the
        last checkpoint could not be written.
    """
    latest = self._checkpointer.latest
    if latest is not None and latest.step == completed and not overwrite:
      return
    tree = writable(tree)
    try:
      checksums.on_first(
        lambda: disk.require_room(self._directory, orbax_context.total(tree))
      )
      self._finish_checksums()
      with orbax_context.writing(tree):
        saving = self._checkpointer.save_async(
          completed, tree, force=True, overwrite=overwrite
        )
      if saving is not None and not orbax_context.fits(tree):
        saving.result()
      if saving is not None and not jax.process_index():
        self._summing = self._pool.submit(
          self._write_checksums, completed, saving.result
        )
    except Exception as e:  # any error of Orbax, such as about a full disk
      raise CheckpointError(
        f'no checkpoint after round {completed}: {disk.why(self._directory, e)}'
      ) from e

  def _write_checksums(
    self, completed: int, wait: Callable[[], object]
  ) -> None:
    """Writes the checksums of a checkpoint, once it is written."""
    with contextlib.suppress(Exception):  # raised by the next call of Orbax
      wait()
    folder = pathlib.Path(self._directory, str(completed))
    if folder.is_dir():
      checksums.write(folder)

  def _finish_checksums(self) -> None:
    """Waits for the checksums of the last checkpoint; raises OSError."""
    if self._summing is not None:
      summing, self._summing = self._summing, None
      summing.result()

  def restore_tree(
    self,
    abstract_tree: ct.PyTree,
    optional: Sequence[str] = (),
    any_size: Sequence[str] = (),
  ) -> ct.PyTree | None:
    """Restores the newest sound tree, or returns None if there is none.

    A checkpoint whose files differ from what was written is reported and moved
    to `DIRECTORY.damaged`, and the one before it is restored. One that has no
    checksums is restored and reported.

    Args:
      abstract_tree: a tree of the same structure, of arrays or of
        `jax.ShapeDtypeStruct`; the result has their shardings and memory
        kinds. Leaves `...` are not restored.
      optional: branches that checkpoints of an earlier release lack; the result
        then lacks them, too.
      any_size: branches that are NumPy arrays of whatever shape was saved.

    Raises:
      ConfigError: the checkpoint is of another run, or all are damaged.
    """
    abstract = jax.tree.map(_abstract, abstract_tree)
    steps = [found.step for found in self._checkpointer.checkpoints]
    sound, damaged = checksums.newest_agreed(self._directory, steps)
    if damaged and sound is None:
      raise config_lib.ConfigError(
        f'all checkpoints in {self._directory} are damaged: '
        f'{"; ".join(damaged.values())}. Remove them to begin from the start'
      )
    self._set_aside(damaged)
    if sound is None:
      return None
    if line := checksums.says_unchecked(f'{self._directory}/{sound}'):
      self._report(line)
    return self._load(sound, abstract, optional, any_size)

  def _load(
    self,
    step: int,
    abstract: ct.PyTree,
    optional: Sequence[str],
    any_size: Sequence[str],
  ) -> ct.PyTree:
    folder = f'{self._directory}/{step}'
    try:
      stored = self._checkpointer.metadata(step).metadata
      # Metadata is None if its files cannot be read; then loading says why.
      if isinstance(stored, dict) and isinstance(abstract, dict):
        missing = {name for name in optional if name not in stored}
        abstract = {k: x for k, x in abstract.items() if k not in missing}
        for name in set(any_size) - missing:
          shape, dtype = stored[name].shape, abstract[name].dtype
          abstract[name] = np.empty(shape, dtype)
      differs = tree_difference.difference(stored, abstract) if stored else ''
      if not differs:
        return self._read(step, abstract)
    except Exception as e:  # any error of Orbax, such as about memory
      raise config_lib.ConfigError(
        f'{folder} cannot be read: {disk.reason(e)}. Remove it to go on from '
        'the checkpoint before, or from the beginning'
      ) from e
    raise config_lib.ConfigError(
      f'{folder} is not of this run: {differs}. Expected the config it was '
      'made with, or another --workdir'
    )

  def _read(self, step: int, abstract: ct.PyTree) -> ct.PyTree:
    """Reads a checkpoint a shard at a time if it was written on such a mesh."""
    try:
      with orbax_context.reading(abstract, orbax_context.shard_bytes):
        return self._checkpointer.load(step, abstract_state=abstract)
    except Exception as e:  # Orbax may wrap it
      if 'Requested more bytes' not in disk.reason(e):
        raise
    # Written on another mesh: a shard lies across the chunks of many.
    with orbax_context.reading(abstract):
      return self._checkpointer.load(step, abstract_state=abstract)

  def _set_aside(self, damaged: dict[int, str]) -> None:
    """Moves damaged checkpoints away, so that their rounds can be saved."""
    if not damaged:
      return
    checksums.wait_for_all()  # until every process has looked at them
    for step, why in damaged.items():
      aside = pathlib.Path(f'{self._directory}.damaged', str(step))
      self._report(
        f'a checkpoint is damaged: {why}. It is now {aside}, and the one '
        'before it is restored; test the disk'
      )
      if not jax.process_index():
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(self._directory, str(step)).rename(aside)
    checksums.wait_for_all()
    self._checkpointer.reload()

  def restore(self, abstract_state: RunState) -> RunState | None:
    """Restores the newest state, or returns None; see `restore_tree`."""
    names = [_PAYLOADS]
    tree = self.restore_tree(_to_tree(abstract_state), names, names)
    if tree is None:
      return None
    counters = RunCounters(*map(int, tree['position']))
    miners = {int(uid): m for uid, m in tree['miners'].items()}
    payloads = tree.get(_PAYLOADS)
    if payloads is not None:
      payloads = payloads[:-1]  # see `_padded`
    return RunState(
      counters, tree['shared'], miners, tree['protocol'], payloads
    )

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Waits until the last checkpoint is written."""
    try:
      try:
        self._finish_checksums()
      finally:
        self._pool.shutdown()
        self._checkpointer.close()
    except Exception as e:
      raise CheckpointError(
        f'the last checkpoint: {disk.why(self._directory, e)}'
      ) from e


def _to_tree(state: RunState) -> ct.PyTree:
  return {
    'position': np.array(state.counters, np.int64),
    'shared': state.shared,
    'miners': {str(uid): m for uid, m in state.miners.items()},
    'protocol': state.protocol,
    _PAYLOADS: _padded(state.payloads),
  }


def _padded(data: ct.Array | None) -> np.ndarray:
  """Returns bytes and one more, as Orbax writes no empty arrays."""
  some = np.zeros(0, np.uint8) if data is None else np.asarray(data)
  return np.append(some, np.uint8(0))


def writable(tree: ct.PyTree) -> ct.PyTree:
  """Returns a tree that Orbax can write and that does not change meanwhile.

  Of an array whose devices belong to several processes each writes its shards.
  Other arrays of several processes are written whole, by the first alone, as
  Orbax accepts no array there whose devices belong to one process. A small
  model on one device becomes NumPy arrays, which Orbax writes faster.
  """
  small = orbax_context.total(tree) <= orbax_context.IN_FLIGHT

  def is_writable(x: object) -> bool:
    if not isinstance(x, jax.Array):
      return isinstance(x, str)
    if jax.process_count() > 1:
      return not x.is_fully_addressable
    return not small or len(x.sharding.device_set) > 1

  def convert(x: ct.PyTree) -> ct.PyTree:
    if is_writable(x):
      return x
    if jax.process_index():
      return np.broadcast_to(np.zeros((), x.dtype), x.shape)
    return np.asarray(x) if isinstance(x, jax.Array) else np.array(x)

  return jax.tree.map(convert, tree)


def _abstract(x: ct.PyTree) -> ct.PyTree:
  """Returns a leaf to restore: with its sharding, or NumPy as NumPy."""
  if isinstance(x, jax.Array):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  return x
