import dataclasses

from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.plan import hardware


def config(text, **devices):
  return config_lib.Config(
    devices=config_lib.Devices(**devices), plan=config_lib.Plan(hardware=text)
  )


class HardwareTest(parameterized.TestCase):
  @parameterized.parameters(
    ('8xB200', 8, 'B200', 1), ('9xh100', 9, 'H100', 2), ('1xA100-40', 1,
     'A100-40', 1), ('6xv5p', 6, 'v5p', 2),
  )  # fmt: skip
  def test_parse(self, text, count, name, hosts):
    found = hardware.parse(text)
    self.assertEqual((found.count, found.name), (count, name))
    self.assertEqual(found.hosts, hosts)

  @parameterized.parameters('8xB2000', 'B200', '0xB200', '-1xB200', '8 x B200')
  def test_what_is_not_known_is_one_line_that_lists_what_is(self, text):
    with self.assertRaises(config_lib.ConfigError) as caught:
      hardware.parse(text)
    message = str(caught.exception)
    self.assertIn(f'got {text!r}', message)
    self.assertNotIn('\n', message)
    for name in hardware.DEVICES:
      self.assertIn(name, message)

  def test_several_hosts_are_as_fast_as_the_link_between_them(self):
    one, two = hardware.parse('8xH100'), hardware.parse('16xH100')
    self.assertEqual(one.link, one.device.inside)
    self.assertEqual(two.link, two.device.outside)

  def test_every_device_has_a_source_and_sane_numbers(self):
    for name, device in hardware.DEVICES.items():
      with self.subTest(name):
        self.assertNotEmpty(device.source)
        self.assertBetween(device.memory, 16e9, 1e12)
        # Of bfloat16 and float32 sums, dense: none has more yet.
        self.assertBetween(device.peak, 5e13, 2.5e15)
        self.assertLess(device.outside, device.bandwidth)

  def test_published_rate_of_a_b200(self):
    """Checks 536 TFLOP/s (arXiv 2603.08163): 6 x parameters x tokens."""
    tokens = 30 * 192 * 2048
    rate = 6 * 72_747_327_488 * tokens / (20 * 60 * 8)
    self.assertAlmostEqual(rate / 1e12, 536, delta=1)
    share = rate / hardware.DEVICES['B200'].peak
    self.assertAlmostEqual(share, config_lib.Plan().peak_fraction, delta=0.02)

  def test_devices_must_be_those_of_the_mesh(self):
    hardware.check(config('8xB200', data=2, fsdp=2, tensor=2))
    with self.assertRaisesRegex(
      config_lib.ConfigError, r'plan.hardware: 8 devices, .* 1 \* 4 \* 1 = 4'
    ):
      hardware.check(config('8xB200', fsdp=4))

  def test_copies_take_the_devices_that_are_left(self):
    found = hardware.resolve(config('8xB200', data=0, fsdp=4))
    self.assertEqual(found.devices.data, 2)
    said = config('8xB200', data=1, fsdp=4)
    self.assertEqual(hardware.resolve(said), said)

  def test_a_plan_is_nobody_elses_affair(self):
    one, other = config('8xB200'), config('1x4090')
    self.assertEqual(config_lib.identity(one), config_lib.identity(other))
    self.assertNotEqual(
      config_lib.identity(one),
      config_lib.identity(dataclasses.replace(one, seed=1)),
    )


PLAN = config_lib.Plan()


def parse(text):
  return hardware.parse_inventory(text, PLAN)


class ParseTest(parameterized.TestCase):
  def test_the_one_of_the_docs(self):
    groups = parse('8xB200, 16xH100, 64xA100 in pairs, 400x4090 on 200 Mb/s')
    found = [(g.name, g.hosts, g.together) for g in groups]
    self.assertEqual(
      found,
      [
        ('8xB200', 1, True),
        ('8xH100', 2, True),
        ('2xA100', 32, False),
        ('4090', 400, False),
      ],
    )
    # Megabits here, megabytes where nothing is said.
    self.assertEqual((groups[3].upload, groups[3].download), (25e6, 25e6))
    self.assertEqual((groups[0].upload, groups[0].download), (110e6, 500e6))

  @parameterized.parameters(
    ('2xa100-40 alone', 'A100-40', 2, 1),
    ('8x4090 in fours', '4090', 2, 4),
    ('3xH100', 'H100', 1, 3),
    ('16xv5e', 'v5e', 4, 4),
  )
  def test_hosts(self, text, kind, hosts, size):
    (group,) = parse(text)
    self.assertEqual((group.kind, group.hosts, group.size), (kind, hosts, size))
    # What a host has is on one link.
    self.assertEqual(hardware.Hardware(size, kind, group.device).hosts, 1)

  def test_what_is_said_in_any_order(self):
    (group,) = parse('4x3090 with 40 ms on 1 Gb/s / 300 Mb/s up in pairs '
                     'with 12.5 GB')  # fmt: skip
    self.assertEqual(group.latency, 0.04)
    self.assertEqual((group.upload, group.download), (37.5e6, 125e6))
    self.assertEqual((group.size, group.device.memory), (2, 12.5e9))
    self.assertEqual(group.device.peak, hardware.DEVICES['3090'].peak)

  def test_any_device(self):
    (group,) = parse('2xany with 80 TFLOP/s with 24 GB')
    self.assertEqual((group.device.peak, group.device.memory), (80e12, 24e9))
    self.assertEqual((group.hosts, group.size), (2, 1))

  @parameterized.parameters(
    ('8xB200, pony', "'pony': expected such as"),
    ('0xH100', "'0xH100': expected such as"),
    ('8xB9', "there is no kind 'B9'; kinds: B300"),
    ('7xA100 in pairs', '7 devices do not fill hosts of 2; write two'),
    ('12xH100', '12 devices do not fill hosts of 8'),
    ('8xA100 in heaps', 'expected in pairs, in threes'),
    ('8xA100 on 20 MB/s', "cannot read 'on 20 MB/s'; .* megabits"),
    ('8xA100 on 20 Mb/s on 3 Mb/s', 'download is given twice'),
    ('8xA100 on 0 Mb/s', 'download is 0'),
    ('2xany with 24 GB', 'expected such as 2xany with 80 TFLOP/s'),
  )
  def test_what_cannot_be_read_is_named(self, text, message):
    with self.assertRaisesRegex(config_lib.ConfigError, message) as caught:
      parse(text)
    self.assertStartsWith(str(caught.exception), 'plan.inventory: ')


if __name__ == '__main__':
  absltest.main()
