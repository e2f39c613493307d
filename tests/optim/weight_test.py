import numpy as np
from absl.testing import absltest

from covenant.optim import weight


class WeightTest(absltest.TestCase):
  def test_equal_messages_weigh_a_whole_whatever_their_sequences(self):
    self.assertEqual(weight.weigh('equal', 20, 80), weight.Weight(64, 1))

  def test_no_message_declares_more_than_it_was_assigned(self):
    self.assertEqual(weight.weigh('tokens', 999, 80), weight.Weight(64, 80))

  def test_the_least_weight_is_one_part(self):
    self.assertEqual(weight.weigh('tokens', 0, 6400).parts, 1)

  def test_unknown_rules_are_refused(self):
    with self.assertRaisesRegex(ValueError, "'equal' or 'tokens', got 'x'"):
      weight.weigh('x', 1, 1)

  def test_totals_divide_by_whole_messages(self):
    parts_R, sizes_R = weight.columns([weight.Weight(), weight.Weight(16, 5)])
    np.testing.assert_array_equal(weight.wholes(parts_R), [1, 0.25])
    np.testing.assert_array_equal(sizes_R, [1, 5])
    totals = weight.totals(parts_R)
    self.assertEqual(totals.of_all, np.float32(1 / 1.25))
    # Nothing is divided by less than the average weight, 40 parts of 64.
    parts = np.array([0, 16, 40, 64, 80])
    np.testing.assert_array_equal(
      totals.of_senders[parts],
      (64 / np.array([40, 40, 40, 64, 80])).astype(np.float32),
    )

  def test_no_messages_are_divided_as_one(self):
    totals = weight.totals(np.zeros(0, np.uint16), 65)
    np.testing.assert_array_equal(totals.of_senders, np.ones(65))
    self.assertEqual(totals.of_all, 1)

  def test_more_messages_than_can_be_counted_are_refused(self):
    with self.assertRaisesRegex(ValueError, 'at most 1023 messages, got 1024'):
      weight.columns([weight.Weight()] * 1024)


if __name__ == '__main__':
  absltest.main()
