"""Tests for covenant.data.manifest."""

import json
import pathlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config
from covenant.data import manifest as manifest_lib

DIGESTS = [f'{i:064x}' for i in range(3)]
MANIFEST = manifest_lib.ShardManifest(
  manifest_lib.TokenizerDigest('bytes', 'ab'),
  vocab_size=256,
  end_of_text=0,
  train=(manifest_lib.Shard('000000/train-00000', 200, 190, DIGESTS[0]),),
  heldout=(
    manifest_lib.Shard('heldout-00000', 200, 190, DIGESTS[1]),
    manifest_lib.Shard('000001/heldout-00001', 9, 8, DIGESTS[2]),
  ),
  sources=(manifest_lib.Source('a\udcff.txt', 3, 200, 190, 209, 198),),
)


def read(record) -> manifest_lib.ShardManifest:
  content = record if isinstance(record, bytes) else json.dumps(record).encode()
  return manifest_lib.from_json('m.json', content)


class ManifestTest(parameterized.TestCase):
  def edited(self, change):
    record = json.loads(manifest_lib.to_json(MANIFEST))
    change(record)
    return record

  def assert_broken(self, record, message):
    with self.assertRaisesRegex(config.ConfigError, message):
      read(record)

  def test_reads_what_was_written(self):
    self.assertEqual(read(manifest_lib.to_json(MANIFEST).encode()), MANIFEST)

  @parameterized.parameters(
    (b'{', 'not JSON'),
    (b'\xff', 'not JSON'),
    (b'[]', r'manifest: expected the fields .*, got \[\]'),
    (b'{}', 'version: expected 2, got None'),
    (b'{"version": 1}', 'version: expected 2, got 1; make the shards again'),
    (b'{"version": 2}', r"manifest: expected the fields .*got \['version'\]"),
  )
  def test_not_a_manifest(self, content, message):
    self.assert_broken(content, "data.path: 'm.json': " + message)

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
    ('sources', [{}], r'sources\[0\]: expected the fields'),
    ('digest', 'ab', 'digest: expected [0-9a-f]{64} of this list'),
    ('vocab_size', 255, 'digest: expected'),
    ('extra', 1, "manifest: expected the fields .*'extra'"),
  )
  def test_field(self, field, value, message):
    self.assert_broken(self.edited(lambda m: m.update({field: value})), message)

  @parameterized.parameters(
    ('tokens', 0, 'tokens: expected 1 or more, got 0'),
    ('tokens', 201, 'digest: expected .* the file was changed'),
    ('bytes', -1, 'bytes: expected 0 or more, got -1'),
    ('digest', None, 'digest: expected str, got None'),
    ('digest', 'xy', "digest: expected 64 hex digits, got 'xy'"),
    ('name', '../train-00000', 'name: expected like 000000/heldout-00000, got'),
    ('name', '../../000000/heldout-00000', 'name: expected like'),
    ('name', 'train-00000', "name: expected like .*heldout-00000, got 'train"),
    ('size', 1, "expected the fields .* got .*'size'"),
  )
  def test_shard_field(self, field, value, message):
    def change(record):
      record['splits']['heldout'][1][field] = value

    self.assert_broken(self.edited(change), message)

  def test_digest_is_of_the_tokens_not_of_names(self):
    shard = MANIFEST.train[0]._replace(name='000007/train-00000')
    renamed = MANIFEST._replace(train=(shard,), sources=())
    self.assertEqual(renamed.digest, MANIFEST.digest)
    for change in (
      {'train': (shard._replace(digest=DIGESTS[1]),)},
      {'train': (shard._replace(tokens=201),)},
      {'heldout': MANIFEST.heldout[::-1]},
      {'end_of_text': 1},
      {'tokenizer': manifest_lib.TokenizerDigest('bytes', 'ac')},
    ):
      other = MANIFEST._replace(**change)
      self.assertNotEqual(other.digest, MANIFEST.digest, change)

  @hypothesis.given(
    st.lists(st.binary(min_size=1, max_size=4), max_size=9, unique=True),
    st.data(),
  )
  def test_merkle_root_depends_on_every_leaf_and_their_order(
    self, leaves, data
  ):
    root = manifest_lib.merkle_root(leaves)
    others = data.draw(st.permutations(leaves))
    same = others == leaves
    self.assertEqual(manifest_lib.merkle_root(others) == root, same)
    self.assertNotEqual(manifest_lib.merkle_root([*leaves, b'x' * 5]), root)


class ShardWriterTest(parameterized.TestCase):
  @hypothesis.settings(deadline=None)
  @hypothesis.given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(0, 99)), min_size=1),
    st.integers(1, 200),
  )
  def test_cuts(self, parts, shard_tokens):
    """Shards are full but the last, hold the tokens, and share the bytes."""
    folder = pathlib.Path(self.create_tempdir().full_path)
    writer = manifest_lib.ShardWriter(
      folder, '000003/', 'train', np.dtype('<u2'), shard_tokens
    )
    ids, begun = [], 0
    for count, num_bytes in parts:
      ids_n = np.arange(begun, begun + count, dtype=np.uint16)
      writer.add(ids_n, num_bytes)
      ids, begun = [*ids, *ids_n.tolist()], begun + count
    shards = writer.close()
    self.assertEqual(sum(s.tokens for s in shards), len(ids))
    self.assertTrue(all(s.tokens == shard_tokens for s in shards[:-1]))
    self.assertEqual(
      sum(s.bytes for s in shards), sum(b for n, b in parts if n)
    )
    content = b''
    for i, shard in enumerate(shards):
      self.assertEqual(shard.name, f'000003/train-{i:05d}')
      content += (folder / f'train-{i:05d}.tokens').read_bytes()
      sums = (folder / f'train-{i:05d}.sums').read_bytes()
      self.assertEqual(manifest_lib.digest_of(sums), shard.digest)
    self.assertEqual(np.frombuffer(content, '<u2').tolist(), ids)

  def test_shard_tokens(self):
    with self.assertRaisesRegex(ValueError, 'shard_tokens: expected 1 or more'):
      manifest_lib.ShardWriter(
        pathlib.Path(), '', 'train', np.dtype('<u2'), shard_tokens=0
      )


if __name__ == '__main__':
  absltest.main()
