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
from covenant.protocol import apply
from covenant.protocol import published_checkpoint
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import bucket as bucket_lib
from covenant.store import location as location_lib
from covenant.train import shared_state as shared_state_lib


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
    self.objects = run_storage_lib.RunStorage(
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

  def shared_model(self, **sizes):
    if not sizes:
      return shared_state_lib.SharedModel(self.config)
    mesh = sharding.mesh(config_lib.Devices(**sizes), jax.devices())
    return shared_state_lib.SharedModel(self.config, mesh)

  def publish(self, shared_model):
    shared = shared_model.init()
    # As if it had moved: what is zero tells nothing.
    shared = shared._replace(
      outer=jax.tree.map(lambda x: x + np.ones_like(x), shared.outer)
    )
    place = apply.Position(6, bytes(32), shared)
    fingerprint = shared_model.fingerprint(shared)
    published_checkpoint.publish(
      self.objects, place, fingerprint, lambda _: bytes(64)
    )
    bucket = self.objects.bucket
    index = published_checkpoint.read_index(
      self.objects, bucket, 6, 'me', lambda hotkey, data, signature: True
    )
    return shared, index

  @parameterized.parameters(
    (dict(fsdp=2, tensor=2), {}), ({}, dict(fsdp=2, tensor=2))
  )
  def test_a_joiner_has_it_on_its_own_mesh(self, theirs, own):
    want, index = self.publish(self.shared_model(**theirs))
    shared_model = self.shared_model(**own)
    got = published_checkpoint.load(
      self.objects, index, [self.objects.bucket], shared_model
    ).shared
    jax.tree.map(np.testing.assert_array_equal, got, want)
    like = shared_model.init()
    self.assertEqual(
      [x.sharding for x in jax.tree.leaves(got)],
      [x.sharding for x in jax.tree.leaves(like)],
    )

  def test_the_roots_before_it_are_proven(self):
    """By hashes that lead to the root, which the chain knows."""
    self.config = dataclasses.replace(
      self.config, optim=dataclasses.replace(self.config.optim, staleness=1)
    )
    shared_model = self.shared_model()
    place = apply.Position(0, bytes(32), shared_model.init())
    for digest in (b'a' * 32, None, b'c' * 32):
      place = place.advance(
        digest, place.shared, apply.kept_links(shared_model)
      )
    self.assertLen(place.past, 2)

    def published(place):
      published_checkpoint.publish(
        self.objects,
        place,
        shared_model.fingerprint(place.shared),
        lambda _: bytes(64),
      )
      index = published_checkpoint.read_index(
        self.objects, self.objects.bucket, place.round, 'me', lambda *_: True
      )
      return published_checkpoint.load(
        self.objects, index, [self.objects.bucket], shared_model
      )

    self.assertEqual(published(place).past, place.past)
    for r, past, said in (
      (4, place.past, 'round 3 of its past does not lead'),
      (5, (), 'knows 0 rounds before'),
    ):
      with self.assertRaisesRegex(apply.OutOfSyncError, said):
        published(place._replace(round=r, past=past))

  def test_of_another_model(self):
    _, index = self.publish(self.shared_model())
    model = dataclasses.replace(self.config.model, width=64)
    config = dataclasses.replace(self.config, model=model)
    with self.assertRaisesRegex(
      apply.OutOfSyncError,
      'round 6 cannot be read: ValueError: Requested shape',
    ):
      published_checkpoint.load(
        self.objects,
        index,
        [self.objects.bucket],
        shared_state_lib.SharedModel(config),
      )


if __name__ == '__main__':
  absltest.main()
