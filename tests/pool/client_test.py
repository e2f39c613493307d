"""A worker's connection believes what its pool has signed."""

import ssl
from unittest import mock

from absl.testing import absltest

from covenant import config as config_lib
from covenant.pool import client as client_lib
from covenant.pool import server as server_lib
from covenant.pool import visitors
from tests.pool import serving

KEY, POOL, RUN = serving.KEY, serving.POOL, serving.RUN


class ClientTest(serving.ServerCase):
  """The worker's side, at a real server."""

  def client(self, hotkey='', key=KEY):
    url = f'http://127.0.0.1:{self.server.port}'
    return client_lib.Client(url, key, RUN, hotkey)

  def test_asks(self):
    client = self.client(POOL.address)
    for _ in range(3):
      text, data = client.ask('POST', '/echo', b'abc')
      self.assertEqual((text, data), ({'of': '/echo'}, b'cba'))

  def test_the_pool_is_the_one_that_was_named(self):
    with self.assertRaisesRegex(
      config_lib.ConfigError, 'pool.hotkey: the pool at .* says'
    ):
      self.client(KEY.address).ask('POST', '/echo')

  def test_a_changed_reply_is_refused(self):
    client = self.client()
    client.ask('POST', '/echo')
    for change in (b'step', b'', b'x'):
      send = client._send

      def changed(*args, change=change, send=send):
        answer = send(*args)
        return answer._replace(body=change + answer.body[len(change) or 1 :])

      with mock.patch.object(client, '_send', changed):
        with self.assertRaisesRegex(
          client_lib.PoolUnreachableError, 'not signed by the pool'
        ):
          client.ask('POST', '/echo', b'abc')
    self.assertEqual(client.ask('POST', '/echo', b'abc')[1], b'cba')

  def test_a_reply_to_another_request_is_refused(self):
    client, sent = self.client(), []
    send = client._send

    def recorded(*args):
      sent.append(send(*args))
      return sent[-1]

    with mock.patch.object(client, '_send', recorded):
      client.ask('POST', '/echo', b'abc')
    with mock.patch.object(client, '_send', lambda *args: sent[-1]):
      with self.assertRaisesRegex(
        client_lib.PoolUnreachableError, 'not signed by the pool'
      ):
        client.ask('POST', '/echo', b'abc')

  def test_a_clock_that_jumps_changes_nothing(self):
    client = self.client()
    for seconds in (0, 3600, -7200, 10**9):
      with mock.patch('time.time', lambda s=seconds: s):
        with mock.patch('time.time_ns', lambda s=seconds: s * 10**9):
          client.ask('POST', '/echo')

  def test_a_pool_that_was_started_again(self):
    client = self.client()
    client.ask('POST', '/echo')
    self.server._tokens = visitors.Tokens()
    with self.assertRaisesRegex(client_lib.PoolUnreachableError, 'says 409'):
      client.ask('POST', '/echo')
    client.ask('POST', '/echo')

  def test_redirects_are_not_followed(self):
    with mock.patch.object(
      self.server, '_answer', lambda _: server_lib.Reply(302, {})
    ):
      with self.assertRaisesRegex(client_lib.PoolUnreachableError, '302'):
        self.client().ask('POST', '/echo')

  def test_tls(self):
    certificate, key = self.certificate()
    self.server = self.serve(certificate=certificate, certificate_key=key)
    silent = self.raw()
    client = self.client()
    client._url = client._url.replace('http:', 'https:')
    with self.assertRaisesRegex(
      client_lib.PoolUnreachableError, 'CERTIFICATE_VERIFY_FAILED'
    ):
      client.ask('POST', '/echo')
    client_lib._opener.cache_clear()
    self.addCleanup(client_lib._opener.cache_clear)
    trusted = ssl.create_default_context(cafile=certificate)
    with mock.patch('ssl._create_default_https_context', lambda: trusted):
      text, data = client.ask('POST', '/echo', b'abc')
    self.assertEqual((text, data), ({'of': '/echo'}, b'cba'))
    silent.close()


if __name__ == '__main__':
  absltest.main()
