"""Tests for covenant.data.shards."""

import json
import pathlib
import shutil

import hypothesis
import hypothesis.strategies as st
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config
from covenant.data import corpus
from covenant.data import dataset
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
    path = directory / 'manifest.json'
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))

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
    directory = self.write(encoder, shard_tokens)
    got = shards.open_shards(directory, verify)
    expected = dataset.tokenize(CORPUS, encoder)
    self.assertEqual(got[2:], expected[2:])
    for a, b in zip(got[:2], expected[:2], strict=True):
      self.assertEqual(a.num_tokens, b.num_tokens)
      self.assertEqual(a.num_bytes, b.num_bytes)
      ids = np.arange(a.num_sequences(5))[::-1]
      np.testing.assert_array_equal(a.read(ids, 5), b.read(ids, 5))

  @hypothesis.settings(deadline=None)
  @hypothesis.given(st.lists(st.text('aé', max_size=20)), st.integers(1, 50))
  def test_cut(self, texts, shard_tokens):
    documents = [corpus.Document('', text) for text in texts]
    encoder = tokenizer.Bytes()
    pieces = list(shards._cut(documents, encoder, shard_tokens))
    lengths = [len(piece) for piece, _ in pieces]
    self.assertEqual(lengths[:-1], [shard_tokens] * (len(pieces) - 1))
    self.assertEqual(
      b''.join(bytes(piece.astype('u1')) for piece, _ in pieces),
      b''.join(text.encode() + b'\0' for text in texts),
    )
    self.assertEqual(
      sum(num_bytes for _, num_bytes in pieces),
      sum(document.num_bytes for document in documents),
    )

  def test_streams(self):
    """No document is asked for before the shards ahead of it are cut."""
    asked = []

    def documents():
      for document in DOCUMENTS:
        asked.append(document.name)
        yield document

    next(iter(shards._cut(documents(), tokenizer.Bytes(), 200)))
    self.assertEqual(asked, ['0'])

  def test_layout(self):
    directory = self.write(BPE, 2**20)
    self.assertCountEqual(
      [path.name for path in directory.iterdir()],
      ['manifest.json', 'tokenizer.json', 'train-00000', 'heldout-00000'],
    )
    loaded = tokenizer.BPE((directory / 'tokenizer.json').read_text())
    self.assertEqual(loaded.definition(), BPE.definition())

  def test_ids_that_need_32_bits(self):
    directory = self.write(WideBytes(), 2**20)
    array = json.loads((directory / 'train-00000/zarr.json').read_text())
    self.assertEqual(array['data_type'], 'uint32')


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

  def test_shard_tokens(self):
    with self.assertRaisesRegex(
      ValueError, 'shard_tokens: expected 1 or more, got 0'
    ):
      self.write(shard_tokens=0)


class DamageTest(ShardsCase):
  def test_flipped_bit(self):
    directory = self.write()
    path = directory / 'train-00001/c/0'
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    self.assert_broken(
      directory, r"data.path: '.*train-00001': cannot be read: DATA_LOSS"
    )
    data = shards.open_shards(directory, verify=False)
    with self.assertRaisesRegex(ValueError, 'train-00001'):
      data.train.read(np.arange(data.train.num_sequences(8)), 8)

  def test_missing_chunk_is_not_zeros(self):
    directory = self.write()
    (directory / 'train-00001/c/0').unlink()
    self.assert_broken(directory, "'.*train-00001': cannot be read")

  def test_missing_shard(self):
    directory = self.write()
    shutil.rmtree(directory / 'train-00001')
    for verify in (True, False):
      self.assert_broken(directory, "'.*train-00001': cannot be opened", verify)

  def test_exchanged_shards(self):
    directory = self.write()
    one, two = directory / 'train-00000', directory / 'train-00001'
    one.rename(directory / 'aside')
    two.rename(one)
    (directory / 'aside').rename(two)
    self.assert_broken(
      directory, "'.*train-00000': expected tokens of the digest"
    )

  def test_shorter_shard(self):
    directory = self.write()

    def change(manifest):
      manifest['splits']['train'][0]['tokens'] = 201

    self.edit(directory, change)
    for verify in (True, False):
      self.assert_broken(
        directory, "'.*train-00000': expected 201 tokens.*got 200", verify
      )

  def test_ids_beyond_the_vocabulary(self):
    directory = self.write()
    self.edit(directory, lambda manifest: manifest.update(vocab_size=97))
    self.assert_broken(
      directory, "'.*train-00000': expected ids below vocab_size 97, got 116"
    )

  def test_array_of_another_kind(self):
    directory = self.write()
    path = directory / 'train-00000/zarr.json'
    array = path.read_text()
    path.write_text(array.replace('"uint16"', '"int16"'))
    self.assert_broken(
      directory, "'.*train-00000': expected one dim.* got 1 of int16"
    )

  def test_other_tokenizer(self):
    directory = self.write(BPE)
    path = directory / 'tokenizer.json'
    path.write_text(path.read_text() + ' ')
    self.assert_broken(directory, "'.*json': expected a tokenizer of the dig")
    path.unlink()
    self.assert_broken(directory, r"'.*tokenizer\.json': no such file; the man")
    shards.open_shards(directory, verify=False)

  def test_other_bytes(self):
    directory = self.write()
    self.edit(
      directory, lambda manifest: manifest['tokenizer'].update(digest='00')
    )
    self.assert_broken(
      directory, "'.*json': expected a tokenizer of the digest 00, got"
    )


class OpenTest(ShardsCase):
  def test_path_empty(self):
    self.assert_broken('', "data.path is empty; data.source 'shards' needs")

  def test_no_manifest(self):
    self.assert_broken(self.folder(), r"manifest\.json': no such file; make it")


MANIFEST = shards.ShardManifest(
  shards.TokenizerDigest('bytes', 'ab'),
  vocab_size=256,
  end_of_text=0,
  train=(shards.Shard('train-00000', 200, 190, 'cd'),),
  heldout=(
    shards.Shard('heldout-00000', 200, 190, 'ef'),
    shards.Shard('heldout-00001', 9, 8, '01'),
  ),
)


class ManifestCase(parameterized.TestCase):
  def folder(self) -> pathlib.Path:
    return pathlib.Path(self.create_tempdir().full_path)

  def write(self) -> pathlib.Path:
    directory = self.folder()
    shards.write_manifest(directory, MANIFEST)
    return directory

  def edit(self, directory, change) -> None:
    path = directory / 'manifest.json'
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))

  def assert_broken(self, directory, message):
    with self.assertRaisesRegex(config.ConfigError, message):
      shards.read_manifest(directory)


class ManifestWriteTest(ManifestCase):
  def test_reads_what_was_written(self):
    self.assertEqual(shards.read_manifest(self.write()), MANIFEST)


class ManifestReadTest(ManifestCase):
  @parameterized.parameters(
    (b'{', 'not JSON'),
    (b'\xff', 'not JSON'),
    (b'[]', r'manifest: expected the fields .*, got \[\]'),
    (b'{}', 'version: expected 1, got None'),
    (b'{"version": 2}', 'version: expected 1, got 2'),
    (b'{"version": 1}', r"manifest: expected the fields .*got \['version'\]"),
  )
  def test_not_a_manifest(self, content, message):
    directory = self.folder()
    (directory / 'manifest.json').write_bytes(content)
    self.assert_broken(directory, r"data.path: '.*manifest\.json': " + message)

  @parameterized.parameters(
    ('vocab_size', '256', "manifest.vocab_size: expected int, got '256'"),
    ('end_of_text', True, 'manifest.end_of_text: expected int, got True'),
    ('end_of_text', 256, '0 <= end_of_text < .* 256 and vocab_size 256'),
    ('end_of_text', -1, 'got end_of_text -1 and'),
    ('vocab_size', 2**31 + 1, 'got end_of_text 0 and vocab_size 2147483649'),
    ('tokenizer', [], r'manifest.tokenizer: expected dict, got \[\]'),
    ('tokenizer', {}, r"tokenizer: expected the fields \['digest', 'kind'\]"),
    (
      'tokenizer',
      {'kind': 'words', 'digest': ''},
      "tokenizer.kind: expected one of bytes, bpe, sentencepiece, got 'words'",
    ),
    ('splits', {'train': []}, r"splits: expected the fields \['heldout', 'tr"),
    (
      'splits',
      {'train': [], 'heldout': []},
      'splits.train: expected shards, got none',
    ),
    ('extra', 1, "manifest: expected the fields .*'extra'"),
  )
  def test_field(self, field, value, message):
    directory = self.write()
    self.edit(directory, lambda manifest: manifest.update({field: value}))
    self.assert_broken(directory, message)

  @parameterized.parameters(
    ('tokens', 0, 'tokens: expected 1 or more, got 0'),
    ('bytes', -1, 'bytes: expected 0 or more, got -1'),
    ('digest', None, 'digest: expected str, got None'),
    ('name', '../train-00000', "name: expected like heldout-00000, got '../"),
    ('name', 'train-00000', "name: expected like heldout-00000, got 'train"),
    ('size', 1, "expected the fields .* got .*'size'"),
  )
  def test_shard_field(self, field, value, message):
    directory = self.write()

    def change(manifest):
      manifest['splits']['heldout'][1][field] = value

    self.edit(directory, change)
    self.assert_broken(directory, r'splits\.heldout\[1\]\W*' + message)


if __name__ == '__main__':
  absltest.main()
