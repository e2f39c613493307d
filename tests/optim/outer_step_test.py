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
from covenant.optim import outer_step as outer_step_lib
from covenant.optim import quantize
from covenant.optim import reduce
from covenant.optim import sharded_leaf
from covenant.optim import topk_variants
from covenant.optim import weight
from tests.optim import trees

P = jax.P
SIGN = compression_lib.TopK(4, trees.BLOCK)
COMPRESSIONS = {
  'sign_magnitude': compression_lib.TopK(
    4, trees.BLOCK, quantize.SignMagnitude()
  ),
  'statistical': compression_lib.TopK(4, trees.BLOCK, quantize.Statistical()),
  'none': compression_lib.TopK(4, trees.BLOCK, quantize.Exact()),
  'divisors': compression_lib.TopK(4, trees.BLOCK, layout='divisors'),
  'dct': topk_variants.DCTTopK(4, trees.BLOCK),
  'dense': compression_lib.Dense(),
}


def method(compression, outer_=None):
  return algorithm_lib.Algorithm(
    optax.sgd(0.1),
    lambda step: 0.1,
    compression,
    0.9,
    outer_ or reduce.nesterov(0.7, 0.9),
    'senders',
    'median',
  )


def received(shapes, compression, peers=4):
  """Their messages, of norms that differ: some are clipped."""
  compress = jax.jit(lambda tree: jax.tree.map(compression.compress, tree))
  sent = (trees.random_tree(shapes, seed) for seed in range(peers))
  return [
    jax.device_get(
      compress(jax.tree.map(lambda x, r=r: x * np.float32(r + 1), tree))
    )
    for r, tree in enumerate(sent)
  ]


def make_step(params, algorithm, on=None, cut=None, *arguments, **options):
  return outer_step_lib.OuterStep(
    params,
    algorithm.compression,
    algorithm.outer,
    algorithm.mean_over,
    algorithm.clip,
    on,
    cut,
    *arguments,
    **options,
  )


def slices(step):
  return [leaf.slices for group in step._groups for leaf in group.leaves]


class Node:
  """An outer step, and the state that it moves."""

  def __init__(self, shapes, method, on=None, budget=sharded_leaf.BUDGET):
    cut = trees.specs(shapes, on) if on else None
    params = jax.tree.map(jax.numpy.asarray, trees.random_tree(shapes, 9))
    if on is not None:
      params = jax.tree.map(
        lambda x, spec: jax.device_put(x, jax.NamedSharding(on, spec)),
        params,
        cut,
      )
    self.state = params, method.outer.init(params)
    self.step = make_step(params, method, on, cut, budget)

  def advance(self, messages, consume=False, weights=None):
    *state, self.delta_norm = self.step.apply(
      *self.state, messages, consume, weights
    )
    self.state = tuple(state)
    return jax.device_get(self.state)


def assert_equal(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


class OuterStepTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_nodes_of_all_meshes_agree_bit_for_bit(self):
    """Over rounds with clipped norms."""
    messages = received(trees.SHAPES, SIGN)
    nodes = [
      Node(trees.SHAPES, method(SIGN)),
      Node(trees.SHAPES, method(SIGN), budget=100),
      Node(trees.SHAPES, method(SIGN), trees.mesh(4, 1)),
      Node(trees.SHAPES, method(SIGN), trees.mesh(2, 2), budget=70),
    ]
    self.assertTrue(nodes[0].step._groups.is_one)
    self.assertEqual(
      [slices(n.step) for n in nodes],
      [[1] * 4, [1, 12, 8, 1], [1] * 4, [1, 6, 2, 1]],
    )
    for some in (messages, messages[1:], messages[:1]):
      want = nodes[0].advance(some)
      for node in nodes[1:]:
        assert_equal(node.advance(some), want)
        self.assertAlmostEqual(node.delta_norm, nodes[0].delta_norm, 3)
    table = nodes[3].state[0]['table']
    self.assertEqual(table.sharding.spec, P(('fsdp', 'tensor'), None))

  @parameterized.parameters(*COMPRESSIONS)
  @pytest.mark.rows(2)
  def test_a_mesh_is_moved_as_one_device(self, name):
    compression = COMPRESSIONS[name]
    messages = received(trees.STACK, compression, peers=3)
    weights = [weight.Weight(64, 8), weight.Weight(5), weight.Weight(17, 2)]
    one = Node(trees.STACK, method(compression))
    want = one.advance(messages, weights=weights)
    node = Node(trees.STACK, method(compression), trees.mesh(2, 2), budget=150)
    self.assertGreater(slices(node.step)[0], 1)
    assert_equal(node.advance(messages, weights=weights), want)

  def test_a_counter_in_the_outer_state_is_of_rounds(self):
    """Not of slices."""
    descend = optax.chain(
      optax.scale_by_schedule(optax.linear_schedule(-0.1, -0.4, 3)),
      optax.trace(0.5),
    )
    counting = method(SIGN, descend)
    messages = received(trees.STACK, SIGN, peers=1)
    nodes = (
      Node(trees.STACK, counting),
      Node(trees.STACK, counting, trees.mesh(2, 2), 150),
    )
    for _ in range(3):
      want, got = (node.advance(messages) for node in nodes)
      assert_equal(got, want)
    self.assertEqual(int(got[1][0].count), 3)

  @parameterized.parameters(False, True)
  def test_what_is_consumed_is_gone_and_else_it_stays(self, consume):
    messages = received(trees.STACK, SIGN, peers=1)
    node = Node(trees.STACK, method(SIGN), trees.mesh(4, 1), budget=150)
    before = node.state
    copies = jax.device_get(before)
    after = node.advance(messages, consume)
    for x in jax.tree.leaves(before):
      self.assertEqual(x.is_deleted(), consume)
    if not consume:
      assert_equal(jax.device_get(before), copies)
    assert_equal(after, Node(trees.STACK, method(SIGN)).advance(messages))

  def test_an_optimizer_of_all_leaves_at_once_has_no_mesh(self):
    arguments = trees.random_tree(trees.STACK, 0), method(SIGN)
    with self.assertRaisesRegex(ValueError, 'all tensors at once'):
      make_step(
        *arguments,
        trees.mesh(4, 1),
        trees.specs(trees.STACK, trees.mesh(4, 1)),
        per_leaf=False,
      )
    step = make_step(*arguments, budget=10, per_leaf=False)
    self.assertTrue(step._groups.is_one)


class LargeTest(absltest.TestCase):
  """The programs of the largest leaf of configs/72b.py, on eight devices."""

  def test_nothing_dense_crosses_devices_or_is_copied(self):
    config = config_lib.load('configs/72b.py')
    shapes = llama.abstract(config.model)
    on = trees.mesh(8, 1)
    with_momentum = algorithm_lib.make(config)._replace(
      outer=reduce.nesterov(0.7, 0.9)
    )
    outer_step = make_step(
      shapes, with_momentum, on, sharding.specs(shapes, on)
    )
    leaf = outer_step._groups.largest.leaves[0]
    self.assertEqual(sorted(leaf.shape), [80, 8192, 28672])
    slice_bytes = 4 * np.prod(leaf.slice_shape)
    add, step = (x.compile() for x in outer_step.lower())
    self.assertNotIn('all-', add.as_text())
    # In place; a total of float32, and senders of uint16.
    memory = add.memory_analysis()
    self.assertGreaterEqual(memory.alias_size_in_bytes, 1.5 * slice_bytes)
    self.assertLess(memory.temp_size_in_bytes, slice_bytes / 8)
    # One number crosses: the sum of the delta's squares.
    self.assertEqual(step.as_text().count('all-reduce('), 1)
    for other in ('all-gather', 'all-to-all', 'permute', 'reduce-scatter'):
      self.assertNotIn(other, step.as_text())
    memory = step.memory_analysis()
    self.assertLess(memory.temp_size_in_bytes, 2 * slice_bytes)
    # The parameter's new slice, and its momentum's.
    self.assertLess(memory.output_size_in_bytes, 2.01 * slice_bytes)

  def test_a_slice_is_put_in_place(self):
    on = trees.mesh(8, 1)
    spec = P(None, 'fsdp', None)
    (leaf,) = sharded_leaf.leaves(
      {'x': jax.ShapeDtypeStruct((80, 8192, 28672), np.float32)},
      compression_lib.TopK(),
      on,
      {'x': spec},
    )
    part = leaf.abstract_stacked(leaf.abstract_slice)
    index = jax.ShapeDtypeStruct((), np.int32)
    put = sharded_leaf.put.lower(
      leaf.abstract, part, index, leaf=leaf
    ).compile()
    memory = put.memory_analysis()
    self.assertEqual(memory.alias_size_in_bytes, 4 * 80 * 1024 * 28672)
    self.assertLess(memory.temp_size_in_bytes, 1 << 20)


if __name__ == '__main__':
  absltest.main()
