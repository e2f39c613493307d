"""docs/sparseloco.md: an ordinary optax loop, changed in three lines."""

import difflib
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


def run(source):
  """Returns the loss that the program prints at its end."""
  result = subprocess.run(
    [sys.executable, '-c', source], capture_output=True, text=True
  )
  if result.returncode:
    raise AssertionError(result.stderr)
  return float(result.stdout.split()[-1])


class ThirdPartyTest(parameterized.TestCase):
  @parameterized.parameters('sparseloco', 'diloco')
  def test_at_most_three_lines_change_and_it_trains(self, name):
    before, after = listing('plain'), listing(name)
    self.assertNotIn('covenant', before)
    changed = [
      line
      for line in difflib.ndiff(before.splitlines(), after.splitlines())
      if line.startswith('+ ')
    ]
    self.assertLessEqual(len(changed), 3, changed)
    self.assertLess(run(after), 0.02)

  def test_the_plain_loop_trains(self):
    self.assertLess(run(listing('plain')), 0.02)


if __name__ == '__main__':
  absltest.main()
