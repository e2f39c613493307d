import contextlib
import dataclasses
import io
import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant import metrics
from covenant.data import corpus
from covenant.data import dataset
from covenant.emulate import emulation
from covenant.emulate import host as host_lib
from covenant.emulate import saved
from covenant.protocol import checkpoint
from covenant.train import local as local_lib
from covenant.train import shared_state as shared_state_lib
from tests import helpers

TRACES = helpers.ROOT / 'tests' / 'golden' / 'traces.json'


def tiny(variant='', **changes):
  return dataclasses.replace(helpers.tiny(variant=variant), **changes)


class RunTest(parameterized.TestCase):
  rewrite_golden = False

  @classmethod
  def setUpClass(cls):
    """One whole run, for the tests that look at what a run leaves."""
    super().setUpClass()
    folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.finished = pathlib.Path(folder, 'run')
    cls.outcome = emulation.run(tiny(), cls.finished)

  def workdir(self, name='run'):
    return pathlib.Path(self.create_tempdir().full_path, name)

  @parameterized.parameters('', 'diloco', 'ddp')
  @pytest.mark.rows(1)
  def test_learns_and_follows_the_golden_trace(self, variant):
    """If you meant to change the numbers, run pytest with --rewrite-golden."""
    config, workdir, outcome = tiny(variant), self.finished, self.outcome
    if variant:
      workdir = self.workdir()
      outcome = emulation.run(config, workdir)
    self.assertTrue(outcome.finished)
    records = metrics.read(workdir / 'metrics.jsonl')
    rounds = [r for r in records if isinstance(r, metrics.Round)]
    evaluations = [r for r in records if isinstance(r, metrics.Evaluation)]
    self.assertEqual([r.round for r in rounds], [1, 2, 3, 4])
    self.assertEqual([e.round for e in evaluations], [0, 2, 4])
    self.assertLess(evaluations[-1].loss, evaluations[0].loss)
    trace = {
      'training': [r.loss for r in rounds],
      'heldout': [e.loss for e in evaluations],
      'bytes': [r.bytes_round for r in rounds],
    }
    golden = json.loads(TRACES.read_text()) if TRACES.exists() else {}
    if self.rewrite_golden:
      golden[config.name] = trace
      TRACES.write_text(json.dumps(golden, indent=1) + '\n')
    for name, want in golden[config.name].items():
      np.testing.assert_allclose(trace[name], want, rtol=1e-5, err_msg=name)

  def test_every_inner_step_is_written(self):
    steps = metrics.read(self.finished / 'steps.jsonl', [metrics.Step])
    config = tiny()
    length = config.optim.inner_steps
    self.assertEqual(
      [(x.round, x.step) for x in steps],
      [(1 + i // length, i) for i in range(config.rounds * length)],
    )
    rounds = metrics.rounds(metrics.read(self.finished / 'metrics.jsonl'))
    for r, record in enumerate(rounds):
      own = steps[r * length : (r + 1) * length]
      mean = sum(step.loss for step in own) / length
      self.assertAlmostEqual(mean, record.loss, places=5)
      self.assertAlmostEqual(own[-1].learning_rate, record.learning_rate)
      self.assertGreater(min(step.gradient_norm for step in own), 0)
      self.assertEqual(sum(step.tokens for step in own), 576)

  def test_the_bytes_printed_are_the_lengths_of_the_payloads(self):
    shared_model = shared_state_lib.SharedModel(tiny())
    records = [
      r
      for r in metrics.read(self.finished / 'metrics.jsonl')
      if isinstance(r, metrics.Round)
    ]
    floats = sum(x.size for x in jax.tree.leaves(shared_model.abstract_params))
    for record in records:
      self.assertEqual(record.bytes_round, 3 * shared_model.spec.payload_bytes)
      self.assertEqual(record.dense_bytes_round, 3 * 4 * floats)
    self.assertEqual(
      self.outcome.state.counters.bytes_up,
      sum(record.bytes_round for record in records),
    )

  @parameterized.parameters('', 'ddp')
  @pytest.mark.rows(1)
  def test_resumed_equals_uninterrupted(self, variant):
    """The miners, the validators' memory, and all that the chain knows."""
    config, whole, want = tiny(variant), self.finished, self.outcome
    if variant:
      config, whole = tiny(variant, validators=2), self.workdir('whole')
      want = emulation.run(config, whole)
    parts = self.workdir('parts')
    asked = iter([True])
    first = emulation.run(config, parts, stop=lambda: next(asked))
    self.assertFalse(first.finished)
    self.assertEqual(first.state.counters.round, 1)
    got = emulation.run(config, parts)
    self.assertEqual(
      helpers.everything(got.state), helpers.everything(want.state)
    )
    standings = json.loads(got.state.protocol)['standings']
    self.assertEqual(list(standings), ['3', '4'][: config.validators])
    self.assertEqual(
      helpers.untimed(parts / 'metrics.jsonl'),
      helpers.untimed(whole / 'metrics.jsonl'),
    )
    self.assertEqual(
      (parts / 'steps.jsonl').read_text(), (whole / 'steps.jsonl').read_text()
    )

  @pytest.mark.slow
  def test_a_finished_run_is_not_run_again(self):
    before = (self.finished / 'metrics.jsonl').read_bytes()
    seen = []
    got = emulation.run(tiny(), self.finished, seen.append)
    self.assertEqual(
      helpers.everything(got.state), helpers.everything(self.outcome.state)
    )
    self.assertEqual((self.finished / 'metrics.jsonl').read_bytes(), before)
    self.assertLen(seen, len(before.splitlines()))

  def test_another_config_is_refused_by_the_names_of_its_fields(self):
    with self.assertRaisesRegex(
      config_lib.ConfigError, 'seed: 0 there, 5 here'
    ):
      emulation.run(tiny(seed=5), self.finished)

  @pytest.mark.slow
  def test_a_run_is_made_longer(self):
    workdir, err = self.workdir(), io.StringIO()
    emulation.run(tiny(rounds=2), workdir)
    with contextlib.redirect_stderr(err):
      outcome = emulation.run(tiny(rounds=3), workdir)
    self.assertEqual(outcome.state.counters.round, 3)
    self.assertIn('rounds: 2 before, 3 now; the learning rate', err.getvalue())
    rounds = metrics.rounds(metrics.read(workdir / 'metrics.jsonl'))
    self.assertEqual([r.round for r in rounds], [1, 2, 3])

  @pytest.mark.slow
  def test_made_longer_with_its_own_schedule_it_equals_a_long_one(self):
    short, long = (
      helpers.tiny(f'rounds={n}', 'optim.inner.decay_steps=6') for n in (2, 4)
    )
    want = emulation.run(long, self.workdir('whole'))
    parts = self.workdir('parts')
    emulation.run(short, parts)
    got = emulation.run(long, parts)
    self.assertEqual(
      helpers.everything(got.state), helpers.everything(want.state)
    )

  def test_more_miners_than_data_is_refused_and_leaves_nothing(self):
    workdir = self.workdir()
    with self.assertRaisesRegex(config_lib.ConfigError, 'miners: 900 miners'):
      emulation.run(tiny(miners=900), workdir)
    self.assertFalse(workdir.exists())

  @pytest.mark.slow
  def test_divergence_names_the_miner_the_round_and_the_step(self):
    config = tiny()
    inner = dataclasses.replace(config.optim.inner, learning_rate=1e30)
    optim = dataclasses.replace(config.optim, inner=inner)
    with self.assertRaisesRegex(
      local_lib.DivergedError, 'miner 0, round 0: the loss is .* inner step'
    ):
      emulation.run(tiny(optim=optim), self.workdir())

  @pytest.mark.network
  def test_kill_9_in_the_middle_then_resume_is_bit_identical(self):
    """A real process, killed after its first checkpoint is complete."""
    config = tiny(rounds=5000, checkpoint=config_lib.Checkpoint(every=2))
    whole, parts = self.workdir('whole'), self.workdir('parts')
    command = [
      sys.executable, f'{helpers.ROOT}/run.py',
      f'--config={helpers.CONFIGS}/tiny.py',
      '--config.rounds=5000', '--config.checkpoint.every=2',
      f'--workdir={parts}',
    ]  # fmt: skip
    process = subprocess.Popen(
      command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, cwd=helpers.ROOT
    )
    while not _steps(parts) and process.poll() is None:
      time.sleep(0.005)  # waits for a file of another process
    process.kill()
    _, stderr = process.communicate()
    self.assertEqual(process.returncode, -signal.SIGKILL, stderr.decode())
    saved = max(_steps(parts))
    self.assertBetween(saved, 2, 4000)

    def run(workdir):
      """Until a checkpoint later than those of the process, and a round."""
      seen = []
      return emulation.run(
        config, workdir, seen.append, lambda: seen[-1].round == saved + 3
      )

    got, want = run(parts), run(whole)
    self.assertEqual(want.state.counters.round, saved + 3)
    self.assertEqual(
      helpers.everything(got.state), helpers.everything(want.state)
    )
    self.assertEqual(
      helpers.untimed(parts / 'metrics.jsonl'),
      helpers.untimed(whole / 'metrics.jsonl'),
    )

  @pytest.mark.slow
  def test_sixty_four_miners(self):
    config = tiny(miners=64, rounds=1)
    optim = dataclasses.replace(config.optim, inner_steps=1)
    outcome = emulation.run(
      dataclasses.replace(config, optim=optim), self.workdir()
    )
    self.assertLen(outcome.state.miners, 64)


@pytest.mark.slow
class LearningTest(absltest.TestCase):
  def test_approaches_the_entropy_of_the_source(self):
    """Text of a known source: no model can do better, a good one comes near."""
    config = tiny(rounds=30, eval=config_lib.Eval(every=30, sequences=512))
    inner = dataclasses.replace(config.optim.inner, batch_size=16)
    config = dataclasses.replace(
      config,
      data=dataclasses.replace(config.data, synthetic_tokens=200_000),
      optim=dataclasses.replace(config.optim, inner_steps=10, inner=inner),
    )
    workdir = pathlib.Path(self.create_tempdir().full_path)
    emulation.run(config, workdir)
    last = metrics.read(workdir / 'metrics.jsonl')[-1]
    entropy = corpus.entropy_rate(config.seed)
    self.assertBetween(last.loss, 0.97 * entropy, 1.25 * entropy)


class CheckpointTest(absltest.TestCase):
  @pytest.mark.slow
  def test_restores_every_bit_and_keeps_the_last_two(self):
    config = tiny(validators=2)
    host = host_lib.Host(config, dataset.load(config))
    directory = self.create_tempdir().full_path
    with checkpoint.Checkpoints(directory, config.checkpoint) as checkpoints:
      self.assertIsNone(checkpoints.restore(saved.save(host)))
      for _ in range(3):
        host.round()
        checkpoints.save(saved.save(host))
    want, counters = (
      helpers.everything(saved.save(host)),
      saved.save(host).counters,
    )
    host.init()
    with checkpoint.Checkpoints(directory, config.checkpoint) as checkpoints:
      got = checkpoints.restore(saved.save(host))
    self.assertEqual(helpers.everything(got), want)
    self.assertEqual(got.counters, counters)
    saved.load(host, got)
    self.assertEqual(helpers.everything(saved.save(host)), want)
    self.assertEqual(_steps(pathlib.Path(directory).parent, directory), [2, 3])


def _steps(workdir, directory=None):
  """Rounds of the complete checkpoints."""
  path = pathlib.Path(directory or workdir / 'checkpoints')
  return sorted(int(p.name) for p in path.glob('*') if p.name.isdigit())


if __name__ == '__main__':
  absltest.main()
