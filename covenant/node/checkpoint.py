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
from covenant.node import miner as miner_lib
from covenant.node import replica as replica_lib


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
  miners: dict[int, miner_lib.Private]  # by uid


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
    """Starts to write `state`; returns once training may go on."""
    latest = self._checkpointer.latest
    if latest is not None and latest.step == state.position.round:
      return
    # A copy: training donates these buffers while the writer still reads.
    host = jax.tree.map(lambda x: np.array(x), _to_tree(state))
    self._checkpointer.save_async(state.position.round, host, force=True)

  def restore(self, like: State) -> State | None:
    """The newest checkpoint, or None if there is none.

    Args:
      like: a state of the same run; its values do not matter.
    """
    if self._checkpointer.latest is None:
      return None
    abstract = jax.tree.map(_abstract, _to_tree(like))
    tree: Any = self._checkpointer.load(abstract_state=abstract)
    position = Position(*map(int, tree['position']))
    miners = {int(uid): m for uid, m in tree['miners'].items()}
    return State(position, tree['shared'], miners)

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_: object) -> None:
    """Waits for the write under way."""
    self._checkpointer.close()


def _to_tree(state: State) -> dict[str, Any]:
  return {
    'position': np.array(state.position, np.int64),
    'shared': state.shared,
    'miners': {str(uid): m for uid, m in state.miners.items()},
  }


def _abstract(x: Any) -> Any:
  """How a leaf is to be restored: where it is now, NumPy as NumPy."""
  if isinstance(x, jax.Array):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  return x
