"""Tests for covenant.data.shards."""

import json
import pathlib
from unittest import mock

import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config
from covenant.data import corpus
from covenant.data import dataset
from covenant.data import manifest as manifest_lib
from covenant.data import remote
from covenant.data import shards
from covenant.data import tokenizer

TEXTS = ('the cat sat on the mat; ' * 20, 'é' * 100, '', 'the hat\n' * 9)
DOCUMENTS = tuple(corpus.Document(str(i), t) for i, t in enumerate(TEXTS))
CORPUS = corpus.Corpus(train=DOCUMENTS, heldout=DOCUMENTS[:1])
BPE = tokenizer.BPE.train(TEXTS, 280)


class WideBytes(tokenizer.Bytes):
  vocab_size = 2**17


class ShardsCase(parameterized.TestCase):
  def folder(self) -> pathlib.Path:
    return pathlib.Path(self.create_tempdir().full_path)

  def write(self, encoder=None, shard_tokens=200) -> pathlib.Path:
    directory = self.folder() / 'shards'
    shards.write(directory, CORPUS, encoder or tokenizer.Bytes(), shard_tokens)
    return directory

  def edit(self, directory, change) -> None:
    """Changes the manifest, and its digest with it."""
    path = directory / 'manifest.json'
    manifest = change(shards.read_manifest(directory))
    path.write_text(manifest_lib.to_json(manifest))

  def assert_broken(self, directory, message, verify=True):
    with self.assertRaisesRegex(config.ConfigError, message):
      shards.open_shards(directory, verify)


class RoundTripTest(ShardsCase):
  @parameterized.product(
    encoder=(tokenizer.Bytes(), BPE, WideBytes()),
    shard_tokens=(100, 2**20),
    verify=(True, False),
  )
  def test_same_as_in_memory(self, encoder, shard_tokens, verify):
    if isinstance(encoder, WideBytes) and verify:
      verify = False  # the file would say 256 ids
    directory = self.write(encoder, shard_tokens)
    got = shards.open_shards(directory, verify)
    expected = dataset.tokenize(CORPUS, encoder)
    self.assertEqual(got[2:4], expected[2:4])
    for a, b in zip(got[:2], expected[:2], strict=True):
      self.assertEqual(a.num_tokens, b.num_tokens)
      self.assertEqual(a.num_bytes, b.num_bytes)
      ids = np.arange(a.num_sequences(5))[::-1]
      np.testing.assert_array_equal(a.read(ids, 5), b.read(ids, 5))

  def test_sequences_cross_chunks_and_shards(self):
    text = ''.join(map(str, range(20_000)))
    whole = corpus.Corpus((corpus.Document('a', text),), CORPUS.heldout)
    directory = self.folder() / 'shards'
    shards.write(directory, whole, tokenizer.Bytes(), 40_000)
    got = shards.open_shards(directory).train
    expected = dataset.tokenize(whole, tokenizer.Bytes()).train
    ids = np.arange(got.num_sequences(999))
    np.testing.assert_array_equal(got.read(ids, 999), expected.read(ids, 999))

  def test_layout(self):
    directory = self.write(BPE, 2**20)
    self.assertCountEqual(
      [path.name for path in directory.iterdir()],
      [
        'manifest.json', 'tokenizer.json',
        'train-00000.tokens', 'train-00000.sums',
        'heldout-00000.tokens', 'heldout-00000.sums',
      ],
    )  # fmt: skip
    loaded = shards.read_tokenizer(directory)
    self.assertEqual(loaded.definition(), BPE.definition())

  def test_ids_that_need_32_bits(self):
    directory = self.write(WideBytes(), 2**20)
    tokens = shards.read_manifest(directory).train[0].tokens
    size = (directory / 'train-00000.tokens').stat().st_size
    self.assertEqual(size, 4 * tokens)

  def test_opening_reads_only_the_manifest(self):
    directory = self.write()
    for path in [*directory.glob('*.tokens'), *directory.glob('*.sums')]:
      path.unlink()
    data = shards.open_shards(directory)
    self.assertGreater(data.train.num_sequences(8), 10)
    with self.assertRaisesRegex(config.ConfigError, 'train-00000.sums'):
      data.train.read([0], 8)

  def test_digest(self):
    directory = self.write()
    digest = shards.read_manifest(directory).digest
    shards.open_shards(directory, digest=digest)
    with self.assertRaisesRegex(
      config.ConfigError, f'data.digest: expected 00, but .* has {digest}'
    ):
      shards.open_shards(directory, digest='00')


class WriteTest(ShardsCase):
  def test_never_overwrites(self):
    directory = self.folder()
    with self.assertRaisesRegex(ValueError, 'exists; shards are never overwr'):
      shards.write(directory, CORPUS, tokenizer.Bytes())
    self.assertEmpty(list(directory.iterdir()))

  def test_failure_leaves_nothing(self):
    parent = self.folder()
    nul = corpus.Corpus(CORPUS.train, (corpus.Document('nul', 'a\0'),))
    with self.assertRaisesRegex(ValueError, 'text has a NUL at byte 1'):
      shards.write(parent / 'shards', nul, tokenizer.Bytes())
    self.assertEmpty(list(parent.iterdir()))

  def test_empty_split(self):
    with self.assertRaisesRegex(
      ValueError, 'corpus.heldout: expected documents, got none'
    ):
      shards.write(
        self.folder() / 'shards',
        corpus.Corpus(CORPUS.train, ()),
        tokenizer.Bytes(),
      )


class DamageTest(ShardsCase):
  def flip(self, path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)

  def test_flipped_bit(self):
    directory = self.write()
    self.flip(directory / 'train-00001.tokens')
    message = r"data.path: '.*train-00001.tokens': chunk 0 \(bytes 0 to 399\)"
    self.assert_broken(directory, message)
    data = shards.open_shards(directory)
    data.train.read([0], 8)  # of another shard
    with self.assertRaisesRegex(config.ConfigError, message):
      data.train.read(np.arange(data.train.num_sequences(8)), 8)

  def test_a_bad_chunk_is_named_and_fetched_again(self):
    directory = self.write()
    expected = shards.open_shards(directory).train.read([1], 8)
    real, bad = remote.LocalFolder.read_range, [True]

    def broken_once(folder, key, start, end):
      content = real(folder, key, start, end)
      return b'\1' + content[1:] if bad and bad.pop() else content

    with (
      mock.patch.object(remote.LocalFolder, 'read_range', broken_once),
      self.assertLogs(level='WARNING') as logged,
    ):
      got = shards.open_shards(directory).train.read([1], 8)
    np.testing.assert_array_equal(got, expected)
    self.assertIn('chunk 0 of', logged.output[0])
    self.assertIn(
      'train-00000.tokens is damaged (try 1 of 3)', logged.output[0]
    )

  def test_damaged_sums(self):
    directory = self.write()
    path = directory / 'train-00000.sums'
    path.write_bytes(bytes(16))
    self.assert_broken(directory, 'train-00000.sums.*differs from its digest')

  def test_missing_shard(self):
    directory = self.write()
    (directory / 'train-00001.tokens').unlink()
    self.assert_broken(directory, "'.*train-00001.tokens': no such file")

  def test_exchanged_shards(self):
    directory = self.write()
    one, two = directory / 'train-00000.sums', directory / 'train-00001.sums'
    one.rename(directory / 'aside')
    two.rename(one)
    (directory / 'aside').rename(two)
    self.assert_broken(directory, "train-00000.sums': differs from its digest")

  def test_shorter_and_longer_shard(self):
    directory = self.write()
    path = directory / 'train-00000.tokens'
    content = path.read_bytes()
    path.write_bytes(content + b'\0')
    self.assert_broken(directory, "train-00000.tokens': expected 200 tokens")
    path.write_bytes(content[:-1])
    self.assert_broken(directory, "train-00000.tokens': chunk 0")

  def test_ids_beyond_the_vocabulary(self):
    directory = self.write()
    self.edit(directory, lambda manifest: manifest._replace(vocab_size=97))
    self.assert_broken(
      directory, "'.*train-00000.tokens': expected ids below vocab_size 97"
    )

  def test_changed_manifest(self):
    directory = self.write()
    path = directory / 'manifest.json'
    record = json.loads(path.read_text())
    record['splits']['train'].pop()
    path.write_text(json.dumps(record))
    self.assert_broken(directory, 'digest: expected .* the file was changed')

  def test_other_tokenizer(self):
    directory = self.write(BPE)
    path = directory / 'tokenizer.json'
    path.write_text(path.read_text() + ' ')
    self.assert_broken(directory, "'.*json': expected a tokenizer of the dig")
    path.unlink()
    self.assert_broken(directory, r"'.*tokenizer\.json': no such file; the man")
    shards.open_shards(directory)

  def test_other_bytes(self):
    directory = self.write()
    self.edit(
      directory,
      lambda manifest: manifest._replace(
        tokenizer=manifest_lib.TokenizerDigest('bytes', '00')
      ),
    )
    self.assert_broken(
      directory, "'.*json': expected a tokenizer of the digest 00, got"
    )


class OpenTest(ShardsCase):
  def test_path_empty(self):
    self.assert_broken('', "data.path is empty; data.source 'shards' needs")

  def test_no_manifest(self):
    self.assert_broken(self.folder(), r"manifest\.json': no such file; make it")


if __name__ == '__main__':
  absltest.main()
