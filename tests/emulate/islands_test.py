"""Runs of miners that are not alike, through the protocol."""

import dataclasses
import pathlib

import numpy as np
from absl.testing import absltest

from covenant import config as config_lib
from covenant.data import dataset
from covenant.emulate import host as host_lib
from covenant.node import replica as replica_lib

ROOT = pathlib.Path(__file__).parent.parent.parent


def tiny(aggregation=None, optim=None, **changes):
  config = config_lib.load(f'{ROOT}/configs/tiny.py')
  aggregation = dataclasses.replace(
    config.optim.aggregation, **(aggregation or {})
  )
  changes['optim'] = dataclasses.replace(
    config.optim, aggregation=aggregation, **(optim or {})
  )
  config = dataclasses.replace(config, **changes)
  return config_lib.parse(dataclasses.asdict(config))


class UnequalTest(absltest.TestCase):
  def test_each_counts_by_what_it_trained_on(self):
    """Three islands and a straggler; all valid, all nodes at one place."""
    config = tiny(
      aggregation=dict(weight='tokens'),
      optim=dict(most_sequences=24),
      miners=4,
      islands='steps=6; steps=3; steps=3,batch=2; steps=6',
      adversaries='straggler',
    )
    host = host_lib.Host(config, dataset.load(config))
    drawn = []
    for _ in range(3):
      host.round()
      witness = host.validators[0]
      self.assertEqual(list(witness.messages), [0, 1, 2, 3])
      parts = [witness.weights[u].parts for u in range(4)]
      sizes = [witness.weights[u].size for u in range(4)]
      self.assertEqual(sizes[:3], [24, 12, 6])
      self.assertEqual(parts, [round(64 * s / 24) for s in sizes])
      drawn.append(sizes[3])
    self.assertGreater(len(set(drawn)), 1)
    self.assertLen({n.root for n in host.nodes}, 1)
    prints = {replica_lib.fingerprint(n.shared.params) for n in host.nodes}
    self.assertLen(prints, 1)
    efforts = [witness.standings.standings[u].effort for u in range(3)]
    np.testing.assert_allclose(efforts, [1.0, 1.0, 0.5])
    for uid, miner in enumerate(host.miners):
      self.assertEqual(witness.standings.standings[uid].penalties, ())
      tokens = miner.contribution.tokens
      self.assertEqual(tokens, sizes[uid] * config.data.context)


if __name__ == '__main__':
  absltest.main()
