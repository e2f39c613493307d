"""What equal stages of a process share, and what an amendment changes of it."""

import dataclasses

import jax
import numpy as np
import pytest
from absl.testing import absltest

from covenant import config as config_lib
from covenant.models import llama
from covenant.train.pipeline import stage_tools
from tests.pool import stages


class StageToolsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.config = stages.make_config()
    self.island = config_lib.Island(stages=3)

  def of(self, index=0, changes=None, **fields):
    config = dataclasses.replace(self.config, **fields)
    return stage_tools.of(config, self.island, index, changes or {})

  def test_stages_that_differ_in_their_network_share_them(self):
    pool = dataclasses.replace(self.config.pool, url='http://127.0.0.1:1')
    self.assertIs(self.of(pool=pool), self.of())
    self.assertIsNot(self.of(1), self.of())

  @pytest.mark.slow
  def test_the_stages_begin_with_the_model_cut_in_parts(self):
    key = jax.random.key(self.config.seed)
    whole = jax.tree.leaves(llama.init(self.config.model, key))
    parts = [self.of(i).initial().params for i in range(3)]
    found = [np.asarray(x).tobytes() for x in jax.tree.leaves(parts)]
    self.assertContainsSubset({np.asarray(x).tobytes() for x in whole}, found)

  def test_an_amendment_keeps_what_it_does_not_change(self):
    old = self.of()
    inner = self.of(changes={'optim.inner.learning_rate': 0.5})
    self.assertEqual(inner.config.optim.inner.learning_rate, 0.5)
    rates = [float(x.method.schedule(0)) for x in (old, inner)]
    self.assertLess(*rates)
    self.assertIs(inner.outer_step, old.outer_step)
    outer = self.of(changes={'optim.outer.learning_rate': 0.5})
    self.assertIsNot(outer.outer_step, old.outer_step)
    for new in (inner, outer):
      self.assertIs(new.compressor, old.compressor)
      self.assertIs(new.spec, old.spec)

  def test_what_may_not_change_is_refused(self):
    with self.assertRaisesRegex(config_lib.ConfigError, 'model.width'):
      self.of(changes={'model.width': 128})


if __name__ == '__main__':
  absltest.main()
