import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from covenant.optim import collectives

P = jax.P


def mesh_of(name, kind):
  return jax.make_mesh(
    (2,), (name,), axis_types=(kind,), devices=jax.devices()[:2]
  )


def on_peers(f, x):
  """`f` of two peers in `jax.shard_map`, each with one element of `x`."""
  mesh = mesh_of('peers', jax.sharding.AxisType.Auto)
  spec = P('peers')
  mapped = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)
  return jax.jit(mapped)(x)


def sharded(x):
  """An array whose type says that its rows are sharded over two devices."""
  mesh = mesh_of('fsdp', jax.sharding.AxisType.Explicit)
  return jax.device_put(x, jax.NamedSharding(mesh, P('fsdp')))


class GatherTest(absltest.TestCase):
  def test_a_single_peer_has_its_own_message(self):
    words = jnp.array([1, 2], jnp.uint32)
    np.testing.assert_array_equal(
      collectives.gather_words(words, None), [[1, 2]]
    )
    self.assertEqual(collectives.index(None), 0)

  def test_messages_come_in_the_order_of_the_peers(self):
    def difference(x):
      first, second = collectives.gather_words(x, 'peers')
      # Typed as equal on all peers; the index is each peer's own.
      zero = 0 * collectives.index('peers').astype(jnp.float32)
      return second - first + zero

    x = jnp.array([1.0, 5.0])
    got = jax.vmap(difference, axis_name='peers')(x)
    np.testing.assert_array_equal(got, [4, 4])
    np.testing.assert_array_equal(on_peers(difference, x), [4, 4])


class ShardsTest(absltest.TestCase):
  def test_axes_follow_from_the_type(self):
    x = sharded(jnp.arange(4.0))
    self.assertEqual(collectives.shard_axes(x, None), ('fsdp',))
    self.assertEqual(collectives.shard_axes(jnp.ones(4), None), ())

  def test_the_axis_of_peers_is_not_one_of_shards(self):
    found = []

    def look(x):
      found.append(collectives.shard_axes(x, 'peers'))
      found.append(collectives.shard_axes(x, None))
      return x

    on_peers(look, jnp.arange(2.0))
    self.assertEqual(found, [(), ('peers',)])

  def test_a_function_sees_shards_and_sums_over_them(self):
    shapes = []

    def double(x):
      shapes.append(x.shape)
      return 2 * x, collectives.sum_over(jnp.sum(x), ('fsdp',))

    x = sharded(jnp.arange(4.0))
    got, total = jax.jit(
      functools.partial(collectives.on_shards, double, axis_name=None)
    )((x,))
    self.assertEqual(shapes, [(2,)])
    np.testing.assert_array_equal(got, [0, 2, 4, 6])
    self.assertEqual(total, 6)
    self.assertEqual(jax.typeof(got).sharding.spec, P('fsdp'))

  def test_without_shards_the_function_is_called(self):
    got, total = collectives.on_shards(
      lambda x: (x, collectives.sum_over(x, ())), (3,), None
    )
    self.assertEqual((got, total), (3, 3))


class VaryingTest(absltest.TestCase):
  def test_types_every_leaf_in_shard_map(self):
    def typed(x):
      same = collectives.varying({'new': jnp.zeros(1), 'own': x}, 'peers')
      for leaf in same.values():
        self.assertIn('peers', jax.typeof(leaf).manual_axis_type.varying)
      return same['own']

    np.testing.assert_array_equal(on_peers(typed, jnp.arange(2.0)), [0, 1])

  def test_changes_nothing_elsewhere(self):
    tree = {'x': jnp.ones(2)}
    self.assertIs(collectives.varying(tree, 'peers'), tree)
    self.assertIs(collectives.varying(tree, None), tree)


if __name__ == '__main__':
  absltest.main()
