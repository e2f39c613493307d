"""Tokenizers: bytes, byte-level BPE and SentencePiece."""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import trainers

from covenant import config
from covenant.data import corpus as corpus_lib

END_OF_TEXT = '<|endoftext|>'
# Its names in published tokenizers: GPT, Llama 3, Llama 2, Gemma.
_END_NAMES = (END_OF_TEXT, '<|end_of_text|>', '</s>', '<eos>')
_NUM_BYTES = 256


class Tokenizer(Protocol):
  """The interface of a tokenizer.

  Attributes:
    kind: 'bytes', 'bpe' or 'sentencepiece', as in `data.tokenizer`.
    vocab_size: the bound of all ids.
    end_of_text: the id that ends a document; `encode` never returns it.
  """

  kind: str
  vocab_size: int
  end_of_text: int

  def encode(self, text: str) -> np.ndarray:
    """Returns the ids of a text without an end of text: int32 [n]."""

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text of ids, ends of text included."""

  def definition(self) -> bytes:
    """Returns the content of its file, which shards store with a digest."""


class Bytes:
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

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text; an incomplete character becomes U+FFFD."""
    return bytes(np.asarray(ids, np.uint8)).decode(errors='replace')

  def definition(self) -> bytes:
    return b'utf-8'


class BPE:
  """A tokenizer of the `tokenizers` library, from the text of its JSON.

  Raises:
    ValueError: the JSON is no tokenizer, or has no end of text.
  """

  kind = 'bpe'

  def __init__(self, json: str):
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(json)
    except Exception as error:  # the library raises bare Exceptions
      raise ValueError(f'not a tokenizer.json: {error}') from error
    self._json = json
    # '<|endoftext|>' in a document must not end it. The JSON does not store
    # this switch.
    self._tokenizer.encode_special_tokens = True
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    ends = [vocabulary[name] for name in _END_NAMES if name in vocabulary]
    if not ends:
      raise ValueError(
        f'expected an end of text token, one of {", ".join(_END_NAMES)}; the '
        f'{len(vocabulary)} tokens have none'
      )
    self.end_of_text = ends[0]
    self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps

  @classmethod
  def train(cls, texts: Iterable[str], vocab_size: int) -> 'BPE':
    """Trains a byte-level BPE of at most `vocab_size` ids, deterministically.

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
    tokenizer.train_from_iterator(texts, trainer)
    return cls(tokenizer.to_str())

  def encode(self, text: str) -> np.ndarray:
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    return np.asarray(encoding.ids, np.int32)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    return self._tokenizer.decode(
      np.asarray(ids).tolist(), skip_special_tokens=False
    )

  def to_json(self) -> str:
    """Returns a tokenizer.json for `data.tokenizer_path`."""
    return self._json

  def definition(self) -> bytes:
    return self._json.encode()


class SentencePiece:
  """A SentencePiece model, from the bytes of its .model file.

  Raises:
    ConfigError: the package sentencepiece is not installed.
    ValueError: the bytes are no such model, or it has no end of text.
  """

  kind = 'sentencepiece'

  def __init__(self, model: bytes):
    try:
      import sentencepiece  # noqa: PLC0415  an optional dependency
    except ImportError:
      raise config.ConfigError(
        "data.tokenizer 'sentencepiece' needs the package sentencepiece; run "
        "`pip install 'covenant[sentencepiece]'`"
      ) from None
    self._model = model
    self._processor = sentencepiece.SentencePieceProcessor()
    try:
      self._processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
      raise ValueError(f'not a SentencePiece model: {error}') from error
    self.vocab_size = self._processor.vocab_size()
    self.end_of_text = self._processor.eos_id()
    if self.end_of_text < 0:
      raise ValueError(
        'expected an end of text token (eos); the model has none'
      )

  def encode(self, text: str) -> np.ndarray:
    return np.asarray(self._processor.encode(text), np.int32)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    return self._processor.decode(np.asarray(ids).tolist())

  def definition(self) -> bytes:
    return self._model


def token_dtype(vocab_size: int) -> np.dtype:
  """Returns the dtype of stored ids: little-endian uint16 or uint32.

  >>> token_dtype(65536), token_dtype(65537)
  (dtype('uint16'), dtype('uint32'))
  """
  return np.dtype('<u2' if vocab_size <= 2**16 else '<u4')


def encode(document: corpus_lib.Document, tokenizer: Tokenizer) -> np.ndarray:
  """Returns the tokens of a document with its end of text: [n]."""
  dtype = token_dtype(tokenizer.vocab_size)
  ids = tokenizer.encode(document.text).astype(dtype)
  return np.append(ids, dtype.type(tokenizer.end_of_text))


def make(
  data: config.Data, vocab_size: int, corpus: corpus_lib.Corpus
) -> Tokenizer:
  """Makes the tokenizer of a config.

  Args:
    data: the config of the data. 'bpe' without a path is trained on the
      training documents alone.
    vocab_size: `model.vocab_size`, the number of ids of the model.
    corpus: the documents of the run.

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
  data: config.Data, vocab_size: int, corpus: corpus_lib.Corpus
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
    try:
      return BPE.train((d.text for d in corpus.train), vocab_size)
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
    return BPE(content.decode()) if kind == 'bpe' else SentencePiece(content)
  except config.ConfigError:
    raise
  except ValueError as error:
    raise config.ConfigError(
      f'data.tokenizer_path {data.tokenizer_path!r}: {error}'
    ) from error
