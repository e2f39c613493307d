"""Tests for the keys of objects."""

from absl.testing import absltest
from absl.testing import parameterized

from covenant.store import interface


class KeyTest(parameterized.TestCase):
  @parameterized.parameters('a', 'a/b-1/c_2.d', '.staging/x', 'a' * 200)
  def test_a_key(self, text):
    self.assertTrue(interface.is_key(text))
    interface.check_key(text)

  @parameterized.parameters(
    '', '/a', 'a/', 'a//b', '.', '..', 'a/../b', 'a b', 'a\n', 'ä', 'a' * 201,
    '/'.join(['a' * 100] * 6),
  )  # fmt: skip
  def test_what_is_none(self, text):
    self.assertFalse(interface.is_key(text))
    with self.assertRaisesRegex(interface.StoreError, '^key: expected parts'):
      interface.check_key(text)


if __name__ == '__main__':
  absltest.main()
