"""Arithmetic on messages, on a miner of the tiny model."""

import jax
import numpy as np
import pytest
from absl.testing import absltest

from covenant.adversaries import messages
from covenant.train import local as local_lib
from tests import helpers
from tests.node import network as network_lib


def norms(miner, message):
  """The L2 norm of each tensor that a message stands for."""
  dense = messages.dense(miner, message)
  return np.array([np.linalg.norm(x) for x in jax.tree.leaves(dense)])


class MessagesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.miner = network_lib.Network(self).miner(0)
    self.task = local_lib.Task(0, 3, b'seed', bytes(32))
    self.message = network_lib.message(1)

  def test_a_message_stands_for_few_values_of_each_block(self):
    density = 16 / (16 * 16)
    dense = messages.dense(self.miner, self.message)
    shapes = network_lib.shared_model().abstract_params
    for x, like in zip(
      jax.tree.leaves(dense), jax.tree.leaves(shapes), strict=True
    ):
      self.assertEqual((x.shape, x.dtype), (like.shape, np.float32))
      if min(x.shape[-2:], default=0) >= 16:
        self.assertLessEqual(np.count_nonzero(x), density * x.size)

  def test_what_was_sent_survives_being_sent_again(self):
    once = messages.dense(self.miner, self.message)
    twice = messages.dense(self.miner, messages.sparse(self.miner, once))
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
      np.testing.assert_array_equal(a != 0, b != 0)
      np.testing.assert_allclose(a, b, rtol=1e-2)

  @pytest.mark.slow
  def test_a_change_is_of_the_values(self):
    changed = messages.changed(self.miner, self.message, lambda x: -2 * x)
    np.testing.assert_allclose(
      norms(self.miner, changed), 2 * norms(self.miner, self.message), rtol=1e-2
    )
    before, after = (
      np.concatenate(
        [x.ravel() for x in jax.tree.leaves(messages.dense(self.miner, m))]
      )
      for m in (self.message, changed)
    )
    self.assertLess(np.dot(before, after), 0)

  def test_draws_are_of_a_round_and_of_a_miner(self):
    def draw(task, *key):
      return messages.generator(self.miner, task, *key).random()

    first = draw(self.task)
    self.assertEqual(first, draw(self.task))
    self.assertNotEqual(first, draw(self.task._replace(round=4)))
    other = self.task._replace(uid=2)
    self.assertNotEqual(first, draw(other))
    self.assertEqual(draw(self.task, 7), draw(other, 7))

  def test_zeros_stand_for_nothing(self):
    zeros = messages.zeros(self.miner, self.task)
    self.assertEqual(norms(self.miner, zeros).max(), 0)

  @pytest.mark.slow
  def test_a_fit_has_the_median_norm_of_the_others(self):
    sent = {
      uid: network_lib.message(uid, scale)
      for uid, scale in enumerate((1e-4, 1e-3, 1e-2))
    }
    delta = messages.dense(self.miner, network_lib.message(9, 1.0))
    fit = messages.fit(self.miner, delta, sent)
    np.testing.assert_allclose(
      norms(self.miner, messages.sparse(self.miner, fit)),
      norms(self.miner, sent[1]),
      rtol=0.02,
    )

  def test_without_others_a_fit_is_a_hundredth_of_the_parameters(self):
    delta = messages.dense(self.miner, network_lib.message(9, 1.0))
    fit = messages.fit(self.miner, delta, {})
    params = jax.tree.leaves(self.miner.shared.params)
    np.testing.assert_allclose(
      norms(self.miner, messages.sparse(self.miner, fit)),
      [0.01 * np.linalg.norm(x) for x in params],
      rtol=0.02,
    )

  def test_noise_has_the_usual_norm_and_is_the_miners_own(self):
    self.miner.messages = {1: self.message}
    noise = messages.noise(self.miner, self.task)
    np.testing.assert_allclose(
      norms(self.miner, noise), norms(self.miner, self.message), rtol=0.02
    )
    again = messages.noise(self.miner, self.task)
    self.assertEqual(helpers.bits(noise), helpers.bits(again))
    other = messages.noise(self.miner, self.task._replace(uid=1))
    self.assertNotEqual(helpers.bits(noise), helpers.bits(other))


if __name__ == '__main__':
  absltest.main()
