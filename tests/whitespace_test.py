"""The hook that cleans the ends of lines and of files."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized

from tests import whitespace


class WhitespaceTest(parameterized.TestCase):
  @parameterized.parameters(
    ('a', 'a\n'),
    ('a \nb\t\r\n\n\n', 'a\nb\n'),
    ('  a\n\n b\n', '  a\n\n b\n'),
    ('', ''),
    ('\n\n', ''),
  )
  def test_ends_are_clean(self, text, want):
    self.assertEqual(whitespace.mended(text), want)
    self.assertEqual(whitespace.mended(want), want)

  def test_fixes_only_when_asked_and_only_what_is_ours(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    for name in 'a.py', 'b.ipynb':
      (folder / name).write_text('x = 1 \n')
    (folder / 'c.bin').write_bytes(b'\xff \n')
    names = [str(path) for path in sorted(folder.iterdir())]
    self.assertEqual(whitespace.main(names), 1)
    self.assertEqual((folder / 'a.py').read_text(), 'x = 1 \n')
    self.assertEqual(whitespace.main(['--fix', *names]), 1)
    self.assertEqual((folder / 'a.py').read_text(), 'x = 1\n')
    self.assertEqual((folder / 'b.ipynb').read_text(), 'x = 1 \n')
    self.assertEqual(whitespace.main(names), 0)


if __name__ == '__main__':
  absltest.main()
