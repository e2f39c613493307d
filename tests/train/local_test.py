"""Tests for covenant.train.local: one round, with plain Python functions."""

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from covenant import config as config_lib
from covenant.data import assignment
from covenant.data import dataset
from covenant.train import local as local_lib
from covenant.train import placement
from covenant.train import replica as replica_lib
from covenant.train import step as step_lib
from tests import helpers

BATCHES = [np.full((2, 4), i, np.int32) for i in range(3)]


def start(steps=3, schedule_steps=6, round_index=5):
  return local_lib.RoundInProgress.begin(
    local_lib.Task(1, round_index, b'seed', bytes(32)),
    iter(BATCHES),
    joined=np.int32(12),
    steps=steps,
    schedule_steps=schedule_steps,
  )


class Recorder:
  """A replica whose parameters are one number; each step subtracts 1."""

  def __init__(self, nats=2.0):
    self.calls = []
    self.nats = nats
    self.replica = local_lib.Replica(
      self.begin, self.shard, self.step, self.rest, self.end
    )

  def begin(self, params, state, run):
    self.calls.append('begin')
    return params, state.inner, ('constant',)

  def shard(self, tokens_BxL1):
    return tokens_BxL1 + 10

  def step(self, params, inner, tokens_BxL1, step, joined, constant):
    assert constant == 'constant'
    self.calls.append((int(tokens_BxL1[0, 0]), int(step), int(joined)))
    outcome = step_lib.StepOutcome(jnp.float32(self.nats), jnp.float32(1))
    return params - 1, inner + 1, outcome

  def rest(self, inner):
    self.calls.append('rest')
    return inner

  def end(self, params, local, constants):
    self.calls.append(('end', constants))
    return params, local

  def compress(self, start, end, error):
    self.calls.append('compress')
    return start - end + error, error / 2, 0.5


def state():
  return local_lib.MinerState(np.int32(2), jnp.int32(0), jnp.float32(8))


class TrainRoundTest(absltest.TestCase):
  def test_calls_in_the_order_of_the_fields(self):
    recorder, run = Recorder(), start()
    trained, after = local_lib.train_round(
      recorder.replica, recorder.compress, jnp.float32(9), state(), run
    )
    self.assertEqual(
      recorder.calls,
      [
        'begin',
        # The schedule of a round has 6 steps, of which this miner takes 3.
        (10, 30, 12),
        (11, 32, 12),
        (12, 34, 12),
        'rest',
        ('end', ('constant',)),
        'compress',
      ],
    )
    self.assertEqual(trained.message, 3 + 8)
    self.assertEqual((trained.loss, trained.error_norm), (2.0, 0.5))
    self.assertEqual(trained.sequences, 6)
    receipt = assignment.Receipt()
    for batch in BATCHES:
      receipt.add(batch)
    self.assertEqual(trained.receipt, receipt.digest())
    self.assertEqual((after.joined, after.inner, after.error), (2, 3, 4))
    self.assertIsNone(after.local)

  def test_a_loss_that_is_not_finite_is_named(self):
    recorder = Recorder(nats=np.nan)
    with self.assertRaisesRegex(
      local_lib.DivergedError,
      'miner 1, round 5: the loss is nan and .* inner step 0',
    ):
      local_lib.train_round(
        recorder.replica, recorder.compress, jnp.float32(9), state(), start()
      )


class NotFiniteTest(absltest.TestCase):
  def train(self, numbers, error_norm=0.5):
    """Trains a round whose steps have these losses and norms of gradients."""
    recorder, seen, left = Recorder(), [], iter(numbers)

    def step(params, inner, *_):
      nats, norm = next(left)
      outcome = step_lib.StepOutcome(jnp.float32(nats), jnp.float32(norm))
      return params - 1, inner + 1, outcome

    def compress(start, end, error):
      return start - end + error, error / 2, error_norm

    trained, _ = local_lib.train_round(
      recorder.replica._replace(step=step),
      compress,
      jnp.float32(9),
      state(),
      start(),
      seen.append,
    )
    return trained, seen

  def test_a_skipped_step_is_counted_and_not_in_the_mean(self):
    for bad in ((np.nan, 1.0), (2.0, np.inf)):
      trained, seen = self.train([(2.0, 1.0), bad, (4.0, 1.0)])
      self.assertEqual((trained.loss, trained.skipped), (3.0, 1))
      self.assertEqual([x.is_skipped for x in seen], [False, True, False])
      self.assertEqual([x.index for x in seen], [0, 1, 2])
      self.assertEqual([x.tokens for x in seen], [6, 6, 6])

  def test_the_round_is_lost_with_its_last_step(self):
    with self.assertRaisesRegex(local_lib.DivergedError, 'at inner step 1;'):
      self.train([(2.0, 1.0), (np.nan, 1.0), (2.0, np.nan)])

  def test_the_round_is_lost_with_its_delta(self):
    with self.assertRaisesRegex(local_lib.DivergedError, 'the delta is not'):
      self.train([(2.0, 1.0)] * 3, error_norm=np.inf)


class OverlapTest(absltest.TestCase):
  def test_early_steps_are_moved_to_the_shared_parameters(self):
    recorder = Recorder()
    before = state()._replace(local=jnp.float32(20))
    run, begun = replica_lib.train_early(
      recorder.replica, before, start(), steps=1
    )
    self.assertEqual((run.origin, begun.local, begun.inner), (20, 19, 1))
    self.assertLen(run.losses, 1)
    recorder.calls.clear()
    replica = replica_lib.overlapped(
      recorder.replica, placement.Placement(None)
    )
    # The replica that is wrapped gets no constants of its own.
    replica = replica._replace(
      step=lambda *args: recorder.step(*args, 'constant')
    )
    trained, after = local_lib.train_round(
      replica, recorder.compress, jnp.float32(9), begun, run
    )
    # Three steps in all, from the shared parameters, 9, to 9 - 3.
    self.assertEqual(trained.message, 3 + 8)
    self.assertEqual((after.local, after.inner), (6, 3))
    self.assertEqual([c for c in recorder.calls if len(c) == 3], [
      (11, 32, 12), (12, 34, 12),
    ])  # fmt: skip


class IdsTest(absltest.TestCase):
  def test_an_island_trains_on_the_first_of_its_ids(self):
    config = config_lib.load(
      f'{helpers.ROOT}/configs/tiny.py', ['islands=steps=2,batch=3']
    )
    split = dataset.load(config).train
    task = local_lib.Task(0, 1, b'seed', bytes(32))
    ids_n = local_lib.assigned_ids(config, task, split)
    ids_HxB = local_lib.batch_ids(config, task, split)
    self.assertEqual(ids_HxB.shape, (2, 3))
    np.testing.assert_array_equal(ids_HxB.reshape(-1), ids_n[:6])


if __name__ == '__main__':
  absltest.main()
