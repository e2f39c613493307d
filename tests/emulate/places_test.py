"""The rows of devices: how many there are, and of which processes."""

import types
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.emulate import places as places_lib
from covenant.models import sharding
from tests import helpers


def meshes(*owners):
  """Stand-ins for rows of devices of these processes."""
  return [
    types.SimpleNamespace(
      size=len(row),
      devices=np.array([types.SimpleNamespace(process_index=i) for i in row]),
    )
    for row in owners
  ]


class PlacesTest(parameterized.TestCase):
  def places(self, config, processes, *owners):
    rows = mock.patch.object(
      sharding, 'rows', lambda devices, available: meshes(*owners)
    )
    count = mock.patch.object(jax, 'process_count', lambda: processes)
    with rows, count:
      return [place.rank for place in places_lib.places(config)]

  @parameterized.parameters(
    (8, [0, 1, 0, 1, 0, 1]), (3, [0, 1, 0]), (2, [0, 1])
  )  # fmt: skip
  def test_all_processes_have_miners(self, miners, want):
    config = helpers.tiny(f'miners={miners}')
    got = self.places(config, 2, [0], [0], [0], [1], [1], [1])
    self.assertEqual(got, want)

  def test_a_process_without_a_miner_is_refused(self):
    with self.assertRaisesRegex(
      config_lib.ConfigError, r'devices.peers: 2 miners .* processes \[1, 2\]'
    ):
      self.places(helpers.tiny(), 3, [0], [0])
    with self.assertRaisesRegex(config_lib.ConfigError, r'as miners \(1\)'):
      self.places(helpers.tiny('miners=1'), 2, [0], [1])

  def test_a_miner_on_two_processes_is_refused(self):
    with self.assertRaisesRegex(
      config_lib.ConfigError, r'2 devices .* processes \[0, 1\]; lower'
    ):
      self.places(helpers.tiny(), 2, [0, 1])

  def test_more_rows_than_devices_are_refused(self):
    with self.assertRaisesRegex(config_lib.ConfigError, 'devices.peers'):
      places_lib.places(helpers.tiny('devices.peers=9'))

  def test_0_is_as_many_as_there_are(self):
    self.assertLen(
      places_lib.places(helpers.tiny('miners=4', 'devices.peers=0')), 4
    )
    self.assertLen(
      places_lib.places(helpers.tiny('miners=9', 'devices.peers=0')), 8
    )

  def test_what_one_memory_holds(self):
    self.assertEqual(places_lib.most(helpers.tiny('miners=9')), 9)
    self.assertEqual(
      places_lib.most(helpers.tiny('miners=9', 'devices.peers=4')), 12
    )


class AllCoresTest(parameterized.TestCase):
  def places(self, *changes, cores=5, devices=1):
    """Returns the rows on some CPU devices of a machine with `cores`."""
    config = helpers.tiny('devices.peers=0', 'miners=9', *changes)
    available = jax.devices()[:devices]
    with (
      mock.patch.object(jax, 'devices', lambda: available),
      mock.patch.object(places_lib.machine, 'cores', lambda: cores),
    ):
      return places_lib.places(config), places_lib.describe(config)

  def test_a_row_per_core(self):
    self.assertEqual(config_lib.Config().devices.peers, 0)
    places, text = self.places()
    self.assertLen(places, 5)
    self.assertLen(set(places), 1)
    self.assertStartsWith(
      text, '5 of 9 miners train at the same time, on 5 cores of 1 device (cpu)'
    )

  @parameterized.parameters(
    (1, 'devices.peers=1'),
    (3, 'miners=3'),
    (1, 'devices.data=0'),
  )
  def test_a_choice_of_the_user_holds(self, rows, change):
    self.assertLen(self.places(change)[0], rows)

  def test_devices_come_first(self):
    self.assertLen(self.places(devices=2)[0], 4)  # of two cores each
    self.assertLen(self.places(devices=8)[0], 8)
    self.assertLen(self.places('devices.fsdp=2', devices=2)[0], 1)


if __name__ == '__main__':
  absltest.main()
