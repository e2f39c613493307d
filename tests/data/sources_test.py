"""Tests for covenant.data.sources."""

import json
import os
import pathlib

from absl.testing import absltest
from absl.testing import parameterized

from covenant import config
from covenant.data import sources
from tests.data import text_files


class FindTest(parameterized.TestCase):
  def write(self, *names: str | bytes) -> pathlib.Path:
    root = pathlib.Path(self.create_tempdir().full_path)
    for name in names:
      path = pathlib.Path(os.fsdecode(os.fsencode(root)), os.fsdecode(name))
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(os.fsencode(name))
    return root

  def names(self, path: object) -> list[str]:
    return [file.name for file in sources.find(str(path))]

  def test_folder(self):
    kept = [
      'B.JSONL', 'a.txt', 'c/d.Md', 'c/e.parquet', 'f.jsonl.ZST', 'g.txt.gz',
    ]  # fmt: skip
    left_out = [
      '.git/x.txt', '.h.txt', 'a.txt~', '#a.txt#', 'c/.e.parquet.crc',
      'a.py', 'i.csv.gz', 'j.swp', 'k.txt.bak',
    ]  # fmt: skip
    root = self.write(*kept, *left_out)
    self.assertEqual(self.names(root), kept)
    self.assertEqual([f.size for f in sources.find(str(root))][0], 7)

  def test_names_that_are_not_utf8(self):
    root = self.write(b'\xff\xfe.txt', 'a.txt')
    names = self.names(root)
    self.assertEqual(
      [os.fsencode(n) for n in names], [b'a.txt', b'\xff\xfe.txt']
    )
    file = sources.find(str(root))[1]
    self.assertIn('\\xff\\xfe.txt', file.label)
    self.assertEqual(pathlib.Path(file.path).read_bytes(), b'\xff\xfe.txt')

  def test_links_are_followed_once(self):
    root = self.write('a/x.txt', 'b.txt')
    (root / 'a' / 'up').symlink_to(root)
    (root / 'again').symlink_to(root / 'a')
    (root / 'c.txt').symlink_to(root / 'b.txt')
    outside = self.write('y.txt')
    (root / 'out').symlink_to(outside)
    (root / 'gone.txt').symlink_to(root / 'nothing')
    self.assertEqual(self.names(root), ['a/x.txt', 'b.txt', 'out/y.txt'])

  def test_globs(self):
    root = self.write('a/1.jsonl', 'b/2.jsonl', 'b/3.txt', 'c/4.jsonl')
    self.assertEqual(
      self.names(root / '*' / '*.jsonl'),
      ['a/1.jsonl', 'b/2.jsonl', 'c/4.jsonl'],
    )
    self.assertEqual(
      self.names(root / '[bc]'), ['b/2.jsonl', 'b/3.txt', 'c/4.jsonl']
    )
    with self.assertRaisesRegex(config.ConfigError, 'no .txt, .* file in'):
      sources.find(str(root / '*.md'))

  @parameterized.parameters(
    'a.csv', 'a.txt.bz2', 'a.parquet.gz', 'a', 'a.jsonl2'
  )
  def test_a_named_file_of_an_unknown_suffix(self, name):
    root = self.write(name)
    message = f"data.path: '{name}' has an unknown suffix; expected .txt"
    for path in (root / name, root / 'a*'):
      with self.assertRaisesRegex(config.ConfigError, message):
        sources.find(str(path))

  def test_nothing_there(self):
    for path, message in (
      ('', 'data.path is empty'),
      ('/no/such', "no such file or folder: '/no/such'"),
      (self.write('a.py'), 'no .txt, .md, .* file in'),
    ):
      with self.assertRaisesRegex(config.ConfigError, message):
        sources.find(str(path))

  def test_dataset_on_disk(self):
    root = self.write('d/train/data-0.arrow', 'd/test/data-0.arrow', 'e/x.txt')
    (root / 'd/dataset_dict.json').write_text('{"splits": ["train", "test"]}')
    for split in ('train', 'test'):
      (root / f'd/{split}/cache-1.arrow').touch()  # of some map, not the data
      (root / f'd/{split}/state.json').write_text(
        json.dumps({'_data_files': [{'filename': 'data-0.arrow'}]})
      )
    files = sources.find(str(root))
    self.assertEqual(
      [(f.name, f.split) for f in files],
      [
        ('d/test/data-0.arrow', 'heldout'),
        ('d/train/data-0.arrow', 'train'),
        ('e/x.txt', ''),
      ],
    )
    self.assertEqual(
      self.names(root / 'd'), ['test/data-0.arrow', 'train/data-0.arrow']
    )


class KindTest(parameterized.TestCase):
  @parameterized.parameters(*text_files.ROWS, *text_files.TEXTS)
  def test_known(self, suffix):
    self.assertEqual(
      sources.kind(f'a.{suffix}'), f'.{suffix.lower().split(".")[0]}'
    )


class SaidSplitTest(parameterized.TestCase):
  @parameterized.parameters(
    ('train-00000-of-00010.parquet', 'train'),
    ('corpus.train.jsonl.zst', 'train'),
    ('Training/a.txt', 'train'),
    ('val/a.txt', 'heldout'),
    ('wiki_valid.txt', 'heldout'),
    ('validation-00000-of-00001-3d2b1c4d5e6f7a8b.parquet', 'heldout'),
    ('en/dev.jsonl', 'heldout'),
    ('HELDOUT.md', 'heldout'),
    ('train/test/a.txt', 'heldout'),
    ('test/train-1.txt', 'train'),
    ('data-00000.arrow', ''),
    ('the-test-of-time.txt', ''),
    ('contest.txt', ''),
    ('trains.txt', ''),
    ('', ''),
  )
  def test_name(self, name, split):
    self.assertEqual(sources.said_split(name), split)


if __name__ == '__main__':
  absltest.main()
