"""The package as others install it, in environments of their own."""

import pytest
from absl.testing import absltest
from absl.testing import parameterized

from tests import helpers
from tests import venvs


class RequirementsTest(absltest.TestCase):
  def test_the_optimizer_needs_jax_optax_and_numpy(self):
    names = {r.name for r in venvs.requirements()}
    self.assertEqual(names, {'absl-py', 'jax', 'numpy', 'optax'})

  def test_what_jax_users_have_has_no_upper_bound(self):
    # The newest releases are tested below.
    for requirement in venvs.requirements('run'):
      if requirement.name in ('jax', 'numpy', 'optax', 'flax'):
        operators = {s.operator for s in requirement.specifier}
        self.assertEqual(operators, {'>='}, requirement)


@pytest.mark.install
class ReleasesTest(parameterized.TestCase):
  """The optimizer's tests with the bounds of setup.py, warnings as errors."""

  @parameterized.parameters('oldest', 'newest')
  def test_optimizer(self, which):
    python = venvs.jax_venv(which)
    release = venvs.installed(python)['jax']
    if which == 'oldest':
      (jax,) = [r for r in venvs.requirements() if r.name == 'jax']
      self.assertEqual(str(release), venvs.lower_bound(jax))
    command = [python, '-m', 'pytest', '-q', '-W', 'error', 'tests/optim']
    output = venvs.run(command, cwd=helpers.ROOT)
    self.assertRegex(output, r'\n\d{3,} passed')
    print(f'jax {release}: {output.splitlines()[-1]}')


if __name__ == '__main__':
  absltest.main()
