import re

from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.plan import memory
from covenant.plan import table
from tests import helpers

LADDER = ('150m', '512m', '1b', '8b', '72b', '1t')


def load(name, *overrides):
  return config_lib.load(str(helpers.CONFIGS / f'{name}.py'), overrides)


class TextTest(parameterized.TestCase):
  @parameterized.parameters(*LADDER)
  def test_of_every_size(self, name):
    config = load(name)
    page = table.text(config, [table.Program('inner step', '', 1.0)])
    for text in (
      f'{name}: ', 'inner step', 'compress', 'gather', 'outer step',
      'checkpoint', '  20 peers', ' 100 peers', '1000 peers', 'Covenant-72B',
      ': 94.5 %', ': 82.1 %', ': 95.7 %', 'megabytes, not megabits',
    ):  # fmt: skip
      self.assertIn(text, page)
    long = [line for line in page.splitlines() if len(line) > 80]
    self.assertEmpty(long)

  def test_72b(self):
    page = table.text(load('72b'))
    for text in (
      '70,599,843,840 parameters\n', 'data 1 x fsdp 8 x tensor 1',
      '192 x 2048 = 393,216 tokens', '10.00 bits a value sent',
      '1.38 GB up', '26.2 GB down', 'given 20 min', '~94.9 %', '~97.1 %',
      'a round is possible: yes',
    ):  # fmt: skip
      self.assertIn(text, page)

  def test_costs_are_of_the_prices_that_are_given(self):
    self.assertNotIn('costs', table.text(load('72b')))
    page = table.text(
      load('72b', 'plan.device_price=3', 'plan.egress_price=0.09')
    )
    # 30 steps of 393,216 tokens; 8 devices for 103 blocks of 12 s; 26.2 GB.
    tokens, devices, egress = 11.79648, 8 * 3 * 20.6 / 60, 26.2 * 0.09
    for text in (
      '11.80 M a round', '8 x 20.6 min at $3 an hour: $8.24',
      '26.20 GB from stores at $0.09 a GB: $2.36', '$0.1202', '$0.169',
    ):  # fmt: skip
      self.assertIn(text, page)
    (found,) = re.findall(r'~\$([\d.]+) per million tokens', page)
    self.assertAlmostEqual(float(found), (devices + egress) / tokens, places=3)
    long = [line for line in page.splitlines() if len(line) > 80]
    self.assertEmpty(long)

  def test_hosts_that_one_copy_spans_are_said(self):
    self.assertIn('spans 64 hosts', table.text(load('1t')))
    self.assertNotIn('spans', table.text(load('72b')))
    smaller = 'plan.hardware=16xH200', 'devices.fsdp=16'
    self.assertIn('spans 2 hosts', table.text(load('72b', *smaller)))

  def test_what_is_assumed_is_marked(self):
    """Each bandwidth, share of a peak, time and buffer has its tilde."""
    page = table.text(load('72b'))
    for text in ('~110 MB/s', '~500 MB/s', '~0.25 of the peak', '~activations',
                 '~0.94 of a device', '~summed', '~in a tree'):  # fmt: skip
      self.assertIn(text, page)
    self.assertRegex(page, r'inner step +~\d+\.\d')
    self.assertRegex(page, r'time +~\d+\.\d s: arithmetic ~')

  def test_gather_grows_with_peers_and_what_is_summed_does_not(self):
    page = table.text(load('72b'))
    rows = re.findall(r'^ +(\d+) peers +(.*)$', page, re.MULTILINE)
    shares = [[int(x) for x in re.findall(r'(\d+) %', row)] for _, row in rows]
    self.assertLen(shares, 3)
    (_, _, _), _, (direct, summed, tree) = shares
    self.assertLess(direct, 40)
    self.assertGreater(summed, 60)
    self.assertGreater(tree, summed)

  def test_steps_that_take_longer_than_a_round_are_said(self):
    page = table.text(load('72b', 'plan.hardware=8xH100'))
    self.assertIn('too slow: more devices', page)
    page = table.text(load('72b', 'phases.round_blocks=90'))
    self.assertIn('expected at least 102', page)

  @parameterized.parameters(
    ('plan.hardware=8xB9', 'plan.hardware: expected COUNTxKIND'),
    ('plan.hardware=4xB200', 'plan.hardware: 4 devices, but the mesh'),
    ('devices.fsdp=3', 'plan.hardware: 8 devices'),
    ('plan.upload=-1', 'plan.upload: expected more than 0, got -1.0'),
    ('plan.download=0', 'plan.download: expected more than 0'),
    ('plan.memory_fraction=2', 'plan.memory_fraction: expected at most 1.0'),
  )
  def test_bad_input_is_one_line(self, edit, message):
    with self.assertRaises(config_lib.ConfigError) as caught:
      table.text(load('72b', edit))
    self.assertStartsWith(str(caught.exception), message)
    self.assertNotIn('\n', str(caught.exception))


class ProgramsTest(absltest.TestCase):
  def test_of_a_compiler_that_refuses(self):
    programs = [
      table.Program('a', 'cpu', 0.5, 2.0, 3 * 10**9, 0, {'all-reduce': (2, 7)}),
      table.Program('b', 'tpu', 0.5, 2.0, 3 * 10**9, 4 * 10**9),
      table.Program('c', 'tpu', 0.5, error='too large'),
    ]
    page = table.text(load('8b'), programs)
    self.assertRegex(page, r'a +0\.5 s +2\.0 s cpu +3\.0\n +2 all-reduce <= 7')
    self.assertRegex(page, r'b +0\.5 s +2\.0 s tpu +3\.0 \+ 4\.0 beside it')
    self.assertIn('refused: too large', page)


class AdviceTest(parameterized.TestCase):
  @parameterized.parameters(*LADDER)
  def test_the_ladder_fits_on_the_hardware_that_it_names(self, name):
    self.assertTrue(memory.fits(load(name)))
    self.assertIn(f'{name} FITS on', table.verdict(load(name)))

  def test_one_knob_if_one_is_enough(self):
    config = load('8b', 'optim.inner.microbatch_size=24', 'model.loss_chunk=0',
                  'plan.hardware=8xH100')  # fmt: skip
    self.assertFalse(memory.fits(config))
    (knob,) = memory.knobs(config)
    self.assertEqual(knob, 'optim.inner.microbatch_size=1')
    other = memory.edited(config, [knob])
    assert other is not None
    self.assertTrue(memory.fits(other))
    self.assertIn(f'With --config.{knob} it fits', table.verdict(config))

  def test_more_devices_where_no_knob_is_enough(self):
    config = load('72b', 'plan.hardware=8xA100')
    knobs = memory.knobs(config)
    self.assertIn('plan.hardware=32xA100', knobs)
    self.assertIn('devices.fsdp=32', knobs)
    self.assertIn('72b DOES NOT FIT on 8xA100', table.verdict(config))

  def test_what_nothing_helps_is_said(self):
    config = load('72b', 'plan.hardware=1x3090', 'devices.fsdp=1',
                  'optim.inner.batch_size=2')  # fmt: skip
    self.assertEmpty(memory.knobs(config))
    self.assertIn('No knob helps', table.verdict(config))


if __name__ == '__main__':
  absltest.main()
