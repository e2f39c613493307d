"""A pool's server for tests: it echoes, and says what it saw."""

import base64
import http.client
import socket
import subprocess

from absl.testing import parameterized

from covenant.chain import keys
from covenant.pool import messages
from covenant.pool import server as server_lib
from covenant.pool import server_settings

KEY = keys.Key.from_seed(bytes(32))
POOL = keys.Key.from_seed(b'p' * 32)
RUN = b'r' * 16


class Listener:
  """Is told of channels; each method does nothing unless it is given."""

  def __init__(self, **methods):
    for name in 'open', 'receive', 'close':
      setattr(self, name, methods.get(name, lambda *_: None))
    self.longest = methods.get('longest', lambda channel: 1 << 30)


class ServerCase(parameterized.TestCase):
  """A case with a server that echoes."""

  def setUp(self):
    super().setUp()
    self.seen, self.admitted = [], []
    self.longest = {'/channel': 0, '/echo': 10, '/bug': 0, '/large': 1 << 24}
    self.data = b''
    self.server = self.serve()

  def serve(self, channels=None, **settings):
    def admit(request):
      self.admitted.append(request)
      self.assertEqual(request.body, b'')
      longest = self.longest.get(request.path.partition('?')[0])
      return longest if longest is not None else server_lib.Reply(404, {})

    def answer(request):
      self.seen.append(request)
      if request.path == '/bug':
        raise ZeroDivisionError
      data = self.data or request.body[::-1]
      return server_lib.Reply(200, {'of': request.path}, data)

    server = server_lib.PoolServer(
      server_settings.ServerSettings('127.0.0.1', 0, **settings),
      POOL.address, POOL.sign, {'run': RUN.hex()}, keys.verify, admit, answer,
      channels=channels,
    )  # fmt: skip
    server.start()
    self.addCleanup(server.close)
    return server

  def certificate(self):
    """Makes a certificate of this machine; returns the paths of it, its key."""
    folder = self.create_tempdir().full_path
    certificate, key = f'{folder}/c.pem', f'{folder}/k.pem'
    try:
      subprocess.run(
        ['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days',
         '2', '-subj', '/CN=localhost', '-addext',
         'subjectAltName=IP:127.0.0.1', '-keyout', key, '-out', certificate],
        check=True, capture_output=True,
      )  # fmt: skip
    except FileNotFoundError:
      self.skipTest('needs openssl')
    return certificate, key

  def link(self):
    link = http.client.HTTPConnection('127.0.0.1', self.server.port, timeout=60)
    self.addCleanup(link.close)
    return link

  def hello(self, key=KEY):
    link = self.link()
    link.request('GET', '/hello?nonce=7', headers={'X-Worker': key.address})
    response = link.getresponse()
    data = response.read()
    self.check(b'7', response, data)
    return messages.unpack(data)[0]

  def check(self, text, response, data):
    """The reply is signed by the pool, for this request."""
    signature = bytes.fromhex(response.headers['X-Signature'])
    text = messages.reply_text(text, response.status, messages.digest(data))
    self.assertTrue(keys.verify(POOL.address, text, signature))

  def headers(self, path, body=b'', number=0, token=None, key=KEY):
    token = self.hello(key)['token'] if token is None else token
    digest = messages.digest(body)
    text = messages.request_text(
      POOL.address, token, 'POST', path, number, digest
    )
    headers = {
      'X-Worker': key.address,
      'X-Token': token,
      'X-Number': str(number),
      'X-Digest': digest,
      'X-Signature': key.sign(text).hex(),
    }
    return text, headers

  def ask(self, path='/echo', body=b'', number=0, token=None, **changes):
    text, headers = self.headers(path, body, number, token)
    headers |= {k.replace('_', '-'): v for k, v in changes.items()}
    link = self.link()
    link.request('POST', path, body, headers)
    response = link.getresponse()
    data = response.read()
    if response.status == 200:
      self.check(text, response, data)
    return response.status, *messages.unpack(data)

  def open_channel(self):
    """Opens a channel; returns its connection, which nobody reads."""
    token, digest = self.hello()['token'], messages.digest(b'')
    text = messages.request_text(
      POOL.address, token, 'GET', '/channel', 0, digest
    )
    headers = {
      'X-Worker': KEY.address, 'X-Token': token, 'X-Number': '0',
      'X-Digest': digest, 'X-Signature': KEY.sign(text).hex(),
      'Host': 'pool', 'Upgrade': 'websocket', 'Connection': 'Upgrade',
      'Sec-WebSocket-Version': '13',
      'Sec-WebSocket-Key': base64.b64encode(bytes(16)).decode(),
    }  # fmt: skip
    lines = ''.join(f'{name}: {x}\r\n' for name, x in headers.items())
    link = self.raw()
    link.sendall(f'GET /channel HTTP/1.1\r\n{lines}\r\n'.encode())
    return link

  def raw(self, port=None):
    link = socket.create_connection(('127.0.0.1', port or self.server.port))
    self.addCleanup(link.close)
    link.settimeout(30)
    return link
