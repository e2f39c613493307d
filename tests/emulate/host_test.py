import dataclasses
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest

from covenant.data import dataset
from covenant.emulate import host as host_lib
from covenant.emulate import saved
from covenant.models import loss as loss_lib
from covenant.node import miner as miner_lib
from covenant.optim import inner as inner_lib
from covenant.train import local as local_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train import trainer as trainer_lib
from tests import helpers

TRACES = helpers.ROOT / 'tests' / 'golden' / 'traces.json'


def tiny(variant='', **changes):
  return dataclasses.replace(helpers.tiny(variant=variant), **changes)


class MinersTest(absltest.TestCase):
  @pytest.mark.slow
  def test_a_miner_trains_as_it_would_alone(self):
    """Bit for bit: who else is emulated on the host does not matter."""
    many, one = tiny(miners=3, rounds=1), tiny(miners=1, rounds=1)
    miners = []
    for config in (many, one):
      host = host_lib.Host(config, dataset.load(config))
      host.round()
      miners.append(host.miners[0])
    first, alone = miners
    self.assertEqual(
      helpers.bits(first.role.miner_state.result()),
      helpers.bits(alone.role.miner_state.result()),
    )
    made, also = (m.role.contribution.result() for m in miners)
    self.assertEqual(made.payload, also.payload)

  @pytest.mark.slow
  def test_ddp_is_adamw_on_the_mean_gradient(self):
    config = tiny('ddp', rounds=3)
    host = host_lib.Host(config, dataset.load(config))
    params = jax.tree.map(np.asarray, saved.save(host).shared.params)
    adamw = inner_lib.adamw(config.optim.inner)
    schedule = inner_lib.schedule(config.optim.inner, 3)
    opt = adamw.init(params)

    def loss(params, tokens):
      return loss_lib.next_token_loss(config.model, params, tokens).total

    step = jax.jit(jax.grad(loss))
    for r in range(3):
      host.round()
      gradients = [
        step(params, batch_of(config, miner, r)) for miner in host.miners
      ]
      mean = jax.tree.map(lambda *g: sum(g) / len(g), *gradients)
      updates, opt = adamw.update(mean, opt, params)
      rate = schedule(r)
      params = jax.tree.map(
        lambda p, u, rate=rate: p + rate * u, params, updates
      )
    jax.tree.map(
      lambda got, want: np.testing.assert_allclose(got, want, atol=1e-6),
      saved.save(host).shared.params,
      params,
    )


class LostRoundTest(absltest.TestCase):
  """One miner of four trains at a rate at which nothing stays finite."""

  @pytest.mark.slow
  def test_it_sits_out_and_starts_again_from_the_shared_parameters(self):
    config = tiny(miners=4, rounds=3)
    inner = dataclasses.replace(config.optim.inner, learning_rate=1e30)
    optim = dataclasses.replace(config.optim, inner=inner)
    wild = dataclasses.replace(config, optim=optim)
    data = dataset.load(config)
    host = host_lib.Host(config, data)
    notes = []
    host.stopwatch.note = lambda name, event: notes.append((name, event))
    own = host.miners[2].role.slot
    trainer = trainer_lib.Trainer(wild, host.shared_model, data)
    host.miners[2].role.slot = miner_lib.LocalSlot(trainer)
    for r in range(2):
      record = host.round()
      self.assertEqual((record.round, record.uids), (r + 1, (0, 1, 3)))
      self.assertTrue(np.isfinite(record.loss))
      fresh = own.init(host.miners[2].shared.params, r + 1)
      self.assertEqual(
        helpers.bits(host.miners[2].role.miner_state.result()),
        helpers.bits(fresh),
      )
    self.assertEqual(
      [(n, e.round, e.what) for n, e in notes],
      [('2', 0, 'lost round'), ('2', 1, 'lost round')],
    )
    self.assertRegex(notes[0][1].error, 'miner 2, round 0: .*sits out')
    host.miners[2].role.slot = own
    self.assertEqual(host.round().uids, (0, 1, 2, 3))
    self.assertLen({node.root for node in host.nodes}, 1)
    self.assertLen({node.fingerprint() for node in host.nodes}, 1)


def batch_of(config, miner, round_index):
  """Returns the tokens that a miner read in a round of one step."""
  split, chain = dataset.load(config).train, miner.chain
  start = miner.schedule.start(round_index)
  uids = {peer.hotkey: peer.uid for peer in chain.peers(start)}
  task = local_lib.Task(
    uids[chain.hotkey], round_index, chain.block_hash(start), miner.root
  )
  (ids_B,) = local_lib.batch_ids(config, task, split)
  return split.read(ids_B, config.data.context)


class ChainOptionsTest(absltest.TestCase):
  """A chain whose permits go to stake, and whose weights are sealed."""

  @pytest.mark.slow
  def test_paid_miners_get_permits_and_stay_miners(self):
    plain = tiny(validators=2)
    network = dataclasses.replace(plain.network, permits=4, reveal_epochs=1)
    config = dataclasses.replace(plain, network=network)
    hosts = [host_lib.Host(c, dataset.load(c)) for c in (config, plain)]
    for _ in range(9):  # two epochs of 360 blocks and more
      records = [host.round() for host in hosts]
      self.assertEqual(records[0].uids, (0, 1, 2))
      self.assertEqual(records[0].payloads, records[1].payloads)
    chain = hosts[0].chain
    peers = chain.peers(chain.head())
    holders = [peer.uid for peer in peers if peer.permit]
    self.assertLen(holders, 4)
    self.assertNotEmpty(set(holders) & {0, 1, 2})
    # It changes who is paid when, and nothing else.
    self.assertEqual(*(host.miners[0].fingerprint() for host in hosts))
    chain = hosts[1].chain
    self.assertEqual(
      [peer.uid for peer in chain.peers(chain.head()) if peer.permit], [3, 4]
    )


@pytest.mark.slow
class NodesTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    config = tiny(validators=3)
    cls.host = host_lib.Host(config, dataset.load(config))
    cls.records = [cls.host.round() for _ in range(3)]

  def test_all_stand_at_the_same_place(self):
    self.assertLen(self.host.nodes, 6)
    prints = {
      shared_state_lib.fingerprint(n.shared.params) for n in self.host.nodes
    }
    self.assertLen(prints, 1)
    self.assertLen({n.root for n in self.host.nodes}, 1)
    self.assertEqual({n.state.round for n in self.host.nodes}, {3})

  def test_all_validators_found_the_same(self):
    standings = {str(v.role.standings) for v in self.host.validators}
    self.assertLen(standings, 1)

  def test_every_honest_miner_counted_and_is_paid(self):
    self.assertEqual([r.payloads for r in self.records], [3, 3, 3])
    self.assertEqual([r.uids for r in self.records], [(0, 1, 2)] * 3)
    weights = self.host.miners[0].chain.weights()
    self.assertEqual(list(weights), [3, 4, 5])  # the validators, in round 3
    self.assertNotEmpty(weights[3])
    self.assertEqual(weights[3], weights[4])
    self.assertContainsSubset(weights[3], {0, 1, 2})

  def test_warming_up_compiles_scoring_and_changes_nothing(self):
    config = tiny(rounds=1)
    host = host_lib.Host(config, dataset.load(config))
    before = helpers.everything(saved.save(host))
    losses = host.judge.scorer.losses
    with mock.patch.object(
      host.judge.scorer, 'losses', mock.Mock(wraps=losses)
    ) as scored:
      host.warm_up()
    self.assertGreater(scored.call_count, 2)
    self.assertEqual(helpers.everything(saved.save(host)), before)

  def test_two_hosts_do_not_find_each_others_objects(self):
    config = tiny()
    other = host_lib.Host(config, dataset.load(config))
    mine = {n.objects.bucket.location for n in self.host.nodes}
    self.assertNoCommonElements(
      mine, {n.objects.bucket.location for n in other.nodes}
    )

  def test_begins_anew(self):
    config = tiny()
    host = host_lib.Host(config, dataset.load(config))
    before = helpers.everything(saved.save(host))
    host.round()
    self.assertNotEqual(helpers.everything(saved.save(host)), before)
    host.init()
    self.assertEqual(helpers.everything(saved.save(host)), before)


if __name__ == '__main__':
  absltest.main()
