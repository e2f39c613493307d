"""Tests for covenant.data.dataset."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized

from covenant import config
from covenant.data import corpus
from covenant.data import dataset
from covenant.data import shards
from covenant.data import tokenizer


def make(vocab_size: int = 256, **fields) -> config.Config:
  return config.Config(
    model=config.Model(vocab_size=vocab_size), data=config.Data(**fields)
  )


class LoadTest(parameterized.TestCase):
  def write_shards(self) -> str:
    path = pathlib.Path(self.create_tempdir().full_path) / 'shards'
    text = corpus.Corpus(
      train=(corpus.Document('a', 'a' * 99),),
      heldout=(corpus.Document('b', 'b' * 9),),
    )
    shards.write(path, text, tokenizer.Bytes())
    return str(path)

  def test_shakespeare(self):
    data = dataset.load(make())
    self.assertEqual(data.train.num_tokens, 4_708_636)
    self.assertEqual(data.heldout.num_tokens, 610_260)
    self.assertEqual(data.vocab_size, 256)

  def test_synthetic_with_bpe(self):
    fields = {'source': 'synthetic', 'synthetic_tokens': 9000}
    data = dataset.load(make(300, tokenizer='bpe', **fields))
    self.assertEqual(data.vocab_size, 300)
    self.assertEqual(data.train.num_bytes, 8100)
    self.assertGreater(data.train.bytes_per_token, 1.3)

  def test_shards(self):
    data = dataset.load(
      make(source='shards', path=self.write_shards(), context=9)
    )
    self.assertEqual(
      (data.train.num_tokens, data.heldout.num_tokens), (100, 10)
    )

  def test_context_too_large(self):
    path = self.write_shards()
    for context, message in (
      (
        10,
        'data.context is 10, but the heldout split has 10 tokens; expected '
        'at most 9',
      ),
      (100, 'the train split has 100 tokens; expected at most 99'),
    ):
      with self.assertRaisesRegex(config.ConfigError, message):
        dataset.load(make(source='shards', path=path, context=context))

  def test_vocabulary_too_small(self):
    path = self.write_shards()
    with self.assertRaisesRegex(
      config.ConfigError,
      'model.vocab_size is 255, but the shards in data.path .* need 256; raise',
    ):
      dataset.load(make(255, source='shards', path=path, context=4))


class TokenizeTest(parameterized.TestCase):
  def test_end_of_text_follows_each_document(self):
    documents = [corpus.Document(name, name) for name in ('ab', 'é', 'c')]
    text = corpus.Corpus(train=tuple(documents[:2]), heldout=(documents[2],))
    data = dataset.tokenize(text, tokenizer.Bytes())
    self.assertEqual((data.vocab_size, data.end_of_text), (256, 0))
    self.assertEqual(
      data.train.read([0], 5).tolist(), [[97, 98, 0, 195, 169, 0]]
    )
    self.assertEqual(data.heldout.read([0], 1).tolist(), [[99, 0]])
    self.assertEqual((data.train.num_tokens, data.train.num_bytes), (6, 4))
    self.assertAlmostEqual(data.train.bytes_per_token, 4 / 6)


if __name__ == '__main__':
  absltest.main()
