import re

from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.plan import role_table
from tests import helpers


def load(name, *overrides):
  return config_lib.load(str(helpers.CONFIGS / f'{name}.py'), overrides)


class RoleTableTest(parameterized.TestCase):
  @parameterized.parameters('150m', '512m', '1b', '8b', '72b', '1t')
  def test_a_round_is_possible(self, name):
    self.assertEqual(
      role_table.answer(load(name)).text, 'a round is possible: yes'
    )

  @parameterized.parameters(
    ('phases.select_blocks=15', 'phases.select_blocks: expected at least 16'),
    ('plan.download=60', 'phases.select_blocks: expected at least '),
    ('devices.offload=False', 'miner, inner step: needs ~277.4 of the 180.5'),
    ('checkpoint.publish=1', 'checkpoint.publish: expected at least 5'),
    ('plan.peak_fraction=0.01', 'validator: its phases take ~'),
  )
  def test_what_makes_it_impossible_is_said(self, edit, reason):
    found = role_table.answer(load('72b', edit))
    self.assertStartsWith(found.text, 'a round is possible: no: ')
    self.assertTrue(
      any(problem.startswith(reason) for problem in found.problems),
      found.problems,
    )

  def test_every_role_has_a_line(self):
    lines = [*role_table.of_roles(load('72b'))]
    for text in (
      'miner     largest', 'validator collect', 'validator score',
      'validator apply', 'validator publish', 'evaluator evaluate',
      'evaluator export', 'joiner    load', 'joiner    replay a round',
    ):  # fmt: skip
      self.assertLen([x for x in lines if x.startswith(f'  {text}')], 1, text)

  def test_phases_have_what_they_need_and_what_they_have(self):
    page = '\n'.join(role_table.of_phases(load('72b')))
    found = re.findall(r'^  (\w+_blocks) +~(\d+) +(\d+)', page, re.MULTILINE)
    self.assertEqual(
      {name: (int(needed), int(given)) for name, needed, given in found},
      {
        'put_blocks': (12, 12),
        'select_blocks': (16, 16),
        'takeover_blocks': (12, 12),
        'round_blocks': (102, 103),
      },
    )
    for text in (
      'time to vote   ~188 s', 'to train again ~67 s', 'utilization    ~97.1 %',
      'at 500 Mb/s    ~74.6 %', '~64 cores a host', 'plan.finality_blocks',
    ):  # fmt: skip
      self.assertIn(text, page)

  def test_of_slow_links_nothing_slower_is_said(self):
    slow = load('72b', 'plan.upload=13.75', 'plan.download=62.5')
    self.assertNotIn('500 Mb/s', '\n'.join(role_table.of_phases(slow)))


if __name__ == '__main__':
  absltest.main()
