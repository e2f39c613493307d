"""The chain's tests with the oldest and the newest SDK that setup.py admits."""

import pathlib
import sys

import pytest
from absl.testing import absltest
from absl.testing import parameterized

from tests import helpers
from tests import venvs

SUITE = (
  'tests/chain/interface_test.py',
  'tests/chain/bittensor_test.py',
  'tests/chain/connection_test.py',
  'tests/chain/session_test.py',
  'tests/chain/subnet_test.py',
)


@pytest.mark.install
class ReleasesTest(parameterized.TestCase):
  """With the packages that are here, but for the SDK."""

  @parameterized.parameters('oldest', 'newest')
  def test_chain(self, which):
    (sdk,) = (r for r in venvs.requirements('network') if r.name == 'bittensor')
    if which == 'newest' and venvs.is_newest(sdk):
      self.skipTest('the unit tests have run with the newest release')
    wanted = str(sdk)
    if which == 'oldest':
      wanted = f'bittensor=={venvs.lower_bound(sdk)}'
    folder = pathlib.Path(self.create_tempdir().full_path)
    pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps']
    venvs.run([*pip, '--target', folder, wanted])
    output = venvs.run(
      [sys.executable, '-m', 'pytest', '-q', '-n', '0', *SUITE],
      cwd=helpers.ROOT,
      PYTHONPATH=f'{folder}:{helpers.ROOT}',
      JAX_PLATFORMS='cpu',
    )
    self.assertRegex(output, r'\n?1\d\d passed')
    (found,) = folder.glob('bittensor-*.dist-info')
    if which == 'oldest':
      self.assertIn(venvs.lower_bound(sdk), found.name)
    print(f'{found.stem}: {output.splitlines()[-1]}')


if __name__ == '__main__':
  absltest.main()
