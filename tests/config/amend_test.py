from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.config import amend
from tests import helpers


class AmendTest(parameterized.TestCase):
  @parameterized.parameters(
    ('seed=1', 'may not change in a live run'),
    ('model.width=128', 'may not change in a live run'),
    ('optim.inner_steps=7', 'may not change in a live run'),
    ('phases.origin=7', 'may not change in a live run'),
    ('nonsense=7', 'may not change in a live run'),
    ('optim.outer.learning_rate=fast', 'expected float'),
    ('rounds', 'expected PATH=VALUE'),
  )
  def test_what_is_no_amendment(self, edit, error):
    with self.assertRaisesRegex(config_lib.ConfigError, error):
      amend.parse([edit])

  def test_texts_become_values(self):
    phases = '[{"start": 0, "mixture": [{"path": "web", "weight": 2}]}]'
    edits = ['rounds=30', 'release=3.1', f'data.phases={phases}', 'protocol=2']
    found = amend.parse(edits)
    self.assertEqual(found['rounds'], 30)
    self.assertEqual((found['protocol'], found['release']), (2, '3.1'))
    (share,) = found['data.phases'][0]['mixture']
    self.assertEqual(share, {'path': 'web', 'weight': 2.0, 'digest': ''})

  @parameterized.parameters(([],), (['rounds=3', 'rounds=4'],))
  def test_no_change_and_two(self, edits):
    with self.assertRaisesRegex(config_lib.ConfigError, '--set'):
      amend.parse(edits)

  def test_every_field_exists_and_is_part_of_the_run(self):
    known = config_lib.flatten(config_lib.Config())
    self.assertContainsSubset(amend.FIELDS, known)
    # All but the length, which is a node's own until an amendment sets it.
    shown = {
      path
      for path in amend.FIELDS
      if path not in ('rounds', 'data.phases')
      and isinstance(known[path], float | int)
    }
    for path in shown:
      text = f'{path}={known[path] * 2 or 1}'
      try:
        config = config_lib.edit(helpers.tiny(), [text])
      except config_lib.ConfigError:
        continue  # out of bounds, or it contradicts another field
      if config != helpers.tiny():
        self.assertNotEqual(
          config_lib.identity(config), config_lib.identity(helpers.tiny()), path
        )

  def test_amended(self):
    config = helpers.tiny('rounds=20')
    changes = {'optim.outer.learning_rate': 0.5, 'protocol': 2, 'release': '3'}
    found = amend.amended(config, 4, changes)
    self.assertEqual(
      amend.differences(config, found),
      {'optim.outer.learning_rate': ['1.0', '0.5']},
    )


if __name__ == '__main__':
  absltest.main()
