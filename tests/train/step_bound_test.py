"""The bound of a round's step."""

import jax
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.optim import exact
from covenant.optim import reduce
from covenant.optim import weight as weight_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train import step_bound
from tests.node import network as network_lib
from tests.reference import protocol

F = np.float32


def sizes(*values):
  return np.pad(np.array(values, F), (0, step_bound.ROUNDS - len(values)))


class StepBoundTest(parameterized.TestCase):
  def test_a_total_norm_is_that_of_the_other_exact_functions(self):
    draw = np.random.default_rng(0)
    for scale in (1e-33, 1e-20, 1e-3, 1.0, 1e18):
      rows = np.abs(draw.normal(0, scale, (5, 37))).astype(F)
      rows[0] = 0
      rows[1, 1:] = 0
      found = step_bound.total_norms(rows)
      for row, total in zip(rows, found, strict=True):
        self.assertEqual(total, protocol.norm([row]))
        self.assertEqual(total, exact.norms([[jax.numpy.asarray(row)]])[0])

  def test_the_size_is_the_weighted_mean_after_the_clip(self):
    norms = np.array([[3, 4], [3, 4], [300, 4]], F)
    clips = reduce.clip_factors(norms)
    parts = np.array([64, 64, 64], np.uint16)
    self.assertEqual(step_bound.size(norms, clips, parts), 5)
    alone = step_bound.size(norms[2:], clips[2:] * 0 + 1, parts[2:])
    self.assertAlmostEqual(float(alone), 300, delta=0.1)
    norms[1] = 0
    got = step_bound.size(norms, np.ones_like(norms), np.array([64, 1, 0]))
    self.assertEqual(got, F(5 * 64 / 65))

  @parameterized.parameters(
    ((), 1e9, 1.0),
    ((10, 10), 1e9, 1.0),  # too few
    ((10, 10, 10), 40, 1.0),
    ((10, 10, 10), 80, 0.5),
    ((10, 10, 10), 4e6, 1e-5),
    ((1, 1, 1, 10, 10, 10, 10), 80, 0.5),  # all that are kept
    ((10, 10, 10, 1, 1, 1, 1), 80, 0.5),  # the newest, in a warm-up
    ((1e6, 10, 10, 10), 80, 0.5),  # one long step does not raise it
    ((1e6, 10, 10), 80, 0.5),
  )
  def test_the_factor_brings_a_long_step_to_the_median(self, last, now, want):
    got = step_bound.factor(F(now), sizes(*last))
    self.assertAlmostEqual(float(got), want, delta=1e-6 * want)
    self.assertLessEqual(got, want)

  def test_the_newest_sizes_are_kept(self):
    kept = sizes()
    for i in range(1, 21):
      kept = step_bound.remember(kept, F(i))
    np.testing.assert_array_equal(kept, np.arange(20, 4, -1, dtype=F))
    self.assertIs(step_bound.remember(kept, F(0)), kept)


class SharedModelTest(absltest.TestCase):
  """The bound in the shared state."""

  def test_no_message_throws_the_model(self):
    model = network_lib.shared_model()
    shared = network_lib.start().shared
    honest = {u: network_lib.message(u) for u in range(4)}
    moves = []
    for r in range(5):
      thrown = {9: network_lib.message(9, scale=1e3)}
      messages = thrown if r == 3 else honest
      after, _ = model.apply_round(shared, messages)
      moves.append(_distance(after.params, shared.params))
      shared = after
    kept = np.asarray(shared.steps)
    self.assertGreater(moves[3], moves[2])
    # One message moves as many elements as honest ones that agree.
    self.assertLess(moves[3], 4.5 * np.sqrt(4) * moves[2])
    self.assertAlmostEqual(kept[1] / kept[2], 4, delta=1e-4)
    self.assertAlmostEqual(kept[0] / kept[2], 1, delta=0.1)

  def test_it_is_that_of_the_reference(self):
    model = network_lib.shared_model()
    shared = network_lib.start().shared
    compression = model.method.compression
    history = []
    for r, scale in enumerate((1e-3, 1e-3, 2e-3, 1.0, 1e-3)):
      uids = range(3)
      messages = {u: network_lib.message(10 * r + u, scale) for u in uids}
      values = [
        [
          (None, np.concatenate([np.ravel(v) for v in compression.values(p)]))
          for p in jax.tree.structure(model.abstract_params).flatten_up_to(m)
        ]
        for m in messages.values()
      ]
      weights = {u: weight_lib.Weight(parts=64 - u) for u in uids}
      _, size = protocol.bound(values, [64, 63, 62], history)
      history = [size, *history]
      shared, _ = model.apply_round(shared, messages, weights=weights)
      np.testing.assert_array_equal(
        np.asarray(shared.steps), sizes(*map(float, history))
      )

  @pytest.mark.slow
  def test_baselines_whose_step_is_normalized_have_none(self):
    config = config_lib.load('configs/tiny.py:ddp')
    model = shared_state_lib.SharedModel(config)
    shared = model.init()
    delta = jax.tree.map(lambda x: np.full(x.shape, 1.0, F), shared.params)
    for scale in (1, 1, 1, 1000):
      scaled = jax.tree.map(lambda x, s=scale: s * x, delta)
      shared, _ = model.apply_round(shared, {0: scaled})
    kept = np.asarray(shared.steps)
    self.assertAlmostEqual(kept[0] / kept[1], 1000, delta=1)


def _distance(a, b):
  squares = jax.tree.map(lambda x, y: float(np.sum((x - y) ** 2)), a, b)
  return sum(jax.tree.leaves(squares)) ** 0.5


if __name__ == '__main__':
  absltest.main()
