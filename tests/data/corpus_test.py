"""Tests for covenant.data.corpus."""

import hashlib
import math
import pathlib
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config
from covenant.data import corpus

DOCUMENTS = st.dictionaries(
  st.text('abc', min_size=1, max_size=4),
  st.text(min_size=1, max_size=30),
  min_size=2,
  max_size=12,
).map(lambda d: tuple(corpus.Document(k, v + k) for k, v in d.items()))


class TextCase(parameterized.TestCase):
  def write(self, **files: bytes) -> pathlib.Path:
    """A new folder; a keyword a__md is the file a.md, x___y__txt x/y.txt."""
    folder = pathlib.Path(self.create_tempdir().full_path)
    for name, content in files.items():
      path = folder / name.replace('___', '/').replace('__', '.')
      path.parent.mkdir(exist_ok=True)
      path.write_bytes(content)
    return folder

  def load(self, path: object, fraction: float = 0.1) -> corpus.Corpus:
    data = config.Data(source='text', path=str(path), heldout_fraction=fraction)
    return corpus.load(data, seed=0)


class ShakespeareTest(parameterized.TestCase):
  def test_split_is_by_play_and_fixed(self):
    plays = corpus.load(config.Data(), seed=0)
    self.assertLen(plays.train + plays.heldout, 38)
    self.assertEqual(
      [d.name for d in plays.heldout],
      [
        'measure-for-measure',
        'pericles',
        'romeo-and-juliet',
        'the-tempest',
        'two-gentlemen-of-verona',
      ],
    )
    self.assertEqual(plays, corpus.load(config.Data(), seed=1))
    held = sum(d.num_bytes for d in plays.heldout)
    total = held + sum(d.num_bytes for d in plays.train)
    self.assertEqual(total, 5_318_858)
    self.assertBetween(held / total, 0.1, 0.15)

  def test_text_is_raw_and_names_sorted(self):
    train = corpus.load(config.Data(), seed=0).train
    self.assertEqual([d.name for d in train], sorted(d.name for d in train))
    dream = train[0]
    self.assertEqual(dream.name, 'a-midsummer-night-s-dream')
    self.assertStartsWith(dream.text, "# A Midsummer Night's Dream\n")
    self.assertIn('our nuptial hour  \nDraws on apace', dream.text)

  def test_at_least_one_play_each_side(self):
    tiny = corpus.load(config.Data(heldout_fraction=1e-6), seed=0)
    self.assertLen(tiny.heldout, 1)

  def test_every_byte_is_as_in_earlier_releases(self):
    plays = corpus.load(config.Data(), seed=0)
    digest = hashlib.blake2b(digest_size=16)
    for document in sorted(plays.train + plays.heldout):
      for part in document:
        digest.update(len(part.encode()).to_bytes(8, 'big'))
        digest.update(part.encode())
    self.assertEqual(digest.hexdigest(), '5278c4f3263ae34c2005b709206389c8')

  def test_file_missing(self):
    nowhere = pathlib.Path(self.create_tempdir().full_path, 'plays.xz')
    with (
      mock.patch.object(corpus, '_PLAYS', nowhere),
      self.assertRaisesRegex(
        config.ConfigError, 'No such file or directory; install covenant again'
      ),
    ):
      corpus.load(config.Data(), seed=0)

  @parameterized.parameters(lambda b: b + b' ', lambda b: b[:-1], lambda b: b'')
  def test_file_changed(self, change):
    file = self.create_tempfile(content=change(corpus._PLAYS.read_bytes()))
    with (
      mock.patch.object(corpus, '_PLAYS', pathlib.Path(file.full_path)),
      self.assertRaisesRegex(
        config.ConfigError, 'expected the BLAKE2b digest ef0ffbb348bd9906, got'
      ),
    ):
      corpus.load(config.Data(), seed=0)


class TextTest(TextCase):
  def test_file_is_split_at_a_line_break_near_its_end(self):
    text = b''.join(b'line %d\r\n' % i for i in range(100))
    folder = self.write(a__txt=text)
    for path in (folder / 'a.txt', folder):
      result = self.load(path)
      (train,), (heldout,) = result
      self.assertEqual((train.text + heldout.text).encode(), text)
      self.assertStartsWith(heldout.text, 'line ')
      self.assertBetween(heldout.num_bytes / len(text), 0.1, 0.13)

  @parameterized.parameters(
    ('x' * 100, 10), ('ab', 1), ('a\n', 1), ('é' * 30, 3)
  )
  def test_file_without_a_near_line_break(self, text, size):
    folder = self.write(a__txt=text.encode())
    (train,), (heldout,) = self.load(folder / 'a.txt')
    self.assertEqual(train.text + heldout.text, text)
    self.assertLen(heldout.text, size)

  def test_folder_is_split_by_document(self):
    folder = self.write(
      b__md=b'b', a__txt=b'a\r\n', sub___c__txt=b'c', d__py=b'no', e__md=b''
    )
    result = self.load(folder, fraction=0.3)
    documents = sorted(result.train + result.heldout)
    self.assertEqual(
      documents, [('a.txt', 'a\r\n'), ('b.md', 'b'), ('sub/c.txt', 'c')]
    )
    self.assertTrue(result.train)
    self.assertTrue(result.heldout)

  def test_path_empty(self):
    with self.assertRaisesRegex(
      config.ConfigError, "data.path is empty; data.source 'text' needs"
    ):
      self.load('')

  def test_path_missing(self):
    with self.assertRaisesRegex(
      config.ConfigError, "data.path: no such file or folder: '/no/such'"
    ):
      self.load('/no/such')

  def test_folder_without_texts(self):
    with self.assertRaisesRegex(
      config.ConfigError, r'data.path: no .txt, .md, .jsonl, .* file in'
    ):
      self.load(self.write(a__py=b'1'))

  def test_not_utf8(self):
    with self.assertRaisesRegex(
      config.ConfigError, r"data.path: '.*b.txt' is not UTF-8: byte 2 is 0xff"
    ):
      self.load(self.write(a__txt=b'a', b__txt=b'ab\xff'))

  def test_nul(self):
    with self.assertRaisesRegex(
      config.ConfigError, r"data.path: '.*a.txt' has a NUL at byte 3; NUL is"
    ):
      self.load(self.write(a__txt='é1\0'.encode()))

  def test_empty(self):
    with self.assertRaisesRegex(
      config.ConfigError, r'data.path: the text of .* is empty'
    ):
      self.load(self.write(a__txt=b'', b__txt=b''))

  def test_too_short(self):
    with self.assertRaisesRegex(
      config.ConfigError, 'data.path: expected two characters or more.*got 1'
    ):
      self.load(self.write(a__txt=b'a'))

  def test_shards_have_no_text(self):
    with self.assertRaisesRegex(
      config.ConfigError, "data.source 'shards' has no text"
    ):
      corpus.load(config.Data(source='shards'), seed=0)


class SplitTest(parameterized.TestCase):
  @hypothesis.settings(deadline=None)
  @hypothesis.given(DOCUMENTS, st.floats(1e-6, 0.5), st.floats(1e-6, 0.5))
  def test_documents(self, documents, low, high):
    low, high = sorted((low, high))
    small = corpus.split_documents(documents, low)
    large = corpus.split_documents(documents, high)
    self.assertCountEqual(small.train + small.heldout, documents)
    self.assertTrue(small.heldout)
    self.assertTrue(large.train)
    self.assertContainsSubset(small.heldout, large.heldout)
    backwards = corpus.split_documents(documents[::-1], low)
    self.assertCountEqual(backwards.heldout, small.heldout)

  def test_one_document(self):
    with self.assertRaisesRegex(ValueError, 'expected two documents or more'):
      corpus.split_documents((corpus.Document('a', 'a'),), 0.1)


class SyntheticTest(parameterized.TestCase):
  def test_length_and_split(self):
    data = config.Data(source='synthetic', synthetic_tokens=1000)
    (train,), (heldout,) = corpus.load(data, seed=0)
    self.assertLen(train.text, 900)
    self.assertLen(heldout.text, 100)
    text = corpus.synthetic_text(1000, seed=0)
    self.assertEqual(train.text + heldout.text, text)
    self.assertNotEqual(text, corpus.synthetic_text(1000, seed=1))

  def test_too_short(self):
    data = config.Data(source='synthetic', synthetic_tokens=1)
    with self.assertRaisesRegex(
      config.ConfigError, 'data.synthetic_tokens: expected two characters'
    ):
      corpus.load(data, seed=0)

  def test_stream_is_stable(self):
    self.assertEqual(
      corpus.synthetic_text(32, seed=0), 'onmoafoaklaedeoajdbkenkdjfhehklc'
    )

  @parameterized.parameters(0, 1, 2)
  def test_entropy_is_the_cross_entropy_under_the_true_chain(self, seed):
    matrix = corpus.transitions(seed)
    np.testing.assert_allclose(matrix.sum(axis=1), 1)
    text = corpus.synthetic_text(200_000, seed)
    states = np.frombuffer(text.encode(), np.uint8) - ord('a')
    losses = -np.log(matrix[states[:-1], states[1:]])
    rate = corpus.entropy_rate(seed)
    self.assertAlmostEqual(losses.mean(), rate, delta=0.02)
    self.assertBetween(rate, 1, math.log(16) - 0.5)


if __name__ == '__main__':
  absltest.main()
