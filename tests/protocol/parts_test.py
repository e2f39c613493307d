"""Objects in parts: resumed at the part, and not trusted."""

import os
import subprocess
import sys
import threading
from unittest import mock

import pytest
from absl.testing import absltest

from covenant.protocol import parts
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import bucket as bucket_lib
from covenant.store import interface
from covenant.store import location as location_lib
from tests.store import faults_test
from tests.store import upload_test

LIMIT = 4000
DATA = bytes(i % 251 for i in range(3900))
DIGEST = run_storage_lib.digest(DATA)
# A node that puts five parts of 8 MiB.
_CUT = 2**23
_NODE = f"""
import random, sys
from covenant.protocol import parts, run_storage
from covenant.store import bucket, location
parts.PART_BYTES = {_CUT}
own = bucket.open_bucket(location.Location.parse(sys.argv[1]))
storage = run_storage.RunStorage(b'r' * 16, own, b'', None)
data = random.Random(7).randbytes(4 * {_CUT} + 100)
digest = run_storage.digest(data)
storage.put_once(storage.key('payloads', 3, digest), data)
print(digest.hex())
"""


class PartsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(mock.patch.object(parts, 'PART_BYTES', 400))
    self.storages = [self.open(name) for name in ('owner', 'mirror')]

  def open(self, name):
    location = location_lib.Location('memory', f'{name}-{self.id()[-40:]}')

    def open_bucket(data):
      found = location_lib.Location.from_bytes(data)
      return bucket_lib.open_for_reading(found, allow_local=True)

    return run_storage_lib.RunStorage(
      b'r' * 16,
      bucket_lib.open_bucket(location),
      location.to_bytes(),
      open_bucket,
    )

  def put(self, storage, data=DATA, digest=DIGEST):
    storage.put_once(storage.key('payloads', 3, digest), data)

  def fetch(self, limit=LIMIT):
    owner, mirror = self.storages
    taken = {}
    ref = run_storage_lib.ObjectRef(DIGEST, owner.location)
    got = mirror.fetch(
      'payloads', 3, [ref], [mirror.bucket], limit, 30, taken.__setitem__
    )[DIGEST]
    if isinstance(got, bytes):
      self.assertEqual(taken, {DIGEST: got})
    return got

  def test_comes_whole(self):
    owner, _ = self.storages
    self.put(owner)
    self.assertLen(owner.bucket.list(''), 11)  # ten parts and their list
    self.assertEqual(self.fetch(), DATA)
    owner.delete_before('payloads', 4)
    self.assertEmpty(owner.bucket.list(''))

  def test_a_small_object_is_not_cut(self):
    """Messages of one spec may have several lengths."""
    owner, mirror = self.storages
    data = DATA[:400]
    digest = run_storage_lib.digest(data)
    self.put(owner, data, digest)
    self.assertLen(owner.bucket.list(''), 1)
    ref = run_storage_lib.ObjectRef(digest, owner.location)
    got = mirror.fetch('payloads', 3, [ref], [], LIMIT, 30)
    self.assertEqual(got, {digest: data})

  def test_an_upload_goes_on_with_the_parts_that_are_missing(self):
    owner, _ = self.storages
    put, sent = owner.bucket.put, []

    def break_off(key, data, replace=False):
      if len(sent) == 4:
        raise interface.StoreUnavailableError('restart')
      sent.append(key)
      put(key, data, replace=replace)

    with mock.patch.object(run_storage_lib, '_LARGE', 50):
      with mock.patch.object(owner.bucket, 'put', break_off):
        with self.assertRaises(interface.StoreUnavailableError):
          self.put(owner)
      self.assertIsInstance(self.fetch(), interface.MissingObjectError)
      again = []
      with mock.patch.object(
        owner.bucket, 'put', lambda k, d, replace: again.append(k)
      ):
        self.put(owner)
      self.assertLen(again, 7)
      self.assertEmpty(set(again) & set(sent))
      self.put(owner)
    self.assertEqual(self.fetch(), DATA)

  @pytest.mark.network
  def test_a_process_killed_while_it_uploads_goes_on_after_a_restart(self):
    store, reached = upload_test.serve(self), threading.Event()

    def hold(h):
      reached.set()
      store.over.wait(faults_test.PATIENCE)
      h.hang_up()

    def puts():
      return [line.split()[1] for line in store.log if line.startswith('PUT')]

    endpoint = f'http://127.0.0.1:{store.server_port}'
    location = location_lib.Location('s3', 'abc', endpoint=endpoint)
    command = [sys.executable, '-c', _NODE, str(location)]
    environ = {**os.environ, **faults_test.ENVIRON}
    store.fault(lambda h: faults_test.serve(h), times=2, method='PUT')
    store.fault(hold, method='PUT')  # the third of the parts
    with subprocess.Popen(command, env=environ) as node:
      self.assertTrue(reached.wait(faults_test.PATIENCE))
      node.kill()
    first, kept = puts(), set(store.objects)
    self.assertLen(first, 3)
    self.assertEqual(kept, set(first[:2]))
    answer = subprocess.run(
      command, env=environ, check=True, capture_output=True, text=True
    )
    again = puts()[3:]
    self.assertLen(again, 4)  # three parts and their list
    self.assertEqual(again[0], first[2])
    self.assertEmpty(set(again) & kept)
    self.assertEqual(again[-1].rpartition('/')[2], answer.stdout.strip())

  def test_a_list_of_other_parts_hides_nothing(self):
    owner, mirror = self.storages
    other = bytes(3900)
    self.put(owner, other)  # under the digest of DATA
    self.assertIn('list is that of another', str(self.fetch()))
    self.put(mirror)
    self.assertEqual(self.fetch(), DATA)

  def test_lists_of_strangers_are_bounded(self):
    one = bytes(32)
    for data in (
      b'',
      parts.make_list([]),
      parts.make_list([one])[:-1],
      parts.make_list([one] * 11),
      b'x' + parts.make_list([one]),
    ):
      self.assertIsNone(parts.read_list(data, LIMIT), data)
    self.assertLen(parts.read_list(parts.make_list([one] * 10), LIMIT), 10)


class Sources:
  """Stands in for `reader` and `time`: some objects hang for all the time.

  Args:
    hangs: the keys that hang in so many fetches; others come in a second.
    objects: the bytes by key.
  """

  def __init__(self, objects, hangs):
    self.objects = objects
    self.hangs = dict(hangs)
    self.now = 0.0

  def monotonic(self):
    return self.now

  def fetch(self, requests, seconds, workers=1, note=None, take=None):
    del workers, note
    end, got = self.now + seconds, {}
    for name, asked in requests.items():
      got[name] = interface.StoreUnavailableError('not in time')
      if self.hangs.get(asked.key, 0) or self.now >= end:
        continue
      self.now += 1.0
      got[name] = self.objects[asked.key]
      if take is not None:
        take(name, got[name])
    for asked in requests.values():
      if self.hangs.get(asked.key, 0):
        self.hangs[asked.key] -= 1
        self.now = max(self.now, end)
    return got


class ShareTest(absltest.TestCase):
  def fetch(self, hangs):
    """Fetches ten objects of two parts in 100 s; returns those that came."""
    self.enterContext(mock.patch.object(parts, 'PART_BYTES', 4))
    objects, asked, keys = {}, {}, []
    for i in range(10):
      data = bytes([i] * 4 + [100 + i])
      digests = [run_storage_lib.digest(x) for x in (data[:4], data[4:])]
      objects[f'r/{i}'] = parts.make_list(digests)
      for digest, part in zip(digests, (data[:4], data[4:]), strict=True):
        objects[f'r/{digest.hex()}'] = part
      keys.append([f'r/{i}', f'r/{digests[0].hex()}'])
      name = run_storage_lib.digest(data)
      asked[name] = parts.request((None,), f'r/{i}', 8, name)
    hangs = {keys[i][part]: times for (i, part), times in hangs.items()}
    fake, taken = Sources(objects, hangs), []
    with (
      mock.patch.object(parts.reader, 'fetch', fake.fetch),
      mock.patch.object(parts, 'time', fake),
    ):
      got = parts.fetch(asked, 8, 100.0, 4, None, lambda n, d: taken.append(n))
    came = [n for n, data in got.items() if isinstance(data, bytes)]
    self.assertCountEqual(came, taken)
    self.assertLessEqual(fake.now, 101.0)
    order = list(asked)
    return [order.index(n) for n in came]

  def test_parts_that_hang_take_no_time_of_others(self):
    self.assertEqual(self.fetch({}), list(range(10)))
    for bad in (0, 3, 9):
      came = self.fetch({(bad, 1): 99})
      self.assertEqual(came, [i for i in range(10) if i != bad])
    came = self.fetch({(i, 1): 99 for i in range(4)})
    self.assertEqual(came, [4, 5, 6, 7, 8, 9])

  def test_lists_that_hang_take_no_time_of_others(self):
    self.assertEqual(self.fetch({(0, 0): 99}), list(range(1, 10)))

  def test_what_hung_once_is_tried_again(self):
    hangs = {(0, 1): 1, (5, 0): 1}
    self.assertEqual(self.fetch(hangs), list(range(10)))


if __name__ == '__main__':
  absltest.main()
