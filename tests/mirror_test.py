"""Each module of the package has its tests where its reader looks for them."""

from absl.testing import absltest

from tests import helpers

LINES = 100  # a module of more has a test file of its own name
NAMED = {'__init__': 'exports'}  # a module whose tests are called otherwise


def modules() -> dict[str, int]:
  """Lines of each module, by its path below covenant/ without .py."""
  package = helpers.ROOT / 'covenant'
  return {
    path.relative_to(package).with_suffix('').as_posix(): len(
      path.read_text(encoding='utf-8').splitlines()
    )
    for path in sorted(package.rglob('*.py'))
  }


def untested() -> set[str]:
  """The large modules without a test file of their name."""
  return {
    name
    for name, lines in modules().items()
    if lines > LINES
    and not (
      helpers.ROOT / 'tests' / f'{NAMED.get(name, name)}_test.py'
    ).exists()
  }


class MirrorTest(absltest.TestCase):
  def test_every_large_module_has_its_tests(self):
    missing = sorted(untested())
    self.assertEmpty(
      missing, f'more than {LINES} lines; write tests/NAME_test.py of each'
    )

  def test_modules_are_found(self):
    self.assertContainsSubset({'metrics', 'chain/yuma'}, modules())


if __name__ == '__main__':
  absltest.main()
