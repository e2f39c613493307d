"""Tests for covenant.data.readers."""

import pathlib
import struct
from unittest import mock

import numpy as np
import pyarrow as pa
from absl.testing import absltest
from absl.testing import parameterized
from pyarrow import parquet

from covenant import config
from covenant.data import readers
from covenant.data import sources
from tests.data import text_files

TEXTS = ['the cat', '', 'é\0\u2028x\n', 'z' * 300, *map(str, range(40))]


class ReadersCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def file(self, name: str) -> sources.File:
    (found,) = [f for f in sources.find(str(self.folder)) if f.name == name]
    return found

  def written(self, name: str, content: bytes) -> sources.File:
    (self.folder / name).write_bytes(content)
    return self.file(name)


class RowsTest(ReadersCase):
  @parameterized.parameters(*text_files.ROWS)
  def test_same_in_every_format(self, suffix):
    text_files.write_rows(self.folder / f'a.{suffix}', TEXTS, 'body')
    file, read = self.file(f'a.{suffix}'), []
    got = list(readers.rows(file, 'body', read.append))
    self.assertEqual(got, [text for text in TEXTS if text])
    self.assertGreater(sum(read), 0)

  @parameterized.parameters(*text_files.ROWS)
  def test_a_field_that_is_not_there_is_one_line_with_the_columns(self, suffix):
    text_files.write_rows(self.folder / f'a.{suffix}', TEXTS)
    with self.assertRaisesRegex(
      config.ConfigError,
      rf"^data.path: '.*a.{suffix}'.*: there is no field 'body' "
      r'\(data.field\); there: id, text$',
    ):
      list(readers.rows(self.file(f'a.{suffix}'), 'body'))

  @parameterized.parameters(*text_files.ROWS)
  def test_a_field_that_is_no_text(self, suffix):
    text_files.write_rows(self.folder / f'a.{suffix}', TEXTS)
    with self.assertRaisesRegex(
      config.ConfigError, r"expected text in the field 'id' .*, got int"
    ):
      list(readers.rows(self.file(f'a.{suffix}'), 'id'))

  def test_json_lines(self):
    content = (
      b'\xef\xbb\xbf{"text": "a"}\r\n\n{"text": null}\n{"text": "\\ud800b"}'
    )
    file = self.written('a.jsonl', content)
    self.assertEqual(list(readers.rows(file, 'text')), ['a', '\ufffdb'])

  @parameterized.parameters(
    (b'{"text": "a"}\n{"text"', 'line 2: not JSON'),
    (b'["text"]', "line 1: there is no field 'text' .* there: no object"),
    (b'\xff', 'line 1: not JSON'),
  )
  def test_broken_json_lines(self, content, message):
    file = self.written('a.jsonl', content)
    with self.assertRaisesRegex(config.ConfigError, message):
      list(readers.rows(file, 'text'))

  @parameterized.parameters('jsonl.gz', 'jsonl.zst', 'parquet', 'arrow')
  def test_damaged_files_are_one_line(self, suffix):
    text_files.write_rows(self.folder / f'a.{suffix}', TEXTS)
    path = self.folder / f'a.{suffix}'
    content = path.read_bytes()
    path.write_bytes(b'xxxxxxxx' + content[8 : len(content) // 2])
    with self.assertRaises(config.ConfigError) as caught:
      list(readers.rows(self.file(f'a.{suffix}'), 'text'))
    self.assertIn(f'a.{suffix}', str(caught.exception))
    self.assertNotIn('\n', str(caught.exception))

  def test_arrow_file_format_and_other_types_of_text(self):
    values = pa.array(['a', None, 'b', 'a'])
    for i, column in enumerate(
      (values, values.cast(pa.large_string()), values.dictionary_encode())
    ):
      table = pa.table({'text': column})
      with pa.OSFile(str(self.folder / f'{i}.arrow'), 'wb') as file:
        with pa.ipc.new_file(file, table.schema) as writer:
          writer.write_table(table)
      parquet.write_table(table, self.folder / f'{i}.parquet')
      for suffix in ('arrow', 'parquet'):
        found = readers.rows(self.file(f'{i}.{suffix}'), 'text')
        self.assertEqual(list(found), ['a', 'b', 'a'])

  def test_package_missing(self):
    text_files.write_rows(self.folder / 'a.parquet', TEXTS)
    with (
      mock.patch.dict('sys.modules', {'pyarrow.parquet': None}),
      self.assertRaisesRegex(
        config.ConfigError, r'needs the package pyarrow.*covenant\[data\]'
      ),
    ):
      list(readers.rows(self.file('a.parquet'), 'text'))


class BlocksTest(ReadersCase):
  @parameterized.parameters(*text_files.TEXTS)
  def test_text(self, suffix):
    text = 'é\r\n\0' * 1000
    content = text_files.packed(b'\xef\xbb\xbf' + text.encode(), suffix.lower())
    with mock.patch.object(readers, '_BLOCK', 7):
      got = list(readers.blocks(self.written(f'a.{suffix}', content)))
    self.assertGreater(len(got), 100)
    self.assertEqual(''.join(got), text)

  @parameterized.parameters(
    (b'ab\xff', 'byte 2 is 0xff'), ('é'.encode()[:1], 'byte 0 is 0xc3')
  )
  def test_not_utf8(self, content, message):
    with self.assertRaisesRegex(
      config.ConfigError, f"data.path: '.*a.txt' is not UTF-8: {message}"
    ):
      list(readers.blocks(self.written('a.txt', content)))

  def test_not_utf8_in_a_later_block(self):
    content = 'é'.encode() * 50 + b'\xff'
    with (
      mock.patch.object(readers, '_BLOCK', 7),
      self.assertRaisesRegex(config.ConfigError, 'byte 100 is 0xff'),
    ):
      list(readers.blocks(self.written('a.txt', content)))


class TokenRowsTest(ReadersCase):
  DOCUMENTS = ([3, 1, 2], [], [70_000, 5])

  def assert_reads(self, name, documents=DOCUMENTS):
    found = [d.tolist() for d in readers.token_rows(self.file(name))]
    self.assertEqual(found, [list(d) for d in documents])

  @parameterized.parameters(('<u2', ([3, 1, 2], [], [7])), ('<u4', DOCUMENTS))
  def test_datatrove(self, dtype, documents):
    ids = [i for document in documents for i in document]
    ends = np.cumsum([len(d) for d in documents])
    (self.folder / 'a.ds').write_bytes(np.array(ids, dtype).tobytes())
    (self.folder / 'a.ds.index').write_bytes(ends.astype('<u8').tobytes())
    (self.folder / 'a.ds.metadata').write_text('gpt2|4\n5\n5')
    self.assert_reads('a.ds', documents)

  def test_megatron(self):
    ids = np.array([i for d in self.DOCUMENTS for i in d], '<i4')
    sizes = np.array([3, 0, 1, 1], '<i4')  # the last document has two parts
    pointers = 4 * (np.cumsum(sizes) - sizes).astype('<i8')
    documents = np.array([0, 1, 2, 4], '<i8')
    head = b'MMIDIDX\0\0' + struct.pack('<QBQQ', 1, 4, 4, 4)
    index = head + sizes.tobytes() + pointers.tobytes() + documents.tobytes()
    (self.folder / 'a.bin').write_bytes(ids.tobytes())
    (self.folder / 'a.idx').write_bytes(index)
    self.assert_reads('a.bin')
    (self.folder / 'a.idx').write_bytes(b'x' + index[1:])
    with self.assertRaisesRegex(config.ConfigError, 'no index of Megatron'):
      self.assert_reads('a.bin')
    (self.folder / 'a.idx').write_bytes(index)
    (self.folder / 'a.bin').write_bytes(ids.tobytes()[:-4])
    with self.assertRaisesRegex(config.ConfigError, 'has 16 bytes; its index'):
      self.assert_reads('a.bin')

  def test_index_missing(self):
    (self.folder / 'a.ds').write_bytes(bytes(4))
    with self.assertRaisesRegex(config.ConfigError, "'.*a.ds': .*No such file"):
      self.assert_reads('a.ds')

  def test_index_of_other_tokens(self):
    (self.folder / 'a.ds').write_bytes(bytes(5))
    (self.folder / 'a.ds.index').write_bytes(np.array([2], '<u8').tobytes())
    with self.assertRaisesRegex(config.ConfigError, 'are not the 2 tokens'):
      self.assert_reads('a.ds')


if __name__ == '__main__':
  absltest.main()
