"""Tokens of a run, and the one way to read them: TensorStore.

A split is one long line of tokens, every document followed by the end of
text. Sequence i is the `context + 1` tokens from token `i * context`: inputs
are all but the last, targets all but the first. Neighbours share one token,
so every token is a target, the end of text included; only the first token of
a split and a rest shorter than `context` are none.
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import tensorstore as ts

from covenant.data import corpus as corpus_lib
from covenant.data import tokenizer as tokenizer_lib


class Future(Protocol):
  """A read under way."""

  def result(self) -> np.ndarray:
    """Waits for the sequences: int32 [n, context + 1]."""


@dataclasses.dataclass(frozen=True)
class Split:
  """The tokens to train on, or those held out.

  Attributes:
    store: One-dimensional, int32; in memory or on disk.
    num_bytes: Length of the text in UTF-8. The ends of text have no bytes.
  """

  store: ts.TensorStore
  num_bytes: int

  @property
  def num_tokens(self) -> int:
    """Ends of text included."""
    return self.store.shape[0]

  @property
  def bytes_per_token(self) -> float:
    """A loss in nats a token, divided by this, is in nats a byte."""
    return self.num_bytes / self.num_tokens

  def num_sequences(self, context: int) -> int:
    """How many sequences of `context` targets there are."""
    if context < 1:
      raise ValueError(f'context: expected 1 or more, got {context}')
    return max(self.num_tokens - 1, 0) // context

  def start(self, ids: Sequence[int] | np.ndarray, context: int) -> Future:
    """Begins to read the sequences `ids`, [n]; returns at once.

    Raises:
      ValueError: An id is not in [0, num_sequences(context)).
    """
    ids_n = np.asarray(ids)
    if not ids_n.size:
      ids_n = ids_n.astype(np.int64)  # asarray([]) is of floats
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
    ids_n = ids_n.astype(np.int64)  # only now: uint64 could turn negative
    positions_nxl = ids_n[:, None] * context + np.arange(context + 1)
    # One indexed read: TensorStore asks about 20 us for each operation.
    return self.store[positions_nxl].read()

  def read(self, ids: Sequence[int] | np.ndarray, context: int) -> np.ndarray:
    """The sequences `ids`, [n]: int32 [n, context + 1]. Errors as `start`."""
    return self.start(ids, context).result()


class TokenData(NamedTuple):
  """The tokens of a run. Ids are below `vocab_size`."""

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
  """Reads batch after batch of ids, `depth` of them ahead of the consumer.

  Args:
    split: What to read.
    batches: The ids of each batch, [n]. Read `depth` ahead as well.
    context: Targets a sequence.
    depth: Reads in flight while the consumer works, 1 or more.

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


def token_dtype(vocab_size: int) -> np.dtype:
  """What ids are stored as: little-endian uint16 if they fit, else uint32.

  >>> token_dtype(65536), token_dtype(65537)
  (dtype('uint16'), dtype('uint32'))
  """
  return np.dtype('<u2' if vocab_size <= 2**16 else '<u4')


def encode(
  document: corpus_lib.Document, tokenizer: tokenizer_lib.Tokenizer
) -> np.ndarray:
  """The tokens of one document with its end of text: `token_dtype` [n]."""
  dtype = token_dtype(tokenizer.vocab_size)
  ids = tokenizer.encode(document.text).astype(dtype)
  return np.append(ids, dtype.type(tokenizer.end_of_text))


def tokenize(
  corpus: corpus_lib.Corpus, tokenizer: tokenizer_lib.Tokenizer
) -> TokenData:
  """Tokenizes into memory. Large corpora belong in shards (shards.py)."""

  def split(documents: tuple[corpus_lib.Document, ...]) -> Split:
    tokens = np.concatenate([encode(d, tokenizer) for d in documents])
    num_bytes = sum(d.num_bytes for d in documents)
    return Split(ts.cast(ts.array(tokens), ts.int32), num_bytes)

  return TokenData(
    train=split(corpus.train),
    heldout=split(corpus.heldout),
    vocab_size=tokenizer.vocab_size,
    end_of_text=tokenizer.end_of_text,
  )
