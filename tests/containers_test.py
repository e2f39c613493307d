"""docs/containers/: linted, and its steps run without an engine."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from absl.testing import absltest
from absl.testing import parameterized

from covenant import cli
from covenant import config as config_lib
from tests import helpers

FOLDER = helpers.ROOT / 'docs' / 'containers'
USER = '65532'
# A root that is read-only but for two folders, for a user without rights.
SANDBOX = f"""
for folder in "$1" "$2"; do mount --bind "$folder" "$folder"; done
mount -o remount,bind,ro /
shift 2
exec unshare --user --map-user={USER} --map-group={USER} "$@"
"""
INSIDE = ('unshare', '-r', '-m', 'bash', '-ec', SANDBOX, '-')


def instructions():
  """Returns the instructions of the Dockerfile: (name, text), in order."""
  text = (FOLDER / 'Dockerfile').read_text()
  text = re.sub(r'^#.*\n', '', text, flags=re.MULTILINE).replace('\\\n', ' ')
  pairs = (line.partition(' ') for line in text.splitlines() if line.strip())
  return [(name, rest.strip()) for name, _, rest in pairs]


def has_sandbox():
  try:
    return not subprocess.run(
      [
        'unshare',
        '-r',
        '-m',
        'bash',
        '-c',
        SANDBOX,
        '-',
        '/tmp',
        '/tmp',
        'true',
      ],
      capture_output=True,
      check=False,
    ).returncode
  except OSError:
    return False


class ImageTest(absltest.TestCase):
  def test_an_unprivileged_user_owns_what_it_writes(self):
    found = instructions()
    last = max(i for i, (name, _) in enumerate(found) if name == 'FROM')
    final = dict(found[last:])
    self.assertEqual(final['USER'], f'{USER}:{USER}')
    self.assertIn(f'install -d -o {USER} -g {USER} /work', final['RUN'])
    self.assertEqual(json.loads(final['ENTRYPOINT']), ['covenant'])
    written = [
      word.partition('=')[2]
      for word in final['ENV'].split()
      if word.startswith(('HOME', 'XDG', 'MPL'))
    ]
    self.assertLen(written, 3)
    for path in written:
      self.assertTrue(path.startswith(('/work', '/tmp')), path)

  def test_compose_has_a_read_only_root_and_no_rights(self):
    text = (FOLDER / 'compose.yml').read_text()
    services = yaml.safe_load(text)['services']
    self.assertEqual(sorted(services), ['localnet', 'localnet-cuda'])
    for service in services.values():
      self.assertTrue(service['read_only'])
      self.assertEqual(service['user'], f'{USER}:{USER}')
      self.assertEqual(service['cap_drop'], ['ALL'])
      self.assertEqual(service['security_opt'], ['no-new-privileges:true'])
      self.assertEqual(service['tmpfs'], ['/tmp'])
      build = service['build']
      context = (FOLDER / build['context']).resolve()
      self.assertEqual(context, helpers.ROOT)
      self.assertTrue((context / build['dockerfile']).is_file())
      check(service['command'])

  @pytest.mark.slow
  def test_the_steps_of_the_image_run_on_a_read_only_root(self):
    """The first RUN installs; the entry point trains in /work, here elsewhere.

    Nothing is fetched: what the package needs is that of these tests.
    """
    if not has_sandbox():
      self.skipTest('this system gives no namespaces to its users')
    root = pathlib.Path(self.create_tempdir().full_path)
    work, tmp, source = root / 'work', root / 'tmp', root / 'source'
    for folder in (work, tmp):
      folder.mkdir()
    shutil.copytree(
      helpers.ROOT,
      source,
      ignore=shutil.ignore_patterns('.*', 'runs', 'tests', '*.egg-info'),
    )
    found = instructions()
    install = dict(reversed(found))['RUN'].replace('/opt/covenant', f'{root}/v')
    install = install.replace(
      'pip install', 'pip install --no-index --no-deps --no-build-isolation'
    )
    packages = os.pathsep.join(p for p in sys.path if 'site-packages' in p)
    given = {
      'PATH': f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}',
      'PYTHONPATH': packages,
      'EXTRAS': 'run',
      'JAX': '',
      'JAX_PLATFORMS': 'cpu',
    }
    subprocess.run(['bash', '-ec', install], cwd=source, env=given, check=True)
    shutil.rmtree(source)
    final = dict(found)
    variables = dict(word.split('=', 1) for word in final['ENV'].split())
    places = {'/work': work, '/tmp': tmp, '/opt/covenant': root / 'v'}
    variables = {
      key: re.sub(
        r'^(/work|/tmp|/opt/covenant)', lambda m: str(places[m[1]]), value
      ).replace('$PATH', given['PATH'])
      for key, value in variables.items()
    }
    command = [
      *json.loads(final['ENTRYPOINT']),
      *(word.replace('/work', str(work)) for word in json.loads(final['CMD'])),
      '--config=tiny', '--config.rounds=1',  # the last one counts
    ]  # fmt: skip
    done = subprocess.run(
      [*INSIDE, work, tmp, *command],
      cwd=work,
      env={**given, **variables, 'TMPDIR': str(tmp)},
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 0, done.stderr[-2000:])
    self.assertIn(f'report: {work}/run/report.html', done.stdout)
    self.assertTrue((work / 'run' / 'report.html').is_file())
    self.assertTrue((work / '.cache').is_dir())


def check(words):
  """Fails where a command of the program names what there is not."""
  flags = dict(word[2:].split('=', 1) for word in words)
  assert flags.pop('role', 'emulate') in cli.ROLES, words
  sets = [
    f'{name.removeprefix("config.")}={value}'
    for name, value in flags.items()
    if name.startswith('config.')
  ]
  config_lib.load(flags['config'], sets)
  rest = {name for name in flags if not name.startswith('config')}
  assert rest <= set(cli.flags.FLAGS), rest


class SlurmTest(parameterized.TestCase):
  """The scripts with programs that write down how they were called."""

  def run_script(self, name, *words, **variables):
    folder = pathlib.Path(self.create_tempdir().full_path)
    for program in ('srun', 'covenant'):
      path = folder / program
      path.write_text(f'#!/bin/bash\nprintf "%s\\n" {program} "$@"\n')
      path.chmod(0o755)
    done = subprocess.run(
      ['bash', FOLDER / name, *words],
      cwd=folder,
      env={'PATH': f'{folder}:{os.environ["PATH"]}', **variables},
      capture_output=True,
      text=True,
      check=False,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr

  def test_a_miner_on_two_nodes(self):
    shared = self.create_tempdir().full_path
    code, words, _ = self.run_script(
      'miner.sbatch', '--config.network.hotkey=7', CONFIG='72b', WORKDIR=shared
    )
    self.assertEqual(code, 0)
    self.assertEqual(words[:3], ['srun', '--kill-on-bad-exit=1', 'covenant'])
    self.assertIn('--role=miner', words)
    self.assertIn('--config.network.coordinator=auto', words)
    check(words[3:])
    code, _, error = self.run_script('miner.sbatch', WORKDIR=shared)
    self.assertNotEqual(code, 0)
    self.assertIn('CONFIG: the name or file of a config', error)

  @parameterized.parameters(
    ('0', '0', '0', []),
    ('5', '1', '2', ['--config.optim.inner_steps=30']),
    ('7', '2', '1', ['--config.seed=1', '--config.optim.compression.k=32',
                     '--config.rounds=9']),
  )  # fmt: skip
  def test_a_study_as_an_array(self, task, setting, seed, changes):
    settings = self.create_tempfile(
      'settings.txt',
      '\noptim.inner_steps=30\noptim.compression.k=32 rounds=9\n',
    )
    code, words, error = self.run_script(
      'study.sbatch', settings.full_path, CONFIG='shakespeare', OUT='/out',
      SLURM_ARRAY_TASK_ID=task,
    )  # fmt: skip
    self.assertEqual((code, error), (0, ''))
    self.assertEqual(words[0], 'covenant')
    self.assertIn(f'--workdir=/out/setting-{setting}-seed-{seed}', words)
    self.assertIn(f'--config.seed={seed}', words)
    self.assertContainsSubset(changes, words)
    check(words[1:])

  def test_a_task_beyond_the_settings_says_so(self):
    settings = self.create_tempfile('settings.txt', '\n')
    code, _, error = self.run_script(
      'study.sbatch', settings.full_path, CONFIG='tiny', OUT='/out',
      SLURM_ARRAY_TASK_ID='3',
    )  # fmt: skip
    self.assertEqual(code, 2)
    self.assertRegex(error, 'task 3: .* has 1 settings')

  def test_directives_are_slurms(self):
    for path in FOLDER.glob('*.sbatch'):
      found = re.findall(r'^#SBATCH (--[\w-]+)=?(\S*)$', path.read_text(), re.M)
      names = [name for name, _ in found]
      self.assertContainsSubset({'--job-name', '--time', '--signal'}, names)
      self.assertLen(set(names), len(names))


class LintTest(parameterized.TestCase):
  @parameterized.parameters(
    ('hadolint', ['Dockerfile']),
    ('shellcheck', ['miner.sbatch', 'study.sbatch']),
  )
  def test_linters_have_nothing_to_say(self, program, names):
    beside = pathlib.Path(sys.executable).parent / program
    found = str(beside) if beside.exists() else shutil.which(program)
    if found is None:
      self.skipTest(f'{program} is not installed (extra dev)')
    done = subprocess.run(
      [found, *(FOLDER / name for name in names)],
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual((done.returncode, done.stdout), (0, ''))

  def test_commands_in_comments_are_complete(self):
    """Each file says how it is started, with its own path."""
    for path in FOLDER.iterdir():
      if path.suffix not in ('.dockerignore',):
        text = path.read_text()
        self.assertIn(f'docs/containers/{path.name}', text)
        for line in re.findall(r'^#   (sbatch|docker) .*$', text, re.M):
          self.assertNotEmpty(shlex.split(line))


if __name__ == '__main__':
  absltest.main()
