"""The program as its user meets it: processes, exit codes, what they print."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import cli
from tests import helpers

pytestmark = pytest.mark.network

TINY = '--config=configs/tiny.py'
# Runs the program in a new process for each line of arguments; what takes the
# most time, importing, is done once.
_FORKS = """
import json, os, runpy, sys
from covenant import cli

for line in sys.stdin:
  child = os.fork()
  if not child:
    out, err, *arguments = json.loads(line)
    for stream, path in (1, out), (2, err):
      os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = ['run.py', *arguments]
    sys.exit(runpy.run_path('run.py', run_name='__main__'))
  _, status = os.waitpid(child, 0)
  print(os.waitstatus_to_exitcode(status), flush=True)
"""


def start(*arguments, devices=8):
  return subprocess.Popen(
    [sys.executable, 'run.py', *arguments],
    cwd=helpers.ROOT,
    env=os.environ | {'JAX_NUM_CPU_DEVICES': str(devices)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run(*arguments, **kwargs):
  process = start(*arguments, **kwargs)
  out, err = process.communicate()
  return process.returncode, out, err


class RunTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(self.create_tempdir().full_path, 'run')

  def test_trains_reports_and_points_to_what_it_made(self):
    code, out, err = run(TINY, f'--workdir={self.workdir}')
    self.assertEqual(code, 0, err)
    for text in (
      'held-out loss', 'bytes sent', 'parameters: ', 'figures: ', 'report: ',
    ):  # fmt: skip
      self.assertIn(text, out)
    self.assertRegex(err, r'round 4/4, ETA .*loss .*sent .*x.*tok/s')
    self.assertNotIn('Warning', err)
    for name in (
      'config.json', 'metrics.jsonl', 'tensorboard', 'checkpoints/4',
      'figures/loss_tokens.png', 'figures/loss_bytes.png',
      'figures/miner_losses.png', 'report.html',
    ):  # fmt: skip
      self.assertTrue((self.workdir / name).exists(), name)
    code, out, err = run(
      TINY, '--role=explain', '--uid=0', f'--workdir={self.workdir}'
    )
    self.assertEqual(code, 0, err)
    self.assertRegex(out, r'uid 0, hotkey 5\w+, after round 4')
    self.assertIn('of the usual work', out)
    made = self.workdir / 'report.html'
    before = made.read_bytes()
    made.unlink()
    code, _, err = run('--role=report', f'--workdir={self.workdir}')
    self.assertEqual(code, 0, err)
    self.assertEqual(made.read_bytes(), before)
    code, out, err = run(
      '--role=export', f'--config={self.workdir}/config.json',
      f'--workdir={self.workdir}',
    )  # fmt: skip
    self.assertEqual(code, 0, err)
    self.assertIn(f'the model after round 4 is in {self.workdir}/hf/4', out)
    self.assertTrue((self.workdir / 'hf/4/tokenizer.json').exists())

  def test_ctrl_c_checkpoints_and_says_how_to_go_on(self):
    process = start(TINY, '--config.rounds=5000', f'--workdir={self.workdir}')
    assert process.stderr is not None
    for line in process.stderr:
      if line.startswith('round 1/'):
        break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    self.assertEqual(process.returncode, 0, err)
    self.assertRegex(
      out, rf'stopped after round \d+ of 5000.*--workdir={self.workdir}'
    )
    self.assertNotEmpty(list((self.workdir / 'checkpoints').iterdir()))

  def test_72b_prints_its_plan_and_then_what_it_lacks(self):
    code, out, err = run(
      '--config=configs/72b.py', '--config.plan.compile=false',
      f'--workdir={self.workdir}', devices=1,
    )  # fmt: skip
    self.assertEqual(code, 1)
    self.assertRegex(
      out, r'72b: 70,599,843,840 parameters\n(.*\n)+.* on 8xB200'
    )
    self.assertRegex(out, r'inner step +\d+\.\d s\n')
    self.assertIn('error: 72b cannot run here:\n  devices: ', err)
    self.assertRegex(err, r'= 8, and this machine has 1 x cpu\n')
    self.assertIn('memory: 70,599,843,840 parameters', err)
    self.assertIn("data: there is no data.path='data/dclm'", err)
    self.assertNotIn('Traceback', err)
    self.assertFalse(self.workdir.exists())

  def test_plan_compiles(self):
    code, out, err = run(TINY, '--role=plan', '--config.plan.hardware=1xA100')
    self.assertEqual(code, 0, err)
    self.assertRegex(out, r'inner step +\d+\.\d s +\d+\.\d s cpu +0\.0\n')
    self.assertIn('tiny FITS on 1xA100', out)
    self.assertNotIn('Warning', err)

  def test_what_is_no_plan_is_one_line(self):
    code, out, err = run(TINY, '--role=plan', '--config.plan.hardware=8xB9')
    self.assertEqual((code, out), (1, ''))
    self.assertRegex(err, r'^error: plan.hardware: expected .* got .8xB9.\n$')

  def test_a_node_of_a_network_says_all_that_it_lacks(self):
    """One line each: hardware, data, wallet, bucket; and nothing is started."""
    code, _, err = run(
      '--role=miner', '--config=configs/72b.py',
      '--config.network.chain=bittensor', '--config.network.wallet=nobody',
      f'--workdir={self.workdir}',
    )  # fmt: skip
    self.assertEqual(code, 1)
    for line in (
      'memory: 70,599,843,840 parameters', 'data: there is no data.path=',
      'chain: hotkey: no file', 'bucket: network.bucket: expected a location',
    ):  # fmt: skip
      self.assertIn(line, err)
    self.assertNotIn('Traceback', err)
    self.assertFalse(self.workdir.exists())

  def test_shards_of_a_text_are_trained_on(self):
    text = pathlib.Path(self.create_tempdir().full_path, 'text')
    text.mkdir()
    for name in 'ab':
      words = ' '.join(f'{name} {i * i}' for i in range(2000))
      (text / f'{name}.txt').write_text(words)
    shards = self.workdir.with_name('shards')
    code, out, err = run(
      TINY, '--role=tokenize', '--config.data.source=text',
      f'--config.data.path={text}', f'--workdir={shards}',
    )  # fmt: skip
    self.assertEqual(code, 0, err)
    self.assertIn(f'--config.data.path={shards}', out)
    code, _, err = run(
      TINY, '--config.data.source=shards', f'--config.data.path={shards}',
      f'--workdir={self.workdir}',
    )  # fmt: skip
    self.assertEqual(code, 0, err)


# Ctrl-C while covenant.cli is imported.
_INTERRUPTED = """
import runpy, sys

class Finder:
  @staticmethod
  def find_spec(name, *args):
    if name == 'covenant.cli':
      raise KeyboardInterrupt

sys.meta_path.insert(0, Finder)
runpy.run_path('run.py', run_name='__main__')
"""


class ProgramTest(absltest.TestCase):
  def test_help_names_all_roles_and_flags(self):
    code, out, err = run('--help')
    self.assertEqual(code, 1)  # as absl has it
    self.assertEmpty(err)
    for role in cli.ROLES:
      self.assertIn(f'{role}: ', out)
    for flag in ('config', 'workdir', 'workdirs', 'profile', 'uid'):
      self.assertIn(f'--{flag}: ', out)

  def test_ctrl_c_during_imports_is_one_line(self):
    found = subprocess.run(
      [sys.executable, '-c', _INTERRUPTED],
      cwd=helpers.ROOT,
      env=os.environ | {'PYTHONPATH': str(helpers.ROOT)},
      capture_output=True,
      text=True,
    )
    self.assertEqual((found.returncode, found.stdout), (1, ''))
    self.assertEqual(found.stderr, 'stopped\n')


class BadInputTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.forks = cls.enterClassContext(
      subprocess.Popen(
        [sys.executable, '-c', _FORKS],
        cwd=helpers.ROOT,
        env=os.environ | {'PYTHONPATH': str(helpers.ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
      )
    )

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.workdir = self.folder / 'run'

  def run_program(self, *arguments):
    out, err = self.folder / 'out', self.folder / 'err'
    line = json.dumps(
      [str(out), str(err), *arguments, f'--workdir={self.workdir}']
    )
    print(line, file=self.forks.stdin, flush=True)
    code = int(self.forks.stdout.readline())
    return code, out.read_text(), err.read_text()

  @parameterized.parameters(
    (['--config.optim.inner_stpes=3'], 'did you mean optim.inner_steps?'),
    (['--config=configs/tiny.py:wild'], "there is no variant 'wild'"),
    (['--config.data.context=99999', TINY], 'data.context is 99999, but'),
    (['surplus', '--config.seed=2'], '--config.rounds=3; got surplus'),
    (['--confg=x'], "Unknown command line flag 'confg'"),
    (['--role=king'], 'should be one of <emulate|tokenize|'),
    (['--role=explain'], '--uid: expected the uid to explain'),
    (['--role=explain', '--uid=7'], 'there is no'),
    (['--role=worker'], 'pool.url: expected that of a pool'),
    (['--role=report'], 'expected the folder of a run; there is no folder'),
    (['--role=compare', '--workdirs=runs'], 'two runs or more'),
    (
      ['--role=evaluator', '--config=configs/localnet.py'],
      'chain: network.path: expected the folder of a network',
    ),
  )
  def test_bad_input_is_one_clear_line_and_leaves_nothing(
    self, arguments, message
  ):
    code, out, err = self.run_program(*arguments)
    self.assertEqual(code, 1)
    self.assertIn(message, err)
    self.assertNotIn('Traceback', out + err)
    self.assertFalse(self.workdir.exists())


if __name__ == '__main__':
  absltest.main()
