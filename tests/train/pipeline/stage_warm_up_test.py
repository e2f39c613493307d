"""A stage's programs are compiled before its first round, not in it."""

import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.data import dataset
from covenant.optim import weight
from covenant.train import island as island_lib
from covenant.train import local as local_lib
from covenant.train.pipeline import stage as stage_lib
from covenant.train.pipeline import stage_warm_up
from tests import helpers
from tests.train.pipeline import stage_test


class WarmUpTest(parameterized.TestCase):
  @parameterized.parameters(
    ('1x stages=3,rank=8,bits=4', True),
    ('1x stages=2,rank=4,layers=2-1', False),
  )
  @pytest.mark.slow
  def test_two_rounds_compile_nothing_after_it(self, text, tied):
    # The momentum is that of no other test: programs are shared in a process.
    config = stage_test.make_config(
      text, f'model.tie_embeddings={tied}', 'optim.outer.momentum=0.375'
    )
    island = island_lib.of(config, 0)
    split = dataset.load(config).train
    stages = [stage_lib.Stage(config, island, s) for s in range(island.stages)]
    for stage in stages:
      before = helpers.bits((stage.shared, stage.private))
      with helpers.compilations() as found:
        stage_warm_up.warm_up(stage)
      self.assertIn('jit(_step_group)', found)
      after = helpers.bits((stage.shared, stage.private))
      self.assertEqual(after, before)
    with helpers.compilations() as found:
      for r in range(2):
        task = local_lib.Task(0, r, 5, bytes(32))
        stage_test.train(stages, config, task, split)
        self.apply(stages)
    self.assertEqual(found, [])

  def apply(self, stages):
    """Takes an outer step of two messages, both that of the stages."""
    whole = {}
    for stage in stages:
      sections, _ = stage.seal()
      names = [tensor.name for tensor in stage.spec.tensors]
      whole |= dict(zip(names, sections, strict=True))
    parts_R = np.array([weight.WHOLE, 7], np.uint16)
    for stage in stages:
      sections = [whole[tensor.name] for tensor in stage.held_spec.tensors]
      factors_RxP = np.full((2, len(sections)), 0.5, np.float32)
      update = stage_lib.StageUpdate(
        factors_RxP, parts_R, weight.totals(parts_R)
      )
      self.assertGreater(stage.apply([sections, sections], update), 0.0)
      self.assertNotEmpty(stage.digests())


if __name__ == '__main__':
  absltest.main()
