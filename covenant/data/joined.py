"""Several arrays of tokens as one, as the parts of a mixture are read."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from covenant import extras
from covenant.data import tokens as tokens_lib

with extras.needed('run'):
  import tensorstore as ts


class Joined:
  """Several arrays of tokens, one after the other; see `tokens.TokenArray`.

  A row of positions must not cross from one array to another.
  """

  def __init__(self, arrays: Sequence[tokens_lib.TokenArray | ts.TensorStore]):
    self._arrays = arrays
    self._ends = np.cumsum([array.shape[0] for array in arrays])
    self.shape = (int(self._ends[-1]),)
    self.ahead = max(getattr(array, 'ahead', 2) for array in arrays)

  def __getitem__(self, positions_nxl: np.ndarray) -> '_JoinedRows':
    return _JoinedRows(self._arrays, self._ends, positions_nxl)


class _JoinedRows:
  def __init__(
    self,
    arrays: Sequence[tokens_lib.TokenArray | ts.TensorStore],
    ends: np.ndarray,
    positions_nxl: np.ndarray,
  ):
    self._shape = positions_nxl.shape
    array_n = np.searchsorted(ends, positions_nxl[:, 0], 'right')
    self._rows = []
    for i in np.unique(array_n):
      rows = np.flatnonzero(array_n == i)
      first = int(ends[i]) - arrays[i].shape[0]
      self._rows.append((rows, arrays[i][positions_nxl[rows] - first]))

  def read(self) -> '_PendingJoined':
    pending = [(rows, selected.read()) for rows, selected in self._rows]
    return _PendingJoined(self._shape, pending)


class _PendingJoined(NamedTuple):
  shape: tuple[int, ...]
  pending: list[tuple[np.ndarray, tokens_lib.PendingRead]]

  def result(self) -> np.ndarray:
    found_nxl = np.empty(self.shape, np.int32)
    for rows, pending in self.pending:
      found_nxl[rows] = pending.result()
    return found_nxl
