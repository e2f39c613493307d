"""A run's tokenizer in the files that Hugging Face's AutoTokenizer loads.

The loaded tokenizer returns the same ids for any text: it adds no beginning of
text, and the name of a special token in a text stays text. There are two
exceptions: it drops a NUL, which the byte tokenizer refuses, and a
SentencePiece unigram model reads the name of a control token as that token.
"""

import contextlib
import importlib
import json
import os
import pathlib
from typing import Any

from covenant import config as config_lib
from covenant import extras
from covenant import files as files_lib
from covenant import typing as ct
from covenant.data import corpus
from covenant.data import shards
from covenant.data import tokenizer as tokenizer_lib
from covenant.data import tokens as tokens_lib

with extras.needed('run'):
  import tokenizers
  from tokenizers import decoders
  from tokenizers import models
  from tokenizers import normalizers
  from tokenizers import pre_tokenizers

JSON = 'tokenizer.json'
_MODEL = 'tokenizer.model'
_END = 'generation_config.json'
KEPT = 'tokenizer'  # folder of a workdir
_SPACE = '▁'  # a space in SentencePiece


def of(config: config_lib.Config) -> tokenizer_lib.Tokenizer:
  """Returns the tokenizer of a run, or that of its shards.

  Raises:
    ConfigError: as `dataset.load`.
  """
  data = config.data
  if data.source != 'shards':
    documents = corpus.load(data, config.seed)
    return tokenizer_lib.make(data, config.model.vocab_size, documents)
  return shards.read_tokenizer(data.paths[0])


def files(tokenizer: tokenizer_lib.Tokenizer, context: int) -> dict[str, bytes]:
  """Returns the content of a tokenizer's files, by name.

  Args:
    tokenizer: the tokenizer of the run.
    context: tokens per sequence in training, at which users truncate.

  Returns:
    tokenizer.json and tokenizer_config.json, and tokenizer.model for
    SentencePiece; the last alone if a tokenizer.json cannot express the model.
  """
  content = tokenizer.definition()
  found = {_MODEL: content} if tokenizer.kind == 'sentencepiece' else {}
  converted = _convert(tokenizer)
  if converted is None:
    return found
  settings = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'eos_token': converted.id_to_token(tokenizer.end_of_text),
    'model_max_length': context,
    'clean_up_tokenization_spaces': False,
    'split_special_tokens': True,
  }
  # Published tokenizers put tokens before a text; ours does not.
  definition = json.loads(converted.to_str()) | {'post_processor': None}
  return found | {
    JSON: _dump(definition),
    'tokenizer_config.json': _dump(settings),
  }


def keep(
  workdir: str | os.PathLike[str],
  config: config_lib.Config,
  data: tokens_lib.TokenData,
) -> None:
  """Writes the files of a run's tokenizer to its workdir, once.

  So the run's model can be exported without its text. Where shards lack their
  tokenizer or the disk is full, the next start tries again.
  """
  folder = pathlib.Path(workdir, KEPT)
  if folder.exists():
    return
  with contextlib.suppress(config_lib.ConfigError, OSError):
    tokenizer = data.tokenizer or shards.read_tokenizer(config.data.paths[0])
    found = files(tokenizer, config.data.context)
    found[_END] = _dump({'eos_token_id': tokenizer.end_of_text})
    with files_lib.new_folder(folder) as partial:
      for name, content in found.items():
        (partial / name).write_bytes(content)


def kept(
  workdir: str | os.PathLike[str], config: config_lib.Config
) -> tuple[dict[str, bytes], int]:
  """Returns a run's tokenizer: its files by name, and the end of text.

  They are those of the workdir, or made from the data of the config.

  Raises:
    ConfigError: as `dataset.load`, where the workdir has none.
  """
  folder = pathlib.Path(workdir, KEPT)
  if not folder.is_dir():
    tokenizer = of(config)
    return files(tokenizer, config.data.context), tokenizer.end_of_text
  found = {path.name: path.read_bytes() for path in folder.iterdir()}
  return found, json.loads(found.pop(_END))['eos_token_id']


def check(
  folder: str | pathlib.Path, tokenizer: tokenizer_lib.Tokenizer
) -> None:
  """Compares the vocabulary in a folder with that of a tokenizer.

  Raises:
    ConfigError: the folder has no tokenizer.json, or another vocabulary.
  """
  path = pathlib.Path(folder, JSON)
  converted = _convert(tokenizer)
  if converted is None:
    raise config_lib.ConfigError(
      f'{path} cannot be compared with this kind of SentencePiece model'
    )
  if not path.is_file():
    raise config_lib.ConfigError(
      f'pretrained: expected a folder with a {JSON}, there is no {path}'
    )
  try:
    there = tokenizers.Tokenizer.from_str(path.read_text(encoding='utf-8'))
  except Exception as e:  # the library raises bare Exceptions
    raise config_lib.ConfigError(f'{path}: not a tokenizer: {e}') from e
  sizes = [t.get_vocab_size(with_added_tokens=True) for t in (there, converted)]
  for i in range(max(tokenizer.vocab_size, *sizes)):
    expected, got = converted.id_to_token(i), there.id_to_token(i)
    if expected != got:
      raise config_lib.ConfigError(
        f'{path} is the vocabulary of another tokenizer: id {i} is {got!r} '
        f'there, {expected!r} in data.tokenizer {tokenizer.kind!r}'
      )


def _dump(content: ct.Json) -> bytes:
  return json.dumps(content, ensure_ascii=False, indent=2).encode() + b'\n'


def _convert(
  tokenizer: tokenizer_lib.Tokenizer,
) -> tokenizers.Tokenizer | None:
  if tokenizer.kind == 'bytes':
    return _bytes()
  if tokenizer.kind == 'bpe':
    return tokenizers.Tokenizer.from_str(tokenizer.definition().decode())
  return _sentencepiece(tokenizer.definition())


def _bytes() -> tokenizers.Tokenizer:
  """Makes a byte-level BPE without merges, whose ids are the bytes."""
  level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  # Printable bytes are characters of the alphabet themselves; the others, in
  # ascending order, are the characters from U+0100.
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=ord)
  printable = {ord(c) for c in alphabet if ord(c) < 256}
  others = iter(c for c in alphabet if ord(c) > 255)
  names = [chr(b) if b in printable else next(others) for b in range(256)]
  names[tokenizer_lib.Bytes.end_of_text] = '\0'  # as `Bytes` decodes it
  vocabulary = {name: i for i, name in enumerate(names)}
  result = tokenizers.Tokenizer(models.BPE(vocabulary, []))
  result.pre_tokenizer = level
  result.decoder = decoders.ByteLevel()
  result.add_special_tokens([_added('\0')])
  return result


def _added(name: str, special: bool = True) -> tokenizers.AddedToken:
  return tokenizers.AddedToken(name, special=special, normalized=False)


def _sentencepiece(content: bytes) -> tokenizers.Tokenizer | None:
  """Converts a unigram or BPE model; None if it has no counterpart.

  The fields are those of sentencepiece_model.proto.
  """
  with extras.needed('data'):  # its names exist at run time only
    proto: Any = importlib.import_module(
      'sentencepiece.sentencepiece_model_pb2'
    )
  spm = proto.ModelProto.FromString(content)
  trainer, normalizer = spm.trainer_spec, spm.normalizer_spec
  kinds = {name: [] for name in ('NORMAL', 'CONTROL', 'USER_DEFINED')}
  for piece in spm.pieces:
    kind = spm.SentencePiece.Type.Name(piece.type)
    kinds.setdefault(kind, []).append(piece.piece)
  cuts = normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces
  if (
    trainer.model_type not in (trainer.UNIGRAM, trainer.BPE)
    or trainer.treat_whitespace_as_suffix
    or not normalizer.escape_whitespaces
    # The normalizer would treat the pieces between them as texts.
    or (kinds['USER_DEFINED'] and cuts)
  ):
    return None
  fallback = {'byte_fallback': trainer.byte_fallback}
  if trainer.model_type == trainer.UNIGRAM:
    scores = [(piece.piece, piece.score) for piece in spm.pieces]
    model = models.Unigram(scores, trainer.unk_id, **fallback)
  else:
    vocabulary = {piece.piece: i for i, piece in enumerate(spm.pieces)}
    model = models.BPE(
      vocabulary,
      _merges(spm.pieces, vocabulary, set(kinds['NORMAL'])),
      unk_token=spm.pieces[trainer.unk_id].piece,
      fuse_unk=True,
      **fallback,
    )
  result = tokenizers.Tokenizer(model)
  steps: list[normalizers.Normalizer] = []
  if normalizer.precompiled_charsmap:
    steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
  if normalizer.remove_extra_whitespaces:
    steps.append(normalizers.Replace(tokenizers.Regex('^ +| +$'), ''))
    steps.append(normalizers.Replace(tokenizers.Regex(' {2,}'), ' '))
  if normalizer.add_dummy_prefix:
    steps.append(normalizers.Prepend(_SPACE))
  steps.append(normalizers.Replace(' ', _SPACE))
  result.normalizer = normalizers.Sequence(steps)
  parts: list[decoders.Decoder] = [
    decoders.Replace(_SPACE, ' '),
    decoders.ByteFallback(),
    decoders.Fuse(),
  ]
  if normalizer.add_dummy_prefix:
    parts.append(decoders.Strip(' ', 1, 0))
  result.decoder = decoders.Sequence(parts)
  result.add_special_tokens([_added(name) for name in kinds['CONTROL']])
  result.add_tokens([_added(n, special=False) for n in kinds['USER_DEFINED']])
  return result


def _merges(
  pieces: Any, vocabulary: dict[str, int], normal: set[str]
) -> list[tuple[str, str]]:
  """Lists all ways to merge two pieces into one, the best piece first."""
  found = []
  for piece in pieces:
    name = piece.piece
    if name in normal:
      for i in range(1, len(name)):
        left, right = name[:i], name[i:]
        if left in normal and right in normal:
          rank = (-piece.score, vocabulary[left], vocabulary[right])
          found.append((rank, (left, right)))
  return [merge for _, merge in sorted(found)]
