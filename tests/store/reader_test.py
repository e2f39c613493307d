"""An object in parts, of a store that breaks off where it is told to."""

import asyncio
import datetime
import types
from unittest import mock

import obstore
from absl.testing import absltest
from absl.testing import parameterized

from covenant.store import backend
from covenant.store import interface
from covenant.store import reader as reader_lib

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
  def read(self, store, tries=1, limit=10**6, slots=8):
    """What a reader has in the end, after so many tries."""

    async def act():
      reader = reader_lib.ObjectReader(
        None, 'key', limit, asyncio.Semaphore(slots), _PART
      )
      for _ in range(tries - 1):
        with self.assertRaises(interface.StoreUnavailableError):
          await reader.read()
      return await reader.read()

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
      reader = reader_lib.ObjectReader(
        None, 'key', 10**6, asyncio.Semaphore(8), _PART
      )
      with self.assertRaises(interface.StoreUnavailableError):
        await reader.read()
      store.data, store.tag = b'b' * 250, 'second'
      with self.assertRaises(backend.ObjectReplacedError):
        await reader.read()
      return await reader.read()

    with mock.patch.object(obstore, 'get_async', store.get):
      self.assertEqual(asyncio.run(act()), b'b' * 250)

  def test_one_that_is_too_large_is_refused(self):
    store = Store(bytes(250))
    with self.assertRaisesRegex(
      interface.ObjectTooLargeError, 'it has 250 bytes, 249 are allowed'
    ):
      self.read(store, limit=249)
    self.assertLen(store.asked, 1)

  @parameterized.parameters(1, 2, 8)
  def test_reads_no_more_at_once_than_it_may(self, slots):
    store = Store(bytes(2000))
    self.assertEqual(self.read(store, slots=slots), store.data)
    self.assertEqual(store.most, min(slots, reader_lib.PARTS_AT_ONCE))


if __name__ == '__main__':
  absltest.main()
