import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import blocks
from covenant.optim import compression as compression_lib
from covenant.optim import quantize
from covenant.optim import sharded_leaf

P = jax.P
TILES = compression_lib.TopK(1, (4, 4), quantize.Exact())
DIVISORS = compression_lib.TopK(2, (4, 4), quantize.Exact(), 'divisors')


def mesh():
  explicit = (jax.sharding.AxisType.Explicit,) * 3
  names = ('data', 'fsdp', 'tensor')
  return jax.make_mesh((2, 2, 2), names, explicit)


def leaf(shape, spec=None, budget=sharded_leaf.BUDGET, compression=TILES):
  on = mesh() if spec is not None else None
  like = {'x': jax.ShapeDtypeStruct(shape, np.float32)}
  (found,) = sharded_leaf.leaves(like, compression, on, {'x': spec}, budget)
  return found


class LeavesTest(parameterized.TestCase):
  @parameterized.parameters(
    # Shape, spec, elements a slice, and how many slices that makes.
    ((5, 16, 8), None, 10_000, 1),
    ((5, 16, 8), None, 128, 5),  # one matrix
    ((5, 16, 8), None, 127, 10),  # half of one
    ((5, 16, 8), None, 1, 20),  # at least a row of blocks
    ((6, 16, 8), None, 300, 3),  # two matrices
    ((16, 8), None, 64, 2),
    ((3, 2, 16, 8), None, 256, 3),
    ((6, 16, 8), P(None, 'fsdp', 'tensor'), 64, 3),
    ((6, 16, 8), P(None, ('fsdp', 'tensor'), None), 64, 3),
    ((6, 16, 8), P(), 256, 3),  # a copy on every device
    ((16, 8), P(('tensor', 'fsdp')), 1, 1),
    # Blocks of several sizes, vectors and scalars are one.
    ((5, 17, 8), None, 1, 1),
    ((64,), None, 1, 1),
    ((64,), P('fsdp'), 1, 1),
    ((), P(), 1, 1),
  )
  def test_slices_are_as_large_as_they_may_be(self, shape, spec, budget, want):
    self.assertEqual(leaf(shape, spec, budget).slices, want)

  @parameterized.parameters(
    ((16, 12), P('fsdp', 'tensor'), TILES, 'whole blocks of'),
    ((16, 12), P(None, ('fsdp', 'tensor')), TILES, 'whole blocks of'),
    ((17, 8), P(None, 'tensor'), TILES, 'whole blocks of'),
    ((6, 16, 8), P('fsdp'), TILES, 'rows and columns only'),
    ((40,), P('fsdp'), TILES, 'whole blocks of'),
    ((12, 12), P('fsdp', None), DIVISORS, 'whole blocks of'),
  )
  def test_names_who_cannot_be_sharded(self, shape, spec, compression, why):
    with self.assertRaisesRegex(ValueError, rf"\['x'\] of shape .*{why}"):
      leaf(shape, spec, compression=compression)

  def test_divisors_stay_those_of_the_whole(self):
    """Six rows are cut by 3; two times six would be by 4."""
    found = leaf((4, 6, 8), None, 100, DIVISORS)
    self.assertEqual((found.block, found.slices), ((3, 4), 4))


class DealTest(parameterized.TestCase):
  """The values of each block are scattered to the device that has the block."""

  @parameterized.product(
    spec=(
      None,
      P(),
      P(None, 'fsdp', 'tensor'),
      P(None, 'tensor', 'fsdp'),
      P(None, ('fsdp', 'tensor'), None),
      P(None, None, ('tensor', 'fsdp')),
    ),
    budget=(60, 130),  # parts of a matrix, and two
  )
  def test_slices_of_shards(self, spec, budget):
    shape = (4, 16, 16)
    whole = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    (cut_NxL,) = blocks.cut(whole, (4, 4))
    packet = compression_lib.Packet(
      np.zeros((64, 1), np.uint16), np.asarray(cut_NxL), np.zeros((0, 0))
    )
    for compression in (TILES, compression_lib.Dense()):
      found = leaf(shape, spec, budget, compression)
      self.assertGreater(found.slices, 1)
      is_dense = compression is not TILES

      def compare(x, scattered, index, found=found, is_dense=is_dense):
        own = found.take(x, index)
        if not is_dense:
          (own,) = blocks.cut(own, (4, 4))
        return jnp.all(own == scattered)[None]

      specs = found.spec, found.stacked, P()
      compare = jax.jit(found.on_shards(compare, specs, found.stacked))
      x = whole
      if spec is not None:
        x = jax.device_put(x, jax.NamedSharding(found.mesh, found.spec))
      for index in range(found.slices):
        if is_dense:
          scattered = found.scatter_slice(whole, index, None)
        else:
          (split,) = found.scatter_slice((packet,), index, TILES.quantizer)
          self.assertEqual(split.shared.shape, (0, 0))
          _, scattered = split.rows
        self.assertTrue(np.all(compare(x, scattered, np.int32(index))))


class SplitPacketTest(parameterized.TestCase):
  @parameterized.parameters(
    quantize.Exact(),
    quantize.Sign(),
    quantize.Sign('tensor'),
    quantize.SignMagnitude(),
    quantize.SignMagnitude('tensor'),
    quantize.Statistical(),
    quantize.Linear(),
  )
  def test_a_packet_is_put_together_again(self, quantizer):
    rng = np.random.default_rng(0)
    kept = compression_lib.Kept(
      np.zeros((6, 3), np.uint16),
      rng.standard_normal((6, 3)).astype(np.float32),
    )
    compression = compression_lib.TopK(3, (4, 4), quantizer)
    packet = jax.device_get(jax.jit(compression.encode)(kept))
    split = sharded_leaf.split(packet, quantizer)
    self.assertEqual({x.shape[0] for x in split.rows}, {6})
    again = sharded_leaf.join(split, np.concatenate)
    jax.tree.map(np.testing.assert_array_equal, again, packet)


if __name__ == '__main__':
  absltest.main()
