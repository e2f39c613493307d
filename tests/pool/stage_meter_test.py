"""The measurements of a process that holds stages."""

import pathlib
import types
from unittest import mock

import numpy as np
from absl.testing import absltest

from covenant import metrics
from covenant.models import llama
from covenant.optim import algorithm
from covenant.plan import hardware
from covenant.plan import timing
from covenant.pool import stage_meter
from covenant.pool import stage_process
from covenant.telemetry import telemetry as telemetry_lib
from covenant.train.pipeline import stage_programs
from tests.pool import stages

# Of a round and one inner step of two microbatches, of which the first came
# before another stage was lost.
MESSAGES = (
  {'do': 'begin', 'round': 2},
  {'do': 'forward', 'sequences': 2},
  {'do': 'abort'},
  {'do': 'forward', 'sequences': 2},
  {'do': 'backward'},
  {'do': 'forward', 'sequences': 1},
  {'do': 'backward'},
  {'do': 'update', 'norm': 1.5, 'nats': 2.5, 'step': 7},
)


def make_stage(config, index):
  """The attributes of a stage that a meter reads."""
  island = stage_process.pipeline_of(config)
  return types.SimpleNamespace(
    shared=types.SimpleNamespace(params=llama.abstract(config.model)),
    programs=types.SimpleNamespace(
      names=stage_programs.names(config.decoder, island, index)
    ),
    private=types.SimpleNamespace(joined=np.int32(0)),
    config=config,
    method=algorithm.make(config),
    context=config.data.context,
  )


class StageMeterTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.config = stages.make_config()
    self.now = 0.0
    self.telemetry = telemetry_lib.Telemetry(
      self.config,
      telemetry_lib.Node('stage', '5F', self.folder),
      clock=lambda: self.now,
    )
    self.addCleanup(self.telemetry.close)
    self.meter = stage_meter.StageMeter(
      self.config,
      stage_process.pipeline_of(self.config),
      self.telemetry,
      lambda: self.now,
    )

  def work(self, index, *texts):
    """A stage waits a second for each message, and works for two."""
    for text in texts:
      self.now += 1
      with self.meter.work(index, text):
        self.now += 2

  def read(self, kind):
    return metrics.read(self.folder / 'metrics.jsonl', [kind])

  def test_a_step(self):
    stage = make_stage(self.config, 1)
    with mock.patch.object(hardware, 'peak_of', return_value=1e9):
      self.meter.add(1, stage)
    self.work(1, *MESSAGES)
    (step,) = self.read(metrics.Step)
    self.assertEqual((step.round, step.step, step.stage), (3, 7, 1))
    self.assertEqual((step.loss, step.gradient_norm), (2.5, 1.5))
    self.assertAlmostEqual(
      step.learning_rate, float(stage.method.schedule(7)), places=7
    )
    # The step lasts from the call to begin the round: that took 2 s, and each
    # of 7 messages 3 s, a third of which it waited for it.
    self.assertEqual((step.seconds, step.wait_seconds), (23.0, 7.0))
    self.assertEqual(step.tokens, 3 * stage.context)
    self.assertEqual(step.tokens_per_second, step.tokens / 23)
    whole = timing.flops(self.config).total / timing.tokens(self.config)
    share = step.mfu * 1e9 / step.tokens_per_second / whole
    self.assertBetween(share, 0.05, 0.34)  # a layer of three, and no embedding
    self.assertGreater(step.host_bytes, 0)

  def test_the_arithmetic_of_stages_is_that_of_the_model(self):
    found = []
    with mock.patch.object(stage_meter.step_meter, 'StepMeter') as made:
      for index in range(3):
        self.meter.add(index, make_stage(self.config, index))
      found = [call.args[3] for call in made.call_args_list]
    whole = timing.flops(self.config).total / timing.tokens(self.config)
    self.assertAlmostEqual(sum(found) / whole, 1.0)

  def test_a_round(self):
    for index in (0, 1):
      self.meter.add(index, make_stage(self.config, index))
    self.work(0, {'do': 'take'}, {'do': 'begin', 'round': 2})
    self.work(1, {'do': 'begin', 'round': 2}, {'do': 'seal'})
    self.now += 1
    with self.meter.work(1, {'do': 'forward', 'sequences': 1}):
      self.work(0, {'do': 'backward'})  # at the same time
    with self.assertRaises(ValueError):
      with self.meter.work(1, {'do': 'order'}):
        raise ValueError
    self.meter.add(2, make_stage(self.config, 2))
    self.work(2, {'do': 'take'}, {'do': 'order'})  # it catches up
    self.assertFalse((self.folder / 'metrics.jsonl').exists())
    self.work(0, {'do': 'order'})
    self.work(1, {'do': 'order'})  # of the same round
    (found,) = self.read(metrics.NodeRound)
    self.assertEqual((found.round, found.seconds), (3, 21.0))
    self.assertEqual(found.queue_seconds, 6.0)  # none has worked
    self.assertEqual(found.begin_seconds, 4.0)
    self.assertEqual(found.train_seconds, 7.0)
    self.assertEqual((found.apply_seconds, found.failures), (4.0, 1))
    self.assertEqual(found.catch_up_seconds, 2.0)  # not before the first round

  def test_a_stage_that_was_left_is_forgotten(self):
    self.meter.add(1, make_stage(self.config, 1))
    self.meter.remove(1)
    self.assertEmpty(self.meter._stages)

  def test_a_malformed_beginning_changes_nothing(self):
    with self.assertRaises(KeyError):
      self.work(0, {'do': 'begin'})
    self.work(0, {'do': 'take'})
    self.assertEqual(self.meter._working, 0)


if __name__ == '__main__':
  absltest.main()
