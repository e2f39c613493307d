import types

import jax
import numpy as np
import pytest
from absl.testing import absltest

from covenant.protocol import amendments
from covenant.protocol import apply
from covenant.protocol import history
from covenant.protocol import published_checkpoint
from covenant.protocol import rollback
from covenant.protocol import run_storage
from covenant.store import bucket as bucket_lib
from covenant.store import interface as store_lib
from covenant.store import location as location_lib
from covenant.train import shared_state
from covenant.wire import amendment
from tests import helpers

RUN = b'r' * 16


def made(round_index, target):
  return amendment.make(RUN, round_index, {'restore': list(target)})


class RollbackTest(absltest.TestCase):
  def test_when_it_is_due(self):
    target = amendments.Target(2, '0f' * 16)
    adopted = made(5, target), amendment.make(RUN, 6, {'rounds': 40})
    at = [apply.Position(r, bytes(32), None, adopted) for r in (4, 5, 6, 7)]
    self.assertEqual([rollback.due(x) for x in at], [None, target, None, None])
    self.assertEqual([rollback.between(x, 4) for x in at], [0, 1, 1, 1])
    self.assertFalse(rollback.between(at[2], 5))
    self.assertEqual(rollback.needed(adopted, 5), {2})
    self.assertEqual(rollback.needed(adopted, 6), set())

  def test_malformed_ones(self):
    for value in (4, [9, '0f' * 16], [-1, '0f' * 16], [2, 'x'], [2], ['2', 3]):
      one = amendment.make(RUN, 5, {'restore': value})
      with self.assertRaisesRegex(amendments.AmendmentError, 'restore'):
        amendments.restored(one)

  @pytest.mark.slow
  def test_the_state_is_found_by_its_fingerprint(self):
    location = location_lib.Location.parse('memory://rollback')
    bucket = bucket_lib.open_bucket(location)
    storage = run_storage.RunStorage(RUN, bucket, b'', lambda _: bucket)
    model = shared_state.SharedModel(helpers.tiny())
    shared = model.init()
    moved = shared._replace(params=jax.tree.map(lambda x: x + 1, shared.params))
    place = apply.Position(3, bytes(32), moved)
    published_checkpoint.publish(storage, place, model, lambda _: bytes(64))
    chain = types.SimpleNamespace(verify=lambda *_: True)
    sources = [history.Source('one', bucket)]
    around = rollback.Surroundings(chain, storage, model, sources)
    there = apply.fingerprint(model, place)
    got = rollback.load(around, amendments.Target(3, there))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(moved), strict=True):
      np.testing.assert_array_equal(x, y)
    for target in (3, '0' * 32), (2, there):
      with self.assertRaisesRegex(store_lib.StoreError, 'no validator has'):
        rollback.load(around, amendments.Target(*target))
    first = rollback.load(around, amendments.Target(0, there))
    self.assertEqual(model.fingerprint(first), model.fingerprint(shared))
    # It is kept as long as a rollback needs it.
    for r in 4, 5, 6:
      later = place._replace(round=r)
      published_checkpoint.publish(storage, later, model, lambda _: bytes(64))
    published_checkpoint.prune(storage, 2, {3})
    listed = published_checkpoint.published(storage, bucket)
    self.assertEqual(listed, [3, 5, 6])


if __name__ == '__main__':
  absltest.main()
