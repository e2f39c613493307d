import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.data import assignment
from covenant.data import corpus
from covenant.data import dataset
from covenant.emulate import host as host_lib
from covenant.models import loss as loss_lib
from covenant.node import checkpoint
from covenant.node import miner as miner_lib
from covenant.node import replica as replica_lib
from covenant.optim import inner as inner_lib
from covenant.report import metrics

ROOT = pathlib.Path(__file__).parent.parent.parent
TRACES = ROOT / 'tests' / 'golden' / 'traces.json'
TIMES = ('seconds', 'tokens_per_second')


def tiny(variant='', **changes):
  config = config_lib.load(f'{ROOT}/configs/tiny.py:{variant}'.rstrip(':'))
  return dataclasses.replace(config, **changes)


def untimed(path):
  """The records of a metrics file without what a clock wrote."""
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def bits(state):
  """Every bit of a state."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return [(jax.tree_util.keystr(p), np.asarray(x).tobytes()) for p, x in leaves]


class RunTest(parameterized.TestCase):
  rewrite_golden = False

  def workdir(self, name='run'):
    return pathlib.Path(self.create_tempdir().full_path, name)

  @parameterized.parameters('', 'diloco', 'ddp')
  def test_learns_and_follows_the_golden_trace(self, variant):
    """If you meant to change the numbers, run pytest with --rewrite-golden."""
    config, workdir = tiny(variant), self.workdir()
    outcome = host_lib.run(config, workdir)
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

  def test_the_bytes_printed_are_the_lengths_of_the_payloads(self):
    config, workdir = tiny(rounds=1), self.workdir()
    outcome = host_lib.run(config, workdir)
    replica = replica_lib.Replica(config)
    (record,) = [
      r
      for r in metrics.read(workdir / 'metrics.jsonl')
      if isinstance(r, metrics.Round)
    ]
    self.assertEqual(record.bytes_round, 3 * replica.spec.payload_bytes)
    self.assertEqual(outcome.state.position.bytes_up, record.bytes_round)
    floats = sum(x.size for x in jax.tree.leaves(replica.like))
    self.assertEqual(record.dense_bytes_round, 3 * 4 * floats)

  @parameterized.parameters('', 'ddp')
  def test_resumed_equals_uninterrupted(self, variant):
    config = tiny(variant)
    whole, parts = self.workdir('whole'), self.workdir('parts')
    want = host_lib.run(config, whole)
    asked = iter([True])
    first = host_lib.run(config, parts, stop=lambda: next(asked))
    self.assertFalse(first.finished)
    self.assertEqual(first.state.position.round, 1)
    got = host_lib.run(config, parts)
    self.assertEqual(bits(got.state), bits(want.state))
    self.assertEqual(
      untimed(parts / 'metrics.jsonl'), untimed(whole / 'metrics.jsonl')
    )

  def test_a_finished_run_is_not_run_again(self):
    config, workdir = tiny(), self.workdir()
    want = host_lib.run(config, workdir)
    before = (workdir / 'metrics.jsonl').read_bytes()
    seen = []
    got = host_lib.run(config, workdir, seen.append)
    self.assertEqual(bits(got.state), bits(want.state))
    self.assertEqual((workdir / 'metrics.jsonl').read_bytes(), before)
    self.assertLen(seen, len(before.splitlines()))

  def test_another_config_is_refused_by_the_names_of_its_fields(self):
    workdir = self.workdir()
    host_lib.run(tiny(rounds=1), workdir)
    with self.assertRaisesRegex(
      config_lib.ConfigError, 'seed: 0 there, 5 here'
    ):
      host_lib.run(tiny(rounds=1, seed=5), workdir)

  def test_more_miners_than_data_is_refused_and_leaves_nothing(self):
    workdir = self.workdir()
    with self.assertRaisesRegex(config_lib.ConfigError, 'miners: 900 miners'):
      host_lib.run(tiny(miners=900), workdir)
    self.assertFalse(workdir.exists())

  def test_divergence_names_the_miner_the_round_and_the_step(self):
    config = tiny()
    inner = dataclasses.replace(config.optim.inner, learning_rate=1e30)
    optim = dataclasses.replace(config.optim, inner=inner)
    with self.assertRaisesRegex(
      miner_lib.Diverged, 'miner 0, round 0: the loss is .* inner step'
    ):
      host_lib.run(tiny(optim=optim), self.workdir())

  def test_kill_9_in_the_middle_then_resume_is_bit_identical(self):
    """A real process, killed after its first checkpoint is complete."""
    config = tiny(rounds=60, checkpoint=config_lib.Checkpoint(every=3))
    whole, parts = self.workdir('whole'), self.workdir('parts')
    want = host_lib.run(config, whole)
    command = [
      sys.executable, str(ROOT / 'run.py'), f'--config={ROOT}/configs/tiny.py',
      '--config.rounds=60', '--config.checkpoint.every=3',
      f'--workdir={parts}',
    ]  # fmt: skip
    process = subprocess.Popen(
      command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    deadline = time.monotonic() + 120
    while not _steps(parts) and time.monotonic() < deadline:
      time.sleep(0.005)  # waits for a file of another process
    os.kill(process.pid, signal.SIGKILL)
    _, stderr = process.communicate()
    self.assertEqual(process.returncode, -signal.SIGKILL, stderr.decode())
    self.assertBetween(max(_steps(parts)), 3, 57)
    got = host_lib.run(config, parts)
    self.assertEqual(bits(got.state), bits(want.state))
    self.assertEqual(
      untimed(parts / 'metrics.jsonl'), untimed(whole / 'metrics.jsonl')
    )

  def test_sixty_four_miners(self):
    config = tiny(miners=64, rounds=1)
    optim = dataclasses.replace(config.optim, inner_steps=1)
    outcome = host_lib.run(
      dataclasses.replace(config, optim=optim), self.workdir()
    )
    self.assertLen(outcome.state.miners, 64)


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
    host_lib.run(config, workdir)
    last = metrics.read(workdir / 'metrics.jsonl')[-1]
    entropy = corpus.entropy_rate(config.seed)
    self.assertBetween(last.loss, 0.97 * entropy, 1.25 * entropy)


class MinersTest(absltest.TestCase):
  def test_a_miner_trains_as_it_would_alone(self):
    """Bit for bit: who else is emulated on the host does not matter."""
    many, one = tiny(miners=3, rounds=1), tiny(miners=1, rounds=1)
    states = []
    for config in (many, one):
      host = host_lib.Host(config, dataset.load(config))
      states.append(host.round(host.init())[0])
    self.assertEqual(bits(states[0].miners[0]), bits(states[1].miners[0]))

  def test_ddp_is_adamw_on_the_mean_gradient(self):
    config = tiny('ddp', rounds=3)
    host = host_lib.Host(config, dataset.load(config))
    state = host.init()
    params = jax.tree.map(np.asarray, state.shared.params)
    adamw = inner_lib.adamw(config.optim.inner)
    schedule = inner_lib.schedule(config.optim.inner, 3)
    opt = adamw.init(params)

    def loss(params, tokens):
      return loss_lib.next_token_loss(config.model, params, tokens).total

    step = jax.jit(jax.grad(loss))
    for r in range(3):
      gradients = [
        step(params, host_batch(config, uid, r)) for uid in state.miners
      ]
      mean = jax.tree.map(lambda *g: sum(g) / len(g), *gradients)
      updates, opt = adamw.update(mean, opt, params)
      rate = schedule(r)
      params = jax.tree.map(
        lambda p, u, rate=rate: p + rate * u, params, updates
      )
      state, _ = host.round(state)
    jax.tree.map(
      lambda got, want: np.testing.assert_allclose(got, want, atol=1e-6),
      state.shared.params,
      params,
    )


def host_batch(config, uid, round_index):
  """What a miner reads in a round of one step."""
  split = dataset.load(config).train
  context = config.data.context
  ids = assignment.assign(
    config.seed,
    uid,
    round_index,
    config.optim.inner.batch_size,
    split.num_sequences(context),
  )
  return split.read(ids, context)


class CheckpointTest(absltest.TestCase):
  def test_restores_every_bit_and_keeps_the_last_two(self):
    config = tiny()
    host = host_lib.Host(config, dataset.load(config))
    state = host.init()
    directory = self.create_tempdir().full_path
    with checkpoint.Checkpoints(directory, config.checkpoint) as checkpoints:
      self.assertIsNone(checkpoints.restore(state))
      for _ in range(3):
        state, _ = host.round(state)
        checkpoints.save(state)
    with checkpoint.Checkpoints(directory, config.checkpoint) as checkpoints:
      got = checkpoints.restore(host.init())
    self.assertEqual(bits(got), bits(state))
    self.assertEqual(got.position, state.position)
    self.assertEqual(_steps(pathlib.Path(directory).parent, directory), [2, 3])


def _steps(workdir, directory=None):
  """Rounds of the complete checkpoints."""
  path = pathlib.Path(directory or workdir / 'checkpoints')
  return sorted(int(p.name) for p in path.glob('*') if p.name.isdigit())


if __name__ == '__main__':
  absltest.main()
