"""Documents, split into training and held-out text.

Files whose names say so are held out. Otherwise documents are, by a hash of
their content, so that copies of a document are on one side. The split does not
depend on the run's seed: runs of other seeds report losses on the same text.
"""

import bisect
import hashlib
import json
import lzma
import math
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from covenant import config
from covenant.data import readers
from covenant.data import sources

_PLAYS = pathlib.Path(__file__).parent / 'plays' / 'shakespeare.json.xz'
# Another text would have other losses.
_PLAYS_DIGEST = (
  'ef0ffbb348bd9906496ad4e03edb511ded816a436196a96bdf789d649986b59b'
)
_ALPHABET = 'abcdefghijklmnop'
PIECE = 2**18  # characters that are encoded at once
_WORD = re.compile(r'\S{256}(?=\S)|\s{256}(?=\s)')
_LARGE = 2**24  # characters of training text from which progress is shown
_MOST = 2**30  # characters that a BPE is trained on


class Document(NamedTuple):
  """A text, with a name that is unique in its source."""

  name: str
  text: str

  @property
  def num_bytes(self) -> int:
    """The length of the text in UTF-8."""
    return len(self.text.encode())


class Corpus(NamedTuple):
  """The documents to train on and the held-out documents."""

  train: tuple[Document, ...]
  heldout: tuple[Document, ...]


def load(data: config.Data, seed: int) -> Corpus:
  """Loads the documents of `data.source`.

  Args:
    data: the config of the data, with 'shakespeare', 'text' or 'synthetic' as
      source; 'shards' have no text (shards.py).
    seed: the run's seed, which only 'synthetic' uses.

  Raises:
    ConfigError: the text is missing, empty, not UTF-8 or cannot be split.
  """
  fraction = data.heldout_fraction
  if data.source == 'shakespeare':
    return split_documents(_plays(), fraction, lambda play: play.name)
  if data.source == 'text':
    return _load_text(data)
  if data.source == 'synthetic':
    text = synthetic_text(data.synthetic_tokens, seed)
    document = Document('synthetic', text)
    return _split_tail(document, fraction, 'data.synthetic_tokens')
  raise config.ConfigError(
    f'data.source {data.source!r} has no text; expected one of '
    "'shakespeare', 'text', 'synthetic'"
  )


def _load_text(data: config.Data) -> Corpus:
  """Reads all files of `data.path` into memory."""
  files = sources.find(data.path)
  by_split: dict[str, list[Document]] = {'train': [], 'heldout': [], '': []}
  for file in files:
    by_split[file.split] += _documents(file, data.field)
  documents = [d for found in by_split.values() for d in found]
  if not documents:
    raise config.ConfigError(f'data.path: the text of {data.path!r} is empty')
  if data.tokenizer == 'bytes':
    check_nul(documents)
  if by_split['heldout']:
    train = by_split['train'] + by_split['']
    if not train:
      raise no_training_text(data.path)
    return Corpus(_ordered(train), _ordered(by_split['heldout']))
  if len(documents) == 1:
    return _split_tail(documents[0], data.heldout_fraction, 'data.path')
  try:
    corpus = split_documents(_ordered(documents), data.heldout_fraction)
  except ValueError as error:
    raise config.ConfigError(f'data.path: {error}') from error
  heldout = sum(d.num_bytes for d in corpus.heldout)
  total = sum(d.num_bytes for d in documents)
  smallest = min(d.num_bytes for d in documents)
  check_share(heldout, total, data.heldout_fraction, smallest)
  return corpus


def check_nul(documents: Iterable[Document]) -> None:
  """Raises ConfigError if a text has the end of text of the byte tokenizer."""
  for name, text in documents:
    if '\0' in text:
      at = len(text.partition('\0')[0].encode())
      raise config.ConfigError(
        f'data.path: {name!r} has a NUL at byte {at}; NUL is the end of text '
        "of data.tokenizer 'bytes', so text must not contain it"
      )


def _ordered(documents: Iterable[Document]) -> tuple[Document, ...]:
  return tuple(sorted(documents))


def no_training_text(path: str) -> config.ConfigError:
  """Returns the error of files that all say that they are held out."""
  return config.ConfigError(
    f'data.path: the names of all files of {path!r} say that they are held out '
    f'({", ".join(sources.HELDOUT)}); expected text to train on, too'
  )


def _documents(file: sources.File, field: str) -> Iterator[Document]:
  name = file.name.encode(errors='surrogateescape').decode(errors='replace')
  if file.kind in sources.TOKENS:
    raise config.ConfigError(
      f'data.path: {name!r} has tokens; --role=tokenize makes shards of them'
    )
  if file.kind in sources.TEXTS:
    if text := ''.join(readers.blocks(file)):
      yield Document(name, text)
    return
  for i, text in enumerate(readers.rows(file, field)):
    yield Document(f'{name}#{i:09d}', text)


def split_documents(
  documents: tuple[Document, ...],
  fraction: float,
  key: Callable[[Document], str] = lambda document: document.text,
) -> Corpus:
  """Holds out whole documents until they are `fraction` of the bytes.

  They are taken in the order of a hash, so that the choice is fixed, and a
  larger fraction holds out a superset. Both sides get at least one document.

  Args:
    documents: two or more that differ.
    fraction: the share of the bytes to hold out.
    key: what is hashed; the content, so that names do not matter.

  Raises:
    ValueError: there are fewer than two different documents.
  """
  hashes = [content_hash([key(document)]) for document in documents]
  sizes = [document.num_bytes for document in documents]
  limit = threshold(hashes, sizes, fraction)
  sides = ([], [])
  for document, hashed in zip(documents, hashes, strict=True):
    sides[hashed < limit].append(document)
  return Corpus(*map(tuple, sides))


def threshold(
  hashes: Sequence[int] | np.ndarray,
  sizes: Sequence[int] | np.ndarray,
  fraction: float,
) -> int:
  """Returns the hash below which documents are held out.

  Args:
    hashes: the `content_hash` of each document.
    sizes: the bytes of each document.
    fraction: the share of the bytes to hold out, or a little more; less where
      one more document would make it more than twice as much.

  Raises:
    ValueError: there are fewer than two different documents.
  """
  hashes = np.asarray(hashes, np.uint64)
  order = np.argsort(hashes, kind='stable')
  hashes = hashes[order]
  ends = np.flatnonzero(np.append(hashes[1:] != hashes[:-1], True))
  if len(ends) < 2:
    raise ValueError(
      f'expected two documents or more that differ, got {len(hashes)} of '
      f'{len(ends)} content'
    )
  held = np.cumsum(np.asarray(sizes, np.int64)[order])[ends]
  wanted = fraction * held[-1]
  enough = held[:-1] >= wanted
  last = int(np.argmax(enough)) if enough.any() else len(ends) - 2
  if last and held[last] > 2 * wanted and held[last - 1] >= wanted / 2:
    last -= 1  # without a long document, which would hold out far too much
  return int(hashes[ends[last]]) + 1


def content_hash(parts: Iterable[str | bytes]) -> int:
  """Returns the 64-bit hash of a document's content, in any parts."""
  digest = hashlib.blake2b(digest_size=8, person=b'covenant.heldout')
  for part in parts:
    digest.update(part.encode() if isinstance(part, str) else part)
  return int.from_bytes(digest.digest(), 'big')


def check_share(
  heldout: int, total: int, fraction: float, smallest: int
) -> None:
  """Checks that the share that was held out is near what was asked for.

  Args:
    heldout: the bytes of text held out.
    total: the bytes of all text.
    fraction: the share that was asked for.
    smallest: the bytes of the smallest document, less than which cannot be held
      out; 0 if it is not known.

  Raises:
    ConfigError: the share is less than half or more than twice as much, though
      not all documents are too large.
  """
  share, total = heldout / max(total, 1), max(total, 1)
  if fraction / 2 <= share <= 2 * max(fraction, smallest / total):
    return
  raise config.ConfigError(
    f'data.heldout_fraction: expected about {fraction:.2%} of {total:,} bytes '
    f'to be held out, got {share:.2%}, because documents are held out whole; '
    'set it to a share that they allow, or name files so that they say train '
    'and val'
  )


def _split_tail(document: Document, fraction: float, field: str) -> Corpus:
  """Holds out the end of a document, from a line break if one is near."""
  name, text = document
  if len(text) < 2:
    raise config.ConfigError(
      f'{field}: expected two characters or more, to hold out a part; got '
      f'{len(text)}'
    )
  size = tail_size(len(text), fraction)
  cut = len(text) - size
  newline = text.rfind('\n', cut - size // 4, cut)
  if newline >= 0:
    cut = newline + 1
  return Corpus(
    train=(Document(name, text[:cut]),), heldout=(Document(name, text[cut:]),)
  )


def tail_size(length: int, fraction: float) -> int:
  """Returns the characters to hold out of one document, before line breaks."""
  return min(max(round(fraction * length), 1), length - 1)


def _plays() -> tuple[Document, ...]:
  """Returns the plays that the package brings, by name.

  Raises:
    ConfigError: the file is missing or is not the one of this release.
  """
  try:
    content = _PLAYS.read_bytes()
  except OSError as error:
    raise config.ConfigError(
      f"data.source 'shakespeare': {_PLAYS}: {error.strerror}; install "
      'covenant again'
    ) from None
  digest = hashlib.blake2b(content, digest_size=32).hexdigest()
  if digest != _PLAYS_DIGEST:
    raise config.ConfigError(
      f"data.source 'shakespeare': {_PLAYS} is not the file of this release: "
      f'expected the BLAKE2b digest {_PLAYS_DIGEST[:16]}, got {digest[:16]}; '
      'install covenant again'
    )
  texts = json.loads(lzma.decompress(content))
  return tuple(Document(name, text) for name, text in sorted(texts.items()))


def pieces(blocks: Iterable[str]) -> Iterator[str]:
  """Cuts a text into pieces of at most `PIECE` characters.

  A piece ends between a word and a line break or a space, if there is one in
  its second half. The pieces do not depend on the blocks.
  """
  text = ''
  for block in blocks:
    text += block
    while len(text) > PIECE:
      at = _last_break(text)
      yield text[:at]
      text = text[at:]
  if text:
    yield text


def _last_break(text: str) -> int:
  for mark in '\n ':
    at = PIECE
    while (at := text.rfind(mark, PIECE // 2, at)) > 0:
      if text[at - 1].isalnum() and text[at + 1].isalnum():
        return at
  return PIECE


def training_texts(texts: Iterable[str]) -> Iterator[str]:
  """Yields texts to train on, in parts that no word makes slow."""
  total = shown = 0
  for text in texts:
    for piece in pieces([text]):
      start = 0
      for match in _WORD.finditer(piece):
        yield piece[start : match.end()]
        start = match.end()
      yield piece[start:]
      total += len(piece)
      if total - shown >= _LARGE:
        shown = total
        print(
          f'tokenizer: read {total / 1e6:.0f} M characters to train on',
          file=sys.stderr,
          flush=True,
        )
      if total >= _MOST:
        return
  if shown:
    print('tokenizer: training', file=sys.stderr, flush=True)


def synthetic_text(length: int, seed: int) -> str:
  """Returns `length` characters of the Markov chain `transitions(seed)`."""
  matrix = transitions(seed)
  # Only uniform draws: no other stream of NumPy is fixed over its versions.
  uniforms = np.random.default_rng((seed, 1)).random(length + 1).tolist()
  # Without the last bound, which rounding can leave below a draw.
  bounds = np.cumsum(matrix, axis=1)[:, :-1].tolist()
  start = np.cumsum(_stationary(matrix))[:-1].tolist()
  state = bisect.bisect_right(start, uniforms[0])
  letters = []
  for uniform in uniforms[1:]:
    letters.append(_ALPHABET[state])
    state = bisect.bisect_right(bounds[state], uniform)
  return ''.join(letters)


def transitions(seed: int) -> np.ndarray:
  """Returns the transition matrix of `synthetic_text`, float64 [16, 16]."""
  size = len(_ALPHABET)
  weights = np.random.default_rng((seed, 0)).random((size, size)) ** 6
  return weights / weights.sum(axis=1, keepdims=True)


def entropy_rate(seed: int) -> float:
  """Returns the entropy rate of `synthetic_text`, in nats per character.

  It is the least expected loss of any model; that of a unigram model is at
  most log 16 = 2.77.

  >>> round(entropy_rate(seed=0), 3)
  1.805
  """
  matrix = transitions(seed)
  row_entropy = -(matrix * np.log(matrix)).sum(axis=1)
  return math.fsum(_stationary(matrix) * row_entropy)


def _stationary(matrix: np.ndarray) -> np.ndarray:
  """Solves p @ matrix = p, sum(p) = 1 by least squares."""
  size = len(matrix)
  equations = np.vstack([matrix.T - np.eye(size), np.ones(size)])
  return np.linalg.lstsq(equations, np.eye(size + 1)[-1], rcond=None)[0]
