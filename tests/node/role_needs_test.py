import dataclasses
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.node import publishing
from covenant.node import role_needs
from covenant.plan import memory
from covenant.telemetry import machine
from tests import helpers


def load(name, *overrides):
  return config_lib.load(str(helpers.CONFIGS / f'{name}.py'), overrides)


class RoleNeedsTest(parameterized.TestCase):
  def with_devices(self, gigabytes, host=4000):
    self.enterContext(
      mock.patch.object(role_needs, 'device_memory', lambda: gigabytes * 1e9)
    )
    self.enterContext(
      mock.patch.object(machine, 'memory_bytes', lambda: int(host * 1e9))
    )

  @parameterized.parameters('miner', 'validator', 'evaluator')
  def test_a_role_is_checked_on_its_own_mesh(self, role):
    self.with_devices(192)
    well, text = role_needs.memory_line(load('72b'), role)
    self.assertTrue(well, text)
    self.assertIn('GB of each device', text)
    well, text = role_needs.memory_line(load('72b', 'devices.fsdp=1'), role)
    self.assertFalse(well)
    self.assertIn('Raise devices.fsdp', text)

  @parameterized.parameters('miner', 'validator', 'evaluator')
  def test_a_host_with_too_little_memory(self, role):
    self.with_devices(192, host=400)
    well, text = role_needs.memory_line(load('72b'), role)
    self.assertFalse(well)
    self.assertIn('GB of host memory, of 400.0 GB here', text)

  def test_the_head_of_a_pipeline_needs_no_parameters(self):
    self.with_devices(24, host=64)
    self.assertFalse(role_needs.memory_line(load('72b'), 'pool')[0])
    config = load('72b', 'islands=1x stages=80,rank=324,bits=4')
    well, text = role_needs.memory_line(config, 'pool')
    self.assertTrue(well, text)
    folder = self.create_tempdir().full_path
    disk, _ = role_needs.disks_of(config, folder, 'pool')
    whole, _ = role_needs.disks_of(load('72b'), folder, 'pool')
    self.assertLess(disk.needed, whole.needed)

  def test_devices_in_the_hosts_memory_count_there(self):
    config = load('tiny')
    with mock.patch.object(machine, 'memory_bytes', lambda: 1000):
      (need,) = role_needs.memory_of(config, 'validator')
    self.assertEqual(need.what, 'memory')
    self.assertTrue(need.lacks)

  def test_the_temporary_folder_needs_room(self):
    config = load('72b')
    folder = self.create_tempdir().full_path
    with mock.patch.object(
      machine,
      'free_disk_bytes',
      lambda path: 1e8 if str(path) == tempfile.gettempdir() else 1e14,
    ):
      well, text = role_needs.disk_line(config, folder, 'validator')
    self.assertFalse(well)
    self.assertIn(f'temporary files in {tempfile.gettempdir()} take', text)

  def test_what_a_validator_keeps_on_its_disk(self):
    """Shared state, without a miner's moments and error feedback."""
    config, folder = load('72b'), self.create_tempdir().full_path
    validator, miner = (
      role_needs.disks_of(config, folder, role)[0].needed
      for role in ('validator', 'miner')
    )
    state = 8 * 70_599_843_840
    self.assertAlmostEqual(2 * (validator - state), miner - state, delta=1e9)

  def test_the_quota_of_a_bucket(self):
    with mock.patch.object(machine, 'free_disk_bytes', lambda path: 5e9):
      folder = role_needs.bucket_of(load('72b'), 'file:///x', 'validator')
    self.assertEqual(folder.there, 5e9)
    self.assertTrue(folder.lacks)
    store = role_needs.bucket_of(load('72b'), 's3://runs', 'validator')
    self.assertIsNone(store.there)
    self.assertFalse(store.lacks)
    miner = role_needs.bucket_of(load('72b'), 's3://runs', 'miner')
    self.assertLess(miner.needed, store.needed / 20)

  def test_a_bucket_keeps_rounds_as_long_as_turns_take(self):
    """Own checkpoints of a validator are as far apart as its turns."""
    one, three = (
      role_needs.bucket_of(config, 's3://runs', 'validator').needed
      for config in (load('72b'), load('72b', 'validators=3'))
    )
    config = load('72b')
    rounds = publishing.keep_rounds(config, 3) - publishing.keep_rounds(
      config, 1
    )
    self.assertEqual(
      rounds, 2 * (config.checkpoint.keep + 1) * config.checkpoint.publish
    )
    payload = memory.shards(config).payload_bytes
    self.assertEqual(three - one, rounds * config.plan.peers * payload)

  def test_phases_matter_where_blocks_are_final_late(self):
    config = load('72b', 'phases.select_blocks=8')
    self.assertEmpty([*role_needs.phases_of(config)])
    network = dataclasses.replace(config.network, chain='bittensor')
    real = dataclasses.replace(config, network=network)
    (problem,) = role_needs.phases_of(real)
    self.assertStartsWith(problem, 'phases.select_blocks: expected at least 16')


if __name__ == '__main__':
  absltest.main()
