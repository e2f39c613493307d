"""Checkpoints for strangers, from one mesh to another."""

import dataclasses
import shutil
import tempfile

import hypothesis
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
from tests import mutations


class ArchiveTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
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
    published_checkpoint.publish(
      self.objects, place, shared_model, lambda _: bytes(64)
    )
    index = self.index(shared_model, 6)
    self.assertEqual(index.fingerprint, shared_model.fingerprint(shared))
    return shared, index

  def index(self, shared_model, r):
    data = self.objects.bucket.get(self.objects.key('checkpoints', r), 1 << 20)
    layout = published_checkpoint.layout(shared_model)
    return published_checkpoint.decode(
      data, layout, 'me', lambda hotkey, data, signature: True
    )

  @parameterized.parameters(
    (dict(fsdp=2, tensor=2), {}), ({}, dict(fsdp=2, tensor=2))
  )
  @pytest.mark.rows(1)
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

  @pytest.mark.slow
  def test_a_mutated_index_is_the_same_or_refused(self):
    """Signed as it is, so that nothing but its form is looked at."""
    shared_model = self.shared_model()
    place = apply.Position(0, bytes(32), shared_model.init())
    for digest in (b'a' * 32, None):
      place = place.advance(digest, place.shared)
    published_checkpoint.publish(
      self.objects, place, shared_model, lambda _: bytes(64)
    )
    layout = published_checkpoint.layout(shared_model)
    key = self.objects.key('checkpoints', 2)
    data = self.objects.bucket.get(key, 1 << 20)
    whole = self.index(shared_model, 2)
    self.assertLessEqual(len(data) - 64, layout.index_bytes)

    @hypothesis.settings(deadline=None, max_examples=500, database=None)
    @hypothesis.given(mutations.mutated(data))
    def check(mutant):
      try:
        index = published_checkpoint.decode(
          mutant, layout, 'me', lambda hotkey, data, signature: True
        )
      except apply.OutOfSyncError:
        return
      body = mutant[:-64]
      self.assertEqual(published_checkpoint.encode(index), body)
      # Any number may be the round and any digest the root; all else is the
      # layout's, or the fingerprint's of what it names.
      free = {'round': whole.round, 'root': whole.root}
      self.assertEqual(index._replace(**free), whole)

    check()

  @pytest.mark.slow
  def test_of_another_model(self):
    _, index = self.publish(self.shared_model())
    model = dataclasses.replace(self.config.model, width=64)
    config = dataclasses.replace(self.config, model=model)
    with self.assertRaisesRegex(
      apply.OutOfSyncError,
      'has 32768 bytes, not 65536',
    ):
      published_checkpoint.load(
        self.objects,
        index,
        [self.objects.bucket],
        shared_state_lib.SharedModel(config),
      )

  @pytest.mark.slow
  def test_an_index_is_the_same_from_every_mesh(self):
    _, plain = self.publish(self.shared_model())
    self.objects.bucket.delete([self.objects.key('checkpoints', 6)])
    _, sharded = self.publish(self.shared_model(fsdp=2, tensor=2))
    self.assertEqual(plain, sharded)

  def test_the_size_of_a_piece_is_that_of_the_model(self):
    """A digest of other bytes than the model has room for."""
    shared_model = self.shared_model()
    _, index = self.publish(shared_model)
    for size in (0, 1, 10_000):
      piece = bytes(size)
      digest = run_storage_lib.digest(piece)
      self.objects.put_once(self.objects.chunk_key(digest), piece)
      files = index.files | {'params.embedding': [digest.hex()]}
      other = index._replace(
        files=files, fingerprint=published_checkpoint.fingerprint_of(files)
      )
      with self.assertRaisesRegex(
        apply.OutOfSyncError, f'embedding has {size} bytes, not 32768'
      ):
        published_checkpoint.load(
          self.objects, other, [self.objects.bucket], shared_model
        )

  @pytest.mark.slow
  def test_pieces_that_nobody_lists_are_deleted(self):
    """Two checkpoints stay at least, so that one of them is vouched for."""
    shared_model = self.shared_model()
    shared = shared_model.init()
    for r in range(4):
      shared = jax.tree.map(lambda x: x + np.ones_like(x), shared)
      place = apply.Position(r, bytes(32), shared)
      published_checkpoint.publish(
        self.objects, place, shared_model, lambda _: bytes(64)
      )
    self.assertEqual(published_checkpoint.prune(self.objects, 1), 2)
    bucket = self.objects.bucket
    self.assertEqual(
      published_checkpoint.published(self.objects, bucket), [2, 3]
    )
    for r in (2, 3):
      index = self.index(shared_model, r)
      published_checkpoint.load(self.objects, index, [bucket], shared_model)
    for r, body in ((4, b'[' * 9999), (5, b'{}'), (6, b'{"files":{"a":[[]]}}')):
      key = self.objects.key('checkpoints', r)
      self.objects.bucket.put(key, body + bytes(64))
      published_checkpoint.prune(self.objects, 2)
      self.assertNotIn(r, published_checkpoint.published(self.objects, bucket))
      place = apply.Position(r, bytes(32), shared)
      published_checkpoint.publish(
        self.objects, place, shared_model, lambda _: bytes(64)
      )
    published_checkpoint.prune(self.objects, 2)
    named = {
      digest
      for r in (5, 6)
      for digests in self.index(shared_model, r).files.values()
      for digest in digests
    }
    self.assertEqual(
      published_checkpoint.published(self.objects, bucket), [5, 6]
    )
    keys = [info.key for info in bucket.list('')]
    self.assertLen([key for key in keys if '/chunks/' in key], len(named))


if __name__ == '__main__':
  absltest.main()
