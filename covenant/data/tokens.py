"""The tokens of a run, read through TensorStore.

A split is one array of tokens, in which an end of text follows every document.
Sequence i is the `context + 1` tokens from token `i * context`: inputs are all
but the last, targets all but the first. Neighboring sequences share one token,
so that every token is a target, ends of text included; only the first token of
a split and a remainder shorter than `context` are not.
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import tensorstore as ts


class PendingRead(Protocol):
  """A read in progress."""

  def result(self) -> np.ndarray:
    """Waits for and returns the sequences: int32 [n, context + 1]."""


@dataclasses.dataclass(frozen=True)
class Split:
  """The tokens of the training or the held-out split.

  Attributes:
    store: the tokens, int32 [num_tokens], in memory or on disk.
    num_bytes: the length of the text in UTF-8, without ends of text.
  """

  store: ts.TensorStore
  num_bytes: int

  @property
  def num_tokens(self) -> int:
    """The number of tokens, ends of text included."""
    return self.store.shape[0]

  @property
  def bytes_per_token(self) -> float:
    """The divisor from nats per token to nats per byte."""
    return self.num_bytes / self.num_tokens

  def num_sequences(self, context: int) -> int:
    """Returns the number of sequences of `context` targets."""
    if context < 1:
      raise ValueError(f'context: expected 1 or more, got {context}')
    return max(self.num_tokens - 1, 0) // context

  def start(self, ids: Sequence[int] | np.ndarray, context: int) -> PendingRead:
    """Starts to read the sequences `ids`, [n], and returns at once.

    Raises:
      ValueError: an id is not in [0, num_sequences(context)).
    """
    ids_n = np.asarray(ids)
    if not ids_n.size:
      ids_n = ids_n.astype(np.int64)  # asarray([]) has floats
    if ids_n.ndim != 1 or not np.issubdtype(ids_n.dtype, np.integer):
      raise ValueError(
        'ids: expected integers of shape [n], got '
        f'{ids_n.dtype} of shape {list(ids_n.shape)}'
      )
    limit = self.num_sequences(context)
    wrong_n = (ids_n < 0) | (ids_n >= limit)
    if wrong_n.any():
      raise ValueError(
        f'ids: expected 0 <= id < {limit} ({self.num_tokens} tokens, context '
        f'{context}), got {ids_n[wrong_n][0]}'
      )
    ids_n = ids_n.astype(
      np.int64
    )  # after the check: uint64 could become negative
    positions_nxl = ids_n[:, None] * context + np.arange(context + 1)
    # One indexed read: each operation of TensorStore takes about 20 us.
    return self.store[positions_nxl].read()

  def read(self, ids: Sequence[int] | np.ndarray, context: int) -> np.ndarray:
    """Reads the sequences `ids`, [n]: int32 [n, context + 1]; see `start`."""
    return self.start(ids, context).result()


class TokenData(NamedTuple):
  """The tokens of a run, all below `vocab_size`."""

  train: Split
  heldout: Split
  vocab_size: int
  end_of_text: int


def prefetch(
  split: Split,
  batches: Iterable[Sequence[int] | np.ndarray],
  context: int,
  depth: int = 2,
) -> Iterator[np.ndarray]:
  """Reads batches of sequences, `depth` of them ahead of the consumer.

  Args:
    split: the split to read.
    batches: the ids of each batch, [n]; taken `depth` ahead as well.
    context: targets per sequence.
    depth: reads in flight while the consumer works, 1 or more.

  Yields:
    The sequences of each batch, int32 [n, context + 1], in order.
  """
  if depth < 1:
    raise ValueError(f'depth: expected 1 or more, got {depth}')
  flight = collections.deque()
  for ids in batches:
    flight.append(split.start(ids, context))
    if len(flight) > depth:
      yield flight.popleft().result()
  while flight:
    yield flight.popleft().result()
