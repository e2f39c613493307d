"""The phases that every node has, against a chain and buckets in memory."""

from unittest import mock

from absl.testing import absltest

from covenant.chain import interface as chain_lib
from covenant.node import follow
from covenant.protocol import apply
from covenant.protocol import round as round_lib
from covenant.store import interface as store_lib
from covenant.wire import commitment as commitment_lib
from covenant.wire import manifest as manifest_lib
from tests import helpers
from tests.node import network as network_lib

DIGEST = b'd' * 32
Phase = round_lib.Phase
command = network_lib.command


class FollowTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.network = network_lib.Network(self)
    self.node = self.network.node(0)
    self.schedule = self.node.schedule

  def decided(self, digest, majority=True, node=None):
    """The node after DECIDE, at the first block of APPLY."""
    node = node or self.node
    decision = round_lib.Decision(digest, majority)
    node.state = node.state._replace(decision=decision)
    self.network.block = self.schedule.decision_block(0) + 1
    return node

  def apply(self, node=None):
    node = node or self.node
    follow.apply_round(node, command(Phase.APPLY), self.network.block)

  def counted(self, *uids):
    """Publishes payloads and the leader's manifest; returns its digest."""
    self.network.block = self.schedule.put_opens(0)
    entries = []
    for uid in uids:
      payload = self.network.payload(self.network.miner(uid))
      entries.append((uid, self.network.publish(uid, 0, payload)))
    self.network.block = self.schedule.start(1)
    return self.network.propose(3, self.network.manifest(3, entries))

  def test_a_commitment_is_made_once_per_round(self):
    self.network.block = 5
    follow.commit(self.node, 0, DIGEST, 5)
    self.network.block = 7
    follow.commit(self.node, 0, DIGEST, 7)
    membership = self.network.read()
    # In the next block, as block 5 had been read.
    self.assertEqual(membership.committed[0], 6)
    self.assertEqual(
      membership.commitments[0],
      commitment_lib.Commitment(
        commitment_lib.Role.MINER, self.node.objects.location, 0, DIGEST
      ),
    )
    follow.commit(self.node, 1, DIGEST, 7)
    self.network.block = 8
    self.assertEqual(self.network.read().commitments[0].round, 1)

  def test_a_commitment_is_never_replaced_in_its_round(self):
    self.network.block = 5
    follow.commit(self.node, 0, DIGEST, 5)
    self.network.block = 7
    with self.assertRaisesRegex(
      chain_lib.ChainRejectedError, 'round 0: .* is it in use twice?'
    ):
      follow.commit(self.node, 0, b'e' * 32, 7)

  def test_more_than_half_of_the_stake_decides_at_the_decision_block(self):
    at = self.schedule.decision_block(0)
    self.network.block = at
    self.network.commit(3, 0, DIGEST)  # 60 of 150
    self.network.block = at + 1
    self.network.commit(4, 0, DIGEST)  # too late for this block
    self.network.block = self.schedule.last_decision_block(0) + 1
    first = follow.decide(self.node, command(Phase.DECIDE), 0)
    self.assertIsNone(first)
    last = follow.decide(self.node, command(Phase.DECIDE, last=True), 0)
    self.assertEqual(last, round_lib.Decision(DIGEST, majority=True))

  def test_without_a_majority_nobody_counts_at_the_last_look(self):
    self.network.block = self.schedule.start(1)
    self.network.commit(3, 0, DIGEST)  # 60 of 150
    self.network.commit(5, 0, b'e' * 32)
    self.network.block = self.schedule.last_decision_block(0) + 1
    last = follow.decide(self.node, command(Phase.DECIDE, last=True), 0)
    self.assertEqual(last, round_lib.Decision(None, majority=False))

  def test_a_miner_has_no_vote(self):
    self.network.block = self.schedule.decision_block(0)
    self.network.commit(1, 0, DIGEST)
    self.network.block = self.schedule.last_decision_block(0) + 1
    last = follow.decide(self.node, command(Phase.DECIDE, last=True), 0)
    self.assertEqual(last, round_lib.Decision(None, majority=False))

  def test_a_round_of_nobody_moves_the_root_only(self):
    self.decided(None)
    before = self.node.place
    self.node.payloads = {DIGEST: b'data'}
    self.apply()
    self.assertIs(self.node.shared, before.shared)
    self.assertEqual(self.node.root, manifest_lib.extend(before.root, 0, None))
    self.assertEmpty(self.node.messages)
    self.assertEmpty(self.node.payloads)

  def test_the_payloads_of_the_manifest_move_the_parameters(self):
    digest = self.counted(1, 2)
    self.decided(digest)
    before = self.node.place
    self.apply()
    self.assertEqual(
      self.node.root, manifest_lib.extend(before.root, 0, digest)
    )
    self.assertEqual(list(self.node.messages), [1, 2])
    messages = {u: network_lib.message(u) for u in (1, 2)}
    want, norm = network_lib.shared_model().apply_round(before.shared, messages)
    self.assertEqual(
      helpers.bits(self.node.shared.params), helpers.bits(want.params)
    )
    self.assertEqual(self.node.delta_norm, norm)

  def test_the_nodes_of_a_process_share_a_round(self):
    digest, applied = self.counted(1), {}
    nodes = [self.network.node(u, applied=applied) for u in (0, 2)]
    for node in nodes:
      self.apply(self.decided(digest, node=node))
    self.assertIs(nodes[0].shared, nodes[1].shared)
    self.assertLen(applied, 1)

  def test_a_payload_that_nobody_has_is_an_error_of_the_store(self):
    self.network.block = self.schedule.put_opens(0)
    self.network.commit(1, 0, DIGEST)
    self.network.block = self.schedule.start(1)
    data = self.network.manifest(3, [(1, DIGEST)])
    self.decided(self.network.propose(3, data))
    before = self.node.place
    with self.assertRaisesRegex(store_lib.StoreError, 'payload of uid 1'):
      self.apply()
    self.assertEqual(self.node.place, before)

  def test_only_validators_keep_a_round_while_the_next_one_comes(self):
    digest, before = self.counted(1), {1: None}
    lost = store_lib.StoreUnavailableError('no answer')
    for node, kept in (
      (self.network.miner(0), {}),
      (self.network.validator(4), before),
    ):
      node.messages = before
      self.decided(digest, node=node)
      with (
        mock.patch.object(apply, 'fetch_payloads', side_effect=lost),
        self.assertRaises(store_lib.StoreError),
      ):
        self.apply(node)
      self.assertEqual(node.messages, kept)

  def test_a_manifest_of_another_state_is_out_of_sync_if_it_has_a_majority(
    self,
  ):
    self.network.block = self.schedule.start(1)
    data = self.network.manifest(3, [], fingerprint='another')
    digest = self.network.propose(3, data)
    self.decided(digest)
    with self.assertRaisesRegex(apply.OutOfSyncError, 'fingerprint'):
      self.apply()
    # A minority that voted alone does not count.
    self.decided(digest, majority=False)
    before = self.node.place
    self.apply()
    self.assertIs(self.node.shared, before.shared)
    self.assertEqual(self.node.root, manifest_lib.extend(before.root, 0, None))

  def test_what_is_no_manifest_of_this_round_counts_nobody(self):
    for data in (
      b'no manifest',
      self.network.manifest(3, [], round=1),
      self.network.manifest(3, [], run=b'x' * 16),
    ):
      with self.subTest(data[:40]):
        network = network_lib.Network(self)
        node = network.node(0)
        network.block = self.schedule.start(1)
        self.decided(network.propose(3, data), node=node)
        network.block = self.schedule.decision_block(0) + 1
        root = node.root
        follow.apply_round(node, command(Phase.APPLY), network.block)
        self.assertEqual(node.root, manifest_lib.extend(root, 0, None))

  def test_what_the_chain_does_not_have_is_void(self):
    """Whoever voted for it: uids, hotkeys and digests are the chain's."""
    key = network_lib.KEYS[1].address
    for name, entry in {
      'an invented uid': (900, key, None),
      'an invented hotkey': (1, network_lib.KEYS[5].address, None),
      'another uid': (0, key, None),
      'a validator': (4, network_lib.KEYS[4].address, None),
      'another payload': (1, key, DIGEST),
      'one that has not committed': (2, network_lib.KEYS[2].address, None),
    }.items():
      with self.subTest(name):
        self.setUp()
        self.network.block = self.schedule.put_opens(0)
        payload = self.network.payload(self.network.miner(1))
        digest = self.network.publish(1, 0, payload)
        uid, hotkey, other = entry
        listed = manifest_lib.Entry(uid, hotkey, other or digest)
        self.network.block = self.schedule.start(1)
        data = self.network.manifest(3, [listed])
        self.decided(self.network.propose(3, data))
        before = self.node.place
        self.apply()
        self.assertIs(self.node.shared, before.shared)
        self.assertEqual(
          self.node.root, manifest_lib.extend(before.root, 0, None)
        )

  def test_a_payload_committed_before_its_window_is_void(self):
    payload = self.network.payload(self.network.miner(1))
    self.network.block = self.schedule.put_opens(0) - 3
    digest = self.network.publish(1, 0, payload)
    self.network.block = self.schedule.start(1)
    self.decided(
      self.network.propose(3, self.network.manifest(3, [(1, digest)]))
    )
    before = self.node.place
    self.apply()
    self.assertIs(self.node.shared, before.shared)

  def test_who_votes_after_its_payload_still_counts(self):
    digest = self.counted(1)
    vote = commitment_lib.Commitment(
      commitment_lib.Role.VALIDATOR, self.network.objects(1).location, 0, DIGEST
    )
    self.network.chain.seen_by(network_lib.KEYS[1]).commit(
      commitment_lib.encode(vote)
    )
    self.decided(digest)
    self.apply()
    self.assertEqual(list(self.node.messages), [1])

  def test_more_entries_than_contributors_are_void(self):
    most = network_lib.shared_model().most_entries
    entries = tuple(
      manifest_lib.Entry(u, network_lib.KEYS[1].address, DIGEST)
      for u in range(most + 1)
    )
    self.network.block = self.schedule.start(1)
    data = self.network.manifest(3, entries)
    self.decided(self.network.propose(3, data))
    before = self.node.place
    self.apply()
    self.assertIs(self.node.shared, before.shared)

  def test_a_manifest_is_fetched_once_until_its_round_is_applied(self):
    digest = self.counted(1)
    self.network.block += 1
    membership = self.network.read()
    data = follow.fetch_manifest(self.node, membership, 0, digest)
    leader = self.network.objects(3)
    leader.bucket.delete([leader.key('proposals', 0, digest)])
    self.assertEqual(
      follow.fetch_manifest(self.node, membership, 0, digest), data
    )
    with self.assertRaises(store_lib.StoreError):
      follow.fetch_manifest(self.network.node(2), membership, 0, digest)

  def test_payloads_are_kept_as_long_as_a_joiner_may_need_them(self):
    config = helpers.tiny('checkpoint.publish=2', 'checkpoint.keep=2')
    node = self.network.node(1, config=config)
    for r in range(7):
      node.objects.put_once(node.objects.key('payloads', r, DIGEST), b'data')
    for completed, oldest in ((5, 0), (6, 2), (7, 2)):
      node.state = node.state._replace(round=completed)
      follow.forget_payloads(node, command(Phase.KEEP, completed), 0)
      rounds = node.objects.rounds('payloads', node.objects.bucket)
      self.assertEqual(rounds, list(range(oldest, 7)), completed)

  def test_the_handlers_are_those_of_a_follower(self):
    self.assertEqual(
      set(follow.HANDLERS),
      {Phase.DECIDE, Phase.APPLY, Phase.KEEP, Phase.CATCH_UP},
    )

  def test_catching_up_replays_the_rounds_of_the_others(self):
    digest = self.counted(1)
    data = follow.fetch_manifest(self.node, self.network.read(), 0, digest)
    leader = self.network.objects(3)
    leader.put_once(leader.key('history', 0), data)
    self.network.commit(4, 0, digest)  # which makes a majority
    ahead = self.network.node(2)
    self.apply(self.decided(digest, node=ahead))
    self.network.block = self.schedule.start(2) + 1
    self.node.messages = {1: None}
    self.node.payloads = {DIGEST: b'of the round it missed'}
    replayed = follow.catch_up(
      self.node, command(Phase.CATCH_UP), self.network.block
    )
    self.assertEqual(replayed, {0: data})
    self.assertEqual(self.node.state, round_lib.RoundState(1))
    self.assertEqual(self.node.root, ahead.root)
    self.assertEqual(self.node.fingerprint(), ahead.fingerprint())
    self.assertEmpty(self.node.messages)
    self.assertEmpty(self.node.payloads)


if __name__ == '__main__':
  absltest.main()
