"""Tests for covenant.data.tokenizer."""

import io
import json
import pathlib
import sys
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import numpy as np
import sentencepiece
import tokenizers
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config
from covenant.data import corpus as corpus_lib
from covenant.data import tokenizer

TEXTS = ('the cat sat on the mat; ' * 20, 'the hat of the cat\n' * 20)
CORPUS = corpus_lib.Corpus(
  train=tuple(corpus_lib.Document(f'{i}', t) for i, t in enumerate(TEXTS)),
  heldout=(corpus_lib.Document('held', 'zyx zyx zyx zyx ' * 50),),
)
TRAINED = tokenizer.BPE.train(TEXTS, 270)


def model(**options) -> bytes:
  """A SentencePiece model of a few ids."""
  writer = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS[0].split(';') + TEXTS[1].split('\n')),
    model_writer=writer,
    vocab_size=30,
    hard_vocab_limit=False,
    minloglevel=2,
    **options,
  )
  return writer.getvalue()


class BytesTest(parameterized.TestCase):
  @hypothesis.settings(deadline=None)
  @hypothesis.given(
    st.text(st.characters(codec='utf-8', exclude_characters='\0'))
  )
  def test_round_trip(self, text):
    ids = tokenizer.Bytes().encode(text)
    self.assertEqual(ids.dtype, np.int32)
    self.assertEqual(bytes(ids.tolist()), text.encode())
    self.assertNotIn(tokenizer.Bytes().end_of_text, ids)
    self.assertEqual(tokenizer.Bytes().decode(ids), text)

  def test_all_ids_fit(self):
    self.assertEqual(tokenizer.Bytes().vocab_size, 256)

  def test_nul(self):
    with self.assertRaisesRegex(ValueError, 'text has a NUL at byte 2'):
      tokenizer.Bytes().encode('é\0')

  def test_cut_character(self):
    self.assertEqual(tokenizer.Bytes().decode([104, 195]), 'h\ufffd')


class BPETest(parameterized.TestCase):
  @hypothesis.settings(deadline=None)
  @hypothesis.given(
    st.text(st.characters(codec='utf-8'))
    | st.lists(
      st.sampled_from(['the', ' cat', '<|endoftext|>', '\r\n', ' ', '\0', 'é'])
    ).map(''.join)
  )
  def test_round_trip(self, text):
    ids = TRAINED.encode(text)
    self.assertEqual(ids.dtype, np.int32)
    self.assertEqual(TRAINED.decode(ids), text)
    self.assertNotIn(TRAINED.end_of_text, ids)
    self.assertTrue(np.all(ids < TRAINED.vocab_size))

  def test_compresses(self):
    self.assertLess(len(TRAINED.encode(TEXTS[0])), len(TEXTS[0]) // 2)
    self.assertEqual(TRAINED.vocab_size, 270)

  def test_training_is_deterministic(self):
    again = tokenizer.BPE.train(TEXTS, 270)
    self.assertEqual(again.to_json(), TRAINED.to_json())

  def test_json_round_trip(self):
    loaded = tokenizer.BPE(TRAINED.to_json())
    text = 'the cat <|endoftext|> é'
    np.testing.assert_array_equal(loaded.encode(text), TRAINED.encode(text))
    self.assertEqual(loaded.definition(), TRAINED.definition())
    self.assertEqual(loaded.end_of_text, TRAINED.end_of_text)

  def test_decode_shows_end_of_text(self):
    ids = np.append(TRAINED.encode('cat'), TRAINED.end_of_text)
    self.assertEqual(TRAINED.decode(ids), 'cat<|endoftext|>')

  def test_vocabulary_with_gaps(self):
    library = tokenizers.Tokenizer(
      tokenizers.models.WordLevel({'a': 0, '</s>': 9}, unk_token='a')
    )
    library.add_special_tokens(['</s>'])
    loaded = tokenizer.BPE(library.to_str())
    self.assertEqual((loaded.vocab_size, loaded.end_of_text), (10, 9))

  def test_no_end_of_text(self):
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0}))
    with self.assertRaisesRegex(
      ValueError, r'expected an end of text token, one of .*; the 0 special'
    ):
      tokenizer.BPE(library.to_str())

  def test_not_json(self):
    with self.assertRaisesRegex(ValueError, 'not a tokenizer.json: '):
      tokenizer.BPE('{')

  def test_too_few_ids(self):
    with self.assertRaisesRegex(ValueError, 'needs 257 ids or more.*got 256'):
      tokenizer.BPE.train(TEXTS, 256)


def _published(
  special: tuple[str, ...], text: tuple[str, ...] = (), gap: int = 0
) -> tokenizers.Tokenizer:
  """A tokenizer with the structure of a published one, of a few ids.

  Args:
    special: the names of special tokens, in front as in Gemma.
    text: the names of added tokens that are text.
    gap: 1 adds a special token behind the vocabulary, as Gemma 3 has.
  """
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  made.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=290,
    special_tokens=[*special, *text],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator(TEXTS, trainer)
  if gap:
    made.add_special_tokens(['<image_soft_token>'])
  record = json.loads(made.to_str())
  for token in record['added_tokens']:
    token['special'] = token['content'] not in text
  return tokenizers.Tokenizer.from_str(json.dumps(record))


class PublishedTest(parameterized.TestCase):
  def make(self, made, files=(), **fields):
    folder = pathlib.Path(self.create_tempdir().full_path)
    path = folder / 'tokenizer.json'
    path.write_text(made.to_str())
    for name, content in dict(files).items():
      (folder / name).write_text(json.dumps(content))
    data = config.Data(tokenizer='bpe', tokenizer_path=str(path), **fields)
    return tokenizer.make(data, 300, CORPUS)

  def end(self, made, *args, **fields) -> str:
    found = self.make(made, *args, **fields)
    return made.id_to_token(found.end_of_text)

  def test_gemma(self):
    """'</s>' is an HTML tag, and no text gives the token for images."""
    made = _published(('<pad>', '<eos>', '<bos>'), ('</s>', '<h1>'), gap=1)
    found = self.make(made)
    self.assertEqual(made.id_to_token(found.end_of_text), '<eos>')
    self.assertEqual(found.vocab_size, made.get_vocab_size() - 1)
    ids = found.encode('a</s><eos><bos><image_soft_token>')
    self.assertIn(made.token_to_id('</s>'), ids)
    self.assertNotIn(found.end_of_text, ids)
    self.assertLess(ids.max(), found.vocab_size)
    self.assertEqual(found.decode(ids), 'a</s><eos><bos><image_soft_token>')

  @parameterized.parameters(
    (('<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>'), '<|end_of_text|>'),
    (('<|endoftext|>', '<|im_start|>', '<|im_end|>'), '<|endoftext|>'),
    (
      ('<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>'),
      '<｜end▁of▁sentence｜>',
    ),
    (('[CLS]', '[EOS]'), '[EOS]'),
  )
  def test_llama_3_qwen_deepseek(self, special, expected):
    self.assertEqual(self.end(_published(special)), expected)

  def test_files_beside_it_and_the_config_come_first(self):
    made = _published(('<a>', '<b>', '<|endoftext|>'), ('<t>',))
    by_name = {'tokenizer_config.json': {'eos_token': '<b>'}}
    by_dict = {'tokenizer_config.json': {'eos_token': {'content': '<b>'}}}
    by_id = {'generation_config.json': {'eos_token_id': [0, 1]}}
    nothing = {'tokenizer_config.json': {'eos_token': None}}
    for files, expected in (
      (by_name, '<b>'),
      (by_dict, '<b>'),
      (by_id, '<a>'),
      (by_name | by_id, '<b>'),
      (nothing | by_id, '<a>'),
      (nothing, '<|endoftext|>'),
    ):
      self.assertEqual(self.end(made, files), expected)
      self.assertEqual(self.end(made, files, end_of_text='<a>'), '<a>')

  @parameterized.parameters('<t>', '<no>', 'the')
  def test_only_special_tokens_can_be_the_end(self, name):
    made = _published(('<a>', '<b>'), ('<t>',))
    with self.assertRaisesRegex(
      config.ConfigError,
      f"an end of text token, '{name}'; the 2 special tokens are <a>, <b>",
    ):
      self.make(made, end_of_text=name)

  def test_byte_lengths(self):
    for encoder in (
      tokenizer.Bytes(), TRAINED, tokenizer.SentencePiece(model())
    ):  # fmt: skip
      ids = encoder.encode('the cat sat')
      self.assertEqual(
        int(encoder.byte_lengths()[ids].sum()),
        len(
          ' the cat sat' if encoder.kind == 'sentencepiece' else 'the cat sat'
        ),
      )


class BoundedTest(parameterized.TestCase):
  def test_words_without_spaces_are_trained_on_in_parts(self):
    letters = 'abcdefghij' * 1000
    parts = list(corpus_lib.training_texts([letters, 'a b', ' ' * 600]))
    self.assertLessEqual(max(map(len, parts)), 256)
    self.assertEqual(''.join(parts), letters + 'a b' + ' ' * 600)
    self.assertEqual(list(corpus_lib.training_texts(TEXTS)), list(TEXTS))

  def test_long_texts_are_encoded_in_pieces_with_the_same_ids(self):
    text = TEXTS[0] * 20
    whole = TRAINED.encode(text)
    with mock.patch.object(corpus_lib, 'PIECE', 100):
      np.testing.assert_array_equal(TRAINED.encode(text), whole)
      (batched,) = TRAINED.encode_batch([text])
      np.testing.assert_array_equal(batched, whole)
      pieces = list(corpus_lib.pieces([text]))
      again = list(
        corpus_lib.pieces(text[i : i + 7] for i in range(0, 9600, 7))
      )
    self.assertGreater(len(pieces), 50)
    self.assertEqual(again, pieces)
    self.assertEqual(''.join(pieces), text)

  def test_a_text_with_a_prefix_of_its_own_is_not_cut(self):
    prefixed = model(
      remove_extra_whitespaces=False, normalization_rule_name='identity'
    )
    self.assertFalse(tokenizer.SentencePiece(prefixed).has_pieces)
    self.assertTrue(TRAINED.has_pieces)


class SentencePieceTest(parameterized.TestCase):
  def test_round_trip(self):
    definition = model()
    loaded = tokenizer.SentencePiece(definition)
    ids = loaded.encode('the cat sat')
    self.assertEqual(ids.dtype, np.int32)
    self.assertEqual(loaded.decode(ids), 'the cat sat')
    self.assertNotIn(loaded.end_of_text, ids)
    self.assertLess(ids.max(), loaded.vocab_size)
    self.assertEqual(loaded.definition(), definition)

  def test_no_end_of_text(self):
    with self.assertRaisesRegex(ValueError, 'the model has none'):
      tokenizer.SentencePiece(model(eos_id=-1))

  def test_not_a_model(self):
    with self.assertRaisesRegex(ValueError, 'not a SentencePiece model'):
      tokenizer.SentencePiece(b'nonsense')

  def test_not_installed(self):
    with (
      mock.patch.dict(sys.modules, sentencepiece=None),
      self.assertRaisesRegex(
        config.ConfigError, r"pip install 'covenant\[data\]'"
      ),
    ):
      tokenizer.SentencePiece(b'')


class MakeTest(parameterized.TestCase):
  def write(self, name: str, content: bytes) -> str:
    path = pathlib.Path(self.create_tempdir().full_path) / name
    path.write_bytes(content)
    return str(path)

  def make(self, vocab_size: int = 270, **fields) -> tokenizer.Tokenizer:
    return tokenizer.make(config.Data(**fields), vocab_size, CORPUS)

  def test_bytes(self):
    self.assertEqual(self.make(256).kind, 'bytes')

  def test_bpe_learns_from_training_documents_only(self):
    made = self.make(tokenizer='bpe')
    self.assertEqual(made.definition(), TRAINED.definition())
    self.assertLen(made.encode('zyx'), 3)

  def test_bpe_from_file(self):
    path = self.write('a.json', TRAINED.definition())
    made = self.make(tokenizer='bpe', tokenizer_path=path)
    self.assertEqual(made.definition(), TRAINED.definition())

  def test_sentencepiece_from_file(self):
    path = self.write('a.model', model())
    made = self.make(tokenizer='sentencepiece', tokenizer_path=path)
    self.assertEqual(made.kind, 'sentencepiece')

  def test_too_many_ids(self):
    path = self.write('a.json', TRAINED.definition())
    with self.assertRaisesRegex(
      config.ConfigError,
      r"model.vocab_size is 269, but data.tokenizer 'bpe' \(.*a.json\) needs "
      '270; raise',
    ):
      self.make(269, tokenizer='bpe', tokenizer_path=path)
    with self.assertRaisesRegex(
      config.ConfigError,
      "model.vocab_size is 255, but data.tokenizer 'bytes' needs 256",
    ):
      self.make(255)

  def test_too_few_ids_to_train(self):
    with self.assertRaisesRegex(
      config.ConfigError, 'model.vocab_size: a byte-level BPE needs 257'
    ):
      self.make(256, tokenizer='bpe')

  @parameterized.parameters(
    ('bytes', 'a.json', "'bytes' loads no file; expected an empty"),
    ('bpe', 'a.model', "'bpe' loads a .json file; got .* 'a.model'"),
    ('bpe', 'a.json', "data.tokenizer_path: no such file: 'a.json'"),
    ('sentencepiece', '', 'needs data.tokenizer_path, a .model file'),
    ('sentencepiece', 'a.json', "'sentencepiece' loads a .model file; got"),
  )
  def test_path(self, kind, path, message):
    with self.assertRaisesRegex(config.ConfigError, message):
      self.make(tokenizer=kind, tokenizer_path=path)

  @parameterized.parameters(
    ('bpe', 'a.json', b'{}', 'not a tokenizer.json'),
    ('bpe', 'a.json', b'\xff', "can't decode"),
    ('sentencepiece', 'a.model', b'{}', 'not a SentencePiece model'),
  )
  def test_file_broken(self, kind, name, content, message):
    path = self.write(name, content)
    with self.assertRaisesRegex(
      config.ConfigError, f"data.tokenizer_path '.*{name}': .*{message}"
    ):
      self.make(tokenizer=kind, tokenizer_path=path)


if __name__ == '__main__':
  absltest.main()
