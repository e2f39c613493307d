"""Tests for covenant.data.shard_manifest."""

import json
import pathlib

from absl.testing import absltest
from absl.testing import parameterized

from covenant import config
from covenant.data import shard_manifest

MANIFEST = shard_manifest.ShardManifest(
  shard_manifest.TokenizerDigest('bytes', 'ab'),
  vocab_size=256,
  end_of_text=0,
  train=(shard_manifest.Shard('train-00000', 200, 190, 'cd'),),
  heldout=(
    shard_manifest.Shard('heldout-00000', 200, 190, 'ef'),
    shard_manifest.Shard('heldout-00001', 9, 8, '01'),
  ),
)


class ManifestCase(parameterized.TestCase):
  def folder(self) -> pathlib.Path:
    return pathlib.Path(self.create_tempdir().full_path)

  def write(self) -> pathlib.Path:
    directory = self.folder()
    shard_manifest.write(directory, MANIFEST)
    return directory

  def edit(self, directory, change) -> None:
    path = directory / 'manifest.json'
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))

  def assert_broken(self, directory, message):
    with self.assertRaisesRegex(config.ConfigError, message):
      shard_manifest.read(directory)


class WriteTest(ManifestCase):
  def test_reads_what_was_written(self):
    self.assertEqual(shard_manifest.read(self.write()), MANIFEST)


class ReadTest(ManifestCase):
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
