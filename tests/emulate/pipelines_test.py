"""Full replicas and compressed pipelines in one run."""

import pytest
from absl.testing import absltest

from covenant import config as config_lib
from covenant.data import dataset
from covenant.emulate import host as host_lib
from tests import helpers


@pytest.mark.slow
class PipelinesTest(absltest.TestCase):
  def test_count_like_everybody(self):
    config = config_lib.load(
      f'{helpers.CONFIGS}/tiny.py',
      ['model.layers=2', 'miners=2', 'islands=1x ; 1x stages=2,rank=3'],
    )
    host = host_lib.Host(config, dataset.load(config))
    for _ in range(2):
      record = host.round()
      self.assertEqual(record.payloads, 2)
    # Of one miner 3 steps of 4 x 16 positions; 3 floats, to and fro, across
    # the boundary and from the table to the first stage. The fit of the one
    # boundary: 33 rows of 32 bytes and a step; 32 x 3 numbers of 16 bits.
    passed, fit = 3 * 4 * 16 * (3 * 4 * 2 * 2), 33 * (32 + 2) + 32 * 3 * 2
    self.assertEqual(record.stage_bytes, passed + fit)


if __name__ == '__main__':
  absltest.main()
