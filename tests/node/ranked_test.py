"""The chain and the store of several processes."""

from absl.testing import absltest

from covenant.chain import interface as chain_lib
from covenant.chain import local_chain
from covenant.chain import storage as chain_storage
from covenant.node import multihost as multihost_lib
from covenant.node import ranked as ranked_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import bucket as bucket_lib
from covenant.store import interface as store_lib
from covenant.store import location as location_lib
from tests.node.multihost_test import MINER
from tests.node.multihost_test import VALIDATOR
from tests.node.multihost_test import run


class RankedTest(absltest.TestCase):
  def test_one_process_has_its_own(self):
    process_group = multihost_lib.ProcessGroup()
    self.assertIs(ranked_lib.chain(process_group, lambda: self), self)
    self.assertIs(ranked_lib.storage(process_group, b'run', lambda: self), self)

  def test_a_chain(self):
    """Every method says what that of rank 0 does, in the same types."""
    chain = local_chain.LocalChain.create(
      ':memory:',
      b'',
      chain_storage.ChainRules(commit_interval=2),
      clock=lambda: 100.0,
    )
    self.addCleanup(chain.close)
    for key in (MINER, VALIDATOR):
      chain.register(key.address, 5.0, key is VALIDATOR)
    chain.begin(0.0)
    own, head = chain.seen_by(VALIDATOR), chain.head()

    def program(process_group):
      ranked = ranked_lib.chain(
        process_group, lambda: own if process_group.index == 0 else None
      )
      ranked.commit(b'mine')
      with self.assertRaisesRegex(
        chain_lib.ChainRejectedError, 'one in 2 blocks'
      ):
        ranked.commit(b'again')
      ranked.set_weights({0: 1.0})
      signature = ranked.sign(b'text')
      return (
        ranked.hotkey, ranked.block_seconds, ranked.head(),
        ranked.block_hash(3), ranked.timestamp(3), ranked.peers(head),
        ranked.commitments(head), ranked.earned(head), signature,
        ranked.verify(own.hotkey, b'text', signature),
        ranked.verify(own.hotkey, b'else', signature),
      )  # fmt: skip

    first, second = run(program)
    self.assertEqual(first, second)
    self.assertEqual(
      first,
      (
        own.hotkey, own.block_seconds, head, own.block_hash(3),
        own.timestamp(3), own.peers(head), own.commitments(head),
        own.earned(head), own.sign(b'text'), True, False,
      ),
    )  # fmt: skip
    self.assertEqual(second[6][1].data, b'mine')
    self.assertEqual(second[5][1].hotkey, VALIDATOR.address)

  def test_objects(self):
    locations = [
      location_lib.Location.parse(f'memory://{self.id()}-{name}')
      for name in ('own', 'other')
    ]
    own, other = (
      run_storage_lib.RunStorage(
        b'run',
        bucket_lib.open_bucket(location),
        location.to_bytes(),
        lambda data: bucket_lib.open_for_reading(
          location_lib.Location.from_bytes(data), allow_local=True
        ),
      )
      for location in locations
    )
    digests = {d: run_storage_lib.digest(d) for d in (b'a', b'b', b'none')}
    other.put_once(other.key('payloads', 3, digests[b'a']), b'a')
    other.put_once(other.chunk_key(digests[b'b']), b'b')

    def program(process_group):
      objects = ranked_lib.storage(
        process_group, b'run', lambda: own if not process_group.index else None
      )
      objects.put_once(objects.key('history', 1), b'one')
      objects.put_once(objects.key('history', 1), b'one')
      objects.put_once(objects.key('history', 4), b'four')
      objects.delete_before('history', 2)
      with self.assertRaises(store_lib.MissingObjectError):
        objects.bucket.get(objects.key('history', 1), 10)
      bucket = objects.bucket_at(other.location)
      self.assertIs(objects.bucket_at(other.location), bucket)
      self.assertIsNone(objects.bucket_at(b'nonsense'))
      wanted = [
        run_storage_lib.ObjectRef(digests[b'a'], b''),
        run_storage_lib.ObjectRef(digests[b'none'], other.location),
      ]
      got = objects.fetch('payloads', 3, wanted, [bucket], 10)
      missing = got[digests[b'none']]
      return (
        objects.location, objects.rounds('history', objects.bucket),
        objects.bucket.head(objects.key('history', 4)).size,
        got[digests[b'a']], type(missing), str(missing),
        objects.fetch_chunks([digests[b'b']], [bucket], 10)[digests[b'b']],
        objects.fetch_each(objects.key('history', 4), [objects.bucket], 10),
        str(objects.fetch_each(objects.key('history', 4), [bucket], 10)),
        objects.rounds_of_each('history', [objects.bucket, bucket]),
      )  # fmt: skip

    first, second = run(program)
    self.assertEqual(first, second)
    self.assertEqual(
      first[:5], (own.location, [4], 4, b'a', store_lib.MissingObjectError)
    )
    self.assertEqual(first[6:8], (b'b', [b'four']))
    self.assertIn('MissingObjectError', first[8])
    self.assertEqual(first[9], [[4], []])


if __name__ == '__main__':
  absltest.main()
