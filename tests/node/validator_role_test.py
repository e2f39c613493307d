"""The memory of a validator."""

import dataclasses
import json
import types

from absl.testing import absltest

from covenant.chain import interface as chain_lib
from covenant.gauntlet import ratings
from covenant.node import validator_role as role_lib
from covenant.protocol import rollback
from covenant.protocol import round as round_lib
from tests.node import network as network_lib


class ValidatorRoleTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.network = network_lib.Network(self)
    self.node = self.network.validator(3)

  def test_a_restart_keeps_the_ratings(self):
    role = self.node.role
    identities = role_lib.identities(self.network.read())
    role.standings = ratings.admit(role.standings, 2, identities)
    self.assertLen(role.standings.standings, len(network_lib.MINERS))
    role.sent = [(7, {0: 0.25, 1: 0.75}), (9, {1: 1.0})]
    role.targets = {rollback.Target(3, '0f' * 16)}
    tree, text = role.save(self.node.state)
    text = json.loads(json.dumps(text))
    self.assertEmpty(tree)
    other = role_lib.ValidatorRole(role.judge)
    state = round_lib.RoundState(4)
    self.assertIs(other.load(tree, text, state), state)
    self.assertEqual(other.standings, role.standings)
    self.assertEqual(other.sent, role.sent)
    self.assertEqual(other.targets, role.targets)

  def test_it_is_saved_once_the_last_round_is_kept_and_scored(self):
    role = self.node.role
    for kept in (False, True):
      for scored in (False, True):
        state = round_lib.RoundState(1, kept=kept, scored=scored)
        self.assertEqual(role.is_savable(state), kept and scored)

  def test_the_lottery_is_of_the_block_that_closes_the_window(self):
    closes = self.node.schedule.put_closes(0)
    self.network.block = closes - 1
    with self.assertRaises(chain_lib.ChainRejectedError):
      role_lib.lottery(self.node, 0)
    self.network.block = closes
    self.assertEqual(
      role_lib.lottery(self.node, 0), self.network.chain.block_hash(closes)
    )

  def test_another_hotkey_or_registration_loses_its_standing(self):
    """A hotkey swap and a second registration keep the uid, and no more."""
    for change in ({'hotkey': 'swapped'}, {'registered': 99}):
      with self.subTest(change):
        membership = self.network.read()
        identities = role_lib.identities(membership)
        before = ratings.admit(ratings.Ratings(), 2, identities)
        standing = dataclasses.replace(before.standings[0], mu=40.0)
        before = dataclasses.replace(
          before, standings={**before.standings, 0: standing}
        )
        peer = membership.peers[0]._replace(**change)
        peers = {**membership.peers, 0: peer}
        identities = role_lib.identities(membership._replace(peers=peers))
        after = ratings.admit(before, 3, identities)
        self.assertEqual(after.standings[0].mu, ratings.MU)
        self.assertEqual(after.standings[1], before.standings[1])

  def test_identities_are_those_of_miners(self):
    found = role_lib.identities(self.network.read())
    self.assertEqual(set(found), set(network_lib.MINERS))
    self.assertEqual(found[1].hotkey, network_lib.KEYS[1].address)
    peers = types.SimpleNamespace(miners=[])
    self.assertEmpty(role_lib.identities(peers))


if __name__ == '__main__':
  absltest.main()
