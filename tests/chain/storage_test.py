"""The rows of the embedded chain: what holds at a block, and what is kept."""

import os
import sqlite3

from absl.testing import absltest
from absl.testing import parameterized

from covenant.chain import interface
from covenant.chain import storage as storage_lib

_RULES = storage_lib.ChainRules(tempo=5, emission=2.0, capacity=4)


class ChainStorageTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.path = os.path.join(self.create_tempdir().full_path, 'chain.db')
    self.head = 0
    self.storage = storage_lib.ChainStorage.create(self.path, b'seed', _RULES)
    self.addCleanup(self.storage.close)

  def commit(self, data, block=None, storage=None):
    """Writes a commitment of uid 0; returns the block that it belongs to."""
    storage = storage or self.storage
    self.head = self.head if block is None else block
    with storage.writing(lambda: self.head) as at:
      storage.replace('commitments', 0, at, data)
    return at

  def at(self, block, storage=None):
    """The commitments at the end of a block."""
    rows = (storage or self.storage).rows_at(
      block, 'commitments', 'uid, data', lambda: self.head
    )
    return rows

  def test_all_connections_have_the_rules_and_the_seed(self):
    other = storage_lib.ChainStorage.open(self.path, timeout=5.0)
    self.addCleanup(other.close)
    for one in self.storage, other:
      self.assertEqual((one.seed, one.rules), (b'seed', _RULES))
      self.assertIsNone(one.genesis)

  def test_a_row_holds_until_the_next_one(self):
    self.assertEqual(self.commit(b'a', 1), 1)
    self.assertEqual(self.commit(b'b', 3), 3)
    self.head = 4
    self.assertEqual(self.at(0), [])
    for block, data in (1, b'a'), (2, b'a'), (3, b'b'), (4, b'b'):
      self.assertEqual(self.at(block), [(0, data)], block)

  def test_of_two_rows_in_one_block_the_second_holds(self):
    self.commit(b'a', 1)
    self.commit(b'b', 1)
    self.assertEqual(self.at(1), [(0, b'b')])
    count = self.storage.query('SELECT COUNT(*) FROM commitments')
    self.assertEqual(count, [(2,)])  # the first ended where it began

  def test_what_was_read_stays_as_it_is(self):
    """A change belongs to the first block that nobody has read."""
    self.commit(b'a', 1)
    self.assertEqual(self.at(2), [(0, b'a')])
    self.assertEqual(self.commit(b'b', 2), 3)
    self.assertEqual(self.at(2), [(0, b'a')])
    self.assertEqual(self.at(3), [(0, b'b')])

  def test_another_connection_s_reads_count_too(self):
    other = storage_lib.ChainStorage.open(self.path, timeout=5.0)
    self.addCleanup(other.close)
    self.commit(b'a', 1)
    self.assertEqual(self.at(1, other), [(0, b'a')])
    self.assertEqual(self.commit(b'b', 1), 2)

  def test_a_change_that_raises_is_undone(self):
    self.commit(b'a', 1)
    with self.assertRaises(ZeroDivisionError):
      with self.storage.writing(lambda: 2) as at:
        self.storage.replace('commitments', 0, at, b'b')
        raise ZeroDivisionError
    self.head = 2
    self.assertEqual(self.at(2), [(0, b'a')])
    self.assertEqual(self.commit(b'c', 2), 3)  # no transaction is left open

  def test_nothing_is_left_of_one_that_was_removed(self):
    self.commit(b'a', 1)
    with self.storage.writing(lambda: 2) as at:
      self.storage.remove(0, at)
    self.head = 3
    self.assertEqual(self.at(1), [(0, b'a')])
    self.assertEqual(self.at(2), [])

  def test_history_is_kept_for_so_many_blocks(self):
    self.commit(b'a', 1)
    last = storage_lib.HISTORY + 2
    self.commit(b'b', 2)
    self.head = last
    self.assertEqual(self.at(last), [(0, b'b')])
    self.assertEqual(self.at(2), [(0, b'b')])
    with self.assertRaisesRegex(
      interface.ChainRejectedError, f'block 1: .* {storage_lib.HISTORY} blocks'
    ):
      self.at(1)
    rows = self.storage.query('SELECT data FROM commitments')
    self.assertEqual(rows, [(b'b',)])  # the other is gone from the file

  def test_an_image_is_a_ledger_of_its_own(self):
    self.commit(b'a', 1)
    copy = storage_lib.ChainStorage.load(self.storage.dump())
    self.addCleanup(copy.close)
    self.commit(b'b', 2)
    self.head = 3
    self.assertEqual(self.at(3, copy), [(0, b'a')])
    self.assertEqual(self.at(3), [(0, b'b')])
    self.assertEqual(copy.rules, _RULES)

  @parameterized.parameters(b'', b'no database', bytes(4096))
  def test_what_is_no_image_is_refused(self, image):
    with self.assertRaisesRegex(
      interface.ChainError, 'image: there is no chain here'
    ):
      storage_lib.ChainStorage.load(image)

  def test_a_file_has_one_chain(self):
    with self.assertRaisesRegex(interface.ChainError, 'cannot make a chain'):
      storage_lib.ChainStorage.create(self.path, b'other', _RULES)
    with self.assertRaisesRegex(interface.ChainError, 'there is no chain here'):
      storage_lib.ChainStorage.open(f'{self.path}.other', timeout=5.0)
    self.assertFalse(os.path.exists(f'{self.path}.other'))

  def test_one_who_holds_the_file_is_waited_for_and_then_named(self):
    other = storage_lib.ChainStorage.open(self.path, timeout=0.0)
    self.addCleanup(other.close)
    with self.storage.transaction():
      with self.assertRaisesRegex(
        interface.ChainUnreachableError, 'locked.*look whether it was made'
      ):
        self.commit(b'a', 1, other)
    self.assertEqual(self.commit(b'a', 1, other), 1)

  def test_any_error_of_the_database_is_one_of_the_chain(self):
    self.storage.close()
    with self.assertRaisesRegex(
      interface.ChainUnreachableError, 'did not answer'
    ) as raised:
      self.storage.query('SELECT 1')
    self.assertIsInstance(raised.exception.__cause__, sqlite3.Error)


if __name__ == '__main__':
  absltest.main()
