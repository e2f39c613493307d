"""The answers of a pipeline's stages, as their head reads them."""

import math

import jax
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant.models import llama
from covenant.pool import stage_work
from covenant.train import island as island_lib
from covenant.train.pipeline import stage_bytes
from covenant.train.pipeline import stage_programs
from tests.pool import stages


class StageWorkTest(parameterized.TestCase):
  def test_every_tensor_is_of_one_stage_in_leaf_order(self):
    config = stages.make_config()
    island = island_lib.of(config, 0)
    whole = llama.abstract(config.decoder)
    places = stage_work.leaf_places(config.decoder, island)
    self.assertLen(places, len(jax.tree.leaves(whole)))
    self.assertLen(set(places), len(places))
    own = {}
    for s in range(island.stages):
      names = stage_programs.names(config.decoder, island, s).own
      own[s] = jax.tree.leaves(stage_programs.pick(whole, names))
    for leaf, (s, i) in zip(jax.tree.leaves(whole), places, strict=True):
      self.assertEqual(leaf.shape, own[s][i].shape)

  @parameterized.parameters(
    (dict(squares=[1, 2.5], nats=0.5), [1.0, 2.5], 0.5),
    ({}, [], 0.0),
    (dict(squares=[1e300, 1.0]), [math.nan, 1.0], 0.0),
    (dict(squares='x', nats=1.0), [math.nan], math.nan),
    (dict(nats=[1]), [math.nan], math.nan),
  )
  def test_what_is_no_number_is_nan(self, text, squares, nats):
    found = stage_work.numbers(text)
    np.testing.assert_array_equal(found[0], squares)
    np.testing.assert_array_equal(found[1], nats)

  def test_a_sum_is_that_of_float32_in_its_order(self):
    self.assertEqual(stage_work.total([2.0**24, 1.0, 1.0]), 2.0**24)
    self.assertEqual(stage_work.total([1.0, 1.0, 2.0**24]), 2.0**24 + 2)

  def test_sums_of_the_largest_numbers_are_finite(self):
    squares, _ = stage_work.numbers({'squares': [1e30] * 1000})
    self.assertTrue(np.isfinite(stage_work.total(squares)))

  def test_the_longest_message_has_room_for_any(self):
    config = stages.make_config()
    longest = stage_work.longest_message(config, payload_bytes=1000)
    island = island_lib.of(config, 0)
    passed = stage_programs.coordinates(
      config.decoder, island, 32, config.data.context
    )
    fit = stage_programs.fits(config.decoder, island)
    sizes = stage_bytes.size_of(passed) + stage_bytes.size_of(fit)
    self.assertGreater(longest, sizes + 1000)
    self.assertLess(longest, sizes + 2**21)


if __name__ == '__main__':
  absltest.main()
