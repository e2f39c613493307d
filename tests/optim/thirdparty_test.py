"""docs/sparseloco.md: an ordinary optax loop, changed in three lines."""

import re
import subprocess
import sys

import pytest
from absl.testing import absltest
from absl.testing import parameterized

from tests import helpers

pytestmark = pytest.mark.docs

DOCS = helpers.ROOT / 'docs' / 'sparseloco.md'


def listing(name):
  """The Python listing below the HTML comment that names it."""
  text = DOCS.read_text()
  return re.search(rf'<!-- {name} -->\n```python\n(.*?)```', text, re.S)[1]


def before(name):
  """The program that the diff below an HTML comment changes to SparseLoCo's."""
  text = DOCS.read_text()
  diff = re.search(rf'<!-- {name} -->\n```diff\n(.*?)```', text, re.S)[1]
  program = listing('sparseloco')
  added = 0
  for old, new in re.findall(
    r'((?:^-.*\n)*)((?:^\+.*\n)+)', diff, re.MULTILINE
  ):
    old, new = (re.sub(r'^[-+]', '', x, flags=re.M) for x in (old, new))
    assert program.count(new) == 1, new
    program = program.replace(new, old)
    added += new.count('\n')
  return program, added


def run(source):
  """Returns the loss that the program prints at its end."""
  result = subprocess.run(
    [sys.executable, '-c', source], capture_output=True, text=True
  )
  if result.returncode:
    raise AssertionError(result.stderr)
  return float(result.stdout.split()[-1])


class ThirdPartyTest(parameterized.TestCase):
  @parameterized.parameters(('plain', 3), ('diloco', 2))
  def test_few_lines_change_and_it_trains(self, name, lines):
    program, added = before(name)
    self.assertEqual(added, lines)
    self.assertNotIn('sparseloco', program)
    self.assertLess(run(program), 0.02)

  @parameterized.parameters('sparseloco', 'replicated', 'converted')
  def test_listings_train(self, name):
    self.assertLess(run(listing(name)), 0.02)

  def test_a_conversion_keeps_model_loss_and_step(self):
    functions = r'(def (?:apply|loss|train_step)\(.*?)\n\n\n'
    kept = re.findall(functions, listing('replicated'), re.S)
    self.assertLen(kept, 3)
    self.assertEqual(kept, re.findall(functions, listing('converted'), re.S))

  @parameterized.parameters(
    ('schedules', "schedules ['error_decay', 'inner_steps', 'rate']"),
    ('vmap', 'shared (64, 64)'),
  )
  def test_other_listings(self, name, output):
    result = subprocess.run(
      [sys.executable, '-c', listing(name)], capture_output=True, text=True
    )
    self.assertEqual(result.stdout.strip(), output, result.stderr)


if __name__ == '__main__':
  absltest.main()
