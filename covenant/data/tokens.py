"""The tokens of a run: in memory, or in shards that are read as needed.

A split is one array of tokens, in which an end of text follows every document.
Sequence i is the `context + 1` tokens from token `i * context`: inputs are all
but the last, targets all but the first. Neighboring sequences share one token,
so that every token is a target, ends of text included; only the first token of
a split and a remainder shorter than `context` are not.

A split of several manifests is their arrays one after the other; no sequence
has tokens of two. With `data.packing='documents'` the first token of a document
is read as its complement, -1 - token: it starts a document, and it is no target
(covenant/models/loss.py).
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from covenant import extras

if TYPE_CHECKING:  # a training step needs no tokenizer
  from covenant.data import tokenizer as tokenizer_lib

with extras.needed('run'):
  import tensorstore as ts


class PendingRead(Protocol):
  """A read in progress."""

  def result(self) -> np.ndarray:
    """Waits for and returns the sequences: int32 [n, context + 1]."""


class _Selection(Protocol):
  def read(self) -> PendingRead:
    """Starts to read what was selected."""


class TokenArray(Protocol):
  """An array of tokens, int32 [num_tokens], such as a `ts.TensorStore`."""

  @property
  def shape(self) -> tuple[int, ...]:
    """The number of tokens, as a shape."""

  def __getitem__(self, positions_nxl: np.ndarray) -> _Selection:
    """Selects tokens by position, each row of which is a run."""


class Population(NamedTuple):
  """The sequences that a round draws from; see `assignment.assign`.

  Attributes:
    offsets: the first id of each source.
    sizes: the number of sequences of each source.
    weights: the share of each source, in whole numbers.
  """

  offsets: tuple[int, ...]
  sizes: tuple[int, ...]
  weights: tuple[int, ...]


class MixturePhase(NamedTuple):
  """The mixture of a split's manifests from a round on."""

  start: int  # the round
  manifests: tuple[int, ...]  # indices of `Split.parts`
  weights: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Split:
  """The tokens of the training or the held-out split.

  Attributes:
    store: the tokens, int32 [num_tokens], in memory or in shards.
    num_bytes: the length of the text in UTF-8, without ends of text.
    parts: the number of tokens of each manifest; empty: there is one.
    phases: the mixtures of the manifests, by their first round.
    end_of_text: the token after which a document starts, which is read as its
      complement; None: documents are not told apart.
  """

  store: TokenArray | ts.TensorStore
  num_bytes: int
  parts: tuple[int, ...] = ()
  phases: tuple[MixturePhase, ...] = ()
  end_of_text: int | None = None

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
    return int(self._counts(context).sum())

  def _counts(self, context: int) -> np.ndarray:
    """Returns the number of sequences of each manifest, int64 [parts]."""
    if context < 1:
      raise ValueError(f'context: expected 1 or more, got {context}')
    tokens = np.asarray(self.parts or (self.num_tokens,), np.int64)
    return np.maximum(tokens - 1, 0) // context

  def population(self, context: int, round_index: int) -> int | Population:
    """Returns the training sequences of a round, for `assignment.assign`."""
    phases = [p for p in self.phases if p.start <= round_index]
    if not phases:
      return self.num_sequences(context)
    counts = self._counts(context)
    offsets = np.cumsum(counts) - counts
    chosen = list(phases[-1].manifests)
    return Population(
      tuple(offsets[chosen].tolist()),
      tuple(counts[chosen].tolist()),
      phases[-1].weights,
    )

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
    first_n = ids_n * context
    if len(self.parts) > 1:
      ends = np.cumsum(self._counts(context))
      part_n = np.searchsorted(ends, ids_n, 'right')
      tokens = np.asarray(self.parts)
      starts = np.cumsum(tokens) - tokens
      before = ends - self._counts(context)
      first_n = starts[part_n] + (ids_n - before[part_n]) * context
    positions_nxl = first_n[:, None] + np.arange(context + 1)
    # One indexed read: each operation of TensorStore takes about 20 us.
    pending = self.store[positions_nxl].read()
    return pending if self.end_of_text is None else _Marked(self, pending)

  def read(self, ids: Sequence[int] | np.ndarray, context: int) -> np.ndarray:
    """Reads the sequences `ids`, [n]: int32 [n, context + 1]; see `start`."""
    return self.start(ids, context).result()


class _Marked(NamedTuple):
  """A read in which the first tokens of documents become their complements."""

  split: Split
  pending: PendingRead

  def result(self) -> np.ndarray:
    rows_nxl = np.array(self.pending.result(), np.int32)
    starts_nxl = rows_nxl[:, :-1] == self.split.end_of_text
    rows_nxl[:, 1:][starts_nxl] ^= -1
    return rows_nxl


class TokenData(NamedTuple):
  """The tokens of a run, all below `vocab_size`."""

  train: Split
  heldout: Split
  vocab_size: int
  end_of_text: int
  # What made them, where they were made in memory.
  tokenizer: 'tokenizer_lib.Tokenizer | None' = None


def prefetch(
  split: Split,
  batches: Iterable[Sequence[int] | np.ndarray],
  context: int,
  depth: int | None = None,
) -> Iterator[np.ndarray]:
  """Reads batches of sequences, `depth` of them ahead of the consumer.

  Args:
    split: the split to read.
    batches: the ids of each batch, [n]; taken `depth` ahead as well.
    context: targets per sequence.
    depth: reads in flight while the consumer works, 1 or more; None is 2, or
      what the store of the tokens needs.

  Yields:
    The sequences of each batch, int32 [n, context + 1], in order.
  """
  if depth is None:
    depth = getattr(split.store, 'ahead', 2)
  if depth < 1:
    raise ValueError(f'depth: expected 1 or more, got {depth}')
  flight = collections.deque()
  for ids in batches:
    flight.append(split.start(ids, context))
    if len(flight) > depth:
      yield flight.popleft().result()
  while flight:
    yield flight.popleft().result()
