"""The chain and the store of several processes."""

import threading
from unittest import mock

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


def exchanging():
  """Patches the exchange of devices for two ranks that are threads."""
  both, said = threading.Barrier(2), {}

  def exchange(process_group, data):
    said[process_group.index] = data
    both.wait(60)
    found = [said[0], said[1]]
    both.wait(60)
    return found

  return mock.patch.object(multihost_lib.ProcessGroup, 'exchange', exchange)


def storage(name, run_id=b'run'):
  """Returns the storage of a bucket in memory, which others may open."""
  location = location_lib.Location.parse(f'memory://{name}')
  return run_storage_lib.RunStorage(
    run_id,
    bucket_lib.open_bucket(location),
    location.to_bytes(),
    lambda data: bucket_lib.open_for_reading(
      location_lib.Location.from_bytes(data), allow_local=True
    ),
  )


def reading():
  """Returns the storage of a rank that has no bucket of its own."""
  return storage('nothing')


class RankedTest(absltest.TestCase):
  def test_one_process_has_its_own(self):
    process_group = multihost_lib.ProcessGroup()
    self.assertIs(ranked_lib.chain(process_group, lambda: self), self)
    own = ranked_lib.storage(process_group, b'run', lambda: self)
    self.assertIs(own, self)

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
    own, other = (storage(f'{self.id()}-{name}') for name in ('own', 'other'))
    digests = {d: run_storage_lib.digest(d) for d in (b'a', b'b', b'none')}
    other.put_once(other.key('payloads', 3, digests[b'a']), b'a')
    other.put_once(other.chunk_key(digests[b'b']), b'b')

    def program(process_group):
      objects = ranked_lib.storage(
        process_group,
        b'run',
        lambda writes=True: own if writes else reading(),
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

    with exchanging():
      first, second = run(program)
    self.assertEqual(first, second)
    self.assertEqual(
      first[:5], (own.location, [4], 4, b'a', store_lib.MissingObjectError)
    )
    self.assertEqual(first[6:8], (b'b', [b'four']))
    self.assertIn('MissingObjectError', first[8])
    self.assertEqual(first[9], [[4], []])

  def test_each_rank_reads_its_share(self):
    """Nothing large passes through rank 0, and all take all in one order."""
    own = storage(self.id())
    data = [bytes([i]) * 1000 for i in range(5)]
    digests = [run_storage_lib.digest(x) for x in data]
    for x, digest in zip(data[:4], digests[:4], strict=True):
      own.put_once(own.key('payloads', 3, digest), x)
      own.put_once(own.chunk_key(digest), x)
    sent, real = [], multihost_lib.ProcessGroup._send
    asked, reads = {0: set(), 1: set()}, [own, reading()]

    def send(process_group, message, but=0):
      sent.append(len(message))
      real(process_group, message, but)

    def program(process_group):
      here = reads[process_group.index]
      fetch, chunks = here.fetch, here.fetch_chunks

      def counted(kind, r, refs, *rest):
        asked[process_group.index].update(ref.digest for ref in refs)
        return fetch(kind, r, refs, *rest)

      def counted_chunks(some, *rest):
        asked[process_group.index].update(some)
        return chunks(some, *rest)

      here.fetch, here.fetch_chunks = counted, counted_chunks
      objects = ranked_lib.storage(
        process_group, b'run', lambda writes=True: own if writes else here
      )
      refs = [run_storage_lib.ObjectRef(d, own.location) for d in digests]
      came = []
      got = objects.fetch(
        'payloads', 3, refs, [objects.bucket], 2000, 20.0,
        lambda digest, x: came.append((digest, x)),
      )  # fmt: skip
      missing = type(got[digests[4]]), str(got[digests[4]])
      chunks_got = objects.fetch_chunks(digests[:4], [objects.bucket], 2000)
      with self.assertRaises(store_lib.MissingObjectError):
        objects.fetch_chunks(digests, [objects.bucket], 2000)
      lacking = digests[process_group.index : process_group.index + 2]
      return (
        came, missing, [chunks_got[d] for d in digests[:4]],
        objects.missing_anywhere(lacking), objects.clock(),
      )  # fmt: skip

    patched = mock.patch.object(multihost_lib.ProcessGroup, '_send', send)
    with exchanging(), patched:
      first, second = run(program)
    self.assertEqual(first, second)
    came, missing, chunks_got, lacking, _ = first
    self.assertEqual(came, list(zip(digests, data, strict=True))[:4])
    self.assertEqual(missing[0], store_lib.MissingObjectError)
    self.assertEqual(chunks_got, data[:4])
    self.assertEqual(lacking, digests[:3])
    self.assertLess(max(sent), 1000)
    self.assertEqual(asked, {0: set(digests[::2]), 1: set(digests[1::2])})

  def test_all_say_a_full_disk(self):
    own = storage(self.id())
    digests = [run_storage_lib.digest(bytes([i])) for i in range(3)]
    for i, digest in enumerate(digests):
      own.put_once(own.chunk_key(digest), bytes([i]))

    def program(process_group):
      objects = ranked_lib.storage(
        process_group,
        b'run',
        lambda writes=True: own if writes else reading(),
      )
      came = []

      def write(digest, data):
        if process_group.index and came:
          raise OSError(28, 'the disk is full')
        came.append(data)

      with self.assertRaisesRegex(OSError, '^rank 1: .*disk is full') as one:
        objects.fetch_chunks(digests, [objects.bucket], 10, write)
      with self.assertRaisesRegex(OSError, '^rank 1: .*disk is full') as two:
        objects.on_disk(lambda: write(b'', b'here'))
      return came, str(one.exception), str(two.exception), objects.on_disk(int)

    with exchanging():
      first, second = run(program)
    self.assertEqual(first[0], [b'\0', b'\1', b'\2', b'here'])
    self.assertEqual(second[0], [b'\0'])
    self.assertEqual(first[1:], second[1:])


if __name__ == '__main__':
  absltest.main()
