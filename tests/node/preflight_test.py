import dataclasses
import pathlib
import tempfile
import time
from unittest import mock

import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.chain import local_chain
from covenant.chain import storage as chain_storage
from covenant.node import connect
from covenant.node import preflight
from covenant.protocol import round as round_lib
from covenant.store import bucket as bucket_lib
from covenant.telemetry import machine
from covenant.wire import commitment as commitment_lib
from tests import helpers


class DoctorTest(parameterized.TestCase):
  """On a network of one machine: uid 0 a miner, uid 1 a validator."""

  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory(prefix='covenant-')
    self.addCleanup(folder.cleanup)
    self.config = config_lib.load(
      f'{helpers.CONFIGS}/tiny.py', [f'network.path={folder.name}']
    )
    self.chain = local_chain.LocalChain.create(
      connect.chain_file(self.config),
      b'seed',
      chain_storage.ChainRules(block_seconds=1.0),
    )
    self.addCleanup(self.chain.close)
    for name, validator in ('0', False), ('1', True):
      key = connect.local_key(self.config.seed, name)
      self.chain.register(key.address, 5.0, validator)
    self.chain.begin(time.time() - 10)

  def examine(self, hotkey, role='', **network):
    changed = dataclasses.replace(self.config.network, hotkey=hotkey, **network)
    config = dataclasses.replace(self.config, network=changed)
    workdir = self.create_tempdir().full_path
    return {f.name: f for f in preflight.examine(config, workdir, role)}

  def test_warns_of_a_gpu_that_jax_does_not_use(self):
    with mock.patch.object(
      machine, 'idle_accelerator', lambda backend: f'{backend}: install'
    ):
      config = dataclasses.replace(self.config, network=self.config.network)
      found = list(preflight.examine(config, self.create_tempdir().full_path))
    warning = next(f for f in found if f.warns)
    self.assertTrue(warning.well)  # it may run
    self.assertIn('WARNING   devices     cpu: install', preflight.table(found))

  @parameterized.parameters(
    ('0', '', 'uid 0; declared role: none yet; validator permit: no'),
    ('0', 'miner', 'uid 0; declared role: none yet'),
    ('1', 'validator', 'uid 1; declared role: none yet; validator permit: yes'),
    ('1', 'miner', 'uid 1; declared role: none yet; validator permit: yes'),
  )
  def test_finds_nothing_wrong(self, hotkey, role, text):
    found = self.examine(hotkey, role)
    self.assertEqual([f.text for f in found.values() if not f.well], [])
    self.assertIn(text, found['hotkey'].text)
    self.assertLen(found, 10)
    self.assertIn('computes the same bits', found['arithmetic'].text)

  @parameterized.parameters(
    ('stranger', 'miner', 'is not registered at block'),
    ('0', 'validator', 'uid 0 has no validator permit'),
  )
  def test_a_hotkey_without_the_right(self, hotkey, role, text):
    found = self.examine(hotkey, role)
    bad = [f for f in found.values() if not f.well]
    self.assertEqual([f.name for f in bad], ['hotkey'])
    self.assertIn(text, bad[0].text)

  @pytest.mark.slow
  def test_a_hotkey_that_votes_cannot_mine(self):
    schedule = round_lib.Schedule(self.config.phases)
    now = self.chain.timestamp(0) + schedule.start(1) + 2
    with mock.patch.object(time, 'time', lambda: now):
      chain = local_chain.LocalChain.open(
        connect.chain_file(self.config),
        connect.local_key(self.config.seed, '1'),
        time.time,
      )
      self.addCleanup(chain.close)
      vote = commitment_lib.Commitment(
        commitment_lib.Role.VALIDATOR, b'', 0, bytes(32)
      )
      chain.commit(commitment_lib.encode(vote))
    now += 2
    with (
      mock.patch.object(time, 'time', lambda: now),
      mock.patch.object(connect, 'chain', return_value=chain),
    ):
      chain._clock = time.time
      found = self.examine('1', 'miner')
      self.assertFalse(found['hotkey'].well)
      self.assertIn(
        'uid 1 voted as a validator in round 0', found['hotkey'].text
      )
      self.assertTrue(self.examine('1', 'validator')['hotkey'].well)

  @parameterized.parameters(-3600, 3600)
  def test_a_clock_that_is_wrong(self, skew):
    now = time.time
    chain = connect.chain(self.config)
    with mock.patch.object(connect, 'chain', return_value=chain):
      with mock.patch.object(preflight.time, 'time', lambda: now() + skew):
        with mock.patch.object(chain, 'head', return_value=5):
          found = self.examine('0')
    self.assertFalse(found['clock'].well)
    self.assertIn('set the clock (NTP)', found['clock'].text)

  def test_a_bucket_without_credentials(self):
    with mock.patch.dict('os.environ', clear=False) as environ:
      environ.pop('AWS_ACCESS_KEY_ID', None)
      found = self.examine('0', bucket='s3://runs')
    self.assertFalse(found['bucket'].well)
    self.assertIn('AWS_ACCESS_KEY_ID', found['bucket'].text)

  @pytest.mark.slow
  def test_a_bucket_that_replaces_what_must_stay(self):
    put = bucket_lib.ObstoreBucket.put

    def careless(bucket, key, data, *, replace=False):
      put(bucket, key, data, replace=True)

    with mock.patch.object(bucket_lib.ObstoreBucket, 'put', careless):
      found = self.examine('0')
    self.assertFalse(found['bucket'].well)
    self.assertIn('If-None-Match', found['bucket'].text)

  def test_the_probe_is_gone(self):
    self.examine('0')
    folder = pathlib.Path(self.config.network.path, 'buckets', '0')
    self.assertEqual([p for p in folder.rglob('*') if p.is_file()], [])

  def test_no_room_and_no_data(self):
    usage = mock.Mock(free=10)
    with mock.patch.object(machine.shutil, 'disk_usage', return_value=usage):
      found = self.examine('0')
    self.assertFalse(found['disk'].well)
    self.assertIn('3 checkpoints take', found['disk'].text)

  def test_a_role_that_cannot_start_says_all_of_it(self):
    network = dataclasses.replace(
      self.config.network, hotkey='0', bucket='s3://runs'
    )
    config = dataclasses.replace(self.config, network=network)
    with mock.patch.dict('os.environ', clear=False) as environ:
      environ.pop('AWS_ACCESS_KEY_ID', None)
      with self.assertRaisesRegex(
        preflight.PreflightError,
        r'(?s)this validator cannot start:.*permit.*AWS_ACCESS',
      ):
        preflight.require(config, self.create_tempdir().full_path, 'validator')


if __name__ == '__main__':
  absltest.main()
