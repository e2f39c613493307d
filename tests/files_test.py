import json
import pathlib
from unittest import mock

from absl.testing import absltest

from covenant import files


class FilesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path, 'run')
    self.path = self.folder / 'lines.jsonl'

  def test_write_replaces_and_makes_the_folder(self):
    for content in ('first é', b'\xff second'):
      files.write(self.path, content, durable=isinstance(content, bytes))
    self.assertEqual(self.path.read_bytes(), b'\xff second')
    self.assertEqual(list(self.folder.iterdir()), [self.path])

  def test_failed_write_leaves_the_old_content(self):
    files.write(self.path, 'old')
    with mock.patch('os.replace', side_effect=OSError('full')):
      with self.assertRaises(OSError):
        files.write(self.path, 'new')
    self.assertEqual(self.path.read_text(), 'old')

  def test_appended_records_are_read_back(self):
    self.assertEqual(files.read_jsonl(self.path), [])
    self.folder.mkdir()
    files.append_jsonl(self.path, {'a': 1})
    files.append_jsonl(self.path)
    files.append_jsonl(self.path, {'b': [None]}, 'c')
    files.sync(self.path)
    self.assertEqual(
      files.read_jsonl(self.path), [{'a': 1}, {'b': [None]}, 'c']
    )

  def test_unfinished_last_line_is_ignored_then_removed(self):
    records = [{'text': 'x' * n} for n in range(5)]
    self.folder.mkdir()
    files.append_jsonl(self.path, *records)
    whole = self.path.read_bytes()
    for cut in range(len(whole)):  # the writer was killed anywhere
      self.path.write_bytes(whole[:cut])
      complete = whole[:cut].count(b'\n')
      self.assertEqual(files.read_jsonl(self.path), records[:complete])
      files.append_jsonl(self.path, *records[complete:])
      self.assertEqual(self.path.read_bytes(), whole)

  def test_write_lines(self):
    files.write_lines(self.path, ['a', b'b', ''])
    self.assertEqual(self.path.read_bytes(), b'a\nb\n\n')
    self.assertEqual(files.read_lines(self.path), [b'a', b'b', b''])
    files.write_lines(self.path, [])
    self.assertEqual(files.read_lines(self.path), [])

  def test_malformed_line_is_named(self):
    for line in (b'{', b'', b'\xff'):
      files.write_lines(self.path, [json.dumps({}), line])
      with self.assertRaisesRegex(files.JsonLinesError, 'jsonl:2: not JSON'):
        files.read_jsonl(self.path)

  def test_records_survive_what_a_dead_machine_leaves(self):
    whole = [{'round': 1, 'x': 'a'}, {'round': 2, 'x': [1]}]
    lines = [json.dumps(x).encode() for x in whole]
    for torn in (
      b'{"round": 3',
      b'{"round"{"round": 3}',
      b'\0' * 512,
      b'\0\xff\0',
      b'null',
      b'7',
      b'{"x": 3}',
      b'[' * 5000,
      b'9' * 5000,
    ):
      is_lost = int(bool(torn.strip(b'\0')))
      for at in range(3):
        files.write_lines(self.path, [*lines[:at], torn, *lines[at:]])
        found = files.read_records(self.path, 'round')
        self.assertEqual(found, (whole, is_lost), torn)
    self.path.write_bytes(b'\0' * 100 + b'\n'.join(lines) + b'\n' + b'\0' * 9)
    self.assertEqual(files.read_records(self.path, 'round', 'x'), (whole, 0))
    self.assertEqual(files.read_records(self.folder / 'none'), ([], 0))

  def test_new_folder_appears_whole_or_not_at_all(self):
    with self.assertRaisesRegex(ValueError, 'stop'):
      with files.new_folder(self.folder) as partial:
        (partial / 'x').write_text('1')
        raise ValueError('stop')
    self.assertEqual(list(self.folder.parent.iterdir()), [])
    with files.new_folder(self.folder) as partial:
      (partial / 'x').write_text('1')
      self.assertFalse(self.folder.exists())
    self.assertEqual((self.folder / 'x').read_text(), '1')
    self.assertEqual(list(self.folder.parent.iterdir()), [self.folder])


if __name__ == '__main__':
  absltest.main()
