from absl.testing import absltest

from covenant.chain import interface
from covenant.chain import keys
from covenant.chain import local_chain
from covenant.chain import storage as chain_storage
from covenant.protocol import membership as membership_lib
from covenant.wire import commitment as commitment_lib

KEYS = [keys.Key.from_seed(bytes([i]) * 32) for i in range(5)]
# uid -> (stake, whether it is a validator)
PEERS = {0: (0.0, False), 1: (5.0, True), 2: (9.0, True), 3: (5.0, True)}


class RosterTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.now = 0.0
    self.chain = local_chain.LocalChain.create(
      ':memory:',
      b'',
      chain_storage.ChainRules(block_seconds=1.0),
      clock=lambda: self.now,
    )
    self.addCleanup(self.chain.close)
    for uid, (stake, validator) in PEERS.items():
      self.chain.register(KEYS[uid].address, stake, validator)
    self.chain.begin(0.0)

  def commit(self, uid, data):
    self.chain.seen_by(KEYS[uid]).commit(data)

  def said(self, location, *rest):
    return commitment_lib.encode(commitment_lib.Commitment(location, *rest))

  def read(self, block):
    return membership_lib.read(self.chain, block)

  def test_the_leader_has_most_stake_then_the_lowest_uid(self):
    membership = self.read(0)
    self.assertEqual([p.uid for p in membership.validators], [2, 1, 3])
    self.assertEqual([p.uid for p in membership.miners], [0])
    self.assertEqual(membership.uid(KEYS[3].address), 3)

  def test_who_is_not_registered_is_told_what_to_do(self):
    stranger = KEYS[4].address
    with self.assertRaisesRegex(
      interface.ChainRejectedError,
      f'{stranger} is not registered at block 0: register',
    ):
      self.read(0).uid(stranger)

  def test_commitments_are_those_of_the_block(self):
    self.now = 3.0
    self.commit(0, self.said(b'here', 7, b'd' * 32))
    self.now = 6.0
    self.commit(0, self.said(b'there', 8, b'e' * 32))
    self.now = 9.0
    old, new = self.read(5), self.read(9)
    self.assertEqual(old.block, 5)
    self.assertEqual(old.commitments[0].round, 7)
    self.assertEqual(old.committed, {0: 3})
    self.assertEqual(new.commitments[0].digest, b'e' * 32)
    self.assertEqual(new.committed, {0: 6})
    self.assertEqual(old.location(0), b'here')
    self.assertEqual(new.location(0), b'there')
    self.assertEqual(new.location(1), b'')  # it never said
    self.assertEqual(new.location(99), b'')
    self.assertEmpty(self.read(2).commitments)

  def test_what_is_not_ours_is_passed_over(self):
    self.commit(0, b'\2 something else')
    self.commit(1, b'')
    self.commit(2, self.said(b'here'))
    self.now = 2.0
    membership = self.read(1)
    self.assertEqual(list(membership.commitments), [2])
    self.assertIsNone(membership.commitments[2].round)

  def test_who_has_left_stands_for_nothing(self):
    self.commit(2, self.said(b'here', 7))
    self.now = 5.0
    self.chain.deregister(KEYS[2].address)
    self.now = 7.0
    self.assertIn(2, self.read(3).commitments)
    membership = self.read(6)
    self.assertEmpty(membership.commitments)
    self.assertEqual([p.uid for p in membership.validators], [1, 3])

  def test_a_future_block_is_refused(self):
    with self.assertRaises(interface.ChainError):
      self.read(1)


if __name__ == '__main__':
  absltest.main()
