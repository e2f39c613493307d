"""Tests for covenant.extras."""

from absl.testing import absltest
from absl.testing import parameterized

from covenant import errors
from covenant import extras


class ExtrasTest(parameterized.TestCase):
  @parameterized.parameters('nowhere', 'nowhere.part')
  def test_a_missing_package_names_its_extra(self, module):
    message = "^nowhere is not installed; run: pip install 'covenant\\[run\\]'$"
    with (
      self.assertRaisesRegex(extras.MissingExtraError, message) as caught,
      extras.needed('run'),
    ):
      __import__(module)
    self.assertIsInstance(caught.exception, errors.CovenantError)
    self.assertIsInstance(caught.exception, ImportError)
    with self.assertRaisesRegex(extras.MissingExtraError, message):
      extras.require('run', 'nowhere')

  def test_what_is_there_is_imported(self):
    with extras.needed('run'):
      import json
    extras.require('run', 'json')
    self.assertEqual(json.loads('1'), 1)

  @parameterized.parameters(
    ('covenant.nowhere', ModuleNotFoundError),  # a fault of ours
    ('json:nothing', ImportError),  # another release
  )
  def test_other_faults_are_left(self, target, kind):
    module, _, name = target.partition(':')
    with self.assertRaises(kind) as caught, extras.needed('run'):
      exec(f'from {module} import {name or "x"}')
    self.assertNotIsInstance(caught.exception, extras.MissingExtraError)


if __name__ == '__main__':
  absltest.main()
