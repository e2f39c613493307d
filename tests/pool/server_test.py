"""A pool's server answers who signs, and outlives who does not."""

import asyncio
import json
import socket
import struct
import threading
import time
from unittest import mock

import aiohttp
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.chain import keys
from covenant.pool import channel as channel_lib
from covenant.pool import client as client_lib
from covenant.pool import server as server_lib
from covenant.pool import visitors
from tests.pool import serving

KEY, POOL, RUN = serving.KEY, serving.POOL, serving.RUN


class ServerTest(serving.ServerCase):
  def test_signed_requests_are_answered(self):
    self.assertEqual(self.ask(body=b'abc'), (200, {'of': '/echo'}, b'cba'))
    ((worker, method, path, body, address),) = self.seen
    self.assertEqual(
      (worker, method, path, body, address),
      (KEY.address, 'POST', '/echo', b'abc', '127.0.0.1'),
    )
    text = self.hello()
    self.assertEqual((text['run'], text['pool']), (RUN.hex(), POOL.address))

  @parameterized.parameters(
    (dict(path='/other'), 404),
    (dict(path='/echo?' + 'x' * 300), 404),
    (dict(body=b'x' * 11), 413),
    (dict(X_Number='x'), 400),
    (dict(X_Signature='x'), 400),
    (dict(X_Signature=''), 401),
    (dict(X_Worker='nobody'), 401),
    (dict(X_Digest='00' * 32), 401),
    (dict(number=-1), 409),
    (dict(number=2**63), 409),
    (dict(token='nonsense'), 409),
    (dict(token=f'{2**62:x}.{"0" * 64}'), 409),
    (dict(token='.'), 409),
    (dict(token='-1.0'), 409),
  )
  def test_what_is_not_right_is_refused(self, asked, status):
    self.assertEqual(self.ask(**asked)[0], status)
    self.assertEmpty(self.seen)

  @parameterized.parameters('-1', '9' * 30, 'x', '٣')
  def test_a_malformed_length_is_refused(self, length):
    _, headers = self.headers('/echo')
    lines = [f'{k}: {v}' for k, v in headers.items()]
    lines = ['POST /echo HTTP/1.1', 'Host: x', *lines]
    with self.raw() as link:
      text = '\r\n'.join([*lines, f'Content-Length: {length}', '', ''])
      link.sendall(text.encode())
      self.assertRegex(link.recv(1 << 16), rb'^HTTP/1.. 4\d\d')
    self.assertEmpty(self.seen)

  @parameterized.parameters('X-Token', 'X-Digest', 'X-Worker')
  def test_bytes_that_are_no_text_are_refused_without_a_trace(self, name):
    _, headers = self.headers('/echo')
    lines = [f'{k}: {v}' for k, v in headers.items() if k != name]
    lines = ['GET /echo HTTP/1.1', 'Host: x', f'{name}: \udcff', *lines]
    with self.assertNoLogs(level='ERROR'), self.raw() as link:
      text = '\r\n'.join([*lines, '', ''])
      link.sendall(text.encode(errors='surrogateescape'))
      self.assertRegex(link.recv(1 << 16), rb'^HTTP/1.. 4\d\d')

  def test_strangers_do_not_fill_the_log(self):
    self.enterContext(mock.patch.object(visitors.LOG, 'filters', []))
    visitors.LOG.addFilter(visitors.Seldom())
    with self.assertLogs(visitors.LOG) as logs:
      for _ in range(5):
        with self.raw() as link:
          link.sendall(b'GET /\xff HTTP/1.1\r\n\r\n')
          self.assertRegex(link.recv(1 << 16), rb'^HTTP/1.. 4\d\d')
    self.assertLen(logs.output, 1)

  def test_nothing_counts_twice_or_for_something_else(self):
    token = self.hello()['token']
    self.assertEqual(self.ask(number=5, token=token)[0], 200)
    for number in 5, 4:
      self.assertEqual(self.ask(number=number, token=token)[0], 409)
    self.assertEqual(self.ask(number=6, token=token)[0], 200)
    text, headers = self.headers('/echo', number=7, token=token)
    for changes in (
      dict(number=8), dict(path='/large'), dict(body=b'x'),
      dict(token=self.hello()['token']),
    ):  # fmt: skip
      asked = {'number': 7, 'token': token} | changes
      signature = headers['X-Signature']
      self.assertEqual(self.ask(**asked, X_Signature=signature)[0], 401)
    # A token is of one worker.
    other = keys.Key.from_seed(b'o' * 32)
    _, headers = self.headers('/echo', number=9, token=token, key=other)
    self.assertEqual(self.ask(number=9, token=token, **{
      k.replace('-', '_'): v for k, v in headers.items()
    })[0], 409)  # fmt: skip
    self.assertLen(self.seen, 2)
    del text

  def test_a_bug_costs_one_request(self):
    status, text, _ = self.ask('/bug')
    self.assertEqual(status, 500)
    self.assertIn('ZeroDivisionError', json.dumps(text))
    self.assertEqual(self.ask(number=1)[0], 200)

  def test_silent_connections_lock_nobody_out(self):
    """Also more of them than a server would ever take."""
    with mock.patch.object(visitors, '_MOST', 20):
      silent = [self.raw() for _ in range(visitors.PER_ADDRESS + 10)]
      silent[1].sendall(b'\x00\xff GET\r\n\r\n')
      for link in silent[2:10]:
        link.sendall(b'POST /echo HTTP/1.1\r\nX-')
      self.assertEqual(self.ask()[0], 200)

  def test_silent_connections_of_one_address_end(self):
    with mock.patch.object(visitors, '_SILENT_SECONDS', 0.0):
      silent = [self.raw() for _ in range(visitors.PER_ADDRESS)]
      for link in silent:
        self.assertEqual(link.recv(1), b'')
    self.assertEqual(self.ask()[0], 200)

  def test_strangers_bodies_are_not_read(self):
    """A body is read with a lease, once its head is verified."""
    del self.longest['/large']
    token = self.hello()['token']
    for number, changes in enumerate(({}, {'X-Signature': '00' * 64})):
      body = bytes(1 << 23)
      _, headers = self.headers('/large', body, number, token)
      link = self.raw()
      lines = {**headers, **changes, 'Content-Length': str(len(body))}
      head = ''.join(f'{k}: {v}\r\n' for k, v in lines.items())
      link.sendall(f'POST /large HTTP/1.1\r\nHost: x\r\n{head}\r\n'.encode())
      self.assertRegex(link.recv(100), rb'^HTTP/1.. 4\d\d')
    self.assertEmpty(self.seen)

  def test_a_body_whose_lease_ends_is_not_read_on(self):
    body = bytes(1 << 20)
    _, headers = self.headers('/large', body)
    link = self.raw()
    headers |= {'Content-Length': str(len(body))}
    head = ''.join(f'{k}: {v}\r\n' for k, v in headers.items())
    link.sendall(f'POST /large HTTP/1.1\r\nHost: x\r\n{head}\r\n'.encode())
    link.sendall(body[: 1 << 16])
    while not self.admitted:
      time.sleep(0.01)
    del self.longest['/large']
    link.sendall(body[: 1 << 16])
    self.assertRegex(link.recv(100), rb'^HTTP/1.. 410')
    self.assertEmpty(self.seen)

  def test_a_body_that_stops_is_given_up(self):
    _, headers = self.headers('/echo', b'abc')
    with mock.patch.object(server_lib, '_SECONDS', 0.05):
      link = self.raw()
      head = ''.join(f'{k}: {v}\r\n' for k, v in headers.items())
      link.sendall(
        f'POST /echo HTTP/1.1\r\nHost: x\r\n{head}'
        'Content-Length: 3\r\n\r\na'.encode()
      )
      self.assertRegex(link.recv(100), rb'^HTTP/1.. 408')
    self.assertEqual(self.ask()[0], 200)

  @pytest.mark.slow
  def test_a_slow_reader_gets_all(self):
    """It reads without a pause, for longer than a pause may take."""
    self.data = bytes(range(256)) * (1 << 14)  # 4 MiB
    _, headers = self.headers('/echo')
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
    link.connect(('127.0.0.1', self.server.port))
    self.addCleanup(link.close)
    head = ''.join(f'{k}: {v}\r\n' for k, v in headers.items())
    with mock.patch.object(server_lib, '_SECONDS', 1.0):
      link.sendall(f'POST /echo HTTP/1.1\r\nHost: x\r\n{head}\r\n'.encode())
      began, got = time.monotonic(), bytearray()
      while chunk := link.recv(1 << 14):
        got += chunk
        time.sleep(0.006)
    self.assertTrue(got.endswith(self.data))
    self.assertGreater(time.monotonic() - began, 1.2)  # more than a pause

  def test_who_does_not_read_is_cut_off(self):
    self.data = bytes(1 << 25)
    _, headers = self.headers('/echo')
    link = self.raw()
    head = ''.join(f'{k}: {v}\r\n' for k, v in headers.items())
    with mock.patch.object(server_lib, '_SECONDS', 0.05):
      link.sendall(f'POST /echo HTTP/1.1\r\nHost: x\r\n{head}\r\n'.encode())
      while not self.seen:
        time.sleep(0.01)
      deadline = time.monotonic() + 30
      while self.server._keys._now and time.monotonic() < deadline:
        time.sleep(0.01)
    self.data = b''
    self.assertEqual(self.ask()[0], 200)

  def test_requests_of_one_key_and_one_address_are_limited(self):
    with mock.patch.multiple(visitors, _BURST=3.0, _REQUESTS=0.0):
      statuses = []
      for number in range(6):
        link = self.link()
        link.request('GET', f'/hello?nonce={number}')
        statuses.append(link.getresponse().status)
      self.assertEqual(statuses, [200] * 3 + [429] * 3)
    self.server._requests = visitors.Requests()
    gate = threading.Event()
    self.addCleanup(gate.set)
    wait = self.server._answer
    self.server._answer = lambda request: (gate.wait(30), wait(request))[1]
    token = self.hello()['token']
    links = []
    for number in range(5):
      _, headers = self.headers('/echo', number=number, token=token)
      links.append(self.link())
      links[-1].request('POST', '/echo', b'', headers)
      while len(self.admitted) < min(number + 1, 4):
        time.sleep(0.01)
    self.assertEqual(links[4].getresponse().status, 429)
    gate.set()
    for link in links[:4]:
      self.assertEqual(link.getresponse().status, 200)

  def test_slow_answers_hold_up_neither_channels_nor_refusals(self):
    """Such as those of sections that have to be fetched."""
    gate, said = threading.Event(), threading.Semaphore(0)
    self.addCleanup(gate.set)

    listener = serving.Listener(open=lambda channel: said.release())
    self.server = self.serve(listener)
    answer = self.server._answer
    slow = lambda request: (gate.wait(60), answer(request))[1]  # noqa: E731
    self.server._answer = slow
    links = []
    for i in range(32):  # of eight keys
      key = keys.Key.from_seed(bytes([1 + i // 4]) * 32)
      _, headers = self.headers('/echo', number=i, key=key)
      links.append(self.link())
      links[-1].request('POST', '/echo', b'', headers)
    self.assertEqual(self.ask('/other')[0], 404)
    self.open_channel()
    self.assertTrue(said.acquire(timeout=60))
    gate.set()
    for link in links:
      self.assertEqual(link.getresponse().status, 200)

  def test_a_channel_that_is_not_read_can_be_closed(self):
    closed, much = threading.Event(), 64

    def send(channel):
      for _ in range(much):
        channel.send({}, bytes(1 << 20))
      channel.close()

    listener = serving.Listener(open=send, close=lambda channel: closed.set())
    with mock.patch.object(channel_lib, '_CLOSE_SECONDS', 0.1):
      self.server = self.serve(listener)
      link = self.open_channel()
      self.assertTrue(closed.wait(60))
    got = 0
    try:
      while data := link.recv(1 << 20):
        got += len(data)
    except ConnectionResetError:
      pass
    self.assertLess(got, much << 20)

  def test_long_messages_pass_a_real_channel_both_ways(self):
    much = bytes(range(256)) * (7 * channel_lib.PART_BYTES // 512)
    got = []

    def echo(channel, text, data):
      channel.send({'of': len(data)}, data)

    self.server = self.serve(serving.Listener(receive=echo))
    url = f'http://127.0.0.1:{self.server.port}'
    client = client_lib.Client(url, serving.KEY, serving.RUN)

    async def talk():
      opening, headers = client.sign_request('GET', '/channel')
      async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(
          f'{url}/channel', headers=headers, max_msg_size=0
        ) as socket,
      ):
        channel = channel_lib.Channel(
          socket, opening, False, serving.KEY.sign, client.is_pool,
          serving.KEY.address,
        )  # fmt: skip
        channel.send({}, much)

        def take(channel, text, data):
          got.append((text, data == much))
          channel.close()

        await channel.run(take)

    asyncio.run(talk())
    self.assertEqual(got, [({'of': len(much)}, True)])

  def test_open_channels_hold_up_no_end(self):
    opened, said = threading.Event(), []

    def note(what):
      said.append(what)
      opened.set()

    listener = serving.Listener(
      open=lambda channel: note('open'), close=lambda channel: note('close')
    )
    with mock.patch.object(channel_lib, 'HEARTBEAT_SECONDS', 1e6):
      self.server = self.serve(listener)
      self.open_channel()
      self.assertTrue(opened.wait(60))
    end = threading.Thread(target=self.server.close, daemon=True)
    end.start()
    end.join(60)
    self.assertFalse(end.is_alive())
    self.assertEqual(said, ['open', 'close'])
    self.assertEmpty(asyncio.all_tasks(self.server._loop))

  def test_a_reverse_proxy_names_the_address(self):
    self.server = self.serve(proxies=('127.0.0.1',))
    self.ask(X_Forwarded_For='203.0.113.9, 198.51.100.7')
    self.assertEqual(self.seen[0].address, '198.51.100.7')

  def test_an_aborted_connection_is_forgotten(self):
    for _ in range(2 * visitors.PER_ADDRESS):
      link = socket.create_connection(('127.0.0.1', self.server.port))
      linger = struct.pack('ii', 1, 0)  # a reset
      link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
      link.close()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
      try:
        self.assertEqual(self.ask()[0], 200)
        return
      except ConnectionError:  # not all of them have been noticed yet
        time.sleep(0.1)
    self.fail('nobody is served')


if __name__ == '__main__':
  absltest.main()
