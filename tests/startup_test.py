import contextlib
import errno
import io
import os
import pathlib
import re
import subprocess
import sys
from unittest import mock

import jax
from absl import logging
from absl.testing import absltest
from absl.testing import flagsaver
from absl.testing import parameterized

from covenant import cli
from covenant import startup
from tests import helpers


class CacheTest(absltest.TestCase):
  def kept(self, **environment):
    """(folder of compiled programs, what was printed)."""
    err = io.StringIO()
    with (
      mock.patch.dict('os.environ', environment),
      mock.patch.object(jax.config, 'update') as update,
      contextlib.redirect_stderr(err),
    ):
      os.environ.pop('JAX_COMPILATION_CACHE_DIR', None)
      startup.keep_compilations()
    return [call.args[1] for call in update.call_args_list][:1], err.getvalue()

  def test_in_the_cache_of_the_user(self):
    folder = self.create_tempdir().full_path
    found, err = self.kept(XDG_CACHE_HOME=folder)
    self.assertEqual((found, err), ([f'{folder}/covenant/compiled'], ''))

  def test_where_it_cannot_be_written(self):
    file = self.create_tempfile('cache').full_path
    found, err = self.kept(XDG_CACHE_HOME=file)
    self.assertEmpty(found)
    self.assertRegex(err, '^compiled programs are not kept: .*cache.*\n$')

  def test_without_a_home(self):
    failing = mock.patch.object(
      pathlib.Path, 'home', side_effect=RuntimeError('no home')
    )
    with failing:
      found, err = self.kept(XDG_CACHE_HOME='')
    self.assertEmpty(found)
    self.assertRegex(err, '^compiled programs are not kept: no home; set XDG')


def _documented():
  """Returns the flag of a share as docs/install.md has it."""
  page = (helpers.ROOT / 'docs' / 'install.md').read_text()
  (flag,) = re.findall(r'covenant --role=miner .*(--config.devices.*)', page)
  return flag


class DeviceShareTest(parameterized.TestCase):
  @parameterized.parameters(
    (0.25, {}, {'XLA_CLIENT_MEM_FRACTION': '0.250'}),
    (0.0, {}, {}),
    # JAX refuses both of its names at once.
    (0.25, {'XLA_PYTHON_CLIENT_MEM_FRACTION': '.9'}, {}),
    (0.25, {'XLA_CLIENT_MEM_FRACTION': '.9'}, {}),
  )
  def test_what_the_user_sets_holds(self, fraction, environ, wanted):
    self.assertEqual(startup.device_share(fraction, environ), wanted)

  @parameterized.parameters(
    (0.25, {}, {'XLA_CLIENT_MEM_FRACTION': '0.250'}),
    (0.0, {}, {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}),
    (0.0, {'XLA_CLIENT_MEM_FRACTION': '.9'}, {}),
    (0.0, {'XLA_PYTHON_CLIENT_PREALLOCATE': 'true'}, {}),
  )
  def test_without_a_share_memory_is_taken_as_needed(
    self, fraction, environ, wanted
  ):
    found = startup.device_share(fraction, environ, shared=True)
    self.assertEqual(found, wanted)

  @parameterized.parameters(
    ('miner', [_documented()], '0.300', None),
    ('report', [], None, None),
    ('worker', [], None, 'false'),
    ('stage', [], None, 'false'),
    ('pool', [], None, 'false'),
    ('worker', ['--config.devices.memory_fraction=0.3'], '0.300', None),
  )
  def test_a_role_sets_it_before_jax_looks_for_devices(
    self, name, words, fraction, preallocate
  ):
    names = startup.MEMORY_FRACTION, startup.PREALLOCATE
    seen = []

    def role(config, workdir):
      del config, workdir
      seen.append(tuple(map(os.environ.get, names)))

    with (
      mock.patch.dict(cli.ROLES, {name: role}),
      mock.patch.dict('os.environ'),
      flagsaver.flagsaver(config='tiny', role=name, workdir='unused'),
    ):
      for variable in 'XLA_PYTHON_CLIENT_MEM_FRACTION', *names:
        os.environ.pop(variable, None)
      cli.run(['run.py', *words])
    self.assertEqual(seen, [(fraction, preallocate)])


class DiskTest(parameterized.TestCase):
  @parameterized.parameters(
    (errno.ENOSPC, f'/w/x: the disk is full{startup.GO_ON}'),
    (errno.EDQUOT, f'/w/x: the quota of this user is used up{startup.GO_ON}'),
    (errno.EROFS, '/w/x: the file system is read-only'),
    (errno.EACCES, '/w/x: this user may not write there'),
    (errno.EEXIST, '/w/x: a file is there, where a folder was expected'),
  )
  def test_one_line(self, number, line):
    def full(config, workdir):
      raise OSError(number, os.strerror(number), '/w/x')

    with (
      mock.patch.dict(cli.ROLES, emulate=full),
      mock.patch.object(startup, 'keep_compilations'),
      flagsaver.flagsaver(config='tiny', role='emulate'),
      self.assertRaises(SystemExit) as caught,
    ):
      cli.run(['run.py'])
    self.assertEqual(caught.exception.code, f'error: {line}')

  def test_errors_of_libraries(self):
    inner = OSError(errno.EROFS, 'Read-only file system', '/w')
    outer = ValueError('cannot')
    outer.__cause__ = inner
    for error, text in (
      (outer, 'the file system is read-only'),
      (ValueError("... [os_error_code='28']"), 'the disk is full'),
      (ValueError('[Errno 122] Disk quota'), 'the quota of this user is used '),
      (ValueError('odd'), ''),
    ):
      self.assertStartsWith(startup.disk_error(error), text)

  def test_libraries_print_nothing_that_they_raise(self):
    shown = []
    with mock.patch.object(sys, 'excepthook', lambda *a: shown.append(a[1])):
      startup.quiet_libraries()
      self.addCleanup(logging.set_verbosity, logging.get_verbosity())
      for error in (RuntimeError('Event loop is closed'), ValueError('a bug')):
        sys.excepthook(type(error), error, None)
    self.assertEqual([str(error) for error in shown], ['a bug'])

  def test_ctrl_c_while_the_interpreter_ends(self):
    program = (
      'import atexit, os, signal\n'
      'from covenant import __main__\n'
      'atexit.register(os.kill, os.getpid(), signal.SIGINT)\n'
      '__main__.main()\n'
    )
    done = subprocess.run(
      [sys.executable, '-c', program, '--role=none'],
      cwd=helpers.ROOT,
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertRegex(done.stderr, 'role.*none')
    self.assertNotIn('KeyboardInterrupt', done.stderr)
    self.assertEqual(done.returncode, 1)

  def test_a_fault_of_the_program_is_no_such_line(self):
    self.assertFalse(startup.is_for_people(OSError('odd')))

  def test_tilde_in_flags(self):
    home, found = self.create_tempdir().full_path, []
    with (
      mock.patch.dict('os.environ', HOME=home),
      mock.patch.dict(cli.ROLES, plan=lambda *given: found.append(given)),
      mock.patch.object(startup, 'keep_compilations'),
      flagsaver.flagsaver(config='tiny', role='plan', workdir='~/x'),
    ):
      cli.run(['run.py'])
    self.assertEqual(found[0][1], f'{home}/x')


if __name__ == '__main__':
  absltest.main()
