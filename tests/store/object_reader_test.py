"""Objects in parts from a breaking store."""

import asyncio
import datetime
import hashlib
import threading
import tracemalloc
import types
from unittest import mock

import obstore
from absl.testing import absltest
from absl.testing import parameterized

from covenant.store import backend
from covenant.store import interface
from covenant.store import object_reader
from covenant.store import transfer as transfer_lib

_PART = 100  # bytes


class Store:
  """Stands in for `obstore.get_async`. `cuts` break reads off, in order."""

  def __init__(self, data, cuts=()):
    self.data = data
    self.cuts = list(cuts)  # bytes to give before the break; None: all
    self.asked = []  # the range of each read; None is from the beginning on
    self.active = self.most = 0
    self.tag = 'first'

  async def get(self, store, key, *, options):
    del store, key
    self.asked.append(options.get('range'))
    if options.get('if_match', self.tag) != self.tag:
      raise obstore.exceptions.PreconditionError('x')
    at, end = options.get('range', (0, len(self.data)))
    meta = {
      'size': len(self.data),
      'e_tag': self.tag,
      'last_modified': datetime.datetime(2026, 1, 1),
    }
    cut = self.cuts.pop(0) if self.cuts else None
    return types.SimpleNamespace(
      meta=meta, stream=lambda _: self._stream(self.data[at:end], cut)
    )

  async def _stream(self, data, cut):
    self.active += 1
    self.most = max(self.most, self.active)
    await asyncio.sleep(0)
    for i in range(0, len(data[:cut]), 10):
      if i + 10 in (len(data[:cut]), _PART):  # nobody asks for more
        self.active -= 1
      yield data[:cut][i : i + 10]
      await asyncio.sleep(0)
    if cut is not None:
      raise obstore.exceptions.GenericError('HTTP error: IncompleteBody')


class ReaderTest(parameterized.TestCase):
  def read(
    self,
    store,
    tries=1,
    limit=10**6,
    slots=8,
    transfer=None,
    part_bytes=_PART,
  ):
    """Returns the object of a reader in the end, after so many tries."""

    async def act():
      parts = object_reader.ObjectReader(
        None,
        'key',
        limit,
        asyncio.Semaphore(slots),
        part_bytes,
        transfer=transfer,
      )
      for _ in range(tries - 1):
        with self.assertRaises(interface.StoreUnavailableError):
          await parts.read()
      return await parts.read()

    with mock.patch.object(obstore, 'get_async', store.get):
      return asyncio.run(act())

  @parameterized.parameters(0, 1, 99, 100, 101, 200, 950)
  def test_reads_all_of_it(self, size):
    store = Store(bytes(i % 251 for i in range(size)))
    self.assertEqual(self.read(store), store.data)
    self.assertLen(store.asked, max(1, -(-size // _PART)))

  def test_goes_on_where_it_broke(self):
    store = Store(bytes(range(250)), cuts=[30, None, None, 20])
    self.assertEqual(self.read(store, tries=3), store.data)
    self.assertEqual(store.asked[:2], [None, (30, 100)])
    again = [asked for asked in store.asked[2:] if asked[0] % _PART]
    self.assertIn((220, 250), again)

  def test_another_object_is_read_from_the_beginning(self):
    store = Store(b'a' * 250, cuts=[30])

    async def act():
      parts = object_reader.ObjectReader(
        None, 'key', 10**6, asyncio.Semaphore(8), _PART
      )
      with self.assertRaises(interface.StoreUnavailableError):
        await parts.read()
      store.data, store.tag = b'b' * 250, 'second'
      with self.assertRaises(backend.ObjectReplacedError):
        await parts.read()
      return await parts.read()

    with mock.patch.object(obstore, 'get_async', store.get):
      self.assertEqual(asyncio.run(act()), b'b' * 250)

  def test_one_that_is_too_large_is_refused(self):
    store = Store(bytes(250))
    with self.assertRaisesRegex(
      interface.ObjectTooLargeError, 'it has 250 bytes, 249 are allowed'
    ):
      self.read(store, limit=249)
    self.assertLen(store.asked, 1)

  def test_a_size_that_is_announced_takes_no_memory(self):
    """A stranger says that it has a gigabyte, and sends 30 bytes of it."""

    class Liar(Store):
      async def get(self, store, key, *, options):
        found = await super().get(store, key, options=options)
        found.meta['size'] = 2**30
        return found

    tracemalloc.start()
    self.addCleanup(tracemalloc.stop)
    with self.assertRaises(interface.StoreUnavailableError):
      self.read(Liar(bytes(100), cuts=[30]), limit=2**30, part_bytes=2**27)
    self.assertLess(tracemalloc.get_traced_memory()[1], 2**20)

  @parameterized.parameters(1, 2, 8)
  def test_reads_no_more_at_once_than_it_may(self, slots):
    store = Store(bytes(2000))
    self.assertEqual(self.read(store, slots=slots), store.data)
    self.assertEqual(store.most, min(slots, object_reader.PARTS_AT_ONCE))

  @parameterized.parameters(0, 99, 250, 950)
  def test_digests_while_it_reads(self, size):
    cuts = [30] if size else []
    store = Store(bytes(i % 251 for i in range(size)), cuts)
    transfer = transfer_lib.Transfer()
    tries = 1 + (size > 0)
    self.assertEqual(self.read(store, tries, transfer=transfer), store.data)
    expected = hashlib.blake2b(store.data, digest_size=32).digest()
    self.assertEqual(transfer._digested[1], expected)
    self.assertEqual(transfer.digest_of(transfer._digested[0]), expected)
    self.assertEqual((transfer.received, transfer.size), (size, size))

  def test_a_break_while_a_thread_digests_spoils_nothing(self):
    """The thread goes on after the break that gives its part up."""
    begun, go, ended = (threading.Event() for _ in range(3))
    self.addCleanup(go.set)
    blake2b = hashlib.blake2b

    class Slow:
      def __init__(self, **kwargs):
        self._inner = blake2b(**kwargs)

      def update(self, data):
        is_first = not begun.is_set()
        begun.set()
        go.wait()
        self._inner.update(data)
        if is_first:
          ended.set()

      def digest(self):
        return self._inner.digest()

    class Breaking(Store):
      async def _stream(self, data, cut):
        if cut is not None:
          await asyncio.to_thread(begun.wait)
        async for chunk in super()._stream(data, cut):
          yield chunk

    store = Breaking(bytes(range(250)), cuts=[None, 0])
    transfer = transfer_lib.Transfer()

    async def act():
      parts = object_reader.ObjectReader(
        None, 'key', 300, asyncio.Semaphore(8), _PART, transfer=transfer
      )
      with self.assertRaises(interface.StoreUnavailableError):
        await parts.read()
      go.set()
      await asyncio.to_thread(ended.wait)
      return await parts.read()

    with (
      mock.patch.object(obstore, 'get_async', store.get),
      mock.patch.object(object_reader, '_INLINE_BYTES', 10),
      mock.patch.object(object_reader, 'hashlib', mock.Mock(blake2b=Slow)),
    ):
      data = asyncio.run(act())
    self.assertEqual(data, store.data)
    self.assertEqual(
      transfer.digest_of(data), blake2b(data, digest_size=32).digest()
    )


if __name__ == '__main__':
  absltest.main()
