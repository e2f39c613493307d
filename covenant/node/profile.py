"""One round under JAX's profiler."""

import os
import pathlib

import jax


class Profile:
  """Traces the round of a node that was asked for; use as a context manager.

  TensorBoard and Perfetto show what it leaves in `workdir`/profile. A trace
  of a round on one device takes some megabytes.

  Args:
    workdir: of the node.
    round_index: which round, from 0 on; None traces nothing.
  """

  def __init__(
    self, workdir: str | os.PathLike[str], round_index: int | None = None
  ):
    self._folder = pathlib.Path(workdir, 'profile')
    self._round = round_index
    self._running = False

  def at(self, round_index: int) -> None:
    """To be told of the round that is about to begin, as often as one likes."""
    if round_index == self._round and not self._running:
      jax.profiler.start_trace(str(self._folder))
      self._running = True
    elif round_index != self._round:
      self._end()

  def _end(self) -> None:
    if self._running:
      self._running = False
      jax.profiler.stop_trace()

  def __enter__(self) -> 'Profile':
    return self

  def __exit__(self, *_: object) -> None:
    self._end()
