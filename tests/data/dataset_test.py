"""Tests for covenant.data.dataset."""

import dataclasses
import pathlib

import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config
from covenant.data import assignment
from covenant.data import corpus
from covenant.data import dataset
from covenant.data import shards
from covenant.data import tokenizer
from covenant.emulate import emulation
from covenant.gauntlet import ratings
from tests import helpers


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


class PhasesTest(parameterized.TestCase):
  def write(self, letter: str, length: int, encoder=None, text='') -> str:
    path = pathlib.Path(self.create_tempdir().full_path) / letter
    made = corpus.Corpus(
      train=(corpus.Document('t', text or letter * length),),
      heldout=(corpus.Document('h', letter.upper() * 40),),
    )
    shards.write(path, made, encoder or tokenizer.Bytes())
    return str(path)

  def config(self, *phases, **fields) -> config.Config:
    made = tuple(
      config.DataPhase(
        start, tuple(config.DataShare(p, weight) for p, weight in mixture)
      )
      for start, mixture in phases
    )
    return make(source='shards', context=9, phases=made, **fields)

  def test_rounds_draw_from_their_phase(self):
    a, b, c = (self.write(x, 4000) for x in 'abc')
    found = self.config((0, [(a, 1.0)]), (5, [(b, 3.0), (a, 1.0), (c, 1.0)]))
    data = dataset.load(found)
    for r, expected in ((0, 'a' * 50), (4, 'a' * 50), (5, None), (99, None)):
      ids = assignment.assign(0, 1, r, 50, data.train.population(9, r))
      letters = ''.join(chr(x) for x in data.train.read(ids, 9)[:, 0])
      if expected:
        self.assertEqual(letters, expected)
      else:
        self.assertEqual([letters.count(x) for x in 'bac'], [30, 10, 10])
        self.assertNotIn('b' * 10, letters)  # they are mixed
    heldout = data.heldout.read(range(data.heldout.num_sequences(9)), 9)
    self.assertEqual(set(heldout.ravel().tolist()), {ord('A')})

  def test_a_later_phase_changes_no_earlier_round(self):
    a, b = self.write('a', 4000), self.write('b', 900)
    one = dataset.load(self.config((0, [(a, 1.0)]))).train
    two = dataset.load(self.config((0, [(a, 1.0)]), (3, [(b, 1.0)]))).train
    for r in range(3):
      ids = [
        assignment.assign(0, 2, r, 20, split.population(9, r))
        for split in (one, two)
      ]
      np.testing.assert_array_equal(one.read(ids[0], 9), two.read(ids[1], 9))

  def test_other_tokenizer(self):
    a = self.write('a', 400)
    b = self.write('b', 400, tokenizer.BPE.train(['ab'], 257))
    with self.assertRaisesRegex(
      config.ConfigError, "data.phases: expected shards of one tokenizer; .*b'"
    ):
      dataset.load(self.config((0, [(a, 1.0), (b, 1.0)])))

  def test_identity_is_by_digest(self):
    a, b, c = self.write('a', 400), self.write('a', 400), self.write('c', 400)
    for phases in (True, False):
      ids = []
      for path in (a, b, c):
        made = make(source='shards', path=path)
        if phases:
          made = self.config((0, [(path, 1.0)]))
        found = dataset.identified(made)
        self.assertEqual(dataset.identified(found), found)
        ids.append(config.identity(found))
        self.assertNotIn(path, ids[-1])
      self.assertEqual(ids[0], ids[1])
      self.assertNotEqual(ids[0], ids[2])

  def test_identity_of_text_is_by_its_digest(self):
    def at(name, text, **fields):
      file = self.create_tempfile(f'{name}/text.txt', text).full_path
      return dataset.identified(make(source='text', path=file, **fields))

    here, there = at('a', 'to be ' * 99), at('b', 'to be ' * 99)
    other = at('c', 'not to be ' * 99)
    self.assertEqual(dataset.identified(here), here)
    self.assertEqual(config.identity(here), config.identity(there))
    self.assertNotIn('text.txt', config.identity(here))
    self.assertNotEqual(config.identity(here), config.identity(other))
    with self.assertRaisesRegex(config.ConfigError, 'these are other ones'):
      at('d', 'not to be ' * 99, digest=here.data.digest)

  def test_identity_of_a_tokenizer_is_by_its_digest(self):
    ids = []
    for folder, text in (('a', 'ab'), ('b', 'ab'), ('c', 'bc')):
      content = tokenizer.BPE.train([text * 9], 258).definition().decode()
      file = self.create_tempfile(f'{folder}/tokenizer.json', content).full_path
      made = make(258, tokenizer='bpe', tokenizer_path=file)
      ids.append(config.identity(dataset.identified(made)))
    self.assertEqual(ids[0], ids[1])
    self.assertNotEqual(ids[0], ids[2])

  def test_another_digest_is_refused(self):
    path = self.write('a', 400)
    for call in (dataset.identified, dataset.load):
      with self.assertRaisesRegex(
        config.ConfigError, f'data.digest: expected {"0" * 64}, but the manif'
      ):
        call(make(source='shards', path=path, digest='0' * 64))

  def test_manifest_that_is_not_here(self):
    made = make(source='shards', path='/no/such')
    self.assertEqual(dataset.identified(made), made)

  @pytest.mark.slow
  def test_a_run_through_a_phase_change(self):
    """Receipts of all miners are as validators expect them, in both phases."""
    a, b = (
      self.write(x, 0, text=corpus.synthetic_text(40_000, seed))
      for seed, x in enumerate('ab')
    )
    phases = self.config((0, [(a, 1.0)]), (2, [(a, 1.0), (b, 3.0)])).data.phases
    base = helpers.tiny('rounds=4')
    data = dataclasses.replace(
      base.data, source='shards', phases=phases, context=16
    )
    made = dataclasses.replace(base, data=data)
    workdir = self.create_tempdir().full_path
    emulation.run(made, workdir)
    decisions = ratings.read_decisions(pathlib.Path(workdir, 'verdicts.jsonl'))
    self.assertLen(decisions, 4 * made.miners)
    self.assertEqual({d['verdict'] for d in decisions}, {'VALID'})


class PackingTest(parameterized.TestCase):
  def test_first_tokens_of_documents_are_marked(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    (folder / 'train.jsonl').write_text('{"text": "ab"}\n{"text": "cd"}\n')
    (folder / 'val.txt').write_text('efghijk')
    data = dataset.load(
      make(source='text', path=str(folder), context=5, packing='documents')
    )
    a, b, c, d = map(ord, 'abcd')
    self.assertEqual(data.train.read([0], 5).tolist(), [[a, b, 0, ~c, d, 0]])
    self.assertEqual(data.train.population(5, 0), 1)


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
