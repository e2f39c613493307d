"""A pool's server answers who signs, and outlives who does not."""

import http.client
import json
import socket
import threading

from absl.testing import absltest
from absl.testing import parameterized

from covenant.chain import keys
from covenant.pool import server as server_lib

KEY = keys.Key.from_seed(bytes(32))


class GateTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.seen = []

    def answer(request):
      self.seen.append(request)
      if request.path == '/bug':
        raise ZeroDivisionError
      return server_lib.Reply(200, {'of': request.path}, request.body[::-1])

    self.gate = server_lib.PoolServer(
      ('127.0.0.1', 0), 'session', lambda: {'run': 'r'}, keys.verify, answer,
      {'/echo': 10, '/bug': 0},
    )  # fmt: skip
    thread = threading.Thread(
      target=self.gate.serve_forever, kwargs={'poll_interval': 0.01}
    )
    thread.start()
    self.addCleanup(thread.join)
    self.addCleanup(self.gate.server_close)
    self.addCleanup(self.gate.shutdown)

  def ask(self, path='/echo', body=b'', number=0, **changes):
    digest = server_lib.digest(body)
    text = server_lib.signed_text('session', 'POST', path, number, digest)
    headers = {
      'X-Worker': KEY.address,
      'X-Number': str(number),
      'X-Digest': digest,
      'X-Signature': KEY.sign(text).hex(),
    }
    headers |= {k.replace('_', '-'): v for k, v in changes.items()}
    link = http.client.HTTPConnection('127.0.0.1', self.gate.port, timeout=60)
    try:
      link.request('POST', path, body, headers)
      response = link.getresponse()
      return response.status, *server_lib.unpack(response.read())
    finally:
      link.close()

  def test_signed_requests_are_answered(self):
    self.assertEqual(self.ask(body=b'abc'), (200, {'of': '/echo'}, b'cba'))
    ((worker, method, path, body),) = self.seen
    self.assertEqual(
      (worker, method, path, body), (KEY.address, 'POST', '/echo', b'abc')
    )
    status, text, _ = self.ask('/hello')
    self.assertEqual((status, text), (200, {'session': 'session', 'run': 'r'}))

  @parameterized.parameters(
    (dict(path='/other'), 404),
    (dict(path='/echo?' + 'x' * 300), 404),
    (dict(body=b'x' * 11), 413),
    (dict(Content_Length='-1'), 413),
    (dict(Content_Length='9' * 30), 413),
    (dict(Content_Length='x'), 400),
    (dict(X_Number='x'), 400),
    (dict(X_Signature='x'), 400),
    (dict(X_Signature=''), 401),
    (dict(X_Worker='nobody'), 401),
    (dict(number=-1), 409),
    (dict(number=2**63), 409),
  )
  def test_what_is_not_right_is_refused(self, asked, status):
    self.assertEqual(self.ask(**asked)[0], status)
    self.assertEmpty(self.seen)

  def test_nothing_counts_twice_or_for_something_else(self):
    self.assertEqual(self.ask(number=5)[0], 200)
    for number in 5, 4:
      self.assertEqual(self.ask(number=number)[0], 409)
    self.assertEqual(self.ask(number=6)[0], 200)
    other = server_lib.signed_text(
      'before', 'POST', '/echo', 7, server_lib.digest(b'')
    )
    signature = KEY.sign(other).hex()
    self.assertEqual(self.ask(number=7, X_Signature=signature)[0], 401)
    self.assertLen(self.seen, 2)

  def test_a_bug_costs_one_request(self):
    status, text, _ = self.ask('/bug')
    self.assertEqual(status, 500)
    self.assertIn('ZeroDivisionError', json.dumps(text))
    self.assertEqual(self.ask(number=1)[0], 200)

  def test_who_says_nothing_keeps_nobody_waiting(self):
    silent = [socket.create_connection(('127.0.0.1', self.gate.port))]
    silent.append(socket.create_connection(('127.0.0.1', self.gate.port)))
    silent[1].sendall(b'\x00\xff GET\r\n\r\n')
    try:
      self.assertEqual(self.ask()[0], 200)
    finally:
      for link in silent:
        link.close()


if __name__ == '__main__':
  absltest.main()
