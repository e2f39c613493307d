"""Miners that break the rules of the exchange."""

from absl.testing import absltest

from covenant.adversaries import base
from covenant.adversaries import protocol_violations
from covenant.node import miner as miner_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import bucket as bucket_lib
from covenant.store import interface as store_lib
from covenant.store import location as location_lib
from covenant.wire import manifest as manifest_lib
from tests.node import network as network_lib

HONEST = miner_lib.HONEST


class ProtocolViolationsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.network = network_lib.Network(self)

  def poll(self, node, block):
    self.network.block = block
    while node.poll(block) == block:
      pass

  def play(self, policy, blocks=None):
    """A miner polled in the put window of round 0."""
    node = self.network.miner(0, policy)
    schedule = node.schedule
    self.poll(node, 1)
    opens = schedule.put_opens(0)
    for block in blocks or range(opens, schedule.put_closes(0) + 1):
      self.poll(node, block)
    self.network.block += 1
    return node

  def stored(self, node, digest):
    key = node.objects.key('payloads', 0, digest)
    return node.objects.bucket.get(key, 1 << 20)

  def test_the_late_commit_after_the_window(self):
    node = self.network.miner(0, protocol_violations.late(HONEST))
    closes = node.schedule.put_closes(0)
    for block in (1, node.schedule.put_opens(0), closes):
      self.poll(node, block)
    self.assertNotIn(0, self.network.read().commitments)
    self.poll(node, closes + 1)
    self.network.block += 1
    self.assertGreater(self.network.read().committed[0], closes)

  def test_the_early_commit_once_they_have_trained(self):
    node = self.network.miner(0, protocol_violations.early(HONEST))
    self.poll(node, 1)
    self.network.block = 3
    digest = run_storage_lib.digest(node.role.contribution.result().payload)
    self.assertEqual(self.network.read().commitments[0].digest, digest)

  def test_twice_commits_to_another_payload_first(self):
    node = self.network.miner(0, protocol_violations.twice(HONEST))
    self.poll(node, 1)
    opens = node.schedule.put_opens(0)
    seen = []
    for block in range(opens, opens + 5):
      self.poll(node, block)
      seen += [c.digest for c in self.network.read().commitments.values()]
    self.assertLen(set(seen), 2)
    made = node.role.contribution.result()
    self.assertEqual(seen[-1], run_storage_lib.digest(made.payload))

  def test_the_absent_never_upload(self):
    node = self.play(protocol_violations.absent(HONEST))
    self.assertTrue(node.state.uploaded)
    digest = self.network.read().commitments[0].digest
    with self.assertRaises(store_lib.MissingObjectError):
      self.stored(node, digest)

  def test_the_swapped_bytes_have_another_digest(self):
    node = self.play(protocol_violations.swapped(HONEST))
    digest = self.network.read().commitments[0].digest
    self.assertNotEqual(
      run_storage_lib.digest(self.stored(node, digest)), digest
    )

  def test_the_two_faced_show_junk_to_every_second_reader(self):
    bucket = bucket_lib.open_bucket(
      location_lib.Location.parse('memory://two-faced')
    )
    bucket.put('key', b'data')
    seen = {
      name: protocol_violations.serve_two_faced(name, bucket).get('key', 10)
      for name in ('2', '3', 'evaluator')
    }
    self.assertEqual(seen, {'2': b'data', '3': bytes(4), 'evaluator': b'data'})

  def test_every_malformed_payload_is_refused_or_absurd(self):
    node = self.network.miner(1)
    self.network.block = 1
    task = miner_lib.task(node, 0)
    data = protocol_violations.payload(node, task)
    entry = manifest_lib.Entry(1, network_lib.KEYS[1].address, b'')
    self.assertIsNotNone(base.read(node, entry, data))
    for name, change in protocol_violations.MALFORMED.items():
      with self.subTest(name):
        changed = change(node, data, task)
        self.assertNotEqual(changed, data)
        if name != 'huge':  # well-formed: its norm gives it away
          self.assertIsNone(base.read(node, entry, changed))


if __name__ == '__main__':
  absltest.main()
