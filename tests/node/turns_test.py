"""Tests for the order of proposals, and for turns that are lost."""

from unittest import mock

from absl.testing import absltest

from covenant.chain import interface as chain_lib
from covenant.node import turns
from covenant.node import validator_role as role_lib
from tests.node import network as network_lib

HOTKEYS = {u: network_lib.KEYS[u].address for u in network_lib.STAKES}


class TurnsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.network = network_lib.Network(self)
    self.node = self.network.validator(4)
    self.network.block = self.node.schedule.start(1)

  def turns(self, round_index=0):
    membership = self.network.read()
    found = turns.turns(self.node, membership, round_index)
    return [peer.uid for peer in found]

  def test_the_largest_stake_leads(self):
    self.assertEqual(self.turns(), [3, 4, 5])

  def test_who_was_before_the_maker_has_lost_its_turn_for_some_rounds(self):
    turns.pass_over(self.node, 0, self.network.manifest(5, []))
    self.assertEqual(self.node.role.passed, {HOTKEYS[3]: 0, HOTKEYS[4]: 0})
    self.assertEqual(self.turns(1), [5, 3, 4])
    self.assertEqual(self.turns(turns.PASSED_ROUNDS), [5, 3, 4])
    self.assertEqual(self.turns(turns.PASSED_ROUNDS + 1), [3, 4, 5])

  def test_a_leader_whose_manifest_held_stays(self):
    turns.pass_over(self.node, 0, self.network.manifest(3, []))
    self.assertEmpty(self.node.role.passed)

  def test_without_a_manifest_the_leader_has_lost_its_turn(self):
    turns.pass_over(self.node, 0, b'')
    self.assertEqual(self.turns(1), [4, 5, 3])

  def test_all_that_were_passed_over_keep_their_order(self):
    self.node.role.passed = dict.fromkeys(HOTKEYS.values(), 0)
    self.assertEqual(self.turns(1), [3, 4, 5])

  def test_old_rounds_are_forgotten(self):
    self.node.role.passed = {'somebody': 0}
    with mock.patch.object(
      self.node.schedule.__class__, 'put_closes', return_value=0
    ):
      turns.pass_over(
        self.node, turns.PASSED_ROUNDS + 1, self.network.manifest(3, [])
      )
    self.assertEmpty(self.node.role.passed)

  def test_what_the_chain_has_forgotten_changes_nothing(self):
    pruned = chain_lib.ChainRejectedError('pruned')
    with mock.patch.object(self.node.chain, 'peers', side_effect=pruned):
      turns.pass_over(self.node, 0, b'')
    self.assertEmpty(self.node.role.passed)

  def test_a_restart_remembers(self):
    self.node.role.passed = {HOTKEYS[3]: 7}
    tree, text = self.node.role.save(self.node.state)
    again = role_lib.ValidatorRole(self.node.role.judge)
    again.load(tree, text, self.node.state)
    self.assertEqual(again.passed, {HOTKEYS[3]: 7})

  def test_who_is_no_candidate_yet_is_the_last(self):
    self.network.chain.set_permit(HOTKEYS[4], False)
    self.network.block += 2
    self.assertEqual(self.turns(), [3, 5, 4])


if __name__ == '__main__':
  absltest.main()
