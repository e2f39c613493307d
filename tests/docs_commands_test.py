"""Commands of the documentation and of .ci/run: configs, roles and fields.

.ci/run runs those of the documentation that are short.
"""

import importlib.util
import re
import shlex

from absl.testing import absltest
from absl.testing import parameterized

from covenant import cli
from covenant import config as config_lib
from tests import helpers
from tests import venvs

PAGES = ('README.md', 'AGENTS.md', 'CONTRIBUTING.md', 'docs/*.md')


def pages():
  """Yields (name, text) of every page."""
  for pattern in PAGES:
    for page in sorted(helpers.ROOT.glob(pattern)):
      yield page.name, page.read_text(encoding='utf-8')


def messages():
  """Yields (name, text) of every module, whose errors may name extras."""
  for path in sorted((helpers.ROOT / 'covenant').rglob('*.py')):
    text = path.read_text(encoding='utf-8')
    needed = re.findall(r"extras\.needed\('(.*)'\)", text)
    yield path.name, text + ''.join(f"'covenant[{name}]'" for name in needed)


def commands():
  """Yields (page, words) of every command of a block of shell."""
  for name, text in pages():
    for block in re.findall(r'```sh\n(.*?)```', text, re.DOTALL):
      for line in block.replace('\\\n', ' ').splitlines():
        for command in line.split(' && '):
          words = shlex.split(command.removesuffix(' &'), comments=True)
          if words:
            yield name, words


def steps():
  """Yields (page, words) of every run of the program in .ci/run."""
  text = (helpers.ROOT / '.ci' / 'run').read_text(encoding='utf-8')
  for line in text.replace('\\\n', ' ').splitlines():
    _, found, rest = line.partition('python run.py ')
    if found:
      yield '.ci/run', ['python', 'run.py', *shlex.split(rest)]


PROGRAM = [c for c in commands() if c[1][:2] == ['python', 'run.py']]
PROGRAM += steps()
# The same program under its other name.
PROGRAM += [
  (page, ['python', 'run.py', *words[1:]])
  for page, words in commands()
  if words[0] == 'covenant'
]
MODULES = sorted(
  {
    (module,)
    for _, text in pages()
    for module in re.findall(
      r'python -m ((?:benchmarks|experiments)\.\w+)', text
    )
  }
)


class CommandsTest(parameterized.TestCase):
  @parameterized.parameters(*PROGRAM)
  def test_names_what_there_is(self, page, words):
    del page
    flags = dict(word[2:].partition('=')[::2] for word in words[2:])
    config = flags.pop('config', 'shakespeare')
    self.assertIn(flags.pop('role', 'emulate'), cli.ROLES)
    sets = [
      f'{name.removeprefix("config.")}={value}'
      for name, value in flags.items()
      if name.startswith('config.')
    ]
    rest = {name for name in flags if not name.startswith('config.')}
    self.assertContainsSubset(rest, set(cli.flags.FLAGS))
    is_of_a_run = config.startswith('runs/')  # a command before it writes it
    if '...' not in config and '$' not in config and not is_of_a_run:
      file = helpers.ROOT / config
      config_lib.load(str(file) if '/' in config else config, sets)

  @parameterized.parameters(*MODULES)
  def test_modules_are_there(self, module):
    self.assertIsNotNone(importlib.util.find_spec(module))

  def test_extras_are_there(self):
    known = venvs.setup_arguments()['extras_require']
    asked = [
      (page, extra.strip())
      for page, text in [*pages(), *messages()]
      for extras in re.findall(r"'(?:covenant|\.)\[([\w, -]+)\]'", text)
      for extra in extras.split(',')
    ]
    self.assertGreater(len(asked), 15)
    self.assertEqual([a for a in asked if a[1] not in known], [])

  def test_tests_are_there(self):
    known = {}
    for path in (helpers.ROOT / 'tests').rglob('*_test.py'):
      text = path.read_text(encoding='utf-8')
      found = known.setdefault(path.name, set())
      found.update(re.findall(r'^ +def (test_\w+)', text, re.MULTILINE))
    file, named = '', []
    for _, text in pages():
      for name, test in re.findall(r'`(?:[\w/]*?(\w+\.py))?::(\w+)`', text):
        file = name or file
        named.append((file, test))
    self.assertGreater(len(named), 20)
    missing = [x for x in named if x[1] not in known.get(x[0], ())]
    self.assertEqual(missing, [])

  def test_commands_are_found(self):
    self.assertGreater(len(PROGRAM), 10)


if __name__ == '__main__':
  absltest.main()
