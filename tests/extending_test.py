"""Runs the files and the commands of docs/extending.md."""

import os
import pathlib
import re
import shlex
from unittest import mock

import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import cli
from covenant import config as config_lib
from covenant import metrics
from covenant import startup
from covenant.adversaries import registry
from tests import helpers

PAGE = (helpers.ROOT / 'docs' / 'extending.md').read_text(encoding='utf-8')
FILES = dict(re.findall(r'`(\w+\.py)`:\n\n```python\n(.*?)```', PAGE, re.S))
COMMANDS = [
  shlex.split(command.replace('\\\n', ' '))
  for command in re.findall(r'```sh\n(.*?)```', PAGE, re.S)
]


def run(arguments, folder):
  """Does what `python run.py` does with these arguments, in this process."""
  assert arguments[:2] == ['python', 'run.py'], arguments
  role, edits, path = 'emulate', [], ''
  for argument in arguments[2:]:
    name, _, value = argument.removeprefix('--').partition('=')
    if name == 'role':
      role = value
    elif name == 'config':
      path = str(helpers.ROOT / value)
    else:
      edits.append(f'{name.removeprefix("config.")}={value}')
  config = config_lib.load(path, ['rounds=1', 'eval.every=1', *edits])
  with mock.patch('builtins.print'):
    cli.ROLES[role](config, str(folder))
  return config


class PageTest(parameterized.TestCase):
  """The files of the page in a folder of their own."""

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    for name, text in FILES.items():
      (self.folder / name).write_text(text)
    self.addCleanup(os.chdir, os.getcwd())
    os.chdir(self.folder)
    # Each role would set the folder of compiled programs, and draw figures.
    self.enterContext(mock.patch.object(startup, 'keep_compilations'))
    self.enterContext(mock.patch('covenant.report.plots.write_figures'))
    self.enterContext(mock.patch('covenant.report.page.write'))

  def check_learns(self, i):
    config = run(COMMANDS[i], self.folder / 'run')
    records = metrics.read(self.folder / 'run' / 'metrics.jsonl')
    losses = [r.loss for r in records if isinstance(r, metrics.Evaluation)]
    self.assertLess(losses[-1], losses[0])
    return config


@pytest.mark.docs
class OptimizerTest(PageTest):
  @parameterized.parameters(1, 2, 3)
  def test_a_part_of_the_optimizer(self, i):
    self.check_learns(i)


class ExtendingTest(PageTest):
  def test_the_page_has_every_part(self):
    self.assertEqual(
      list(FILES),
      ['shouter.py', 'balanced.py', 'rms_sign.py', 'lion.py',
       'memory_chain.py', 'memory_store.py'],
    )  # fmt: skip
    self.assertLen(COMMANDS, 5)

  @pytest.mark.slow
  def test_an_adversary(self):
    config = self.check_learns(0)
    names = {3: 'shouter.py:shouter', 4: 'copier'}
    self.assertEqual(registry.dishonest(config), names)
    verdicts = (self.folder / 'run' / 'verdicts.jsonl').read_text()
    self.assertIn('HUGE', verdicts)

  @pytest.mark.slow
  def test_a_doctor_finds_chain_and_store_well(self):
    with mock.patch('sys.exit') as leave:
      run(COMMANDS[4], self.folder / 'run')
    leave.assert_not_called()

  @parameterized.parameters(
    ('adversaries=none.py:x', 'adversaries: there is no file .*none.py'),
    ('adversaries=shouter.py:y', "'shouter.py:y': shouter.py has no y"),
    ('adversaries=shouter', "there is no 'shouter'; did you mean"),
    ('adversaries=math:pi', 'function from a policy'),
  )
  def test_what_is_no_adversary_is_an_error(self, edit, message):
    config = config_lib.load(f'{helpers.ROOT}/configs/tiny.py', [edit])
    with self.assertRaisesRegex(config_lib.ConfigError, message):
      registry.names(config)

  def test_a_reference_to_nothing_names_its_field(self):
    name = 'optim.compression.quantizer'
    with self.assertRaisesRegex(config_lib.ConfigError, f'{name}: expected'):
      config_lib.load(f'{helpers.ROOT}/configs/tiny.py', [f'{name}=nothing'])


if __name__ == '__main__':
  absltest.main()
