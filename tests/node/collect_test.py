"""A validator fetches and checks what was committed."""

import dataclasses
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest

from covenant.chain import interface as chain_lib
from covenant.gauntlet import checks as checks_lib
from covenant.gauntlet import incentives
from covenant.gauntlet import scores
from covenant.node import collect
from covenant.protocol import apply
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.wire import commitment as commitment_lib
from covenant.wire import lazy
from covenant.wire import manifest as manifest_lib
from covenant.wire import payload as payload_lib
from tests.node import network as network_lib

Finding = checks_lib.CheckFinding
Phase = round_lib.Phase


class CollectTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.network = network_lib.Network(self)
    self.node = self.network.validator(3)
    self.schedule = self.node.schedule
    self.network.block = self.schedule.put_opens(0)
    self.payloads = {
      uid: self.network.payload(self.network.miner(uid))
      for uid in network_lib.MINERS
    }

  def collect(self):
    self.network.block = self.schedule.collection_block(0) + 1
    collect.collect(
      self.node, network_lib.command(Phase.COLLECT), self.network.block
    )
    return self.node.role.collected

  def findings(self):
    checks = self.collect().report.checks
    return {uid: check.finding for uid, check in checks.items()}

  def test_valid_payloads_are_kept_and_may_count(self):
    digests = [self.network.publish(u, 0, self.payloads[u]) for u in (0, 1)]
    found = self.collect()
    self.assertEqual(set(found.report.valid), {0, 1})
    self.assertEqual(
      found.entries,
      {
        uid: manifest_lib.Entry(uid, network_lib.KEYS[uid].address, digest)
        for uid, digest in enumerate(digests)
      },
    )
    self.assertEqual(set(found.payloads), {0, 1})
    self.assertEqual(sorted(found.chosen), [0, 1])
    self.assertEqual(set(self.node.payloads), set(digests))
    self.assertEqual(self.node.decoded[digests[1]], found.payloads[1])
    self.assertIs(found.before.shared, self.node.shared)

  def test_messages_of_a_large_model_stay_packed(self):
    """With the same findings, and the same arrays where they are needed."""
    for uid in (0, 1):
      self.network.publish(uid, 0, self.payloads[uid])
    whole = self.collect()
    with mock.patch.object(apply, '_UNPACKED_BYTES', 0):
      packed = self.collect()
    self.assertEqual(packed.report, whole.report)
    self.assertEqual(packed.chosen, whole.chosen)
    for uid, content in packed.payloads.items():
      leaves = jax.tree.leaves(content.message)
      self.assertTrue(any(isinstance(x, lazy.Rows) for x in leaves))
      expected = whole.payloads[uid]
      np.testing.assert_array_equal(content.norms, expected.norms)
      jax.tree.map(
        np.testing.assert_array_equal,
        lazy.unpacked(content.message),
        expected.message,
      )

  def test_nothing_committed_is_missing(self):
    self.network.commit(1, None)  # its bucket only
    self.assertEqual(set(self.findings().values()), {Finding.MISSING})

  def test_a_commitment_without_a_payload_is_absent(self):
    self.network.publish(0, 0, self.payloads[0])
    self.network.commit(1, 0, run_storage_lib.digest(self.payloads[1]))
    findings = self.findings()
    self.assertEqual(findings[1], Finding.ABSENT)
    self.assertEqual(self.node.role.collected.chosen, [0])

  def test_what_cannot_be_read_is_refused(self):
    self.network.publish(0, 0, b'no payload')
    self.network.publish(1, 0, self.payloads[1] + bytes(1 << 16))  # too long
    self.network.publish(2, 0, self.payloads[0])  # of another uid
    found = self.findings()
    self.assertEqual(set(found.values()), {Finding.REFUSED})
    self.assertEmpty(self.node.payloads)

  def test_two_commitments_in_one_window_are_twice(self):
    self.network.commit(0, 0, b'x' * 32)
    self.network.block += 2
    self.network.publish(0, 0, self.payloads[0])
    self.assertEqual(self.findings()[0], Finding.TWICE)

  def test_a_second_digest_is_found_behind_a_repetition_of_the_first(self):
    for digest in (b'x' * 32, b'y' * 32, b'x' * 32, b'x' * 32):
      self.network.commit(0, 0, digest)
      self.network.block += 1
      self.network.read()  # which ends this block
    self.network.publish(0, 0, self.payloads[0])
    self.assertEqual(self.findings()[0], Finding.TWICE)

  def test_the_same_digest_again_is_not_twice(self):
    digest = run_storage_lib.digest(self.payloads[0])
    for _ in range(3):
      self.network.commit(0, 0, digest)
      self.network.block += 1
      self.network.read()
    self.network.publish(0, 0, self.payloads[0])
    self.assertNotEqual(self.findings()[0], Finding.TWICE)

  def test_who_takes_over_a_uid_in_the_window_has_not_committed_twice(self):
    """Some chains keep the commitment of the hotkey before for a block."""
    self.network.publish(0, 0, self.payloads[0])
    closes = self.schedule.put_closes(0)
    at = self.network.block
    self.network.block = closes + 2
    membership = self.network.read(closes)
    peer = membership.peers[0]._replace(registered=at + 1)
    membership = membership._replace(
      peers={**membership.peers, 0: peer}, committed={0: at + 2}
    )
    before = commitment_lib.Commitment(
      commitment_lib.Role.MINER, b'', 0, b'x' * 32
    )
    data = chain_lib.CommittedData(at, commitment_lib.encode(before))
    with mock.patch.object(
      self.node.chain, 'commitments', return_value={0: data}
    ):
      found = collect._committed(self.node, 0, membership)
    self.assertEmpty(found.twice)
    self.assertEqual(list(found.entries), [0])

  def test_only_blocks_before_a_commitment_are_read(self):
    for uid in (0, 1, 2):
      self.network.publish(uid, 0, self.payloads.get(uid, b'x'))
    chain, asked = self.node.chain, []

    def commitments(block):
      asked.append(block)
      return type(chain).commitments(chain, block)

    with mock.patch.object(chain, 'commitments', commitments):
      self.collect()
    # The close of the window, and the block before all three committed.
    self.assertLessEqual(len(set(asked)), 2)

  def test_a_commitment_before_the_window_is_early(self):
    self.network = network_lib.Network(self)
    self.node = self.network.validator(3)
    self.network.block = self.schedule.put_opens(0) - 5
    self.network.publish(0, 0, self.payloads[0])
    # It is seen in the window, by when it has been there for long.
    self.assertEqual(self.findings()[0], Finding.EARLY)

  def test_a_commitment_after_the_window_is_not_seen(self):
    self.network.block = self.schedule.put_closes(0) + 1
    self.network.publish(0, 0, self.payloads[0])
    self.assertEqual(self.findings()[0], Finding.MISSING)

  def test_uids_without_data_are_not_looked_at(self):
    """However many are registered, validators go on."""
    for u in (0, 1):
      self.network.publish(u, 0, self.payloads[u])
    with mock.patch.object(scores, 'seats', return_value=1):
      found = self.collect()
    self.assertEqual(list(found.entries), [0])
    self.assertEqual(found.chosen, [0])

  def test_places_go_to_the_next_in_line_if_buckets_fail(self):
    """Any number of dead buckets keeps nobody out."""
    self.network.publish(2, 0, self.payloads[2])
    for uid in (0, 1):  # first in line, and nothing is there
      self.network.commit(uid, 0, b'%d' % uid * 32)
    gauntlet = dataclasses.replace(
      network_lib.CONFIG.gauntlet, contributors=1, evaluate=0
    )
    self.node.config = dataclasses.replace(
      network_lib.CONFIG, gauntlet=gauntlet
    )
    with mock.patch.object(incentives, 'RESERVES', 0):
      self.assertEqual(self.collect().chosen, [2])

  def test_a_bucket_that_failed_is_asked_last(self):
    for u in (0, 1):
      self.network.publish(u, 0, self.payloads[u])
    place = self.network.objects(0).location
    objects = self.node.objects
    bucket = objects.bucket_at(place)
    objects._directory.note(bucket, store_lib.StoreUnavailableError('dead'))
    asked = []

    def fetch(node, r, membership, entries, seconds):
      asked.append([entry.uid for entry in entries])
      return fetched(node, r, membership, entries, seconds)

    fetched = collect._fetch
    with mock.patch.object(collect, '_fetch', fetch):
      found = self.collect()
    self.assertEqual(asked, [[1], [0]])
    self.assertEqual(found.chosen, [0, 1])  # it is back

  def test_what_comes_late_is_checked_beside_the_others(self):
    for u in (0, 1):
      self.network.publish(u, 0, self.payloads[u])
    copy = self.network.payload(self.network.miner(2), seed=1)
    self.network.block += 2
    self.network.commit(2, 0, run_storage_lib.digest(copy))  # nothing there
    found = self.collect()
    self.assertEqual(found.chosen, [0, 1])
    late = collect.check_late(self.node, 0, found, {2: copy}).checks[2]
    self.assertEqual((late.twin, round(late.similarity, 2)), (1, 1.0))
    good = self.payloads[2]
    entry = found.entries[2]._replace(digest=run_storage_lib.digest(good))
    found = found._replace(entries={**found.entries, 2: entry})
    late = collect.check_late(self.node, 0, found, {2: good})
    self.assertTrue(late.checks[2].valid)
    self.assertLess(late.checks[2].similarity, 0.5)
    self.assertIn(entry.digest, self.node.decoded)

  def test_every_miner_gets_a_standing(self):
    self.collect()
    standings = self.node.role.standings.standings
    self.assertEqual(set(standings), set(network_lib.MINERS))

  def test_decode_returns_why_a_payload_is_refused(self):
    entry = manifest_lib.Entry(1, network_lib.KEYS[1].address, b'')
    good = collect.decode(self.node, entry, self.payloads[1])
    self.assertEqual(good.header.uid, 1)
    bad = collect.decode(self.node, entry, b'')
    self.assertIsInstance(bad, payload_lib.PayloadError)
    # Signed by another hotkey than the manifest names.
    other = entry._replace(hotkey=network_lib.KEYS[2].address)
    forged = collect.decode(self.node, other, self.payloads[1])
    self.assertIsInstance(forged, payload_lib.PayloadError)


if __name__ == '__main__':
  absltest.main()
