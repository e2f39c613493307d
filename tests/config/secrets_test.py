"""Tests for the hiding of secrets in the text of a config."""

import json

from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib

SECRET = 'ab12SECRET34cd'


class SecretsTest(parameterized.TestCase):
  @parameterized.parameters(
    f'wss://rpc.example.org/v1/{SECRET}',
    f'wss://rpc.example.org:443/{SECRET}/',
    f'WSS://rpc.example.org?apikey={SECRET}',
    f'wss://rpc.example.org#{SECRET}',
    f'https://user:{SECRET}@rpc.example.org',
    f'https://user:p@{SECRET}@rpc.example.org',
    f'tcp://rpc.example.org:9944/{SECRET}',
    f'https://a.example.org/b?sv=1&SAS={SECRET}',
    f'wss://a.example.org?pwd={SECRET}',
    f'wss://{SECRET}@rpc.example.org',
    f's3://bucket?key_id={SECRET}&secret={SECRET}',
    f'r2://account/bucket?secret={SECRET}&key_id={SECRET}',
    f's3://bucket?endpoint=https://s.example.org&secret={SECRET}',
    f's3://bucket?X-Amz-Signature={SECRET}&region=eu',
    f'SECRET_ACCESS_KEY={SECRET}',
    f'ws://a.example.org/x, wss://b.example.org/{SECRET}',
  )
  def test_hidden_wherever_it_is(self, text):
    for raw in (
      {'network': {'name': text}},
      {'network': {'more': [{'deeper': text}]}},
      {'pool': {'url': text}},
    ):
      shown = json.dumps(config_lib.hide_secrets(raw))
      self.assertNotIn(SECRET, shown)
      self.assertIn('hidden', shown)

  @parameterized.parameters(
    'secret', 'api_key', 'apiKey', 'wandb_token', 'AWS_SECRET_ACCESS_KEY',
    'password',
  )  # fmt: skip
  def test_fields_that_are_named_so(self, name):
    shown = config_lib.hide_secrets({'any': [{name: SECRET, 'other': 'x'}]})
    self.assertEqual(shown, {'any': [{name: 'hidden', 'other': 'x'}]})

  @parameterized.parameters(
    'finney', 'ws://127.0.0.1:9944', 'wss://entrypoint.example.org:443',
    'file:///runs/one', 's3://bucket?endpoint=https://s.example.org&region=eu',
    'memory://x', '127.0.0.1:0', 7, None, True, 0.5,
  )  # fmt: skip
  def test_all_else_stays(self, value):
    raw = {'network': {'name': value}, 'data': {'path': value}}
    self.assertEqual(config_lib.hide_secrets(raw), raw)

  def test_paths_of_data_stay(self):
    raw = {'data': {'path': 'https://example.org/data/shards'}}
    self.assertEqual(config_lib.hide_secrets(raw), raw)

  def test_a_config_stays_one(self):
    config = config_lib.load('configs/tiny.py', [])
    raw = json.loads(config_lib.to_json(config))
    shown = json.dumps(config_lib.hide_secrets(raw))
    self.assertEqual(config_lib.from_json(shown), config)


if __name__ == '__main__':
  absltest.main()
