"""Tests for covenant.data.tokenize."""

import json
import pathlib
import shutil
from unittest import mock

import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.data import corpus
from covenant.data import dataset
from covenant.data import encode
from covenant.data import manifest as manifest_lib
from covenant.data import shards
from covenant.data import tokenize
from covenant.data import tokenizer as tokenizer_lib
from tests.data import text_files

TEXTS = [f'{i} ' + 'the cat sat\n' * (i % 7 + 1) for i in range(40)]


def shard_files(folder: pathlib.Path) -> dict[str, bytes]:
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.suffix in ('.tokens', '.sums')
  }


class TokenizeCase(parameterized.TestCase):
  def folder(self) -> pathlib.Path:
    return pathlib.Path(self.create_tempdir().full_path)

  def rows(self, suffix='jsonl', count=2) -> pathlib.Path:
    folder = self.folder()
    for i in range(count):
      text_files.write_rows(folder / f'{i}.{suffix}', TEXTS[i::count])
    return folder

  def config(self, path, **fields) -> config_lib.Config:
    data = config_lib.Data(source='text', path=str(path), **fields)
    return config_lib.Config(model=config_lib.Model(vocab_size=300), data=data)

  def run_job(self, config, folder=None, part=(1, 1), **options):
    folder = folder or self.folder() / 'out'
    return tokenize.run(config, str(folder), 1, part, **options), folder


class FormatsTest(TokenizeCase):
  @parameterized.parameters(*text_files.ROWS)
  def test_identical_shards_from_every_format(self, suffix):
    expected, there = self.run_job(self.config(self.rows('jsonl')))
    got, here = self.run_job(self.config(self.rows(suffix)))
    self.assertEqual(got.digest, expected.digest)
    self.assertEqual(shard_files(here), shard_files(there))
    self.assertEqual(
      [s.name for s in got.sources], [f'0.{suffix}', f'1.{suffix}']
    )
    self.assertEqual(sum(s.documents for s in got.sources), len(TEXTS))

  @parameterized.parameters('bytes', 'bpe')
  def test_same_as_in_memory(self, kind):
    config = self.config(self.rows(), tokenizer=kind)
    manifest, folder = self.run_job(config)
    got, expected = (
      shards.open_shards(folder, verify=True),
      dataset.load(config),
    )
    if kind == 'bpe':  # trained on both splits, in memory on one
      expected = dataset.tokenize(
        corpus.load(config.data, 0), shards.read_tokenizer(folder)
      )
    for a, b in zip(got[:2], expected[:2], strict=True):
      self.assertEqual(a.num_bytes, b.num_bytes)
      ids = np.arange(a.num_sequences(1))
      np.testing.assert_array_equal(a.read(ids, 1), b.read(ids, 1))
    self.assertEqual(manifest.num_bytes('train'), expected.train.num_bytes)

  def test_texts_are_documents(self):
    folder = self.folder()
    for i, text in enumerate(TEXTS):
      (folder / f'{i:02}.txt').write_text(text)
    config = self.config(folder)
    _, out = self.run_job(config)
    got, expected = shards.open_shards(out), dataset.load(config)
    for a, b in zip(got[:2], expected[:2], strict=True):
      ids = np.arange(a.num_sequences(9))
      np.testing.assert_array_equal(a.read(ids, 9), b.read(ids, 9))

  def test_one_document_is_cut(self):
    path = self.folder() / 'a.md'
    path.write_text('one line\n' * 500)
    config = self.config(path)
    manifest, out = self.run_job(config)
    expected = dataset.load(config)
    self.assertEqual(
      [manifest.num_bytes(s) for s in manifest_lib.SPLITS],
      [expected.train.num_bytes, expected.heldout.num_bytes],
    )
    got = shards.open_shards(out)
    ids = np.arange(got.heldout.num_sequences(9))
    np.testing.assert_array_equal(
      got.heldout.read(ids, 9), expected.heldout.read(ids, 9)
    )

  def test_tokens_of_datatrove(self):
    folder, config = self.folder(), self.config(self.rows(count=1))
    expected, _ = self.run_job(config)
    ids = [np.append(tokenizer_lib.Bytes().encode(t), 0) for t in TEXTS]
    (folder / 'a.ds').write_bytes(np.concatenate(ids).astype('<u2').tobytes())
    ends = np.cumsum([len(x) for x in ids]).astype('<u8')
    (folder / 'a.ds.index').write_bytes(ends.tobytes())
    got, _ = self.run_job(self.config(folder))
    for side in manifest_lib.SPLITS:  # split by ids, not by text
      self.assertGreater(got.num_tokens(side), 0)
    for count in ('num_tokens', 'num_bytes'):
      self.assertEqual(
        sum(getattr(got, count)(side) for side in manifest_lib.SPLITS),
        sum(getattr(expected, count)(side) for side in manifest_lib.SPLITS),
      )
    ids[0][0] = 256
    (folder / 'a.ds').write_bytes(np.concatenate(ids).astype('<u2').tobytes())
    with self.assertRaisesRegex(config_lib.ConfigError, 'has the id 256, and'):
      self.run_job(self.config(folder))


class SplitTest(TokenizeCase):
  def test_names_are_taken_at_their_word(self):
    folder = self.folder()
    for name, texts in (('train', TEXTS[:9]), ('val', TEXTS[9:]), ('x', ['y'])):
      text_files.write_rows(folder / f'{name}.jsonl', texts)
    manifest, _ = self.run_job(self.config(folder))
    held = sum(len(t.encode()) for t in TEXTS[9:])
    self.assertEqual(manifest.num_bytes('heldout'), held)
    loaded = dataset.load(self.config(folder))
    self.assertEqual(loaded.heldout.num_bytes, held)

  def test_all_held_out(self):
    folder = self.folder()
    text_files.write_rows(folder / 'test.jsonl', TEXTS)
    for call in (self.run_job, dataset.load):
      with self.assertRaisesRegex(
        config_lib.ConfigError, 'say that they are held out'
      ):
        call(self.config(folder))

  def test_copies_fall_together_and_names_do_not_matter(self):
    folder, other = self.folder(), self.folder()
    for i, text in enumerate(TEXTS):
      (folder / f'{i}.txt').write_text(text)
      (folder / f'copy of {i}.md').write_text(text)
      (other / f'{len(TEXTS) - i}.txt').write_text(text)
    found = corpus.load(self.config(folder).data, 0)
    held = {document.text for document in found.heldout}
    self.assertLen(found.heldout, 2 * len(held))
    again = corpus.load(self.config(other).data, 0)
    self.assertEqual({document.text for document in again.heldout}, held)

  @parameterized.parameters(0, 1, 2, 3)
  def test_a_share_far_from_what_was_asked_is_refused(self, salt):
    folder = self.folder()
    # Whichever side the long one falls on, the shares are far from 10 %.
    for i, length in enumerate((1, 4000, 1)):
      (folder / f'{i}.txt').write_text(f'{salt}{i}' * length)
    for call in (self.run_job, dataset.load):
      with self.assertRaisesRegex(
        config_lib.ConfigError,
        r'data.heldout_fraction: expected about 10.00% of .* got ',
      ):
        call(self.config(folder))

  def test_a_large_corpus_is_split_by_a_threshold(self):
    config = self.config(self.rows(), heldout_fraction=0.3)
    with mock.patch.object(tokenize, '_EXACT_BYTES', 10):
      _, folder = self.run_job(config)
    rule = json.loads((folder / 'job.json').read_text())['rule']
    self.assertEqual(rule, [int(0.3 * 2**64), 0, 0])
    held = [t for t in TEXTS if corpus.content_hash([t]) < rule[0]]
    got = shards.read_manifest(folder).num_bytes('heldout')
    self.assertEqual(got, sum(map(len, held)))


class ResumeTest(TokenizeCase):
  def test_goes_on_with_the_files_that_are_missing(self):
    config = self.config(self.rows(count=3))
    expected, there = self.run_job(config, shard_tokens=100)
    folder, real = self.folder() / 'out', encode.write_set

    def dies(index):
      if index == 1:  # as far as a kill leaves it
        partial = folder / '.000001.ab12cd34.partial'
        partial.mkdir()
        (partial / 'train-00000.tokens').write_bytes(b'xx')
        raise KeyboardInterrupt
      real(index)

    with (
      mock.patch.object(encode, 'write_set', dies),
      self.assertRaises(KeyboardInterrupt),
    ):
      self.run_job(config, folder, shard_tokens=100)
    self.assertFalse((folder / 'manifest.json').exists())
    done = []
    with mock.patch.object(
      encode, 'write_set', lambda i: (done.append(i), real(i))
    ):
      manifest, _ = self.run_job(config, folder, shard_tokens=100)
    self.assertLess(len(done), 3)
    self.assertEqual(manifest, expected)
    self.assertEqual(shard_files(folder), shard_files(there))
    self.assertEmpty(list(folder.glob('.*.partial')))

  @parameterized.parameters('3', '0/2', '3/2', 'a/b', '1/', '-1/2', '1/2/3')
  def test_a_part_that_is_none(self, text):
    with self.assertRaisesRegex(config_lib.ConfigError, 'expected K/N'):
      tokenize.parse_part(text)

  def test_parts_in_one_folder(self):
    config, folder = self.config(self.rows(count=5)), self.folder() / 'out'
    expected, _ = self.run_job(config)
    for part in (2, 1):
      made, _ = self.run_job(config, folder, (part, 3))
      self.assertIsNone(made)
    with self.assertRaisesRegex(
      config_lib.ConfigError, '1 of 5 sets are missing in .*first is 000002'
    ):
      tokenize.merge(str(folder))
    made, _ = self.run_job(config, folder, (3, 3))
    self.assertEqual(made, expected)

  def test_parts_of_machines_without_a_common_disk(self):
    config, folder = self.config(self.rows(count=3)), self.folder() / 'out'
    expected, _ = self.run_job(config)
    for part in (1, 2):
      _, own = self.run_job(config, part=(part, 2))
      shutil.copytree(own, folder, dirs_exist_ok=True)
    self.assertEqual(tokenize.merge(str(folder)), expected)

  @parameterized.parameters(
    ({'field': 'body'}, 'field: text there, body here'),
    ({'tokenizer': 'bpe'}, 'tokenizer'),
    ({'heldout_fraction': 0.3}, 'heldout_fraction: 0.1 there, 0.3 here'),
  )
  def test_another_job(self, change, message):
    path = self.folder()
    text_files.write_rows(path / 'train.jsonl', TEXTS)
    rows = json.loads(
      f'[{(path / "train.jsonl").read_text().strip()}]'.replace('\n', ',')
    )
    lines = [json.dumps(r | {'body': r['text']}) for r in rows]
    (path / 'train.jsonl').write_text('\n'.join(lines))
    _, folder = self.run_job(self.config(path))
    with self.assertRaisesRegex(
      config_lib.ConfigError, f'has shards of another job .*{message}'
    ):
      self.run_job(self.config(path, **change), folder)

  def test_merge_of_another_folder(self):
    with self.assertRaisesRegex(
      config_lib.ConfigError, 'expected a folder of --role=tokenize'
    ):
      tokenize.merge(str(self.folder()))


if __name__ == '__main__':
  absltest.main()
