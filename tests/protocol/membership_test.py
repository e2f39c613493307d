from absl.testing import absltest

from covenant import config as config_lib
from covenant.chain import interface
from covenant.chain import keys
from covenant.chain import local_chain
from covenant.chain import storage as chain_storage
from covenant.protocol import membership as membership_lib
from covenant.protocol import round as round_lib
from covenant.wire import commitment as commitment_lib

KEYS = [keys.Key.from_seed(bytes([i]) * 32) for i in range(5)]
# uid -> (stake, whether it has a permit)
PEERS = {0: (0.0, False), 1: (5.0, True), 2: (9.0, True), 3: (5.0, True)}
ACTIVE = 2
OUTAGE = membership_lib.OUTAGE
SCHEDULE = round_lib.Schedule(
  config_lib.Phases(
    round_blocks=20,
    put_blocks=6,
    select_blocks=4,
    takeover_blocks=3,
    active_rounds=ACTIVE,
  )
)
Role = commitment_lib.Role


def uids(peers):
  return [peer.uid for peer in peers]


class MembershipTest(absltest.TestCase):
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

  def said(self, location, *rest, role=Role.MINER):
    return commitment_lib.encode(
      commitment_lib.Commitment(role, location, *rest)
    )

  def read(self, block):
    return membership_lib.read(self.chain, block, SCHEDULE)

  def vote(self, round_index, *voters, at=None):
    """Votes on a round, in the block after its end, or at another block."""
    self.now = SCHEDULE.start(round_index + 1) + 1.0 if at is None else at
    vote = self.said(b'', round_index, b'd' * 32, role=Role.VALIDATOR)
    for uid in voters:
      self.commit(uid, vote)

  def look(self, round_index):
    """Returns the membership that decides about a round."""
    block = SCHEDULE.decision_block(round_index)
    self.now = max(self.now, float(block + 1))
    return self.read(block)

  def test_before_any_vote_the_largest_holder_of_a_permit_goes_first(self):
    membership = self.read(0)
    self.assertEmpty(membership.validators)
    self.assertEqual(uids(membership.candidates), [2, 1, 3])
    self.assertEqual(uids(membership.miners), [0])
    self.assertEqual(membership.uid(KEYS[3].address), 3)
    self.assertEqual(membership.stakes(0), {1: 5.0, 2: 9.0, 3: 5.0})

  def test_a_permit_without_a_vote_is_not_a_role(self):
    self.vote(0, 3, 1)  # never uid 2, which has the most stake
    for r in (1, 2, 3):
      self.vote(r, 3, 1)
      membership = self.look(r)
      self.assertEqual(uids(membership.validators), [1, 3])
      self.assertEqual(uids(membership.candidates), [1, 3, 2])
      self.assertEqual(membership.stakes(r), {1: 5.0, 3: 5.0})
      self.assertEqual(uids(membership.miners), [0])

  def test_a_validator_counts_for_some_rounds_after_its_last_vote(self):
    self.vote(0, 1, 2, 3)
    found = {}
    for r in range(1, 5):
      self.vote(r, 1, 3)
      found[r] = uids(self.look(r).validators)
    self.assertEqual(found, {1: [2, 1, 3], 2: [2, 1, 3], 3: [1, 3], 4: [1, 3]})
    self.vote(5, 1, 2, 3)  # it counts in the round in which it is back
    membership = self.look(5)
    self.assertEqual(uids(membership.validators), [2, 1, 3])
    self.assertEqual(membership.stakes(5), {1: 5.0, 2: 9.0, 3: 5.0})

  def test_a_minority_does_not_decide_once_the_others_are_away(self):
    """Not before the outage has lasted many times as long as a silence."""
    self.vote(0, 1, 2, 3)
    everybody, longest = {1: 5.0, 2: 9.0, 3: 5.0}, OUTAGE * ACTIVE
    for r in range(1, longest + 3):
      self.vote(r, 1)
      want = everybody if r <= longest else {1: 5.0}
      self.assertEqual(self.look(r).stakes(r), want, r)
    self.vote(longest + 3, 2, 3)  # back, and the majority at once
    self.assertEqual(
      self.look(longest + 3).stakes(longest + 3), {1: 5.0, 2: 9.0, 3: 5.0}
    )

  def test_a_majority_goes_on_without_the_others(self):
    self.vote(0, 1, 2, 3)
    for r in range(1, ACTIVE + 2):
      self.vote(r, 1, 2)
    self.assertEqual(self.look(ACTIVE + 1).stakes(ACTIVE + 1), {1: 5.0, 2: 9.0})

  def test_a_payload_is_that_of_the_window(self):
    opens = SCHEDULE.put_opens(0)
    digest = b'd' * 32
    for name, at, role, round_index, want in (
      ('in the window', opens + 1, Role.MINER, 0, digest),
      ('before it', opens - 3, Role.MINER, 0, None),
      ('of another round', opens + 1, Role.MINER, 1, None),
      ('of a validator', opens + 1, Role.VALIDATOR, 0, None),
    ):
      with self.subTest(name):
        self.setUp()
        self.now = float(at)
        self.commit(0, self.said(b'', round_index, digest, role=role))
        self.now = opens + 4.0
        membership = self.read(opens + 3)
        self.assertEqual(membership.payload(0, 0, opens), want)
        self.assertIsNone(membership.payload(900, 0, opens))

  def test_a_vote_on_a_round_that_has_not_ended_is_none(self):
    self.vote(9, 2, at=float(SCHEDULE.start(1)))
    self.vote(0, 1, 3)
    self.vote(1, 1, 3)
    membership = self.look(1)
    self.assertEqual(membership.votes, {1: 1, 3: 1})
    self.assertEqual(uids(membership.validators), [1, 3])

  def test_a_miner_with_a_permit_stays_a_miner(self):
    self.now = 15.0
    for uid in (0, 2):
      self.commit(uid, self.said(b'here', 0, b'd' * 32))
    self.vote(0, 1, 3)
    membership = self.look(0)
    self.assertEqual(uids(membership.miners), [0, 2])
    self.assertEqual(uids(membership.candidates), [1, 3])
    self.assertEqual(membership.stakes(0), {1: 5.0, 3: 5.0})
    self.assertIs(membership.role(2), Role.MINER)

  def test_a_declaration_without_a_permit_is_no_validator(self):
    self.vote(0, 0, 1)
    membership = self.look(0)
    self.assertEqual(uids(membership.validators), [1])
    self.assertEqual(uids(membership.candidates), [1, 2, 3])
    self.assertEmpty(membership.miners)

  def test_the_last_declaration_counts(self):
    self.vote(0, 1, 2)
    self.vote(1, 1)
    self.commit(2, self.said(b'here', 1, b'd' * 32))
    membership = self.look(1)
    self.assertEqual(uids(membership.validators), [1])
    self.assertEqual(uids(membership.miners), [0, 2])

  def test_a_jump_of_a_stake_changes_the_order_only(self):
    self.vote(0, 1, 2, 3)
    self.chain.set_stake(KEYS[3].address, 1000.0)
    membership = self.look(0)
    self.assertEqual(uids(membership.validators), [3, 2, 1])

  def test_a_later_state_still_names_the_voters_of_a_round(self):
    self.vote(0, 1, 2, 3)
    self.vote(1, 1, 2)
    self.now = 300.0  # the run has stood still since
    membership = self.read(299)
    self.assertEmpty(membership.validators)
    self.assertEqual(uids(membership.candidates), [2, 1, 3])
    self.assertEqual(uids(membership.active(1)), [2, 1, 3])
    self.assertEqual(membership.stakes(1), {1: 5.0, 2: 9.0, 3: 5.0})

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
    self.commit(0, b'\1 something else')
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
    self.assertEqual(uids(membership.candidates), [1, 3])

  def test_a_future_block_is_refused(self):
    with self.assertRaises(interface.ChainError):
      self.read(1)


if __name__ == '__main__':
  absltest.main()
