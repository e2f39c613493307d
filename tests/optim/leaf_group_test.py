import jax
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import compression as compression_lib
from covenant.optim import leaf_group
from tests.optim import trees

TILES = compression_lib.TopK(4, trees.BLOCK)


def groups(budget, **options):
  params = trees.random_tree(trees.SHAPES, 0)
  return params, leaf_group.Groups(params, TILES, budget=budget, **options)


class GroupsTest(parameterized.TestCase):
  def test_a_small_model_is_one_group(self):
    params, found = groups(1 << 20)
    self.assertLen(found, 1)
    self.assertLen(list(found)[0].leaves, len(params))
    self.assertEqual(list(found)[0].slices, 1)
    self.assertEqual(found.split(params), [params])

  def test_leaves_of_a_large_model_are_groups_in_slices(self):
    _, found = groups(100)
    self.assertEqual([group.slices for group in found], [1, 12, 8, 1])
    self.assertEqual(found.largest.leaves[0].shape, trees.SHAPES['stack'])

  def test_an_optimizer_of_all_leaves_needs_one_group(self):
    _, found = groups(100, per_leaf=False)
    self.assertLen(found, 1)
    self.assertEqual({leaf.slices for leaf in list(found)[0].leaves}, {1})

  def test_leaves_of_a_mesh_are_groups(self):
    mesh = trees.mesh(2, 2)
    specs = trees.specs(trees.SHAPES, mesh)
    params, found = groups(1 << 20, mesh=mesh, specs=specs)
    self.assertLen(found, len(params))
    self.assertEqual(list(found)[1].axes, ('fsdp', 'tensor'))

  @parameterized.parameters(100, 1 << 20)
  def test_split_and_map_are_undone_by_merge(self, budget):
    params, found = groups(budget)
    doubled = [
      group.map(lambda leaf, x, none: 2 * x if none is None else x, part, None)
      for group, part in zip(found, found.split(params), strict=True)
    ]
    jax.tree.map(
      lambda got, x: np.testing.assert_array_equal(got, 2 * x),
      found.merge(doubled),
      params,
    )
    self.assertEqual(found.split(None), [None] * len(found))


if __name__ == '__main__':
  absltest.main()
