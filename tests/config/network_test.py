import dataclasses

from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib

Island = config_lib.Island
ISLANDS = (
  Island(count=2, steps=40, batch=16),
  Island(steps=10, stages=2, rank=4),
)


class IslandTest(parameterized.TestCase):
  def test_entries_are_read_in_order(self):
    islands = config_lib.read_islands(
      '2x steps=40, batch=16; steps=10,stages=2,rank=4'
    )
    self.assertEqual(islands, ISLANDS)
    self.assertEqual(
      config_lib.read_islands(config_lib.show_islands(islands)), islands
    )

  def test_empty_text_is_no_island(self):
    self.assertEqual(config_lib.read_islands(''), ())
    self.assertEqual(config_lib.show_islands(()), '')

  def test_text_joins_equal_neighbors(self):
    islands = (Island(steps=3), Island(count=2, steps=3), Island())
    self.assertEqual(config_lib.show_islands(islands), '3x steps=3; 1x')
    self.assertEqual(
      config_lib.read_islands('3x steps=3; 1x'),
      (Island(count=3, steps=3), Island()),
    )

  @parameterized.parameters(
    ('speed=4', 'speed=4'),
    ('steps=-1', 'steps=-1'),
    ('steps=1,steps=2', 'at most once'),
    ('2x 3x steps=1', '3x'),
    ('stages=0', 'stages: expected at least 1'),
    ('rank=4', 'stages=2'),
    ('stages=2,bits=4', 'expected a rank'),
    ('stages=2,rank=3,bits=4', 'an even rank'),
    ('stages=2,rank=4,bits=3', 'bits: expected one of'),
  )
  def test_invalid_text_is_named(self, text, named):
    with self.assertRaisesRegex(config_lib.ConfigError, named):
      config_lib.read_islands(text)

  def test_invalid_values_are_named(self):
    config = dataclasses.replace(
      config_lib.Config(), islands=(Island(), Island(rank=4))
    )
    with self.assertRaisesRegex(config_lib.ConfigError, "islands: '1x rank=4'"):
      config_lib.edit(config, [])
    with self.assertRaisesRegex(
      config_lib.ConfigError, r'islands\[0\].speed: no such field'
    ):
      config_lib.parse({'islands': [{'speed': 3}]})
    with self.assertRaisesRegex(
      config_lib.ConfigError, r'islands\[0\].steps: expected int, got str'
    ):
      config_lib.parse({'islands': [{'steps': '3'}]})


class SectionsTest(parameterized.TestCase):
  @parameterized.parameters(
    (
      'phases.round_blocks: expected more than 16, the length of the other',
      'phases.round_blocks=16',
    ),
    (
      'phases.select_blocks: a vote must be in a block before the decision',
      'phases.confirmations=2',
    ),
    (
      'devices.stage: a stage is one device',
      'devices.stage=2',
      'devices.fsdp=2',
    ),
    (
      'network.coordinator: expected HOST:PORT',
      'network.coordinator=host',
    ),
    (
      'network.coordinator: expected HOST:PORT of process 0',
      'network.processes=2',
    ),
    (
      'network.process: expected less than network.processes = 1, got 1',
      'network.process=1',
    ),
    ('pool.fee: expected at most 1.0', 'pool.fee=2'),
    ('plan.loss: expected at most 0.9', 'plan.loss=1'),
  )
  def test_a_contradiction_names_the_field(self, message, *edits):
    with self.assertRaises(config_lib.ConfigError) as caught:
      config_lib.edit(config_lib.Config(), edits)
    self.assertStartsWith(str(caught.exception), message)
    self.assertNotIn('\n', str(caught.exception))


if __name__ == '__main__':
  absltest.main()
