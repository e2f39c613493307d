import re

import jax
import numpy as np
import optax
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.models import llama
from covenant.models import sharding
from covenant.optim import algorithm as algorithm_lib
from covenant.optim import compression as compression_lib
from covenant.optim import compressor as compressor_lib
from covenant.optim import quantize
from covenant.optim import reduce
from covenant.optim import sharded_leaf
from covenant.optim import topk_variants
from tests.optim import trees

P = jax.P
# By name, whether the codes of the quantizer depend on a block alone.
EXACT = {
  'sign': compression_lib.TopK(4, trees.BLOCK),
  'sign_magnitude': compression_lib.TopK(
    4, trees.BLOCK, quantize.SignMagnitude(iterations=2)
  ),
  'none': compression_lib.TopK(4, trees.BLOCK, quantize.Exact()),
  'divisors': compression_lib.TopK(4, trees.BLOCK, layout='divisors'),
  'randomk': topk_variants.RandomK(4, trees.BLOCK),
  'dct': topk_variants.DCTTopK(4, trees.BLOCK),
  'dense': compression_lib.Dense(),
}
STATISTICS = {
  'statistical': quantize.Statistical(),
  'linear': quantize.Linear(),
  'sign_tensor': quantize.Sign('tensor'),
  'sign_magnitude_tensor': quantize.SignMagnitude('tensor', iterations=2),
}


def method(compression, error_decay=0.9, inner=True):
  return algorithm_lib.Algorithm(
    optax.sgd(0.1) if inner else None,
    lambda step: 0.1,
    compression,
    error_decay,
    reduce.nesterov(1.0),
    'senders',
    'median',
  )


def like(shapes):
  return {
    name: jax.ShapeDtypeStruct(shape, np.float32)
    for name, shape in shapes.items()
  }


def send(shapes, method, on=None, budget=sharded_leaf.BUDGET, start=True):
  """Returns what is sent of a random round, and its compressor."""
  cut = trees.specs(shapes, on) if on else None

  def put(seed):
    tree = trees.random_tree(shapes, seed)
    if on is None:
      return jax.tree.map(jax.numpy.asarray, tree)
    return jax.tree.map(
      lambda x, spec: jax.device_put(x, jax.NamedSharding(on, spec)), tree, cut
    )

  compressor = compressor_lib.Compressor(
    like(shapes), method.compression, method.error_decay, on, cut, budget
  )
  error = None if method.error_decay is None else put(2)
  sent = compressor.compress(put(0) if start else None, put(1), error)
  return sent, compressor


def assert_equal(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, jax.device_get(want))


class CompressorTest(parameterized.TestCase):
  @parameterized.parameters(*EXACT)
  @pytest.mark.rows(2)
  def test_a_mesh_sends_what_one_device_does(self, name):
    want, _ = send(trees.STACK, method(EXACT[name]))
    got, compressor = send(
      trees.STACK, method(EXACT[name]), trees.mesh(2, 2), budget=150
    )
    self.assertGreater(compressor._groups.largest.slices, 1)
    assert_equal(got.message, want.message)
    assert_equal(got.error, want.error)
    self.assertAlmostEqual(got.error_norm, want.error_norm, 3)
    # Each shard of the error is where that of the parameter was.
    self.assertEqual(
      got.error['stack'].sharding.spec, P(None, 'fsdp', 'tensor')
    )

  @parameterized.parameters((4, 1, 100), (4, 1, 1 << 20), (1, 1, 100))
  @pytest.mark.slow
  def test_all_kinds_of_leaves(self, fsdp, tensor, budget):
    wanted = method(EXACT['sign'])
    want, _ = send(trees.SHAPES, wanted)
    on = trees.mesh(fsdp, tensor) if fsdp > 1 else None
    got, _ = send(trees.SHAPES, wanted, on, budget)
    assert_equal(got.message, want.message)
    assert_equal(got.error, want.error)

  @parameterized.parameters(*STATISTICS)
  @pytest.mark.rows(1)
  def test_statistics_of_a_whole_tensor_are_rounded_otherwise(self, name):
    """A sum over shards has another order; nothing else differs."""
    compression = compression_lib.TopK(4, trees.BLOCK, STATISTICS[name])
    want, _ = send(trees.STACK, method(compression))
    got, _ = send(
      trees.STACK, method(compression), trees.mesh(2, 2), budget=150
    )
    (packet,), (wanted,) = got.message['stack'], want.message['stack']
    assert_equal((packet.indices, packet.codes), (wanted.indices, wanted.codes))
    # Of bfloat16 scales, one unit in the last place.
    rtol = 1e-5 if packet.scales.dtype == np.float32 else 2**-7
    scales, wanted = (x.scales.astype(np.float32) for x in (packet, wanted))
    np.testing.assert_allclose(scales, wanted, rtol, 1e-6)
    np.testing.assert_allclose(
      got.error['stack'], want.error['stack'], 0, 10 * rtol
    )

  @parameterized.parameters('sign', 'dense')
  def test_without_feedback_a_gradient(self, name):
    plain = method(EXACT[name], error_decay=None, inner=False)
    want, _ = send(trees.STACK, plain, start=False)
    got, _ = send(trees.STACK, plain, trees.mesh(2, 2), 150, start=False)
    assert_equal(got.message, want.message)
    self.assertIsNone(got.error)
    self.assertEqual(got.error_norm, 0)


class LargeTest(absltest.TestCase):
  """The programs of the largest leaf of configs/72b.py, on eight devices."""

  @pytest.mark.slow
  def test_no_collective_is_larger_than_the_statistics(self):
    config = config_lib.load('configs/72b.py')
    shapes = llama.abstract(config.model)
    on = trees.mesh(8, 1)
    algorithm = algorithm_lib.make(config)
    compressor = compressor_lib.Compressor(
      shapes,
      algorithm.compression,
      algorithm.error_decay,
      on,
      sharding.specs(shapes, on),
    )
    leaf = compressor._groups.largest.leaves[0]
    self.assertEqual(sorted(leaf.shape), [80, 8192, 28672])
    slice_bytes = 4 * np.prod(leaf.slice_shape)
    self.assertLess(slice_bytes, 4 * sharded_leaf.BUDGET)
    select, subtract = (x.compile() for x in compressor.lower())
    bins = 2**2  # of the quantizer
    for program in (select, subtract):
      found = collectives(program.as_text())
      self.assertNotEmpty(found)
      self.assertLessEqual(max(found), bins)
    # Beside its arguments and its part of the message.
    taken = select.memory_analysis().temp_size_in_bytes
    self.assertLess(taken, 8 * slice_bytes)
    taken = subtract.memory_analysis().temp_size_in_bytes
    self.assertLess(taken, 2 * slice_bytes)


def collectives(text):
  """Elements of the largest array in each collective of compiled HLO."""
  pattern = re.compile(
    r'= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute'
    r'|reduce-scatter|collective-broadcast)(?:-start)?\('
  )
  return [
    max(
      int(np.prod([int(n) for n in sizes.split(',') if n]))
      for sizes in re.findall(r'\w+\[([\d,]*)\]', match[1])
    )
    for match in pattern.finditer(text)
  ]


if __name__ == '__main__':
  absltest.main()
