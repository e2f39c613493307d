"""A validator votes for a manifest, on a chain in memory."""

from absl.testing import absltest
from absl.testing import parameterized

from covenant.chain import keys
from covenant.gauntlet import checks as checks_lib
from covenant.node import base as node_lib
from covenant.node import validator_role as role_lib
from covenant.node import vote as vote_lib
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.wire import manifest as manifest_lib
from tests.node import network as network_lib

Finding = checks_lib.CheckFinding
Phase = round_lib.Phase


class VoteTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.network = network_lib.Network(self)
    self.node = self.network.validator(4)  # the leader is uid 3
    self.schedule = self.node.schedule
    self.network.block = self.schedule.put_opens(0)
    self.entries = {}
    for uid in (0, 1):
      data = self.network.payload(self.network.miner(uid))
      digest = self.network.publish(uid, 0, data)
      hotkey = network_lib.KEYS[uid].address
      self.entries[uid] = manifest_lib.Entry(uid, hotkey, digest)
    self.listed = [(uid, e.digest) for uid, e in self.entries.items()]
    self.network.block = self.schedule.start(1)
    self.stood = []
    self.stand_for = lambda node, r, data, head: self.stood.append(
      (r, data, head)
    )

    self.findings = dict.fromkeys((0, 1), Finding.VALID)
    self.origins = {}  # of similar messages, by uid
    self.chosen = [1]

  def report(self):
    checks = {
      u: checks_lib.CheckResult(f, origin=self.origins.get(u))
      for u, f in self.findings.items()
    }
    return checks_lib.CheckReport(checks, False)

  def vote(self, node=None, propose=None, at=None):
    """Votes once the proposals of this block are final."""
    node = node or self.node
    node.role.collected = role_lib.Collected(
      self.network.read(self.schedule.put_closes(0)),
      node.place,
      self.entries,
      {},
      self.report(),
      self.chosen,
    )
    self.network.block = at or self.network.block + 2
    vote_lib.vote(
      propose or (lambda *_: b'own'),
      self.stand_for,
      node,
      network_lib.command(Phase.VOTE),
      self.network.block,
    )

  def test_the_leader_proposes_at_once(self):
    self.vote(self.network.validator(3))
    self.assertEqual(self.stood, [(0, b'own', self.network.block)])

  def test_it_proposes_once(self):
    """A signature of sr25519 differs every time, and so would its digest."""
    made = iter([b'one', b'two'])
    node = self.network.validator(3)
    for _ in range(2):
      self.vote(node, propose=lambda *_: next(made))
    self.assertEqual([data for _, data, _ in self.stood], [b'one', b'one'])

  def test_others_wait_for_their_turn(self):
    turn = self.schedule.proposes(0, 1)
    with self.assertRaises(node_lib.RetryLaterError):
      self.vote(at=turn - 1)
    with self.assertRaises(node_lib.RetryLaterError):  # it may still change
      self.vote(at=turn)
    self.assertEqual(self.stood, [(0, b'own', turn)])

  def propose_own(self):
    """The node of uid 4 proposes, as the leader has not."""
    own = self.network.manifest(4, self.listed)

    def stand_for(node, r, data, head):
      self.stood.append((r, data, head))
      vote_lib.publish(node, r, data, head)

    self.stand_for = stand_for
    with self.assertRaises(node_lib.RetryLaterError):
      self.vote(propose=lambda *_: own, at=self.schedule.decision_block(0))
    self.assertEqual([data for _, data, _ in self.stood], [own])
    self.stood.clear()
    return own

  def test_a_proposal_is_given_up_for_one_of_a_lower_rank(self):
    self.propose_own()
    data = self.network.manifest(3, self.listed)
    self.network.propose(3, data)
    self.vote()
    self.assertEqual([data for _, data, _ in self.stood], [data])
    self.network.block += 1
    digest = run_storage_lib.digest(data)
    self.assertEqual(self.network.read().commitments[4].digest, digest)

  def test_a_second_proposal_of_the_same_maker_is_not_taken_up(self):
    """Else a leader could use up the others' space for commitments."""
    last = self.network.validator(5)
    self.stand_for = lambda node, r, data, head: (
      self.stood.append(data),
      vote_lib.publish(node, r, data, head),
    )
    turn = self.schedule.decision_block(0)
    self.network.block = turn - 1
    one = self.network.manifest(4, self.listed)
    self.network.propose(4, one)
    with self.assertRaises(node_lib.RetryLaterError):
      self.vote(last, at=turn)
    self.assertEqual(self.stood, [one])
    other = self.network.manifest(4, self.listed[:1])
    self.network.propose(4, other)
    self.assertNotEqual(one, other)
    with self.assertRaises(node_lib.RetryLaterError):
      self.vote(last)
    self.assertEqual(self.stood, [one])

  def test_a_vote_is_kept_where_the_other_cannot_be_verified(self):
    self.propose_own()
    self.network.propose(3, b'nonsense')
    with self.assertRaises(node_lib.RetryLaterError):
      self.vote()
    self.assertEmpty(self.stood)

  def test_a_vote_that_a_majority_shares_is_kept(self):
    own = self.propose_own()
    self.network.commit(5, 0, run_storage_lib.digest(own))  # 90 of 150
    self.network.propose(3, self.network.manifest(3, self.listed))
    with self.assertRaises(node_lib.RetryLaterError):  # others may change it
      self.vote()
    self.assertEmpty(self.stood)

  def test_a_vote_is_final_once_a_majority_of_the_decision_block_shares_it(
    self,
  ):
    self.network.block = self.schedule.start(1) + 1
    data = self.network.manifest(3, self.listed)
    self.network.propose(3, data)
    self.network.commit(5, 0, run_storage_lib.digest(data))
    self.vote()  # 150 of 150
    vote_lib.publish(self.node, 0, data, self.network.block)
    self.stood.clear()
    self.vote(at=self.schedule.decision_block(0) + 1)
    self.assertEmpty(self.stood)

  def test_a_vote_that_cannot_change_in_time_is_final(self):
    self.propose_own()
    self.vote(at=self.schedule.last_decision_block(0))
    self.assertEmpty(self.stood)

  def test_a_proposal_in_the_last_blocks_is_too_late(self):
    self.propose_own()
    self.network.block = self.schedule.last_proposal_block(0)
    self.network.read()  # which ends this block
    self.network.propose(3, self.network.manifest(3, self.listed))
    with self.assertRaises(node_lib.RetryLaterError):
      self.vote(at=self.schedule.last_decision_block(0) - 1)
    self.assertEmpty(self.stood)

  def test_the_last_vote_goes_to_the_most_stake(self):
    """By the state of one block, whatever the own vote was."""
    own = self.propose_own()  # uid 4, 50 of 150
    other = self.network.manifest(5, self.listed)
    self.network.propose(5, other)
    closing = self.schedule.closing_block(0)
    self.network.block = closing + 1
    self.network.commit(3, 0, run_storage_lib.digest(other))  # too late
    last = network_lib.command(Phase.VOTE, last=True)
    vote_lib.vote(
      lambda *_: b'own', self.stand_for, self.node, last, closing + 1
    )
    self.assertEmpty(self.stood)  # 50 behind the own, 40 behind the other
    self.assertIn(run_storage_lib.digest(own), self.node.manifests)

  def test_the_last_vote_follows_the_most_stake(self):
    self.propose_own()
    other = self.network.manifest(5, self.listed)
    digest = self.network.propose(5, other)
    self.network.commit(3, 0, digest)  # 100 of 150
    closing = self.schedule.closing_block(0)
    self.network.block = closing + 1
    last = network_lib.command(Phase.VOTE, last=True)
    vote_lib.vote(
      lambda *_: b'own', self.stand_for, self.node, last, closing + 1
    )
    self.assertEqual([data for _, data, _ in self.stood], [other])

  def test_a_proposal_before_its_turn_waits(self):
    self.network.propose(5, self.network.manifest(5, self.listed))
    with self.assertRaises(node_lib.RetryLaterError):
      self.vote()
    self.assertEmpty(self.stood)

  def test_any_number_of_silent_validators_costs_one_window(self):
    for k in (1, 3, 10, 100):
      turn = self.schedule.proposes(0, k)
      self.assertEqual(turn, self.schedule.decision_block(0))

  def test_it_stands_for_the_leaders_manifest_if_it_can_verify_it(self):
    data = self.network.manifest(3, self.listed)
    self.network.propose(3, data)
    self.vote()
    self.assertEqual(self.stood, [(0, data, self.network.block)])
    digests = {entry.digest for entry in self.entries.values()}
    self.assertEqual(set(self.node.payloads), digests)
    self.assertEqual(set(self.node.decoded), digests)

  def test_half_of_its_own_choice_must_be_in_the_leaders(self):
    for chosen, listed, want in (
      ([0, 1], [1], True),
      ([1], [0], False),
      ([0, 1], [], False),
      ([], [0], True),
      ([], [], True),
    ):
      with self.subTest(chosen=chosen, listed=listed):
        self.setUp()
        self.chosen = chosen
        data = self.network.manifest(3, [self.listed[u] for u in listed])
        self.network.propose(3, data)
        if want:
          self.vote()
          self.assertEqual(self.stood[0][1], data)
        else:
          with self.assertRaises(node_lib.RetryLaterError):
            self.vote()
          self.assertEmpty(self.stood)

  def test_what_is_not_valid_in_its_own_eyes_gets_no_vote(self):
    for finding in Finding:
      valid = checks_lib.CheckResult(finding).valid
      if valid or finding in vote_lib._NOT_FETCHED:
        continue
      with self.subTest(finding.name):
        self.setUp()
        self.findings[0] = finding
        self.network.propose(3, self.network.manifest(3, self.listed))
        with self.assertRaises(node_lib.RetryLaterError):
          self.vote()
        self.assertEmpty(self.stood)

  def test_similar_messages_do_not_count_together(self):
    self.findings = {0: Finding.TWIN, 1: Finding.TWIN}
    for origins, want in (({0: 0, 1: 1}, True), ({0: 0, 1: 0}, False)):
      with self.subTest(origins):
        self.origins = origins
        self.network.propose(3, self.network.manifest(3, self.listed))
        if want:
          self.vote()
          self.setUp()
          self.findings = {0: Finding.TWIN, 1: Finding.TWIN}
        else:
          with self.assertRaises(node_lib.RetryLaterError):
            self.vote()
          self.assertEmpty(self.stood)

  def test_what_it_cannot_vouch_for_it_does_not_stand_for(self):
    unknown = [(0, b'x' * 32)]
    for name, data in {
      'no manifest': b'nonsense',
      'another hotkey': self.network.manifest(5, self.listed),
      'another state': self.network.manifest(3, [], fingerprint='else'),
      'another root': self.network.manifest(3, [], root=b'x' * 32),
      'another run': self.network.manifest(3, [], run=b'x' * 16),
      'another round': self.network.manifest(3, [], round=1),
      'not committed': self.network.manifest(3, unknown),
    }.items():
      with self.subTest(name):
        self.setUp()
        self.network.propose(3, data)
        with self.assertRaises(node_lib.RetryLaterError):
          self.vote()
        self.assertEmpty(self.stood)

  def test_a_payload_that_is_gone_cannot_be_vouched_for(self):
    miner = self.network.objects(1)
    key = miner.key('payloads', 0, self.entries[1].digest)
    data = self.network.manifest(3, self.listed)
    self.network.propose(3, data)
    miner.bucket.delete([key])
    with self.assertRaises(node_lib.RetryLaterError):
      self.vote()
    self.assertEmpty(self.stood)

  def test_an_unreadable_payload_cannot_be_vouched_for(self):
    miner = self.network.objects(1)
    junk = b'no payload'
    digest = run_storage_lib.digest(junk)
    self.entries[1] = self.entries[1]._replace(digest=digest)
    miner.put_once(miner.key('payloads', 0, digest), junk)
    self.network.propose(3, self.network.manifest(3, [(1, digest)]))
    with self.assertRaises(node_lib.RetryLaterError):
      self.vote()
    self.assertEmpty(self.stood)

  def test_of_several_manifests_the_first_by_rank_wins(self):
    last = self.network.validator(5)
    for uid in (4, 3):
      self.network.propose(uid, self.network.manifest(uid, self.listed))
    self.vote(last)
    self.assertEqual(self.stood[0][1], self.network.manifest(3, self.listed))

  def test_a_restarted_validator_does_not_vote_twice(self):
    self.network.commit(4, 0, b'v' * 32)
    self.vote()
    self.assertEmpty(self.stood)

  def test_its_own_manifest_lists_whom_it_chose(self):
    self.vote(self.network.validator(3), propose=vote_lib.proposal)
    data = self.stood[0][1]
    manifest = manifest_lib.decode(data, self.network.chain.verify)
    self.assertEqual(manifest.entries, (self.entries[1],))
    self.assertEqual(manifest.hotkey, network_lib.KEYS[3].address)
    self.assertEqual(manifest.root, self.node.root)
    self.assertEqual(manifest.fingerprint, self.node.fingerprint())

  def test_a_vote_is_published_before_it_is_on_the_chain(self):
    data = self.network.manifest(4, self.listed)
    digest = run_storage_lib.digest(data)
    vote_lib.publish(self.node, 0, data, self.network.block)
    key = self.node.objects.key('proposals', 0, digest)
    self.assertEqual(self.node.objects.bucket.get(key, 1 << 20), data)
    self.network.block += 1
    self.assertEqual(self.network.read().commitments[4].digest, digest)
    self.assertEqual(self.node.manifests, {digest: data})


class SilentTest(parameterized.TestCase):
  """All validators of a network vote, block by block."""

  def setUp(self):
    super().setUp()
    self.network = network_lib.Network(self)
    self.nodes = [self.network.validator(uid) for uid in network_lib.STAKES]
    self.schedule = self.nodes[0].schedule

  def silent(self, count, stake):
    """Registers holders of a permit that run nothing."""
    for i in range(count):
      key = keys.Key.from_seed(bytes([200, i]) * 16)
      self.network.chain.register(key.address, stake, True)

  def run_votes(self, first, last, skip=()):
    """Returns the block of the last vote, and the digests voted for."""
    closes = self.network.read(self.schedule.put_closes(0))
    for node in self.nodes:
      node.role.collected = role_lib.Collected(
        closes, node.place, {}, {}, checks_lib.CheckReport({}, False), []
      )
    for block in range(first, last + 1):
      self.network.block = block
      for node in self.nodes:
        if node.chain.hotkey in skip:
          continue
        command = network_lib.command(Phase.VOTE)
        try:
          vote_lib.vote(
            vote_lib.proposal, vote_lib.publish, node, command, block
          )
        except node_lib.RetryLaterError:
          pass
    self.network.block = last + 1
    now = self.network.read(last)
    votes = {u: now.commitments[u].digest for u in now.votes}
    return max(now.committed.values()), votes

  @parameterized.parameters(0, 1, 2, 3, 10, 40)
  def test_silent_candidates_cost_one_window_at_most(self, count):
    self.network.block = 1
    self.silent(count, 5000.0)
    self.network.block = self.schedule.start(1)
    last = self.schedule.last_decision_block(0)
    block, votes = self.run_votes(self.network.block + 1, last)
    self.assertLessEqual(block, last)
    self.assertCountEqual(votes, network_lib.STAKES)
    self.assertLen(set(votes.values()), 1)
    if not count:
      self.assertLessEqual(block, self.schedule.decision_block(0))

  @parameterized.parameters((3,), (3, 4))
  def test_dead_validators_cost_one_window_at_most(self, *dead):
    self.network.block = self.schedule.start(1)
    last = self.schedule.last_decision_block(0)
    skip = {network_lib.KEYS[uid].address for uid in dead}
    block, votes = self.run_votes(self.network.block + 1, last, skip)
    self.assertLessEqual(block, last)
    self.assertCountEqual(votes, set(network_lib.STAKES) - set(dead))
    self.assertLen(set(votes.values()), 1)


if __name__ == '__main__':
  absltest.main()
