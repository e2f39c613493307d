"""The memory of a validator."""

import types

from absl.testing import absltest

from covenant.chain import interface as chain_lib
from covenant.gauntlet import ratings
from covenant.node import validator_role as role_lib
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
    tree, text = role.save(self.node.state)
    self.assertEmpty(tree)
    other = role_lib.ValidatorRole(role.judge)
    state = round_lib.RoundState(4)
    self.assertIs(other.load(tree, text, state), state)
    self.assertEqual(other.standings, role.standings)

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

  def test_identities_are_those_of_miners(self):
    found = role_lib.identities(self.network.read())
    self.assertEqual(set(found), set(network_lib.MINERS))
    self.assertEqual(found[1].hotkey, network_lib.KEYS[1].address)
    peers = types.SimpleNamespace(miners=[])
    self.assertEmpty(role_lib.identities(peers))


if __name__ == '__main__':
  absltest.main()
