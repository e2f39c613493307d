"""Tests for covenant.train.placement."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.models import llama
from covenant.models import sharding
from covenant.train import placement

MODEL = config_lib.Model(
  vocab_size=32, width=32, layers=2, heads=2, kv_heads=1, ffn_width=48
)


def params():
  return jax.jit(lambda key: llama.init(MODEL, key))(jax.random.key(0))


def mesh(devices, **sizes):
  return sharding.mesh(config_lib.Devices(**sizes), devices)


def assert_equal(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


class HostOffloadTest(absltest.TestCase):
  def test_offloads_and_loads(self):
    host = placement.HostOffload(jax.devices()[0], True)
    tree = {'x': jnp.arange(3)}
    there = host.offload(tree)
    self.assertTrue(placement.is_offloaded(there))
    self.assertFalse(placement.is_offloaded(host.load(there)))
    assert_equal(host.load(there), tree)

  def test_does_nothing_unless_enabled(self):
    host = placement.HostOffload(jax.devices()[0], False)
    tree = {'x': jnp.arange(3)}
    self.assertIs(host.offload(tree), tree)
    self.assertIs(host.load(tree), tree)

  def test_an_empty_tree_is_not_offloaded(self):
    self.assertFalse(placement.is_offloaded(None))


class PlacementTest(parameterized.TestCase):
  def test_without_a_mesh_nothing_moves(self):
    place, tree = placement.Placement(None), params()
    self.assertIsNone(place.home_mesh)
    for move in (place.to_home, place.unshard, place.replicate, place.gather):
      assert_equal(move(tree), tree)
    tokens = np.zeros((2, 3), np.int32)
    self.assertIs(place.shard_batch(tokens), tokens)

  def test_fresh_copies_have_buffers_of_their_own(self):
    place, x = placement.Placement(None), jnp.arange(3)
    self.assertIs(place.replicate(x), x)
    copy = place.replicate(x, fresh=True)
    self.assertNotEqual(copy.unsafe_buffer_pointer(), x.unsafe_buffer_pointer())

  def test_a_mesh_of_one_device_is_that_device(self):
    there = jax.devices()[3]
    place = placement.Placement(mesh([there]))
    self.assertIsNone(place.mesh)
    for x in jax.tree.leaves(place.replicate(params())):
      self.assertEqual(x.devices(), {there})

  @parameterized.parameters(
    dict(data=2), dict(fsdp=2), dict(data=2, fsdp=2), dict(tensor=2)
  )
  def test_what_is_replicated_is_gathered(self, **sizes):
    devices = jax.devices()[4:]
    place, want = placement.Placement(mesh(devices, **sizes)), params()
    there = place.replicate(want)
    for x in jax.tree.leaves(there):
      self.assertEqual(x.sharding.device_set, set(place.mesh.devices.flat))
    home = place.gather(there)
    for x in jax.tree.leaves(home):
      self.assertLen(
        x.sharding.device_set, place.mesh.size // sizes.get('data', 1)
      )
      self.assertIn(devices[0], x.sharding.device_set)
    assert_equal(home, want)
    assert_equal(place.unshard(there), want)
    assert_equal(place.to_home(there), want)

  def test_each_device_gets_its_sequences(self):
    place = placement.Placement(mesh(jax.devices(), data=2, fsdp=2))
    tokens_BxL1 = np.arange(12, dtype=np.int32).reshape(4, 3)
    batch = place.shard_batch(tokens_BxL1)
    assert_equal(batch, tokens_BxL1)
    for shard in batch.addressable_shards:
      self.assertEqual(shard.data.shape, (1, 3))


class PipelinePlacementTest(absltest.TestCase):
  def test_stages_have_their_layers_and_the_first_device_all_at_rest(self):
    stages = mesh(jax.devices()[2:4], stage=2)
    place = placement.PipelinePlacement(MODEL, stages)
    want = (jax.device_put(params(), jax.devices()[2]), jnp.int32(7))
    there, number = place.replicate(want)
    self.assertLen(number.devices(), 2)
    for x in jax.tree.leaves(there['layers']):
      self.assertEqual(x.addressable_shards[0].data.shape[0], 1)
    got = place.gather((there, number))
    assert_equal(got, want)
    for x in jax.tree.leaves(got):
      self.assertEqual(x.devices(), {jax.devices()[2]})


if __name__ == '__main__':
  absltest.main()
