"""The stories of docs/operating.md, by their commands."""

import contextlib
import io
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys

import pytest
from absl.testing import absltest
from absl.testing import flagsaver

from covenant import cli
from covenant import metrics
from tests import helpers

PAGE = helpers.ROOT / 'docs' / 'operating.md'


def stories():
  """Returns the commands of each story, by its workdir."""
  found = {}
  blocks = re.findall(r'```sh\n(.*?)```', PAGE.read_text('utf-8'), re.DOTALL)
  for block in blocks:
    lines = block.replace('\\\n', ' ').splitlines()
    for name in dict.fromkeys(re.findall(r'\bruns/(\w+)', block)):
      found.setdefault(name, []).extend(lines)
  return found


@pytest.mark.docs
class OperatingPageTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    (self.folder / 'configs').symlink_to(helpers.ROOT / 'configs')
    self.runs = self.folder / 'runs'

  def do(self, line):
    """Runs a line of the page; returns its output and errors."""
    first, *words = shlex.split(line)
    if first != 'python':
      return subprocess.run(
        line, shell=True, cwd=self.folder, check=True, capture_output=True,
        text=True,
      ).stdout  # fmt: skip
    with (
      contextlib.chdir(self.folder),
      contextlib.redirect_stdout(io.StringIO()) as out,
      contextlib.redirect_stderr(out),
      flagsaver.flagsaver(verbosity=0),
    ):
      cli.run(cli._parse(words))
    return out.getvalue()

  def refused(self, line, why):
    """Runs a line that ends with an error in one line."""
    with self.assertRaisesRegex(SystemExit, why) as caught:
      self.do(line)
    self.assertNotIn('\n', str(caught.exception))

  def rounds(self, name):
    records = metrics.read(self.runs / name / 'metrics.jsonl', [metrics.Round])
    return [record.round for record in records]

  def test_each_story_has_a_test(self):
    # .ci/run has the commands of `net`.
    self.assertEqual(
      set(stories()), {'nan', 'live', 'back', 'longer', 'small', 'twice', 'net'}
    )

  def test_a_miner_whose_rounds_are_lost(self):
    run, grep = stories()['nan']
    self.do(run)
    self.assertEqual(self.rounds('nan'), [1, 2, 3, 4, 5, 6])
    lost = [json.loads(line) for line in self.do(grep).splitlines()]
    self.assertEqual({event['node'] for event in lost}, {'3'})

  def test_an_amendment(self):
    amend, run = stories()['live']
    self.assertIn('the learning rate falls over', self.do(amend))
    self.do(run)
    self.assertEqual(self.rounds('live'), [1, 2, 3, 4, 5, 6])
    (line,) = (self.runs / 'live' / 'amendments.jsonl').read_text().splitlines()
    self.assertIn('optim.outer.learning_rate', line)

  def test_a_longer_run(self):
    run, longer = stories()['longer']
    self.do(run)
    self.assertIn('the learning rate falls over', self.do(longer))
    self.assertEqual(self.rounds('longer'), [1, 2, 3, 4, 5, 6])

  def test_a_rollback(self):
    amend, run = stories()['back']
    self.do(amend)
    self.do(run)
    self.assertEqual(self.rounds('back')[-1], 7)
    (line,) = (self.runs / 'back' / 'amendments.jsonl').read_text().splitlines()
    self.assertIn('restore', line)

  def test_a_full_disk(self):
    make, mount, run, remount, again = stories()['small']
    self.do(make)
    try:
      self.do(mount)
    except subprocess.CalledProcessError as e:
      self.skipTest(f'a mount needs root: {e.stderr}')
    self.addCleanup(
      subprocess.run, ['umount', '-l', str(self.runs / 'small')], check=True
    )
    self.refused(run, 'the disk is full')
    self.do(remount)
    self.do(again)
    self.assertEqual(self.rounds('small/run'), [1, 2])

  def test_a_job_that_is_queued_twice_and_preempted(self):
    first, second, kill, again = stories()['twice']
    self.assertEqual((first, again), (f'{second} &', second))
    self.assertEqual(kill, 'kill -TERM PID')
    with subprocess.Popen(
      [sys.executable, helpers.ROOT / 'run.py', *shlex.split(second)[2:]],
      cwd=self.folder,
      env={**os.environ, 'PYTHONPATH': str(helpers.ROOT)},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    ) as job:
      for line in job.stdout:
        if line.startswith('round 1/'):
          break
      job.send_signal(signal.SIGSTOP)  # so that it does not end meanwhile
      self.refused(second, rf'runs/twice is in use by .*, pid {job.pid}, 20')
      job.send_signal(signal.SIGTERM)
      job.send_signal(signal.SIGCONT)
      said = job.stdout.read()
    self.assertEqual(job.returncode, 0, said)
    self.assertRegex(said, r'stopped after round \d+ of 60')
    self.assertIn('parameters: ', self.do(again))
    self.assertEqual(self.rounds('twice'), list(range(1, 61)))


if __name__ == '__main__':
  absltest.main()
