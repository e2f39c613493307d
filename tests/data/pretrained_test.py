"""Tests of tokenizers for Hugging Face: the ids are ours.

tokenizer.json is read with the tokenizers library, on which AutoTokenizer is
built; AutoTokenizer itself where transformers is installed.
"""

import importlib.util
import io
import json
import pathlib
import unittest

import hypothesis
import hypothesis.strategies as st
import pytest
import sentencepiece
import tokenizers
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config
from covenant.data import corpus
from covenant.data import pretrained
from covenant.data import shards
from covenant.data import tokenizer as tokenizer_lib

TEXTS = (
  'the cat sat on the mat; ' * 20 + 'a hat, a bat and a rat: 1234 times',
  'the hat of the cat\n' * 20 + 'nothing else to say, or so it seems',
)
BYTES = tokenizer_lib.Bytes()
BPE = tokenizer_lib.BPE.train(TEXTS, 290)


def sentencepiece_model(**options):
  writer = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter('\n'.join(TEXTS).replace(';', '\n').split('\n')),
    model_writer=writer,
    hard_vocab_limit=False,
    minloglevel=2,
    **({'vocab_size': 60} | options),
  )
  return tokenizer_lib.SentencePiece(writer.getvalue())


_AS_LLAMA_2 = {
  'model_type': 'bpe',
  'byte_fallback': True,
  'vocab_size': 330,
  'normalization_rule_name': 'identity',
  'remove_extra_whitespaces': False,
}
UNIGRAM = sentencepiece_model()
LLAMA_2 = sentencepiece_model(**_AS_LLAMA_2)
GEMMA = sentencepiece_model(
  add_dummy_prefix=False, user_defined_symbols=['\n', '\n\n'], **_AS_LLAMA_2
)
ALL = {
  'bytes': BYTES,
  'bpe': BPE,
  'unigram': UNIGRAM,
  'llama 2': LLAMA_2,
  'gemma': GEMMA,
}
LINES = (
  '',
  ' ',
  '  two  spaces\t and\r\n a tab ',
  'the cat sat on the mat; the hat of the hatter',
  'wörld ﬁ ½ Å 日本 🙂🙂',
  'aaaaaaaa\n\n\nbbb ▁x',
  '<|endoftext|> is text, and so is Ā',
)
TEXT = st.text(st.characters(codec='utf-8', exclude_characters='\0')) | st.text(
  'abcehmnost ,;\n'
)


def exported(tokenizer):
  files = pretrained.files(tokenizer, 64)
  return tokenizers.Tokenizer.from_str(files['tokenizer.json'].decode())


class PretrainedTest(parameterized.TestCase):
  @parameterized.named_parameters((name, name) for name in ALL)
  def test_same_ids_for_any_text(self, name):
    there = exported(ALL[name])
    there.encode_special_tokens = True  # 'split_special_tokens'

    @hypothesis.given(TEXT)
    def same(text):
      self.assertEqual(there.encode(text).ids, ALL[name].encode(text).tolist())

    same()
    for text in LINES:
      ids = ALL[name].encode(text).tolist()
      self.assertEqual(there.encode(text).ids, ids, text)
      if name != 'unigram':  # whose unknown characters have another spelling
        self.assertEqual(
          there.decode(ids, skip_special_tokens=False), ALL[name].decode(ids)
        )

  @unittest.skipIf(
    importlib.util.find_spec('transformers') is None,
    "transformers is not installed; pip install 'covenant[hf]'",
  )
  @parameterized.named_parameters((name, name) for name in ALL)
  @pytest.mark.filterwarnings('ignore')  # theirs
  @pytest.mark.rows(1)
  def test_auto_tokenizer(self, name):
    import transformers

    folder = pathlib.Path(self.create_tempdir().full_path)
    for file, content in pretrained.files(ALL[name], 64).items():
      (folder / file).write_bytes(content)
    (folder / 'config.json').write_text('{"model_type": "llama"}')
    there = transformers.AutoTokenizer.from_pretrained(folder)
    self.assertEqual(there.eos_token_id, ALL[name].end_of_text)
    self.assertIsNone(there.bos_token_id)
    self.assertEqual(there.model_max_length, 64)
    for text in LINES:
      self.assertEqual(there(text).input_ids, ALL[name].encode(text).tolist())

  def test_bytes(self):
    there = exported(BYTES)
    self.assertEqual(there.get_vocab_size(), 256)
    self.assertEqual(there.token_to_id('\0'), 0)
    text = ''.join(map(chr, range(1, 0x800)))
    self.assertEqual(bytes(there.encode(text).ids), text.encode())

  def test_nothing_is_put_before_a_text(self):
    """Published tokenizers may; the run never saw it."""
    definition = json.loads(BPE.to_json())
    end = tokenizer_lib.END_OF_TEXT
    definition['post_processor'] = {
      'type': 'TemplateProcessing',
      'single': [
        {'SpecialToken': {'id': end, 'type_id': 0}},
        {'Sequence': {'id': 'A', 'type_id': 0}},
      ],
      'pair': [{'Sequence': {'id': 'A', 'type_id': 0}}],
      'special_tokens': {end: {'id': end, 'ids': [0], 'tokens': [end]}},
    }
    bpe = tokenizer_lib.BPE(json.dumps(definition))
    self.assertEqual(
      exported(bpe).encode('the cat').ids, bpe.encode('the cat').tolist()
    )

  @parameterized.parameters(
    dict(model_type='word'),
    dict(model_type='char'),
    dict(user_defined_symbols=['the']),
  )
  def test_what_cannot_be_converted_is_only_copied(self, **options):
    model = sentencepiece_model(**options)
    self.assertEqual(
      pretrained.files(model, 64), {'tokenizer.model': model.definition()}
    )

  def test_check(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    path = folder / 'tokenizer.json'
    path.write_bytes(pretrained.files(BPE, 64)['tokenizer.json'])
    pretrained.check(folder, BPE)
    other = tokenizer_lib.BPE.train(('zyx ' * 50,), 290)
    for tokenizer in (other, BYTES):
      with self.assertRaisesRegex(config.ConfigError, 'of another tokenizer'):
        pretrained.check(folder, tokenizer)
    path.write_text('{')
    with self.assertRaisesRegex(config.ConfigError, 'not a tokenizer'):
      pretrained.check(folder, BPE)

  @parameterized.parameters(BYTES, BPE, LLAMA_2)
  def test_of_shards(self, tokenizer):
    folder = pathlib.Path(self.create_tempdir().full_path, 'shards')
    documents = corpus.Corpus(
      train=(corpus.Document('a', TEXTS[0]),),
      heldout=(corpus.Document('b', TEXTS[1]),),
    )
    shards.write(folder, documents, tokenizer)
    found = pretrained.of(
      config.Config(data=config.Data(source='shards', path=str(folder)))
    )
    self.assertEqual(found.kind, tokenizer.kind)
    self.assertEqual(found.definition(), tokenizer.definition())

  def test_of_text(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    for name in 'ab':
      (folder / f'{name}.txt').write_text(TEXTS[0] + name)
    data = config.Data(source='text', path=str(folder), tokenizer='bpe')
    found = pretrained.of(
      config.Config(model=config.Model(vocab_size=300), data=data)
    )
    self.assertEqual(found.kind, 'bpe')
    self.assertGreater(found.vocab_size, 257)  # it has learnt something


if __name__ == '__main__':
  absltest.main()
