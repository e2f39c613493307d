"""Runs of miners that are not alike, through the protocol."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from absl.testing import absltest

from covenant import config as config_lib
from covenant.data import dataset
from covenant.emulate import emulation
from covenant.emulate import host as host_lib
from covenant.protocol import round as round_lib
from covenant.train import shared_state as shared_state_lib
from experiments.chaos import network as network_lib
from tests import helpers


def tiny(aggregation=None, optim=None, **changes):
  config = helpers.tiny()
  aggregation = dataclasses.replace(
    config.optim.aggregation, **(aggregation or {})
  )
  changes['optim'] = dataclasses.replace(
    config.optim, aggregation=aggregation, **(optim or {})
  )
  config = dataclasses.replace(config, **changes)
  return config_lib.parse(dataclasses.asdict(config))


@pytest.mark.slow
class UnequalTest(absltest.TestCase):
  def test_each_counts_by_what_it_trained_on(self):
    """Three islands and a straggler; all valid, all nodes at one place."""
    config = tiny(
      aggregation=dict(weight='tokens'),
      optim=dict(most_sequences=24),
      miners=4,
      islands='steps=6; steps=3; steps=3,batch=2; steps=6',
      adversaries=('straggler',),
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
    prints = {shared_state_lib.fingerprint(n.shared.params) for n in host.nodes}
    self.assertLen(prints, 1)
    efforts = [witness.role.standings.standings[u].work for u in range(3)]
    np.testing.assert_allclose(efforts, [2.0, 1.0, 0.5])
    for uid, miner in enumerate(host.miners):
      self.assertEqual(witness.role.standings.standings[uid].penalties, ())
      tokens = miner.role.contribution.result().tokens
      self.assertEqual(tokens, sizes[uid] * config.data.context)


@pytest.mark.slow
class OverlapTest(absltest.TestCase):
  """Rounds that overlap, and a miner that does less in them."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.config = tiny(
      aggregation=dict(weight='tokens'),
      optim=dict(overlap=1),
      rounds=6,
      islands='2x; 1x steps=2',
      checkpoint=config_lib.Checkpoint(every=1, publish=2, keep=1),
    )
    cls.host = host_lib.Host(cls.config, dataset.load(cls.config))

  def test_who_does_less_counts_for_less_in_every_round(self):
    host = self.host
    host.init()
    for _ in range(4):
      self.assertEqual(host.round().uids, (0, 1, 2))
      validator = host.validators[0]
      self.assertEqual(sorted(validator.messages), [0, 1, 2])
      self.assertEqual(validator.role.standings.standings[2].misses, 0)
    parts = [validator.weights[u].parts for u in range(3)]
    self.assertEqual(parts[:2], [64, 64])
    self.assertLess(parts[2], 64)
    self.assertLen({n.root for n in host.nodes}, 1)

  def test_resumed_equals_uninterrupted(self):
    folder = self.create_tempdir().full_path
    want = emulation.run(self.config, f'{folder}/whole')
    asked = iter([True])
    first = emulation.run(
      self.config, f'{folder}/parts', stop=lambda: next(asked)
    )
    self.assertEqual(first.state.counters.round, 1)
    got = emulation.run(self.config, f'{folder}/parts')
    for ours, theirs in zip(
      jax.tree.leaves(got.state.miners),
      jax.tree.leaves(want.state.miners),
      strict=True,
    ):
      np.testing.assert_array_equal(ours, theirs)
    for what in 'root', 'standings', 'contributions':
      self.assertEqual(
        json.loads(got.state.protocol)[what],
        json.loads(want.state.protocol)[what],
      )

  def test_killed_and_joined_stand_where_all_are(self):
    at = round_lib.Schedule(self.config.phases).start
    network = network_lib.Network(
      self.config,
      self.host,
      script={
        at(1) + 9: lambda net: net.kill('2', down=1),
        at(3) + 9: lambda net: net.kill('3', down=1),
        at(4) + 9: lambda net: net.join('new'),
      },
    )
    network.run(6)
    counted = network_lib.audit(network)
    self.assertIn(2, counted[3])
    self.assertIn('new', network.live)


if __name__ == '__main__':
  absltest.main()
