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
    """536 TFLOP/s: reference/papers.md 2, by 6 x parameters x tokens."""
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


if __name__ == '__main__':
  absltest.main()
