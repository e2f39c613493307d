"""Supports of rollbacks, good and hostile, in the eyes of one validator."""

import dataclasses
import types
from unittest import mock

import jax
from absl.testing import absltest

from covenant import config as config_lib
from covenant.emulate import proposals
from covenant.node import amend
from covenant.node import beside
from covenant.node import connect
from covenant.node import divergence
from covenant.node import targets
from covenant.protocol import amendments
from covenant.protocol import apply
from covenant.protocol import published_checkpoint
from covenant.protocol import rollback
from covenant.protocol import round as round_lib
from covenant.wire import amendment as amendment_lib
from covenant.wire import manifest as manifest_lib
from tests.node import network as network_lib

MODEL = network_lib.shared_model
HERE = 5  # rounds that are completed
CONFIG = dataclasses.replace(network_lib.CONFIG, rounds=2000)


def position(round_index, shift=0.0):
  """Returns a position after so many rounds in which nobody counted."""
  place = network_lib.start()
  for _ in range(round_index):
    place = place.advance(None, place.shared)
  if not shift:
    return place
  params = jax.tree.map(lambda x: x + shift, place.shared.params)
  return place._replace(shared=place.shared._replace(params=params))


def fingerprint(round_index, shift=0.0):
  return apply.fingerprint(MODEL(), position(round_index, shift))


def made(round_index, restore, **values):
  return amendment_lib.make(
    MODEL().run, round_index, {'restore': restore, **values}
  )


class Case(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.network = network_lib.Network(self)
    self.nodes = {
      uid: self.network.validator(uid, config=CONFIG) for uid in (3, 4, 5)
    }
    self.node = self.nodes[3]
    schedule = self.node.schedule
    self.network.block = schedule.start(HERE)
    for uid in self.nodes:
      self.vote(uid)
    self.network.block = self.head = schedule.start(HERE + 1)
    for node in self.nodes.values():
      node.state = round_lib.RoundState(HERE, kept=False)

  def vote(self, uid):
    self.network.commit(uid, HERE - 1)

  def publish(self, uid, round_index, shift=0.0):
    published_checkpoint.publish(
      self.network.objects(uid),
      position(round_index, shift),
      MODEL(),
      network_lib.KEYS[uid].sign,
    )

  def support(self, amendment, *uids):
    for uid in uids:
      chain = self.nodes[uid].chain
      amend.support(
        self.network.objects(uid), MODEL().run, amendment, chain.hotkey,
        chain.sign, chain.verify,
      )  # fmt: skip

  def keep(self, *uids):
    for uid in uids or (3,):
      amend.keep(self.nodes[uid], self.head)

  def closing(self):
    return self.network.read()

  def own(self):
    chain = self.node.chain
    return [
      *amend.own_supports(
        self.node.objects, MODEL().run, chain.hotkey, chain.verify
      )
    ]

  def said(self, text):
    return [e for e in self.network.events if text in e.error]


class SupportsTest(Case):
  def test_a_malformed_restore_of_a_stranger_is_dropped(self):
    bad = made(HERE + 4, 5)
    self.support(bad, 4, 5)
    self.keep()
    self.assertEqual(self.node.role.supports, {})
    self.assertIsNone(amend.due(self.node, self.closing(), HERE))

  def test_an_adopted_malformed_one_ends_nothing_before_its_round(self):
    bad = made(HERE + 4, 5)
    self.assertEqual(rollback.needed([bad], 0), set())
    place = apply.Position(bad.round, bytes(32), None, (bad,))
    self.assertIsNone(rollback.due(place))
    with self.assertRaises(amendments.ReleaseNeededError):
      amendments.config_at(CONFIG, [bad], bad.round)

  def test_what_lost_its_majority_need_not_be_adopted(self):
    one = amendment_lib.make(
      MODEL().run, HERE + 9, {'optim.outer.learning_rate': 0.5}
    )
    self.support(one, 4, 5)
    self.keep()
    self.node.state = round_lib.RoundState(HERE + 1, kept=False)
    self.keep()
    self.assertEqual(self.node.role.supported, {one: HERE})
    closing = self.closing()
    self.node.role.collected = types.SimpleNamespace(membership=closing)
    manifest = manifest_lib.Manifest(
      MODEL().run, HERE + 1, bytes(32), '', '', (), None
    )
    with self.assertRaisesRegex(amend.AmendmentError, 'leaves out'):
      amend.check(self.node, manifest)
    # By the stake at the close of the put window it has no majority.
    poorer = {
      uid: peer._replace(stake=1.0) if uid in (4, 5) else peer
      for uid, peer in closing.peers.items()
    }
    self.node.role.collected.membership = closing._replace(peers=poorer)
    amend.check(self.node, manifest)
    # One of them withdraws.
    self.node.role.collected.membership = closing
    chain = self.nodes[4].chain
    amend.withdraw(
      self.network.objects(4), MODEL().run, chain.hotkey, chain.verify, HERE + 9
    )
    self.keep()
    self.assertEqual(self.node.role.supported, {})
    self.assertIn(one, self.node.role.supports)
    amend.check(self.node, manifest)

  def test_no_vote_for_an_own_signature_that_was_withdrawn(self):
    one = amendment_lib.make(MODEL().run, HERE + 9, {'rounds': 1990})
    self.support(one, 3, 4)
    self.keep()
    closing = self.closing()
    self.node.role.collected = types.SimpleNamespace(membership=closing)
    adoption = amend.due(self.node, closing, HERE)
    manifest = manifest_lib.Manifest(
      MODEL().run, HERE, bytes(32), '', '', (), adoption
    )
    amend.check(self.node, manifest)
    chain = self.node.chain
    amend.withdraw(
      self.node.objects, MODEL().run, chain.hotkey, chain.verify, HERE + 9
    )
    with self.assertRaisesRegex(amend.AmendmentError, 'has withdrawn'):
      amend.check(self.node, manifest)

  def test_one_support_for_a_field_and_a_round(self):
    one = amendment_lib.make(MODEL().run, 9, {'rounds': 1990})
    self.support(one, 3)
    self.support(one, 3)  # again
    self.support(amendment_lib.make(MODEL().run, 10, {'rounds': 1991}), 3)
    with self.assertRaisesRegex(amend.AmendmentError, 'supported already'):
      self.support(amendment_lib.make(MODEL().run, 9, {'rounds': 1991}), 3)
    self.assertLen(self.own(), 2)

  def test_a_damaged_own_list_is_withdrawn(self):
    key = self.node.objects.key('amendments', 0)
    self.node.objects.bucket.put(key, b'[', replace=True)
    with self.assertRaises(amend.AmendmentError):
      self.own()
    chain = self.node.chain
    amend.withdraw(
      self.node.objects, MODEL().run, chain.hotkey, chain.verify, 1
    )
    self.assertEqual(self.own(), [])


class TargetsTest(Case):
  def test_all_keep_what_one_validator_had(self):
    """It deletes its checkpoint after the run has adopted the rollback."""
    target = amendments.Target(3, fingerprint(3))
    one = made(HERE + 4, [*target])
    self.publish(5, 3)
    self.support(one, 3, 4)
    self.assertIsNone(amend.due(self.node, self.closing(), HERE))
    for uid in 3, 4:
      self.nodes[uid].role.prints[3] = target.fingerprint
    self.keep(3, 4)
    self.assertEqual(amend.due(self.node, self.closing(), HERE).amendment, one)
    holder = self.network.objects(5)
    listed = [info.key for info in holder.bucket.list(f'{MODEL().run.hex()}/')]
    holder.bucket.delete([key for key in listed if 'amendments' not in key])
    for uid in 3, 4:
      around = targets.surroundings(self.nodes[uid], self.closing())
      key = self.nodes[uid].chain.hotkey
      self.assertTrue(rollback.is_held(around, key, target))
      loaded = rollback.load(around, target)
      self.assertEqual(
        MODEL().fingerprint(loaded), MODEL().fingerprint(position(3).shared)
      )
    # It stays as long as the amendment is wanted.
    published_checkpoint.prune(self.node.objects, 2, {3})
    self.assertTrue(rollback.is_held(around, key, target))

  def test_no_vote_for_a_state_that_is_not_published(self):
    one = made(HERE + 4, [3, fingerprint(3)])
    self.node.role.prints[3] = fingerprint(3)
    self.support(one, 3, 4, 5)
    self.keep()
    self.assertEqual(self.node.role.targets, set())
    self.assertIsNone(amend.due(self.node, self.closing(), HERE))
    self.assertLen(self.said('no validator publishes its checkpoint'), 1)

  def test_an_index_without_its_pieces_is_not_enough(self):
    target = amendments.Target(3, fingerprint(3))
    self.publish(5, 3)
    self.network.objects(5).delete_chunks_except(())
    self.node.role.prints[3] = target.fingerprint
    self.support(made(HERE + 4, [*target]), 3, 4)
    self.keep()
    self.assertEqual(self.node.role.targets, set())
    self.assertLen(self.said('cannot be fetched now'), 1)
    self.publish(4, 3)
    self.keep()
    self.assertEqual(self.node.role.targets, {target})

  def test_a_process_fetches_it_beside_the_rounds(self):
    worker = beside.Beside('test')
    node = self.network.validator(3, config=CONFIG, publisher=worker)
    node.state = self.node.state
    target = amendments.Target(3, fingerprint(3))
    node.role.prints[3] = target.fingerprint
    self.publish(5, 3)
    self.support(made(HERE + 4, [*target]), 3, 4)
    amend.keep(node, self.head)
    self.assertTrue(worker.close(None))
    self.assertEqual(node.role.targets, {target})
    self.assertLen(self.said('is being fetched'), 1)

  def test_a_minority_keeps_nobody_busy(self):
    self.publish(5, 3)
    self.support(made(HERE + 4, [3, fingerprint(3)]), 5)
    self.node.role.prints[3] = fingerprint(3)
    self.keep()
    self.assertEqual(self.node.role.targets, set())
    self.assertNotIn(
      3,
      published_checkpoint.published(
        self.node.objects, self.node.objects.bucket
      ),
    )


class HistoryTest(Case):
  def vote(self, uid):
    there = HERE - 1
    data = self.network.manifest(
      3, [], round=there, root=position(there).root,
      fingerprint=fingerprint(there),
    )  # fmt: skip
    self.network.propose(uid, data, there)

  def test_who_was_not_there_believes_the_history_alone(self):
    """The leader publishes another state than the run had."""
    node, there = self.nodes[4], HERE - 1
    self.publish(3, there, shift=1.0)
    self.publish(5, there)
    false = made(HERE + 4, [there, fingerprint(there, 1.0)])
    self.support(false, 4, 5)
    self.keep(4)
    self.assertEqual(node.role.targets, set())
    self.assertLen(self.said('its fingerprint is'), 1)
    right = made(HERE + 5, [there, fingerprint(there)])
    self.support(right, 4, 5)
    self.keep(4)
    found = amendments.Target(there, fingerprint(there))
    self.assertEqual(node.role.targets, {found})
    self.assertEqual(amend.due(node, self.closing(), HERE).amendment, right)

  def propose(self, *edits):
    """Runs the command of the operator of validator 4."""
    there = dataclasses.replace(CONFIG.network, path='of the test')
    config = dataclasses.replace(CONFIG, network=there)
    with (
      mock.patch.object(connect, 'chain', return_value=self.nodes[4].chain),
      mock.patch.object(
        connect, 'objects', return_value=self.network.objects(4)
      ),
    ):
      return proposals.run(config, '', HERE + 4 if edits else None, edits)

  def test_the_command_takes_the_fingerprint_of_the_history(self):
    there = HERE - 1
    self.publish(3, there, shift=1.0)
    with self.assertRaisesRegex(config_lib.ConfigError, 'vouches for'):
      self.propose(f'restore={there}')
    self.publish(5, there)
    text = self.propose(f'restore={there}')
    self.assertIn(fingerprint(there), text)
    self.assertNotIn(fingerprint(there, 1.0), text)
    self.assertIn('supported by 33% of the stake', self.propose())

  def test_the_command_lists_hostile_values(self):
    values = {'protocol': [2], 'release': '\x1b[2J' * 5000}
    self.support(amendment_lib.make(MODEL().run, HERE + 9, values), 3)
    self.support(made(HERE + 4, 5), 5)
    text = self.propose()
    self.assertTrue(text.replace('\n', '').isprintable())
    self.assertLess(len(text), 3000)

  def test_without_a_manifest_nobody_is_believed(self):
    node = self.nodes[4]
    self.publish(3, 2, shift=1.0)
    self.support(made(HERE + 4, [2, fingerprint(2, 1.0)]), 4, 5)
    self.keep(4)
    self.assertEqual(node.role.targets, set())


class WatchTest(Case):
  def setUp(self):
    super().setUp()
    for r in 3, 4:
      self.node.role.prints[r] = fingerprint(r)
    self.node.role.diverged = 'it is not well'

  def proposed(self):
    divergence.watch(self.node, self.head)
    return [tuple(a.values['restore']) for a in self.own()]

  def test_a_malformed_restore_ends_nobody(self):
    self.publish(5, 4)
    self.support(made(HERE + 4, 5), 4, 5)
    self.keep()
    self.assertEqual(self.proposed(), [(4, fingerprint(4))])

  def test_a_minority_suppresses_no_proposal(self):
    self.publish(5, 4)
    for r in HERE + 3, HERE + 1000:
      self.support(made(r, [1, '0' * 32]), 5)
    self.support(made(HERE + 900, [1, '0' * 32]), 4, 5)  # much later
    self.keep()
    self.assertEqual(self.proposed(), [(4, fingerprint(4))])

  def test_one_of_a_majority_is_enough(self):
    self.publish(5, 4)
    self.support(made(HERE + 3, [3, fingerprint(3)]), 4, 5)
    self.keep()
    self.assertEqual(self.proposed(), [])

  def test_it_prefers_what_more_than_half_of_the_stake_lists(self):
    self.publish(5, 4)
    self.publish(4, 3)
    self.publish(3, 3)
    self.assertEqual(self.proposed(), [(3, fingerprint(3))])

  def test_supports_that_leave_no_room_are_an_event(self):
    self.publish(5, 4)
    for i in range(amendment_lib.MAX_SUPPORTS):
      self.support(made(HERE + 50 + i, [3, fingerprint(3)]), 3)
    self.assertLen(self.proposed(), amendment_lib.MAX_SUPPORTS)
    self.assertLen(self.said('it can propose no rollback'), 1)

  def test_a_damaged_list_of_supports_is_an_event(self):
    self.publish(5, 4)
    key = self.node.objects.key('amendments', 0)
    self.node.objects.bucket.put(key, b'[', replace=True)
    divergence.watch(self.node, self.head)
    self.assertLen(self.said('it can propose no rollback'), 1)


if __name__ == '__main__':
  absltest.main()
