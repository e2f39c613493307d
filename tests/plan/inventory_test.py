from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.plan import hardware
from covenant.plan import inventory

PLAN = config_lib.Plan()


def parse(text):
  return inventory.parse(text, PLAN)


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
