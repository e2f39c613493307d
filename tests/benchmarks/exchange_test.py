"""Tests for benchmarks.exchange."""

import pytest
from absl.testing import absltest

from benchmarks import exchange
from tests import helpers


class ChildTest(absltest.TestCase):
  @pytest.mark.slow
  def test_compiles_in_a_process_of_its_own(self):
    found = exchange.child(str(helpers.ROOT), 'compile', 'adam', 2)
    self.assertGreater(found['seconds'], 0)
    self.assertGreater(found['dense'], 0)
    self.assertEqual(found['bytes'], 0)  # sums, no gathers


if __name__ == '__main__':
  absltest.main()
