"""Arrays with a row per block of a tensor, of which parts are read."""

from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np

from covenant import typing as ct


class BlockRows(Protocol):
  """An array [N, ...] whose rows are made where they are needed.

  `np.asarray` makes all of them.
  """

  shape: tuple[int, ...]

  def read(self, runs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Returns runs of rows: each has a first row and the one after its last."""
    ...

  def __array__(self) -> np.ndarray: ...


def take(
  x: ct.Array | BlockRows,
  grid: tuple[int, int, int, int, int],
  stack: range,
  rows: range,
) -> np.ndarray:
  """Returns the same rows of blocks of every shard of some matrices.

  Args:
    x: the rows of all blocks, in the order of messages.
    grid: matrices, shards down, rows of blocks in one, shards across, blocks
      in a row of one.
    stack: the matrices.
    rows: the rows of blocks of each shard.

  Returns:
    An array of the shape of the grid, with fewer matrices and rows of blocks,
    and of the values of a block.
  """
  _, down, high, across, wide = grid
  if isinstance(x, np.ndarray | jax.Array):
    whole = np.asarray(x).reshape(*grid, -1)
    return whole[stack.start : stack.stop, :, rows.start : rows.stop]
  row = across * wide
  starts = [(s * down + i) * high * row for s in stack for i in range(down)]
  runs = [(x + rows.start * row, x + rows.stop * row) for x in starts]
  found = x.read(joined(runs))
  return found.reshape(len(stack), down, len(rows), across, wide, -1)


def pick(x: ct.Array | BlockRows, blocks_n: np.ndarray) -> np.ndarray:
  """Returns the rows of some blocks, in the order given."""
  if isinstance(x, np.ndarray | jax.Array):
    return np.asarray(x)[blocks_n]
  return x.read(joined([(int(b), int(b) + 1) for b in blocks_n]))


def joined(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
  """Joins runs that follow each other.

  >>> joined([(0, 4), (4, 8), (12, 16)])
  [(0, 8), (12, 16)]
  """
  found: list[tuple[int, int]] = []
  for start, stop in runs:
    if found and found[-1][1] == start:
      start = found.pop()[0]
    found.append((start, stop))
  return found
