"""The log of outer steps that the stages of a pipeline take."""

import pathlib
from unittest import mock

import numpy as np
from absl.testing import absltest

from covenant.pool import orders
from covenant.protocol import checksums


def source(uid, *sections):
  ends = np.cumsum([10, *map(len, sections)])
  return orders.Source(
    uid, 3, f'{uid:064x}', ('2f61',), tuple(map(int, ends)),
    tuple(map(orders.section_digest, sections)),
  )  # fmt: skip


def order(number, before, factor=1.0):
  return orders.Order(
    number,
    before,
    (source(0, b'one', b'', b'three'), source(4, b'1', b'2', b'3')),
    np.full((2, 3), factor, np.float32),
    np.array([128, 64], np.uint16),
  )


class OrderTest(absltest.TestCase):
  def test_decodes_what_it_encodes(self):
    want = order(7, 'a')
    got = orders.decode(*orders.encode(want))
    self.assertEqual(got.sources, want.sources)
    np.testing.assert_array_equal(got.factors_RxP, want.factors_RxP)
    self.assertEqual(got.after, want.after)
    self.assertNotEqual(got.after, order(7, 'a', 2.0).after)

  def test_the_rules_are_part_of_it(self):
    want = order(7, 'a')._replace(changes={'rounds': 9, 'optim.x': 0.1})
    got = orders.decode(*orders.encode(want))
    self.assertEqual((got.changes, got.after), (want.changes, want.after))
    self.assertEqual(got.of_tensors([1]).changes, want.changes)
    self.assertNotEqual(got.after, order(7, 'a').after)
    self.assertNotIn('changes', orders.encode(order(7, 'a'))[0])

  def test_malformed_ones_are_named(self):
    whole, data = orders.encode(order(7, 'a'))
    orders.decode(whole, data)
    for text in (
      {}, {'sources': [{}]}, {'sources': 3}, whole | {'number': 1e999},
      whole | {'changes': [1]},
      whole | {'sources': [whole['sources'][0] | {'ends': [1e999]}]},
    ):  # fmt: skip
      with self.assertRaisesRegex(orders.OrderError, 'not an order'):
        orders.decode(text, b'')

  def test_a_stage_gets_its_sections_and_nothing_else(self):
    part = order(0, 'a').of_tensors([2, 0])
    self.assertEqual(part.factors_RxP.shape, (2, 2))
    data = bytes(10) + b'one' + b'three'
    self.assertEqual(orders.cut(data, part.sources[0]), [b'three', b'one'])
    with self.assertRaisesRegex(orders.OrderError, 'uid 0, round 3'):
      orders.cut(data.replace(b'one', b'two'), part.sources[0])


class OrderLogTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.log = orders.OrderLog(self.folder, 'g')

  def fill(self, count):
    for number in range(count):
      self.log.add(order(number, self.log.id))
      self.log.set_fingerprint(number + 1, f'f{number + 1}')

  def test_goes_on_after_a_restart(self):
    self.fill(3)
    again = orders.OrderLog(self.folder, 'g')
    self.assertEqual((again.number, again.id), (3, self.log.id))
    self.assertTrue(again.has(0, 'g'))
    self.assertTrue(again.has(2, again.state(2)))
    self.assertFalse(again.has(2, again.state(1)))
    self.assertFalse(again.has(4, ''))

  def test_a_state_on_this_history_is_known_without_a_file(self):
    """A stage may say its state as often as it likes."""
    self.fill(3)
    self.log.rebase(orders.Base(1, self.log.state(1), {'x': ['00']}))
    want = [self.log.state(number) for number in range(1, 4)]
    with mock.patch.object(checksums, 'unseal', side_effect=AssertionError):
      self.assertTrue(all(map(self.log.has, range(1, 4), want)))
      for number in -1, 0, 4, 10**400:
        self.assertFalse(self.log.has(number, self.log.base.id))
    self.log.rewind(2)
    self.assertFalse(self.log.has(3, want[2]))
    self.assertEqual(self.log.id, want[1])

  def test_the_same_order_changes_nothing_and_another_replaces_it(self):
    self.fill(3)
    end = self.log.id
    self.log.add(order(1, self.log.state(1)))
    self.assertEqual((self.log.number, self.log.id), (3, end))
    self.log.add(order(1, self.log.state(1), 0.5))
    self.assertEqual(self.log.number, 2)
    self.assertIsNone(self.log.get(2))
    self.assertEqual(self.log.fingerprint(1), 'f1')
    self.assertIsNone(self.log.fingerprint(2))

  def test_a_checkpoint_of_this_history_replaces_what_led_to_it(self):
    self.fill(3)
    base = orders.Base(2, self.log.state(2), {'x': ['00']}, ('here',))
    self.log.rebase(base)
    again = orders.OrderLog(self.folder, 'g')
    self.assertEqual(again.base, base)
    self.assertEqual((again.number, again.id), (3, self.log.id))
    self.assertIsNone(again.get(1))
    self.assertFalse(again.has(1, order(0, 'g').after))

  def test_one_of_another_history_replaces_all(self):
    self.fill(3)
    self.log.rebase(orders.Base(9, 'else', {'x': ['00']}))
    self.assertEqual((self.log.number, self.log.id), (9, 'else'))
    self.assertIsNone(self.log.get(2))

  def test_a_flipped_bit_is_found(self):
    self.fill(2)
    self.log.rebase(orders.Base(1, self.log.state(1), {'x': ['00']}))
    for path in self.folder / 'base.json', self.folder / '00000001':
      whole = path.read_bytes()
      for at in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        with self.assertRaisesRegex(checksums.ChecksumError, path.name):
          orders.OrderLog(self.folder, 'g')
      path.write_bytes(whole)
    self.assertEqual(orders.OrderLog(self.folder, 'g').number, 2)


if __name__ == '__main__':
  absltest.main()
