"""Tokenizers: bytes, byte-level BPE and SentencePiece.

No tokenizer adds a beginning of text. An end of text follows every document;
names of special tokens in a text stay text. A document of more than
`corpus.PIECE` characters is encoded in pieces, which end where words end.
"""

import json as json_lib
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from covenant import config
from covenant import extras
from covenant.data import corpus as corpus_lib

with extras.needed('run'):
  import tokenizers
  from tokenizers import decoders
  from tokenizers import models
  from tokenizers import pre_tokenizers
  from tokenizers import trainers

END_OF_TEXT = '<|endoftext|>'
# Its names in published tokenizers: GPT and Qwen, Llama 3, Llama 2, Gemma,
# DeepSeek. Only special tokens count: Gemma has the HTML tag '</s>' as text.
_END_NAMES = (
  *(END_OF_TEXT, '<|end_of_text|>', '</s>', '<eos>'),
  *('<｜end▁of▁sentence｜>', '[EOS]'),
)
_END_FIELDS = {
  'tokenizer_config.json': 'eos_token',
  'generation_config.json': 'eos_token_id',
}
_NUM_BYTES = 256


class Tokenizer(Protocol):
  """The interface of a tokenizer.

  Attributes:
    kind: 'bytes', 'bpe' or 'sentencepiece', as in `data.tokenizer`.
    vocab_size: the bound of all ids.
    end_of_text: the id that ends a document; `encode` never returns it.
    has_pieces: True if long texts are encoded in pieces.
  """

  kind: str
  vocab_size: int
  end_of_text: int
  has_pieces: bool

  def encode(self, text: str) -> np.ndarray:
    """Returns the ids of a text without an end of text: int32 [n]."""

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the ids of each text, as `encode` does."""

  def byte_lengths(self) -> np.ndarray:
    """Returns the bytes of text that each id stands for: int64 [vocab_size]."""

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text of ids, ends of text included."""

  def definition(self) -> bytes:
    """Returns the content of its file, which shards store with a digest."""


class _InPieces:
  """The encoding of long texts in pieces, by `_encode` of a subclass."""

  has_pieces = True

  def _encode(self, text: str) -> np.ndarray:
    raise NotImplementedError

  def encode(self, text: str) -> np.ndarray:
    if len(text) <= corpus_lib.PIECE or not self.has_pieces:
      return self._encode(text)
    pieces = corpus_lib.pieces([text])
    return np.concatenate([self._encode(piece) for piece in pieces])

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    return [self.encode(text) for text in texts]

  def _is_local(self) -> bool:
    """Returns True if a text may be cut between a word and a line break."""
    parts = self._encode('ab'), self._encode('\ncd')
    return np.array_equal(self._encode('ab\ncd'), np.concatenate(parts))


class Bytes(_InPieces):
  """A tokenizer whose ids are UTF-8 bytes; id 0 is the end of text.

  >>> Bytes().encode('hé').tolist()
  [104, 195, 169]
  """

  kind = 'bytes'
  vocab_size = _NUM_BYTES
  end_of_text = 0

  def encode(self, text: str) -> np.ndarray:
    content = np.frombuffer(text.encode(), np.uint8)
    if not content.all():
      raise ValueError(
        f'text has a NUL at byte {np.argmin(content)}; NUL is the end of text '
        'of the byte tokenizer, so text must not contain it'
      )
    return content.astype(np.int32)

  def byte_lengths(self) -> np.ndarray:
    return (np.arange(_NUM_BYTES) != self.end_of_text).astype(np.int64)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text; an incomplete character becomes U+FFFD."""
    return bytes(np.asarray(ids, np.uint8)).decode(errors='replace')

  def definition(self) -> bytes:
    return b'utf-8'


class BPE(_InPieces):
  """A tokenizer of the `tokenizers` library, from the text of its JSON.

  Its ids are below `vocab_size`, which counts no special token that no text can
  produce, such as Gemma 3's token for images.

  Args:
    json: the content of a tokenizer.json.
    end_of_text: the name or id of the special token that ends a document; empty
      is one of the usual names.

  Raises:
    ValueError: the JSON is no tokenizer, or has no end of text.
  """

  kind = 'bpe'

  def __init__(self, json: str, end_of_text: str | int = ''):
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(json)
    except Exception as error:  # the library raises bare Exceptions
      raise ValueError(f'not a tokenizer.json: {error}') from error
    self._json = json
    # '<|endoftext|>' in a document must not end it.
    self._tokenizer.encode_special_tokens = True
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    added = self._tokenizer.get_added_tokens_decoder()
    special = {t.content: i for i, t in added.items() if t.special}
    self.end_of_text = _end_of_text(end_of_text, special)
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
    text = [i for i, token in added.items() if not token.special]
    self.vocab_size = 1 + max(self.end_of_text, *vocabulary.values(), *text)
    self.has_pieces = self._is_local()

  @classmethod
  def train(cls, texts: Iterable[str], vocab_size: int) -> 'BPE':
    """Trains a byte-level BPE of at most `vocab_size` ids, deterministically.

    It reads at most the first 2**30 characters, and cuts words of more than 256
    characters: the time of a merge grows with the square of a word's length.

    Raises:
      ValueError: `vocab_size` is below 257, the bytes and the end of text.
    """
    if vocab_size <= _NUM_BYTES:
      raise ValueError(
        'a byte-level BPE needs 257 ids or more, 256 bytes and the end of '
        f'text; got {vocab_size}'
      )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
      vocab_size=vocab_size,
      special_tokens=[END_OF_TEXT],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    )
    tokenizer.train_from_iterator(corpus_lib.training_texts(texts), trainer)
    return cls(tokenizer.to_str())

  def _encode(self, text: str) -> np.ndarray:
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    return np.asarray(encoding.ids, np.int32)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    if any(len(text) > corpus_lib.PIECE for text in texts):
      return super().encode_batch(texts)
    encodings = self._tokenizer.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

  def byte_lengths(self) -> np.ndarray:
    lengths = np.zeros(self.vocab_size, np.int64)
    decoder = json_lib.loads(self._json).get('decoder')
    is_bytes = '"ByteLevel"' in json_lib.dumps(decoder)
    for name, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
      if i < self.vocab_size and i != self.end_of_text:
        lengths[i] = len(name) if is_bytes else _piece_bytes(name)
    return lengths

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    return self._tokenizer.decode(
      np.asarray(ids).tolist(), skip_special_tokens=False
    )

  def to_json(self) -> str:
    """Returns a tokenizer.json for `data.tokenizer_path`."""
    return self._json

  def definition(self) -> bytes:
    return self._json.encode()


class SentencePiece(_InPieces):
  """A SentencePiece model, from the bytes of its .model file.

  Args:
    model: the content of the file.
    end_of_text: the name or id of the control token that ends a document; empty
      is the model's own.

  Raises:
    ConfigError: the package sentencepiece is not installed.
    ValueError: the bytes are no such model, or it has no end of text.
  """

  kind = 'sentencepiece'

  def __init__(self, model: bytes, end_of_text: str | int = ''):
    try:
      import sentencepiece  # noqa: PLC0415  an optional dependency
    except ImportError:
      raise config.ConfigError(
        "data.tokenizer 'sentencepiece' needs the package sentencepiece; run "
        "`pip install 'covenant[data]'`"
      ) from None
    self._model = model
    self._processor = sentencepiece.SentencePieceProcessor()
    try:
      self._processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
      raise ValueError(f'not a SentencePiece model: {error}') from error
    self.vocab_size = self._processor.vocab_size()
    self.end_of_text = self._processor.eos_id()
    if end_of_text != '':
      names = {
        self._processor.id_to_piece(i): i
        for i in range(self.vocab_size)
        if self._processor.is_control(i)
      }
      self.end_of_text = _end_of_text(end_of_text, names)
    if self.end_of_text < 0:
      raise ValueError(
        'expected an end of text token (eos); the model has none'
      )
    self.has_pieces = self._is_local()

  def _encode(self, text: str) -> np.ndarray:
    return np.asarray(self._processor.encode(text), np.int32)

  def byte_lengths(self) -> np.ndarray:
    lengths = np.zeros(self.vocab_size, np.int64)
    for i in range(self.vocab_size):
      if not self._processor.is_control(i):
        lengths[i] = _piece_bytes(self._processor.id_to_piece(i))
    return lengths

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    return self._processor.decode(np.asarray(ids).tolist())

  def definition(self) -> bytes:
    return self._model


def _end_of_text(wanted: str | int, special: dict[str, int]) -> int:
  """Returns the id of the end of text among the special tokens."""
  names = [wanted] if wanted else _END_NAMES
  if isinstance(wanted, int):
    names = [name for name, i in special.items() if i == wanted]
  for name in names:
    if name in special:
      return special[name]
  shown = ', '.join(list(special)[:12]) or 'none'
  expected = repr(wanted) if wanted != '' else f'one of {", ".join(_END_NAMES)}'
  raise ValueError(
    f'expected an end of text token, {expected}; the {len(special)} special '
    f'tokens are {shown}. Name one of them in data.end_of_text'
  )


def _piece_bytes(name: str) -> int:
  """Returns the bytes of text of a piece of SentencePiece."""
  is_byte = re.fullmatch('<0x[0-9A-F]{2}>', name)
  return 1 if is_byte else len(name.replace('▁', ' ').encode())


def make(
  data: config.Data,
  vocab_size: int,
  corpus: corpus_lib.Corpus | Iterable[str],
) -> Tokenizer:
  """Makes the tokenizer of a config.

  Args:
    data: the config of the data. 'bpe' without a path is trained on the
      training documents alone.
    vocab_size: `model.vocab_size`, the number of ids of the model.
    corpus: the documents of the run, or the texts to train 'bpe' on.

  Raises:
    ConfigError: the file is missing or invalid, or needs more than
      `vocab_size` ids.
  """
  tokenizer = _make(data, vocab_size, corpus)
  if tokenizer.vocab_size > vocab_size:
    path = f' ({data.tokenizer_path})' if data.tokenizer_path else ''
    raise config.ConfigError(
      f'model.vocab_size is {vocab_size}, but data.tokenizer '
      f'{data.tokenizer!r}{path} needs {tokenizer.vocab_size}; raise '
      'model.vocab_size or choose another tokenizer'
    )
  return tokenizer


def _make(
  data: config.Data,
  vocab_size: int,
  corpus: corpus_lib.Corpus | Iterable[str],
) -> Tokenizer:
  kind, path = data.tokenizer, pathlib.Path(data.tokenizer_path)
  if kind == 'bytes':
    if data.tokenizer_path:
      raise config.ConfigError(
        "data.tokenizer 'bytes' loads no file; expected an empty "
        f'data.tokenizer_path, got {data.tokenizer_path!r}'
      )
    return Bytes()
  if not data.tokenizer_path:
    if kind == 'sentencepiece':
      raise config.ConfigError(
        "data.tokenizer 'sentencepiece' needs data.tokenizer_path, a .model "
        'file; it is empty'
      )
    if isinstance(corpus, corpus_lib.Corpus):
      corpus = [document.text for document in corpus.train]
    try:
      return BPE.train(corpus, vocab_size)
    except ValueError as error:
      raise config.ConfigError(f'model.vocab_size: {error}') from error
  suffix = {'bpe': '.json', 'sentencepiece': '.model'}[kind]
  if path.suffix != suffix:
    raise config.ConfigError(
      f'data.tokenizer {kind!r} loads a {suffix} file; got '
      f'data.tokenizer_path {data.tokenizer_path!r}'
    )
  if not path.is_file():
    raise config.ConfigError(
      f'data.tokenizer_path: no such file: {data.tokenizer_path!r}'
    )
  content = path.read_bytes()
  try:
    end = data.end_of_text or _configured_end(path.parent)
    if kind == 'bpe':
      return BPE(content.decode(), end)
    return SentencePiece(content, end)
  except config.ConfigError:
    raise
  except ValueError as error:
    raise config.ConfigError(
      f'data.tokenizer_path {data.tokenizer_path!r}: {error}'
    ) from error


def _configured_end(folder: pathlib.Path) -> str | int:
  """Returns the end of text that the files beside a tokenizer name.

  tokenizer_config.json has its name, generation_config.json its id, of which
  the first counts; empty if neither says anything.
  """
  for file, field in _END_FIELDS.items():
    try:
      found = json_lib.loads((folder / file).read_bytes()).get(field)
    except FileNotFoundError:
      continue
    except (ValueError, AttributeError, OSError) as error:
      raise ValueError(f'{folder / file}: {error}') from error
    if isinstance(found, dict):  # a token with its options
      found = found.get('content')
    found = found[0] if isinstance(found, list) and found else found
    if isinstance(found, str | int) and found != '':
      return found
  return ''
