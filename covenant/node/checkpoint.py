"""Checkpoints: everything that makes a resumed run the uninterrupted one.

Orbax writes them in the background, each complete or not there at all, and
keeps the newest few.
"""

import os
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from covenant import config as config_lib
from covenant.node import replica as replica_lib
from covenant.node import trainer as trainer_lib


class NotSaved(OSError):
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
  shared: replica_lib.Shared
  miners: dict[int, trainer_lib.Private]  # by uid
  protocol: str  # JSON: the chain, the history root, what validators remember


class Checkpoints:
  """The checkpoints of one run, in `directory`. Use as a context manager."""

  def __init__(
    self, directory: str | os.PathLike[str], config: config_lib.Checkpoint
  ):
    policies: Any = ocp.training.preservation_policies
    self._every = config.every
    self._checkpointer = ocp.training.Checkpointer(
      os.path.abspath(directory),
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

    Args:
      completed: rounds; nothing is written where there is a checkpoint of as
        many.
      tree: nested dicts and tuples of arrays and text.

    Raises:
      NotSaved: this one or, as it is written in the background, the last one.
    """
    latest = self._checkpointer.latest
    if latest is not None and latest.step == completed:
      return
    # A copy: training donates these buffers while the writer still reads.
    host = jax.tree.map(_copy, tree)
    try:
      self._checkpointer.save_async(completed, host, force=True)
    except Exception as e:  # whatever Orbax makes of a full disk
      raise NotSaved(f'no checkpoint after round {completed}: {e}') from e

  def restore_tree(self, like: Any) -> Any | None:
    """The newest tree, or None if there is none.

    Args:
      like: a tree of this form; its values do not matter.
    """
    if self._checkpointer.latest is None:
      return None
    abstract = jax.tree.map(_abstract, like)
    return self._checkpointer.load(abstract_state=abstract)

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
      raise NotSaved(f'the last checkpoint: {e}') from e


def _to_tree(state: State) -> dict[str, Any]:
  return {
    'position': np.array(state.position, np.int64),
    'shared': state.shared,
    'miners': {str(uid): m for uid, m in state.miners.items()},
    'protocol': state.protocol,
  }


def _copy(x: Any) -> Any:
  """Of several processes the first alone writes, and needs a copy."""
  if isinstance(x, str):
    return x
  return np.asarray(x) if jax.process_index() else np.array(x)


def _abstract(x: Any) -> Any:
  """How a leaf is to be restored: where it is now, NumPy as NumPy."""
  if isinstance(x, jax.Array):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  return x
