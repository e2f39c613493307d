"""The chain and the buckets that a config names."""

from unittest import mock

from absl.testing import absltest

from covenant import config as config_lib
from covenant.chain import bittensor
from covenant.chain import interface as chain_lib
from covenant.chain import local_chain
from covenant.chain import storage as chain_storage
from covenant.node import connect
from covenant.store import interface as store_lib
from covenant.store import location as location_lib
from tests import helpers


class ConnectTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = self.create_tempdir().full_path

  def config(self, hotkey='7', *overrides):
    return helpers.tiny(
      f'network.path={self.folder}', f'network.hotkey={hotkey}', *overrides
    )

  def test_keys_are_of_the_seed_and_the_name(self):
    key = connect.local_key(0, 'a').address
    self.assertEqual(key, connect.local_key(0, 'a').address)
    self.assertNotEqual(key, connect.local_key(1, 'a').address)
    self.assertNotEqual(key, connect.local_key(0, 'b').address)

  def test_a_local_chain_is_opened_as_the_hotkey(self):
    config = self.config()
    with self.assertRaises(chain_lib.ChainError):
      connect.chain(config)
    path = connect.chain_file(config)
    local_chain.LocalChain.create(path, b'', chain_storage.ChainRules()).close()
    chain = connect.chain(config)
    self.addCleanup(chain.close)
    self.assertEqual(chain.hotkey, connect.local_key(config.seed, '7').address)

  def test_a_local_network_needs_its_folder(self):
    with self.assertRaisesRegex(config_lib.ConfigError, 'network.path'):
      connect.chain_file(helpers.tiny())

  def test_a_subnet_is_opened_as_the_hotkey_of_a_wallet(self):
    with mock.patch.object(bittensor, 'BittensorChain') as opened:
      chain = connect.chain(
        self.config(
          'hot',
          'network.chain=bittensor',
          'network.name=ws://127.0.0.1:9',
          'network.netuid=7',
          'network.wallet=cold',
          'network.mechanism=1',
        )
      )
    self.assertIs(chain, opened.return_value)
    opened.assert_called_once_with(
      7, 'ws://127.0.0.1:9', 'cold', 'hot', mechanism=1
    )

  def test_others_read_the_bucket_beside_the_chain(self):
    own, other = (
      connect.objects(self.config(name), b'run') for name in ('7', '8')
    )
    own.put_once('key', b'data')
    bucket = other.bucket_at(own.location)
    self.assertEqual(bucket.get('key', 10), b'data')
    with self.assertRaises(store_lib.MissingObjectError):
      other.bucket.get('key', 10)

  def test_other_servers_are_those_of_the_run(self):
    def peers(*overrides):
      config = self.config('7', 'network.chain=bittensor', *overrides)
      objects = connect.objects(config, b'run', writes=False)
      return objects.bucket_at(
        location_lib.Location.parse(
          's3://abc?endpoint=https://s3.example.org:9000'
        ).to_bytes()
      )

    self.assertIsNone(peers())
    self.assertIsNone(peers('store_hosts=s3.example.org,example.org:9000'))
    self.assertIsNotNone(peers('store_hosts=a.b,s3.example.org:9000'))

  def test_a_location_cannot_name_another_folder(self):
    objects = connect.objects(self.config(), b'run')
    objects.put_once('key', b'data')
    for location in (b'/../buckets/7', b'/..', b'/', b'/a/b'):
      self.assertIsNone(objects.bucket_at(location), location)

  def test_a_reader_has_no_location(self):
    objects = connect.objects(self.config(), b'run', writes=False)
    self.assertEqual(objects.location, b'')

  def test_a_bucket_of_each_hotkey_by_one_text(self):
    config = self.config('9', 'network.bucket=memory://connect-{hotkey}')
    objects = connect.objects(config, b'run')
    self.assertIn('connect-9', objects.bucket.location)


if __name__ == '__main__':
  absltest.main()
