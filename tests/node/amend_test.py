"""Amendments in a network: adopted, applied at one round, replayed."""

import dataclasses
import functools
from unittest import mock

import pytest
from absl.testing import absltest

from covenant import config as config_lib
from covenant.config import amend as fields
from covenant.data import dataset
from covenant.emulate import host as host_lib
from covenant.node import amend
from covenant.node import vote as vote_lib
from covenant.protocol import amendments
from covenant.protocol import round as round_lib
from covenant.wire import amendment as amendment_lib
from covenant.wire import manifest as manifest_lib
from experiments.chaos import faults
from experiments.chaos import network as network_lib
from experiments.chaos import scenario
from tests import helpers

ROUND, LONGER = 20, 26  # blocks


@functools.cache
def host():
  """Three miners and two validators."""
  config = dataclasses.replace(
    scenario.get_config(helpers.tiny('optim.outer.momentum=0.5')),
    rounds=20,
    miners=3,
    validators=2,
    checkpoint=config_lib.Checkpoint(every=1, keep=2, publish=2),
  )
  gauntlet = dataclasses.replace(config.gauntlet, evaluate=0)
  config = dataclasses.replace(config, gauntlet=gauntlet)
  return config, host_lib.Host(config, dataset.load(config))


def begin(stakes=(60.0, 40.0), **kwargs):
  config, shared = host()
  network = network_lib.Network(config, shared, **kwargs)
  for name, stake in zip(('3', '4'), stakes, strict=True):
    network.set_stake(name, stake)
  return network


def made(round_index, *edits):
  run = host()[1].shared_model.run
  return amendment_lib.make(run, round_index, fields.parse(edits))


def support(network, amendment, *names):
  for name in names:
    node = network.nodes[name]
    verify, key = node.chain.verify, node.chain.hotkey
    run = node.shared_model.run
    amend.support(node.objects, run, amendment, key, node.chain.sign, verify)


def held(network):
  return {name: node.amendments for name, node in network.nodes.items()}


class AdoptionTest(absltest.TestCase):
  def assert_equal(self, network):
    self.assertLen(
      {(n.root, n.fingerprint()) for n in network.live.values()}, 1
    )

  @pytest.mark.slow
  def test_everybody_follows_it_from_its_round_on(self):
    """A miner that was away, a validator that died, and two joiners, too."""
    one = made(
      4,
      'optim.outer.learning_rate=0.5',
      'optim.outer.momentum=0.3',
      'gauntlet.contributors=2',
      f'phases.round_blocks={LONGER}',
    )
    away = faults.Fault(
      faults.Kind.UNREACHABLE, range(ROUND + 2, 6 * ROUND), frozenset('0')
    )
    collect = round_lib.Phase.COLLECT
    network = begin(
      faults=faults.Faults([away], kills=[faults.Kill('4', 3, collect, 0, 30)]),
      script={
        7 * ROUND + 9: lambda network: network.join('10'),
        10 * ROUND + 9: lambda network: network.join('11'),
      },
    )
    support(network, one, '3', '4')
    network.run(10)
    self.assertEqual({*held(network).values()}, {(one,)})
    self.assert_equal(network)
    for node in network.live.values():
      self.assertEqual(node.config.optim.outer.learning_rate, 0.5)
      plan = node.schedule
      lengths = [plan.start(r + 1) - plan.start(r) for r in (3, 4, 5)]
      self.assertEqual(lengths, [ROUND, LONGER, LONGER])
    counted = network_lib.audit(network)
    self.assertEqual(counted[2], [1, 2])
    self.assertEqual({len(counted[r]) for r in range(4, 10)}, {2})
    # The same history without the amendment leads elsewhere.
    plain = begin()
    plain.run(10)
    self.assertNotEqual(
      plain.nodes['3'].fingerprint(), network.nodes['3'].fingerprint()
    )

  @pytest.mark.slow
  def test_a_minority_changes_nothing(self):
    one = made(4, 'optim.outer.learning_rate=0.5')

    def propose(node, collected, r):
      data = vote_lib.proposal(node, collected, r)
      whole = manifest_lib.decode(data, node.chain.verify)
      signed = amendment_lib.sign(one, node.chain.hotkey, node.chain.sign)
      adoption = amendment_lib.Adoption(one, (signed,))
      if r + manifest_lib.NOTICE > one.round:
        return data
      return manifest_lib.encode(
        whole._replace(adoption=adoption), node.chain.sign
      )

    def dishonest(policy):
      return policy._replace(propose=propose)

    network = begin((45.0, 35.0), dishonest={'3': dishonest})
    network.join('12', validator=True, stake=20.0)
    support(network, one, '3')
    network.run(5)
    self.assertEqual({*held(network).values()}, {()})
    self.assert_equal(network)
    # Its turn to lead is over, and rounds count miners without it.
    self.assertIn(
      network.nodes['3'].chain.hotkey, network.nodes['4'].role.passed
    )
    self.assertEqual(network_lib.audit(network)[2], [0, 1, 2])

  @pytest.mark.slow
  def test_a_leader_cannot_leave_it_out_for_long(self):
    one = made(7, 'optim.outer.learning_rate=0.5')

    def silent(policy):
      def propose(node, collected, r):
        node.role.supports = {}
        return vote_lib.proposal(node, collected, r)

      return policy._replace(propose=propose)

    network = begin((45.0, 35.0), dishonest={'3': silent})
    network.join('12', validator=True, stake=20.0)
    network.run(2)
    support(network, one, '4', '12')
    network.run(6)
    self.assertEqual({*held(network).values()}, {(one,)})
    self.assert_equal(network)

  @pytest.mark.slow
  def test_a_release_that_is_too_old_says_so_before(self):
    one = made(5, 'protocol=2', 'release=3.0')
    network, found = begin(), []
    network.host.adopted = found.append
    self.addCleanup(setattr, network.host, 'adopted', lambda record: None)
    support(network, one, '3', '4')
    with self.assertRaisesRegex(
      amendments.ReleaseNeededError,
      'release 3.0 or newer is needed from round 5',
    ):
      network.run(8)
    self.assertTrue(found[0]['needed'])
    self.assertLessEqual(found[0]['decided'], 3)
    self.assertEqual(network.nodes['3'].state.round, 4)

  @pytest.mark.slow
  def test_a_release_that_knows_the_protocol_goes_on(self):
    one = made(4, 'protocol=2', 'release=3.1')
    known = frozenset({1, 2})
    with mock.patch.object(amendments, 'KNOWN_PROTOCOLS', known):
      network = begin()
      support(network, one, '3', '4')
      network.run(6)
    self.assertEqual({*held(network).values()}, {(one,)})
    self.assert_equal(network)

  @pytest.mark.slow
  def test_supports_are_withdrawn(self):
    network, one = begin(), made(6, 'rounds=30')
    support(network, one, '3', '4')
    node = network.nodes['3']
    own = node.objects, node.shared_model.run, node.chain.hotkey
    self.assertEqual(amend.withdraw(*own, node.chain.verify, 6), 1)
    self.assertEqual(amend.own_supports(*own, node.chain.verify), {})
    network.run(5)
    self.assertEqual({*held(network).values()}, {()})


if __name__ == '__main__':
  absltest.main()
