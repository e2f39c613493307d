"""Text to token ids and back: bytes, byte-level BPE, SentencePiece."""

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
# The names that published tokenizers give to it: GPT, Llama 3, Llama 2, Gemma.
_END_NAMES = (END_OF_TEXT, '<|end_of_text|>', '</s>', '<eos>')
_NUM_BYTES = 256


class Tokenizer(Protocol):
  """What the rest of the project knows of a tokenizer.

  Attributes:
    kind: 'bytes', 'bpe' or 'sentencepiece', as in `data.tokenizer`.
    vocab_size: All ids are below it.
    end_of_text: The id that ends a document. `encode` never makes it.
  """

  kind: str
  vocab_size: int
  end_of_text: int

  def encode(self, text: str) -> np.ndarray:
    """The ids of `text`: int32 [n], without an end of text."""

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """The text of `ids`, an end of text included."""

  def definition(self) -> bytes:
    """What makes this tokenizer this one; shards carry it and its digest."""


class Bytes:
  """UTF-8 bytes as ids. Id 0, which text must not contain, ends a text.

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
    """A cut character becomes U+FFFD."""
    return bytes(np.asarray(ids, np.uint8)).decode(errors='replace')

  def definition(self) -> bytes:
    return b'utf-8'


class BPE:
  """A tokenizer of the `tokenizers` library, from the text of its JSON.

  Raises:
    ValueError: Not such JSON, or it has no end of text.
  """

  kind = 'bpe'

  def __init__(self, json: str):
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(json)
    except Exception as error:  # the library raises bare Exceptions
      raise ValueError(f'not a tokenizer.json: {error}') from error
    self._json = json
    # A document that says '<|endoftext|>' must not end there. The JSON does
    # not keep this switch.
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
    """A byte-level BPE of at most `vocab_size` ids; same texts, same ids.

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
    """A tokenizer.json, for `data.tokenizer_path` and other libraries."""
    return self._json

  def definition(self) -> bytes:
    return self._json.encode()


class SentencePiece:
  """A SentencePiece model, from the bytes of its .model file.

  Raises:
    ConfigError: The package sentencepiece is not installed.
    ValueError: Not such a model, or it has no end of text.
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


def make(
  data: config.Data, vocab_size: int, corpus: corpus_lib.Corpus
) -> Tokenizer:
  """The tokenizer `data` asks for.

  Args:
    data: `tokenizer` and `tokenizer_path` are used. 'bpe' without a path is
      trained on the training documents, and on them only.
    vocab_size: `model.vocab_size`, the ids that the model has room for.
    corpus: Where a BPE learns.

  Raises:
    ConfigError: The file is missing or wrong, or needs more than `vocab_size`
      ids.
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
