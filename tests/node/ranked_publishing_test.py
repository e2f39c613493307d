"""Two ranks, in threads, publish a checkpoint beside the rounds."""

import functools
import threading
import types
from unittest import mock

from absl.testing import absltest

from covenant.node import publishing
from covenant.node import ranked as ranked_lib
from covenant.node import ranked_publishing
from covenant.protocol import apply
from covenant.protocol import published_checkpoint
from covenant.store import interface as store_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import manifest as manifest_lib
from tests import helpers
from tests.node.multihost_test import run
from tests.node.ranked_test import storage


class RankedPublishingTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.config = helpers.tiny()
    cls.model = shared_state_lib.SharedModel(cls.config)

  def publish(self, put, program):
    """Returns the storage, and what `program` returns on two ranks.

    Args:
      put: stands for `put` of the bucket of rank 0: (real, key, data).
      program: takes a publisher that has begun.
    """
    own = storage(self._testMethodName, self.model.run)
    real = own.bucket.put
    own.bucket.put = lambda key, data, *, replace=False: put(
      functools.partial(real, replace=replace), key, data
    )
    root = manifest_lib.genesis(self.model.run)
    place = apply.Position(0, root, self.model.init())
    chain = types.SimpleNamespace(sign=lambda body: bytes(64))

    def of_rank(process_group):
      objects = ranked_lib.storage(
        process_group, self.model.run, lambda writes=True: own
      )
      node = types.SimpleNamespace(
        place=place,
        shared_model=self.model,
        chain=chain,
        state=types.SimpleNamespace(round=0),
        config=self.config,
      )
      found = ranked_publishing.publisher(process_group, objects)
      found.start(node)
      return program(found)

    with (
      mock.patch.object(publishing, 'is_turn', lambda *_: True),
      mock.patch.object(publishing, 'voters', lambda *_: 1),
      mock.patch.object(publishing, 'cleaning', lambda *_: lambda: None),
      mock.patch.object(ranked_publishing, '_PAUSE_SECONDS', 0.0),
    ):
      return own, place, run(of_rank)

  def check(self, own, place):
    """Publishes the state as it is."""
    data = own.bucket.get(own.key('checkpoints', 0), 1 << 20)
    index = published_checkpoint.decode(
      data, published_checkpoint.layout(self.model), 'who', lambda *_: True
    )
    self.assertEqual(index.fingerprint, self.model.fingerprint(place.shared))
    loaded = published_checkpoint.load(own, index, [own.bucket], self.model)
    self.assertEqual(helpers.bits(loaded.shared), helpers.bits(place.shared))

  def test_failures_are_tried_again(self):
    failed = set()

    def put(real, key, data):
      if key not in failed and len(failed) < 3 or key.endswith('00000000'):
        if key not in failed:
          failed.add(key)
          raise store_lib.StoreUnavailableError('down')
      real(key, data)

    def program(publisher):
      while publisher.is_busy:
        publisher.work(0.001)
      failures = publisher.failures, publisher.take_error()
      publisher.finish(True, lambda: False, 0.0)
      return failures

    own, place, (first, second) = self.publish(put, program)
    self.assertEqual(first, (4, 'StoreUnavailableError: down'))
    # A put of the index fails on all ranks, as all ask for it.
    self.assertEqual(second, (1, 'StoreUnavailableError: down'))
    self.check(own, place)

  def test_a_store_that_hangs_delays_nothing(self):
    go = threading.Event()
    self.addCleanup(go.set)

    def put(real, key, data):
      go.wait(60)
      real(key, data)

    def program(publisher):
      for _ in range(3):
        publisher.work(0.02)
      waits = publisher.is_busy
      go.set()
      publisher.finish(True, lambda: False, 0.001)
      return waits, publisher.is_busy

    own, place, found = self.publish(put, program)
    self.assertEqual(found, [(True, False)] * 2)
    self.check(own, place)

  def test_a_stop_ends_it(self):
    go = threading.Event()

    def put(real, key, data):
      go.wait(60)
      raise store_lib.StoreUnavailableError('down')

    def program(publisher):
      publisher.work(0.02)
      go.set()
      publisher.finish(True, lambda: True, 0.0)
      return publisher.is_busy

    own, _, found = self.publish(put, program)
    self.assertEqual(found, [True] * 2)
    self.assertEmpty(published_checkpoint.published(own, own.bucket))


if __name__ == '__main__':
  absltest.main()
