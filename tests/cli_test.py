import contextlib
import io
import pathlib
import signal
from unittest import mock

from absl import flags
from absl.testing import absltest
from absl.testing import flagsaver

from covenant import cli
from covenant import config as config_lib
from covenant import errors
from covenant import startup
from tests import helpers


class CliTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    config = f'{helpers.CONFIGS}/tiny.py'
    self.enter_context(flagsaver.flagsaver(config=config))

  def test_help_describes_every_role(self):
    text = str(flags.FLAGS['role'].help)
    lines = text.partition('>: ')[2].splitlines()  # after absl's own list
    self.assertEqual([line.partition(':')[0] for line in lines], [*cli.ROLES])
    for line in lines:
      self.assertRegex(line, r'^\w+: [A-Z].*[^.]\.$')

  def test_any_error_of_ours_is_one_line(self):
    class SomeError(errors.CovenantError):
      pass

    def role(config, workdir):
      raise SomeError('said once')

    with (
      mock.patch.dict(cli.ROLES, emulate=role),
      self.assertRaisesRegex(SystemExit, '^error: said once$'),
    ):
      cli.run(['run.py'])

  def test_a_bug_keeps_its_traceback(self):
    def role(config, workdir):
      raise ValueError('a bug')

    with (
      mock.patch.dict(cli.ROLES, emulate=role),
      self.assertRaisesRegex(ValueError, '^a bug$'),
    ):
      cli.run(['run.py'])

  def test_fields_are_flags(self):
    found = []
    with mock.patch.dict(cli.ROLES, emulate=lambda *given: found.append(given)):
      cli.run(['run.py', '--config.rounds=7'])
    ((config, workdir),) = found
    self.assertEqual(config.rounds, 7)
    self.assertRegex(workdir, r'^runs/\d+-\d+-tiny$')

  def test_roles_of_a_run_take_its_config(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    tiny = config_lib.load(f'{helpers.CONFIGS}/tiny.py', ['rounds=7'])
    (folder / 'config.json').write_text(config_lib.to_json(tiny))
    found = []

    def role(config, workdir):
      del workdir
      found.append((config.name, config.rounds))

    for name in 'export', 'sample', 'finetune', 'plan':
      for more in [], ['--config.rounds=9'], ['--config=72b']:
        words = ['run.py', f'--role={name}', f'--workdir={folder}', *more]
        with (
          mock.patch.dict(cli.ROLES, {name: role}),
          flagsaver.flagsaver(config='shakespeare', verbosity=0),
        ):
          cli.run(cli._parse(words))
    big = config_lib.load('72b').rounds
    of_a_run = [('tiny', 7), ('tiny', 9), ('72b', big)]
    self.assertEqual(found[:9], 3 * of_a_run)
    self.assertEqual(found[9][0], 'shakespeare')  # it reads no workdir

  def test_the_first_ctrl_c_asks_and_the_second_stops(self):
    with (
      contextlib.redirect_stderr(io.StringIO()) as err,
      startup.stoppable('stopping') as stop,
    ):
      self.assertFalse(stop())
      signal.raise_signal(signal.SIGINT)
      self.assertTrue(stop())
      with self.assertRaises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    self.assertEqual(err.getvalue(), '\nstopping; once more: at once\n')


if __name__ == '__main__':
  absltest.main()
