"""Parts that suit the link, over the store of the fault tests."""

import asyncio
import threading
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from covenant.store import backend
from covenant.store import interface
from covenant.store import location as location_lib
from covenant.store import retry
from covenant.store import upload
from tests.store import faults_test

_MIB, _KIB = 2**20, 2**10
_SETTINGS = backend.StoreSettings(part_bytes=64 * _KIB)


def serve(case: absltest.TestCase) -> faults_test.Store:
  """Starts a store that ends with the test."""
  store = faults_test.Store()
  thread = threading.Thread(target=store.serve_forever, args=(0.01,))
  thread.start()

  def stop():
    store.over.set()
    store.shutdown()
    store.server_close()
    thread.join()

  case.addCleanup(stop)
  return store


class UploaderTest(parameterized.TestCase):
  @parameterized.parameters(
    (None, 2**28, 8 * _MIB),  # nothing was measured
    (1e3, 2**28, 5 * _MIB),  # S3's least
    (20.0 * _MIB, 2**28, 20 * _MIB),  # four of four seconds
    (20.0 * _MIB, 2**25, 8 * _MIB),  # four of the object
    (1e9, 2**30, 64 * _MIB),
    (1e9, 2**24, 5 * _MIB),
    (None, 10**12, 10**8),  # no more than 10,000
    (1e3, 10**12, 10**8),
  )
  def test_the_size_of_a_part(self, rate, size, expected):
    slots = asyncio.Semaphore(1)
    settings = backend.StoreSettings()
    uploader = upload.Uploader(None, None, slots, settings, True)
    uploader.rate = rate
    self.assertEqual(uploader.part_bytes(size), expected)

  @mock.patch.object(upload, '_LEAST_BYTES', 64 * _KIB)
  def test_uploads_measure_the_link(self):
    store = serve(self)
    location = location_lib.Location(
      's3', 'abc', endpoint=f'http://127.0.0.1:{store.server_port}'
    )
    clients = [
      backend.connect(
        location, backend.Credentials('a', 'b'), True, _SETTINGS, n
      )
      for n in (0, 1)
    ]

    async def act():
      uploader = upload.Uploader(
        *clients, asyncio.Semaphore(8), _SETTINGS, True
      )

      async def put(key, size):
        before = sum('partNumber' in line for line in store.log)
        await uploader.put(retry.Call(), key, bytes(size), True)
        return sum('partNumber' in line for line in store.log) - before

      self.assertEqual(await put('a', 150 * _KIB), 3)
      self.assertGreater(uploader.rate, 0)
      uploader.rate = 80.0 * _KIB
      self.assertEqual(await put('b', 320 * _KIB), 4)
      store.fault(faults_test.status(503), times=9, path='partNumber')
      uploader.rate = 100.0 * _KIB
      with self.assertRaises(interface.StoreUnavailableError):
        await put('c', 400 * _KIB)
      self.assertEqual(uploader.rate, 50.0 * _KIB)

    asyncio.run(act())
    self.assertEqual(set(store.objects), {'/abc/a', '/abc/b'})


if __name__ == '__main__':
  absltest.main()
