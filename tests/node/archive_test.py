"""Checkpoints for strangers, from one mesh to another."""

import dataclasses
import gc
import shutil
import tempfile

import jax
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.models import sharding
from covenant.node import agreement
from covenant.node import archive
from covenant.node import objects as objects_lib
from covenant.node import replica as replica_lib
from covenant.store import bucket as bucket_lib
from covenant.store import location as location_lib


# Orbax leaves them behind where a tensor cannot be read.
@pytest.mark.filterwarnings('ignore:coroutine .* was never awaited')
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
class ArchiveTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.addCleanup(gc.collect)  # of this test, not of one after it
    folder = tempfile.mkdtemp()  # short: a path must fit the chain
    self.addCleanup(shutil.rmtree, folder)
    location = location_lib.Location.parse(f'file://{folder}/own')
    self.objects = objects_lib.Objects(
      b'r' * 16,
      bucket_lib.open_bucket(location),
      location.to_bytes(),
      lambda data: bucket_lib.open_for_reading(
        location_lib.Location.from_bytes(data), allow_local=True
      ),
    )
    self.config = config_lib.load(
      'configs/tiny.py', ['model.kv_heads=2', 'optim.outer.momentum=0.5']
    )

  def replica(self, **sizes):
    if not sizes:
      return replica_lib.Replica(self.config)
    mesh = sharding.mesh(config_lib.Devices(**sizes), jax.devices())
    return replica_lib.Replica(self.config, mesh)

  def publish(self, replica):
    shared = replica.init()
    # As if it had moved: what is zero tells nothing.
    shared = shared._replace(
      outer=jax.tree.map(lambda x: x + np.ones_like(x), shared.outer)
    )
    place = agreement.Place(6, bytes(32), shared)
    fingerprint = replica.fingerprint(shared)
    archive.publish(self.objects, place, fingerprint, lambda _: bytes(64))
    bucket = self.objects.bucket
    index = archive.read_index(
      self.objects, bucket, 6, 'me', lambda hotkey, data, signature: True
    )
    return shared, index

  @parameterized.parameters(
    (dict(fsdp=2, tensor=2), {}), ({}, dict(fsdp=2, tensor=2))
  )
  def test_a_joiner_has_it_on_its_own_mesh(self, theirs, own):
    want, index = self.publish(self.replica(**theirs))
    replica = self.replica(**own)
    got = archive.load(
      self.objects, index, [self.objects.bucket], replica
    ).shared
    jax.tree.map(np.testing.assert_array_equal, got, want)
    like = replica.init()
    self.assertEqual(
      [x.sharding for x in jax.tree.leaves(got)],
      [x.sharding for x in jax.tree.leaves(like)],
    )

  def test_the_roots_before_it_are_proven(self):
    """By hashes that lead to the root, which the chain knows."""
    self.config = dataclasses.replace(
      self.config, optim=dataclasses.replace(self.config.optim, staleness=1)
    )
    replica = self.replica()
    place = agreement.Place(0, bytes(32), replica.init())
    for digest in (b'a' * 32, None, b'c' * 32):
      place = place.after(digest, place.shared, agreement.kept_links(replica))
    self.assertLen(place.past, 2)

    def published(place):
      archive.publish(
        self.objects,
        place,
        replica.fingerprint(place.shared),
        lambda _: bytes(64),
      )
      index = archive.read_index(
        self.objects, self.objects.bucket, place.round, 'me', lambda *_: True
      )
      return archive.load(self.objects, index, [self.objects.bucket], replica)

    self.assertEqual(published(place).past, place.past)
    for r, past, said in (
      (4, place.past, 'round 3 of its past does not lead'),
      (5, (), 'knows 0 rounds before'),
    ):
      with self.assertRaisesRegex(agreement.Lost, said):
        published(place._replace(round=r, past=past))

  def test_of_another_model(self):
    _, index = self.publish(self.replica())
    model = dataclasses.replace(self.config.model, width=64)
    config = dataclasses.replace(self.config, model=model)
    with self.assertRaisesRegex(
      agreement.Lost, 'round 6 cannot be read: ValueError: Requested shape'
    ):
      archive.load(
        self.objects,
        index,
        [self.objects.bucket],
        replica_lib.Replica(config),
      )


if __name__ == '__main__':
  absltest.main()
