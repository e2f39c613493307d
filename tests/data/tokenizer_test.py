"""Tests for covenant.data.tokenizer."""

import io
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
