"""Tests of the strategies of miners that want more pay."""

import dataclasses

import jax
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.adversaries import messages
from covenant.adversaries import registry
from covenant.adversaries import strategic
from covenant.data import dataset
from covenant.emulate import host as host_lib
from covenant.node import miner as miner_lib
from tests import helpers

Strategy = strategic.Strategy


def flat(miner, message):
  dense = messages.dense(miner, message)
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(dense)])


class StrategyTest(parameterized.TestCase):
  def test_a_text_says_all_of_it(self):
    for strategy in (*registry.STRATEGIES.values(), Strategy()):
      self.assertEqual(Strategy.parse(str(strategy)), strategy)

  @parameterized.parameters(
    ('nothing=1', "got 'nothing=1'; there are error, norm"),
    ('work=all', "got 'work=all'"),
    ('work=0', 'expected work and length above 0'),
    ('period=0', 'repeats, period and pieces of at least 1'),
    ('pieces=0', 'repeats, period and pieces of at least 1'),
    ('length=2', 'length above 0 and at most 1'),
    ('length=0.5+start=0.6', 'start and length together at most 1'),
    ('rate=0', 'batch and rate above 0'),
  )
  def test_what_is_none(self, text, message):
    with self.assertRaisesRegex(config_lib.ConfigError, message):
      registry.find(f'strategy:{text}')

  def test_its_cost(self):
    self.assertEqual(Strategy(work=0.5, repeats=2).cost, 1.0)
    self.assertEqual(Strategy(work=0.5, period=2).cost, 0.25)
    self.assertEqual(Strategy(length=0.5, batch=3, rate=2).cost, 0.5)


@pytest.mark.slow
class StrategistTest(absltest.TestCase):
  """Two miners of one run, which have trained one round."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    config = dataclasses.replace(
      helpers.tiny('optim.inner_steps=4'), adversaries=('shadow',)
    )
    cls.host = host_lib.Host(config, dataset.load(config))
    for _ in range(2):
      cls.host.round()
    cls.state = jax.device_get(cls.host.miners[0].role.miner_state.result())

  def setUp(self):
    super().setUp()
    self.miner = self.host.miners[0]
    copy = jax.tree.map(jax.numpy.array, self.state)
    self.miner.role.miner_state = strategic.Future.done(copy)
    self.task = miner_lib.task(self.miner, self.miner.state.round)

  def sent(self, **fields):
    """Returns the work and message of a strategy in the next round."""
    honest = miner_lib.in_virtual_time(miner_lib.HONEST)
    policy = strategic.strategist(honest, Strategy(**fields))
    batches = list(policy.batches(self.miner, self.task))
    params = self.miner.shared.params
    work = policy.train(self.miner, self.task, params, batches).result()
    inner = self.miner.config.optim
    whole = inner.inner_steps * inner.inner.batch_size
    self.assertEqual(work.sequences, whole)  # claims all
    return work, flat(self.miner, work.message), batches

  def test_an_honest_one_sends_what_honest_miners_send(self):
    honest = miner_lib.in_virtual_time(miner_lib.HONEST)
    batches = honest.batches(self.miner, self.task)
    work = honest.train(
      self.miner, self.task, self.miner.shared.params, batches
    ).result()
    self.setUp()
    self.assertEqual(
      helpers.bits(self.sent()[0].message), helpers.bits(work.message)
    )

  def test_who_forgets_sends_only_what_is_new_at_the_usual_norm(self):
    _, usual, _ = self.sent()
    self.setUp()
    _, forgot, _ = self.sent(error=0)
    self.setUp()
    _, fitted, _ = self.sent(error=0, norm=1)
    self.assertLess(np.linalg.norm(forgot), np.linalg.norm(usual))
    self.assertGreater(np.linalg.norm(fitted), np.linalg.norm(forgot))
    self.setUp()
    _, tripled, _ = self.sent(error=0, norm=3)
    ratio = np.linalg.norm(tripled) / np.linalg.norm(fitted)
    self.assertAlmostEqual(ratio, 3, delta=0.05)

  def test_a_mask_stays(self):
    found = []
    for _ in range(2):
      _, message, _ = self.sent(mask=0.4)
      found.append(message != 0)
    draw = np.random.default_rng([self.miner.config.seed, self.task.uid])
    leaves = jax.tree.leaves(self.miner.shared.params)
    mask = np.concatenate([draw.random(x.shape).ravel() < 0.4 for x in leaves])
    for sent in found:
      self.assertFalse(np.any(sent & ~mask))
      self.assertTrue(np.any(sent))

  def test_half_of_the_work_and_all_of_the_claim(self):
    for fields, steps in (({'work': 0.5}, 2), ({'work': 0.5, 'repeats': 2}, 4)):
      self.setUp()
      _, _, batches = self.sent(**fields)
      self.assertLen(batches, steps)

  def test_larger_batches_are_fewer_and_shorter_sequences_are_parts(self):
    _, _, honest = self.sent()
    self.setUp()
    _, _, doubled = self.sent(batch=2)
    self.assertLen(doubled, 2)
    np.testing.assert_array_equal(np.concatenate(doubled[:1]),
                                  np.concatenate(honest[:2]))  # fmt: skip
    self.setUp()
    _, _, halves = self.sent(length=0.5)
    width = honest[0].shape[1] - 1
    for half, whole in zip(halves, honest, strict=True):
      np.testing.assert_array_equal(half, whole[:, : width // 2 + 1])
    self.setUp()
    _, _, ends = self.sent(length=0.5, start=0.5)
    self.setUp()
    _, _, either = self.sent(length=0.5, start=-1)
    chosen = []
    for end, one, half, whole in zip(ends, either, halves, honest, strict=True):
      np.testing.assert_array_equal(end, whole[:, width // 2 :])
      for sequence, first, last in zip(one, half, end, strict=True):
        chosen.append(np.array_equal(sequence, first))
        self.assertTrue(chosen[-1] or np.array_equal(sequence, last))
    self.assertLen(set(chosen), 2)  # of each kind some

  def test_first_parts_of_each_piece_are_sequences_of_their_own(self):
    _, _, honest = self.sent()
    self.setUp()
    _, _, quarters = self.sent(pieces=2, length=0.5)
    size = (honest[0].shape[1] - 1) // 4
    for found, whole in zip(quarters, honest, strict=True):
      first, third = whole[:, : size + 1], whole[:, 2 * size : 3 * size + 1]
      expected = np.stack([first, third], 1).reshape(-1, size + 1)
      np.testing.assert_array_equal(found, expected)

  def test_another_rate_is_of_its_own_training_alone(self):
    others = self.host.miners[1].role.slot
    _, usual, _ = self.sent()
    self.setUp()
    slot = self.miner.role.slot
    _, faster, _ = self.sent(rate=4.0)
    self.assertIsNot(self.miner.role.slot, slot)
    self.assertIs(self.host.miners[1].role.slot, others)
    self.miner.role.slot = slot
    self.assertGreater(np.linalg.norm(faster), 1.5 * np.linalg.norm(usual))

  def test_rounds_without_work(self):
    self.setUp()
    self.task = self.task._replace(round=self.task.round | 1)
    before = helpers.bits(self.miner.role.miner_state.result())
    self.sent(period=2)
    after = helpers.bits(self.miner.role.miner_state.result())
    self.assertEqual(before, after)

  def test_mixing_adds_the_others(self):
    _, alone, _ = self.sent()
    self.setUp()
    _, mixed, _ = self.sent(mix=3.0)
    others = sum(flat(self.miner, m) for m in self.miner.messages.values())
    self.assertGreater(np.dot(mixed, others), np.dot(alone, others))


if __name__ == '__main__':
  absltest.main()
