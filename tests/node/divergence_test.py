"""Rollbacks: by the rule of validators, by hand, and of a model with NaN."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.adversaries import poisoning
from covenant.config import amend as fields
from covenant.data import dataset
from covenant.emulate import host as host_lib
from covenant.node import amend
from covenant.node import miner as miner_lib
from covenant.protocol import amendments
from covenant.protocol import published_checkpoint
from covenant.wire import amendment as amendment_lib
from experiments.chaos import network as network_lib
from experiments.chaos import scenario
from tests import helpers

BAD = 2  # the round of the poisoned updates; steps have no bound yet
ROUND = 20  # blocks


@functools.cache
def host(rise):
  """Three miners and two validators; a checkpoint of every round, two stay."""
  config = dataclasses.replace(
    scenario.get_config(helpers.tiny('optim.outer.momentum=0.5')),
    rounds=20,
    miners=3,
    validators=2,
    checkpoint=config_lib.Checkpoint(every=1, keep=2, publish=1),
  )
  gauntlet = dataclasses.replace(
    config.gauntlet, evaluate=0 if rise else 3, rollback_rise=rise
  )
  config = dataclasses.replace(config, gauntlet=gauntlet)
  return config, host_lib.Host(config, dataset.load(config))


def poisoned_network(rise):
  """Returns a network whose miners all go uphill in one round."""
  config, shared = host(rise)
  network = network_lib.Network(config, shared)
  honest = miner_lib.in_virtual_time(miner_lib.HONEST)
  policy = poisoning.scaled(
    honest, -30.0, lambda miner, task: task.round == BAD
  )
  for name in '0', '1', '2':
    network.nodes[name].handlers = miner_lib.handlers(policy)
  return network


def loss(network):
  node = network.nodes['3']
  heldout, context = node.role.judge.heldout, node.config.data.context
  tokens = heldout.read(range(4), context)
  return node.role.judge.scorer.loss(node.shared.params, tokens)


def run_to(network, completed):
  """Runs until a validator has completed some rounds; returns its loss."""
  while network.nodes['3'].state.round < completed:
    network.step()
  return loss(network)


class RollbackTest(parameterized.TestCase):
  def assert_rolled_back(self, network, target):
    """All hold the state that the rollback names, and go on from there."""
    for node in network.live.values():
      (one,) = node.amendments
      self.assertEqual(amendments.restored(one), target)
    network.run(one.round + 2)
    self.assertLen(
      {(n.root, n.fingerprint()) for n in network.live.values()}, 1
    )
    counted = network_lib.audit(network)
    self.assertEqual(counted[BAD], [0, 1, 2])  # it stays in the history
    self.assertEqual(counted[one.round + 1], [0, 1, 2])
    return one

  @pytest.mark.slow
  def test_a_poisoned_update_is_rolled_back_by_the_rule(self):
    network = poisoned_network(0.3)
    before = run_to(network, BAD)
    print_before = network.nodes['3'].fingerprint()
    after = run_to(network, BAD + 1)
    self.assertGreater(after, 1.3 * before)
    network.run(BAD + 4)
    target = amendments.Target(BAD, print_before)
    one = self.assert_rolled_back(network, target)
    self.assertEqual(one.round, BAD + 1 + 3)
    self.assertLess(loss(network), 1.1 * before)
    said = network.errors('it proposes that the state of round')
    self.assertEqual({seen.event.what for seen in said}, {'diverged'})
    # A joiner that replays, or starts from a checkpoint, stands there, too.
    network.join('10')
    network.run(one.round + 4)
    self.assertLen(
      {(n.root, n.fingerprint()) for n in network.live.values()}, 1
    )

  @pytest.mark.slow
  def test_by_hand(self):
    network = poisoned_network(0.0)
    before = run_to(network, BAD)
    there = network.nodes['3'].fingerprint()
    self.assertGreater(run_to(network, BAD + 1), 1.3 * before)
    run = network.host.shared_model.run
    values = {fields.RESTORE: [BAD, there]}
    one = amendment_lib.make(run, BAD + 4, values)
    for name in '3', '4':
      chain, objects = network.nodes[name].chain, network.nodes[name].objects
      amend.support(objects, run, one, chain.hotkey, chain.sign, chain.verify)
    network.run(BAD + 3)
    self.assert_rolled_back(network, amendments.Target(BAD, there))
    self.assertLess(loss(network), 1.1 * before)

  @pytest.mark.slow
  def test_the_only_holder_deletes_it_after_the_adoption(self):
    network = poisoned_network(0.0)
    run_to(network, BAD + 1)
    holder, other = network.nodes['3'], network.nodes['4']
    there, run = holder.role.prints[BAD], network.host.shared_model.run
    key = other.objects.key('checkpoints', BAD)
    other.objects.bucket.delete([key])
    one = amendment_lib.make(run, BAD + 5, {fields.RESTORE: [BAD, there]})
    for node in holder, other:
      chain, objects = node.chain, node.objects
      amend.support(objects, run, one, chain.hotkey, chain.sign, chain.verify)
    while holder.state.round < one.round + 1:
      network.step()
      if holder.amendments:
        holder.objects.bucket.delete([key])
        holder.objects.delete_chunks_except(())
    listed = published_checkpoint.published(other.objects, other.objects.bucket)
    self.assertIn(BAD, listed)
    self.assert_rolled_back(network, amendments.Target(BAD, there))

  @parameterized.parameters(
    (0.3, 'held-out loss is not finite'),
    (0.0, 'shared parameters have a loss that is not finite'),
  )
  @pytest.mark.slow
  def test_a_model_that_is_not_finite(self, rise, error):
    """All hold NaN after a round, as if the arithmetic had led there."""
    config, shared = host(rise)
    network = network_lib.Network(config, shared)
    run_to(network, BAD + 1)
    broken = jax.tree.map(lambda x: x * jnp.nan, network.nodes['3'].shared)
    for node in network.nodes.values():
      node.shared = broken
    network.run(BAD + 5)
    (one,) = network.nodes['3'].amendments
    self.assertLessEqual(amendments.restored(one).round, BAD + 1)
    self.assertTrue(network.errors(error))
    self.assertTrue(network.errors('it sits out this round'))
    network.run(one.round + 2)
    self.assertLen(
      {(n.root, n.fingerprint()) for n in network.live.values()}, 1
    )
    self.assertTrue(jnp.isfinite(loss(network)))

  @pytest.mark.slow
  def test_the_rule_needs_no_rise_without_a_limit(self):
    network = poisoned_network(0.0)
    run_to(network, BAD + 2)
    self.assertEqual(network.errors('it proposes'), [])
    self.assertEqual(network.nodes['3'].role.losses, [])


if __name__ == '__main__':
  absltest.main()
