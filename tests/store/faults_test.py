"""A store that fails, lies, stalls and forgets, by script and counted."""

import concurrent.futures
import contextlib
import hashlib
import http.server
import os
import random
import re
import socket
import threading
import traceback
from unittest import mock

import obstore
import obstore.exceptions
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.store import backend
from covenant.store import bucket as bucket_lib
from covenant.store import interface
from covenant.store import location as location_lib

_KEY_ID, _SECRET = 'KEYIDKEYID', 'SECRETSECRET'
ENVIRON = {'AWS_ACCESS_KEY_ID': _KEY_ID, 'AWS_SECRET_ACCESS_KEY': _SECRET}
_UPLOAD = 5 * 2**20
_CHUNK = 2**16  # what a break may cost of what had come
PATIENCE = 60.0  # seconds; what takes longer never happens


class Store(http.server.ThreadingHTTPServer):
  """The part of S3 that a bucket uses. `faults` answer in place of it."""

  daemon_threads = True

  def __init__(self):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.objects: dict[str, bytes] = {}
    self.parts: dict[str, dict[int, bytes]] = {}  # upload -> number -> bytes
    self.aborted = threading.Event()
    self.over = threading.Event()
    self.lock = threading.RLock()
    self.faults: list[list] = []  # [method, part of the path, act, times]
    self.injected = 0
    self.log: list[str] = []  # method and path, and Range if there is one
    self.headers: list[dict[str, str]] = []
    self.sent = 0  # bytes of bodies

  def fault(self, act, times=1, method='', path=''):
    self.faults.append([method, path, act, times])

  def next_fault(self, method, path):
    with self.lock:
      for fault in self.faults:
        if fault[0] in method and fault[1] in path and fault[3]:
          fault[3] -= 1
          self.injected += 1
          return fault[2]
    return None


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def log_message(self, format, *args):
    pass

  def handle(self):
    with contextlib.suppress(OSError):  # they may leave in the middle
      super().handle()

  def respond(self):
    self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
    self.key = self.path.partition('?')[0]
    with self.server.lock:
      asked = self.headers.get('Range', '')
      self.server.log.append(f'{self.command} {self.path} {asked}'.strip())
      self.server.headers.append(dict(self.headers))
    act = self.server.next_fault(self.command, self.path) or serve
    act(self)

  do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = respond

  def reply(self, status, body=b'', length=None, **headers):
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), value)
    size = len(body) if length is None else length
    self.send_header('Content-Length', str(size))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(body)
      self.server.sent += len(body)

  def hang_up(self):
    self.wfile.flush()
    self.close_connection = True


def serve(h):
  """Answers as S3 does."""
  store = h.server
  upload = re.search(r'uploadId=(\w+)', h.path)
  number = re.search(r'partNumber=(\d+)', h.path)
  with store.lock:
    if h.command in ('GET', 'HEAD'):
      read(h)
    elif h.command == 'POST' and 'uploads' in h.path:
      name = f'upload{len(store.log)}'
      store.parts[name] = {}
      h.reply(200, f'<R><UploadId>{name}</UploadId></R>'.encode())
    elif h.command == 'POST' and h.path.endswith('?delete'):
      keys = re.findall(rb'<Key>.*?</Key>', h.body)
      for key in keys:
        store.objects.pop(f'{h.key}/{key.decode()[5:-6]}', None)
      told = b''.join(b'<Deleted>%b</Deleted>' % key for key in keys)
      h.reply(200, b'<DeleteResult>%b</DeleteResult>' % told)
    elif h.command == 'DELETE' and upload:
      store.parts.pop(upload[1], None)
      store.aborted.set()
      h.reply(204)
    elif upload and upload[1] not in store.parts:  # it was aborted
      h.reply(404, b'<Code>NoSuchUpload</Code>')
    elif number:
      source = h.headers.get('x-amz-copy-source')
      body = store.objects['/' + source.lstrip('/')] if source else h.body
      store.parts[upload[1]][int(number[1])] = body
      h.reply(200, b'<R><ETag>"p"</ETag></R>' if source else b'', ETag='"p"')
    elif h.headers.get('If-None-Match') == '*' and h.key in store.objects:
      h.reply(412)
    elif upload:
      parts = store.parts.pop(upload[1])
      store.objects[h.key] = b''.join(parts[i] for i in sorted(parts))
      h.reply(200, b'<R><ETag>"w"</ETag></R>', ETag='"w"')
    else:
      store.objects[h.key] = h.body
      h.reply(200, ETag=_e_tag(h.body))


def _e_tag(data):
  return f'"{hashlib.md5(data).hexdigest()}"'


def read(h, cut=None):
  data = h.server.objects.get(h.key)
  if data is None:
    return h.reply(404)
  headers = {
    'ETag': _e_tag(data),
    'Last_Modified': 'Wed, 21 Oct 2015 07:28:00 GMT',
  }
  if h.headers.get('If-Match', headers['ETag']) != headers['ETag']:
    return h.reply(412)
  status, part = 200, data
  asked = re.fullmatch(r'bytes=(\d+)-(\d+)', h.headers.get('Range', ''))
  if asked:
    first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
    status, part = 206, data[first : last + 1]
    headers['Content_Range'] = f'bytes {first}-{last}/{len(data)}'
  h.reply(status, part[:cut], len(part), **headers)
  return None


def status(code, body=b''):
  return lambda h: h.reply(code, body)


def truncate(size):
  """Announces all of it, sends `size` bytes and hangs up."""

  def act(h):
    read(h, size)
    h.hang_up()

  return act


def lose_answer(h):
  """Does what it was asked to, and breaks the connection instead of saying."""
  h.reply = lambda *args, **kwargs: None
  serve(h)
  h.hang_up()


def hang(h):
  """Says nothing until the test is over."""
  h.server.over.wait(PATIENCE)
  h.hang_up()


class FaultsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.store = Store()
    thread = threading.Thread(target=self.store.serve_forever, args=(0.01,))
    thread.start()

    def stop():
      self.store.over.set()
      self.store.shutdown()
      self.store.server_close()
      thread.join()

    self.addCleanup(stop)
    self.slept = []
    self.paused = threading.Event()  # set once a try failed
    self.left = threading.Event()  # set once they leave a body without end
    self.location = location_lib.Location(
      's3', 'abc', endpoint=f'http://127.0.0.1:{self.store.server_port}'
    )

  async def sleep(self, seconds):
    self.slept.append(seconds)
    self.paused.set()

  def until(self, event):
    """A clock whose deadline comes when `event` is set, at no other time."""

    def wait(future, seconds):
      self.assertTrue(event.wait(PATIENCE), 'it never happened')
      event.clear()
      raise TimeoutError

    return wait

  def settings(self, **changes):
    changes = {'sleep': self.sleep, 'rng': random.Random(0)} | changes
    return backend.StoreSettings(**changes)

  def open(self, **changes) -> bucket_lib.ObstoreBucket:
    return bucket_lib.open_bucket(
      self.location, ENVIRON, self.settings(**changes)
    )

  @parameterized.parameters(408, 429, 500, 503)
  def test_tries_again_after(self, code):
    self.store.objects['/abc/k'] = b'data'
    self.store.fault(status(code), times=6)
    self.assertEqual(self.open().get('k', 4), b'data')
    self.assertEqual(self.store.injected, 6)
    self.assertLen(self.store.log, 7)
    longest = [0.2, 0.4, 0.8, 1.6, 3.2, 5.0]
    self.assertLen(self.slept, 6)
    for slept, most in zip(self.slept, longest, strict=True):
      self.assertBetween(slept, 0, most)

  def test_a_strangers_refusal_is_not_retried_to_the_deadline(self):
    theirs = bucket_lib.open_for_reading(
      self.location, allow_local=True, settings=self.settings()
    )
    for code, tries in ((408, 3), (425, 3), (429, 3), (400, 1), (404, 1)):
      before = len(self.store.log)
      self.store.fault(status(code), times=tries)
      with self.assertRaises(interface.StoreError):
        theirs.get('k', 4)
      self.assertLen(self.store.log, before + tries)

  def test_names_and_certificates_are_not_retried(self):
    theirs = bucket_lib.open_for_reading(
      self.location, allow_local=True, settings=self.settings()
    )
    for text in (
      'HTTP error: error sending request: dns error: failed to lookup address',
      'HTTP error: invalid peer certificate: UnknownIssuer',
      'HTTP error: received corrupt message of type InvalidContentType',
    ):
      error = obstore.exceptions.GenericError(text)
      with mock.patch.object(obstore, 'get_async', side_effect=error) as get:
        with self.assertRaises(interface.StoreUnavailableError):
          theirs.get('k', 4)
        self.assertEqual(get.call_count, 1, text)

  def test_a_strangers_bucket_is_connected_when_it_is_asked(self):
    with mock.patch.object(backend, 'connect', wraps=backend.connect) as made:
      theirs = bucket_lib.open_for_reading(
        self.location, allow_local=True, settings=self.settings()
      )
      self.assertEqual(made.call_count, 0)
      self.store.objects['/abc/k'] = b'data'
      for _ in range(2):
        self.assertEqual(theirs.get('k', 4), b'data')
      self.assertEqual(made.call_count, 1)

  def test_every_call_recovers(self):
    own = self.open()
    body = b'<ListBucketResult><IsTruncated>false</IsTruncated>'
    body += b'</ListBucketResult>'
    acts = (
      lambda: own.put('k', b'data'),
      lambda: own.head('k'),
      lambda: own.put('k', b'other', replace=True),
      lambda: own.delete(['k']),
      lambda: own.list('run'),
    )
    for i, act in enumerate(acts, 1):
      self.store.fault(status(503))
      if i == 5:
        self.store.fault(status(200, body))
      act()
      self.assertLen(self.slept, i)
    self.assertEqual(self.store.injected, 6)

  def test_jitter_comes_from_the_seed(self):
    self.store.objects['/abc/k'] = b'data'
    runs = []
    for seed in (1, 1, 2):
      self.slept = []
      self.store.fault(status(503), times=3)
      self.open(rng=random.Random(seed)).get('k', 4)
      runs.append(self.slept)
    self.assertEqual(runs[0], runs[1])
    self.assertNotEqual(runs[0], runs[2])

  @parameterized.parameters(400, 405, 416, 501)
  def test_what_will_not_change_is_asked_once(self, code):
    self.store.fault(status(code))
    with self.assertRaisesRegex(interface.StoreError, f'HTTP {code}') as e:
      self.open().put('k', b'')
    self.assertIs(type(e.exception), interface.StoreError)
    self.assertLen(self.store.log, 1)

  @parameterized.parameters(
    (401, 'Unknown', 'HTTP 401'),
    (403, 'InvalidAccessKeyId', 'does not know the access key id'),
    (403, 'SignatureDoesNotMatch', 'does not belong to the access key id'),
    (403, 'RequestTimeTooSkewed', 'clock of this machine is wrong'),
    (403, 'SecondLevelDomainForbidden', 'style=virtual'),
  )
  def test_wrong_credentials_are_not_told_on(self, code, word, reason):
    def refuse(h):
      signed = h.headers['Authorization']
      h.reply(
        code,
        f'<Error><Code>{word}</Code><AWSAccessKeyId>{_KEY_ID}</AWSAccessKeyId>'
        f'<StringToSign>{signed}</StringToSign>{_SECRET}\n\x1b[31m</Error>'
        ''.encode(),
      )

    own = self.open(part_bytes=_UPLOAD)
    acts = (
      lambda: own.put('k', b''),
      lambda: own.put('k', bytes(_UPLOAD + 1), replace=True),
      lambda: own.get('k', 1),
      lambda: own.delete(['k']),
      lambda: own.list(''),
    )
    for act in acts:
      self.store.fault(refuse)
      with self.assertRaisesRegex(interface.AccessDeniedError, reason) as e:
        act()
      self.assertRegex(str(e.exception), r'^cannot \w+ .* in s3://abc at http')
      told = ''.join(traceback.format_exception(e.exception))
      told += repr(own) + repr(vars(own)) + own.location
      for word_of_it in (_KEY_ID, _SECRET, 'StringToSign', '\x1b'):
        self.assertNotIn(word_of_it, told)
      self.assertNotIn('\n', str(e.exception))
    self.assertLen(self.store.log, len(acts))
    self.assertNotIn(_SECRET, repr(backend.Credentials(_KEY_ID, _SECRET)))
    self.assertNotIn(_KEY_ID, repr(backend.Credentials(_KEY_ID, _SECRET)))

  def test_a_put_whose_answer_was_lost_is_a_put(self):
    self.store.fault(lose_answer)
    self.open().put('k', b'data')
    self.assertEqual(self.store.objects, {'/abc/k': b'data'})
    self.assertEqual(self.store.log, ['PUT /abc/k', 'PUT /abc/k', 'GET /abc/k'])

  @parameterized.parameters(b'else', b'something longer', b'')
  def test_another_one_put_meanwhile_stays(self, other):
    def be_late(h):
      h.server.objects[h.key] = other
      h.reply(500)

    self.store.fault(be_late)
    with self.assertRaises(interface.ObjectExistsError):
      self.open().put('k', b'data')
    self.assertEqual(self.store.objects, {'/abc/k': other})

  def test_a_conflict_of_writes_is_asked_again(self):
    self.store.fault(status(409, b'<Code>ConditionalRequestConflict</Code>'))
    self.open().put('k', b'data')
    self.assertEqual(self.store.injected, 1)
    self.assertEqual(self.store.objects, {'/abc/k': b'data'})

  def test_a_read_that_breaks_goes_on(self):
    data = os.urandom(10 * _CHUNK)
    self.store.objects['/abc/k'] = data
    for size in (3 * _CHUNK, 4 * _CHUNK, 0):
      self.store.fault(truncate(size))
    self.assertTrue(self.open().get('k', len(data)) == data)
    self.assertEqual(self.store.injected, 3)
    self.assertLess(self.store.sent, len(data) + 2 * _CHUNK)
    starts = [
      int(re.fullmatch(r'GET /abc/k bytes=(\d+)-655359', line)[1])
      for line in self.store.log[1:]
    ]
    self.assertLen(starts, 3)
    self.assertBetween(starts[0], 2 * _CHUNK, 3 * _CHUNK)
    self.assertBetween(starts[1] - starts[0], 3 * _CHUNK, 4 * _CHUNK)
    self.assertEqual(starts[2], starts[1])
    for headers in self.store.headers[1:]:
      self.assertEqual(headers['if-match'], _e_tag(data))

  def test_a_large_read_comes_in_ranges(self):
    part = 2**16
    data = os.urandom(6 * part + 5)
    self.store.objects['/abc/k'] = data
    own = self.open(part_bytes=part)
    self.assertEqual(own.get('k', len(data)), data)
    expected = {'GET /abc/k'} | {
      f'GET /abc/k bytes={i}-{min(i + part, len(data)) - 1}'
      for i in range(part, len(data), part)
    }
    self.assertEqual(set(self.store.log), expected)
    self.assertLen(self.store.log, 7)

  def test_a_large_read_that_breaks_goes_on(self):
    part = 4 * _CHUNK
    data = os.urandom(3 * part)
    self.store.objects['/abc/k'] = data

    def break_off(h):
      truncate(2 * _CHUNK if 'Range' in h.headers else None)(h)

    self.store.fault(break_off, times=3)  # the first and two of three
    own = self.open(part_bytes=part)
    self.assertTrue(own.get('k', len(data)) == data)
    self.assertEqual(self.store.injected, 3)
    again = [
      line
      for line in self.store.log
      if 'bytes' in line and int(re.search(r'=(\d+)', line)[1]) % part
    ]
    self.assertNotEmpty(again)

  def test_an_object_replaced_in_the_middle_is_not_mixed(self):
    old, new = os.urandom(4 * _CHUNK), os.urandom(3 * _CHUNK)
    self.store.objects['/abc/k'] = old

    def replace(h):
      truncate(2 * _CHUNK)(h)
      h.server.objects['/abc/k'] = new

    self.store.fault(replace)
    self.assertTrue(self.open().get('k', len(old)) == new)
    self.assertRegex(
      ', '.join(self.store.log),
      r'^GET /abc/k, GET /abc/k bytes=\d+-262143, GET /abc/k$',
    )

  @parameterized.parameters(4 * _CHUNK - 1, 4 * _CHUNK + 1)
  def test_without_tags_it_is_not_mixed_either(self, size):
    old, new = b'a' * 4 * _CHUNK, b'b' * size

    def tell(data, cut=None):
      def act(h):
        asked = re.match(r'bytes=(\d+)-', h.headers.get('Range', ''))
        first = int(asked[1]) if asked else 0
        part = data[first : 4 * _CHUNK] if asked else data
        last = first + len(part) - 1
        h.reply(
          206 if asked else 200,
          part[:cut],
          len(part),
          Content_Range=f'bytes {first}-{last}/{len(data)}',
        )
        h.hang_up()

      return act

    self.store.fault(tell(old, 2 * _CHUNK))
    self.store.fault(tell(new), times=2)
    self.assertTrue(self.open().get('k', 5 * _CHUNK) == new)
    self.assertEqual(self.store.injected, 3)

  def test_silence_ends_at_the_deadline(self):
    asked = threading.Event()

    def hang_and_tell(h):
      asked.set()
      hang(h)

    self.store.fault(hang_and_tell, times=100)
    own = self.open(wait=self.until(asked))
    for act in (
      lambda: own.get('k', 1),
      lambda: own.put('k', b''),
      lambda: own.list(''),
    ):
      with self.assertRaisesRegex(
        interface.StoreUnavailableError, r'no answer \(60 s, tries: 1\)$'
      ):
        act()
    self.assertEqual(self.store.injected, 3)

  def test_a_stall_is_tried_again(self):
    self.store.objects['/abc/k'] = b'data'
    self.store.fault(hang)
    own = self.open(stall_seconds=0.2)
    self.assertEqual(own.get('k', 4), b'data')
    self.assertEqual(self.store.injected, 1)

  def test_a_drip_ends_at_the_deadline(self):
    def drip(h):
      asked = re.match(r'bytes=(\d+)-', h.headers.get('Range', ''))
      if asked:  # what the first answer did not bring
        span = f'bytes {asked[1]}-{10**6 - 1}/{10**6}'
        h.reply(206, length=10**6 - int(asked[1]), Content_Range=span)
      else:
        h.reply(200, length=10**6)
      while not h.server.over.wait(0.01):
        h.wfile.write(b'a')

    self.store.fault(drip, times=10**6)
    with self.assertRaises(interface.StoreUnavailableError):
      self.open(deadline_seconds=0.3, slowest_rate=1e9).get('k', 10**6)

  def test_failing_ends_at_the_deadline_and_says_why(self):
    self.store.fault(status(503, b'<Code>SlowDown</Code>'), times=10**6)
    own = self.open(wait=self.until(self.paused))
    with self.assertRaisesRegex(
      interface.StoreUnavailableError,
      r'^cannot read k in s3://abc at .*: the store asks for fewer requests '
      r'\(HTTP 503, SlowDown\) \(60 s, tries: \d+\)$',
    ):
      own.get('k', 1)

  def test_no_server_is_unavailable(self):
    self.store.over.set()
    self.store.shutdown()  # a thread that polls a socket keeps it open
    self.store.socket.close()
    # Bound without listening: no server of another test gets this port.
    refusing = socket.socket()
    self.addCleanup(refusing.close)
    refusing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    refusing.bind(('127.0.0.1', self.store.server_port))
    own = self.open(wait=self.until(self.paused))
    with self.assertRaisesRegex(
      interface.StoreUnavailableError, 'connection refused'
    ):
      own.get('k', 1)

  def pour(self, **reply):
    """A body without end, whatever was announced."""

    def act(h):
      try:
        h.reply(200, b'', **reply)
        while True:  # until they leave
          h.wfile.write(bytes(2**16))
          h.server.sent += 2**16
      finally:
        self.left.set()

    return act

  def test_an_object_over_the_limit_is_not_read(self):
    self.store.fault(self.pour(length=2**30))
    with self.assertRaisesRegex(
      interface.ObjectTooLargeError, f'has {2**30} bytes'
    ):
      self.open().get('k', 100)
    self.store.over.wait(0.1)  # the time to read on, for one who does
    self.assertLess(self.store.sent, 2**24)  # what the system's buffers take

  def test_more_than_was_announced_is_not_read(self):
    self.store.fault(self.pour(length=10))
    self.assertEqual(self.open().get('k', 100), bytes(10))
    self.assertTrue(self.left.wait(PATIENCE))
    self.assertLess(self.store.sent, 2**24)

  @parameterized.parameters(
    (200, {}),  # all of it again, where a part was asked for
    (206, {}),
    (206, {'Content_Range': 'bytes 0-99/1000'}),
  )
  def test_a_malformed_part_is_refused(self, code, headers):
    self.store.objects['/abc/k'] = bytes(1000)
    self.store.fault(truncate(100))
    self.store.fault(lambda h: h.reply(code, bytes(900), **headers))
    with self.assertRaisesRegex(interface.StoreError, 'malformed'):
      self.open().get('k', 1000)

  def test_no_length_is_refused(self):
    def chunked(h):
      h.send_response(200)
      h.send_header('Transfer-Encoding', 'chunked')
      h.end_headers()
      h.wfile.write(b'4\r\ndata\r\n0\r\n\r\n')

    self.store.fault(chunked)
    with self.assertRaisesRegex(interface.StoreError, 'malformed'):
      self.open().get('k', 4)

  def test_a_size_that_changes_under_way_is_no_way_past_the_limit(self):
    def grow(h):
      first = int(re.match(r'bytes=(\d+)-', h.headers['Range'])[1])
      h.reply(
        206, bytes(1000 - first), Content_Range=f'bytes {first}-999/10000000'
      )

    self.store.fault(lambda h: (h.reply(200, bytes(100), 1000), h.hang_up()))
    self.store.fault(grow)
    self.store.fault(self.pour(length=10**7))
    with self.assertRaises(interface.ObjectTooLargeError):
      self.open().get('k', 1000)
    self.assertEqual(self.store.injected, 3)

  @parameterized.parameters(False, True)
  def test_a_part_is_sent_again(self, replace):
    data = os.urandom(2 * _UPLOAD + 9)
    self.store.fault(status(503), path='partNumber=2')
    self.open(part_bytes=_UPLOAD).put('k', data, replace=replace)
    self.assertEqual(self.store.injected, 1)
    self.assertTrue(self.store.objects == {'/abc/k': data})
    self.assertEmpty(self.store.parts)

  @parameterized.parameters(False, True)
  def test_an_upload_that_fails_leaves_nothing(self, replace):
    self.store.fault(status(403), path='partNumber=2')
    with self.assertRaises(interface.AccessDeniedError):
      self.open(part_bytes=_UPLOAD).put(
        'k', bytes(2 * _UPLOAD), replace=replace
      )
    self.assertTrue(self.store.aborted.wait(PATIENCE))
    self.assertEqual(self.store.injected, 1)
    self.assertEqual(list(self.store.objects), [])
    self.assertEmpty(self.store.parts)

  def test_an_upload_past_the_deadline_leaves_nothing(self):
    asked, gave_up = threading.Event(), threading.Event()

    def be_late(h):
      asked.set()
      self.assertTrue(gave_up.wait(PATIENCE))
      serve(h)

    self.store.fault(be_late, path='partNumber', times=100)
    own = self.open(part_bytes=_UPLOAD, wait=self.until(asked))
    with self.assertRaises(interface.StoreUnavailableError):
      own.put('k', bytes(8 * _UPLOAD))  # more parts than move at once
    gave_up.set()
    self.assertTrue(self.store.aborted.wait(PATIENCE))
    self.assertEqual(list(self.store.objects), [])
    self.assertEmpty(self.store.parts)

  @pytest.mark.network
  def test_an_upload_into_silence_leaves_nothing(self):
    self.store.fault(hang, path='partNumber=2', times=100)
    own = self.open(part_bytes=_UPLOAD, deadline_seconds=4, stall_seconds=3)
    with self.assertRaises(interface.StoreUnavailableError):
      own.put('k', bytes(2 * _UPLOAD))
    self.assertTrue(self.store.aborted.wait(PATIENCE))
    self.assertEqual(list(self.store.objects), [])
    self.assertEmpty(self.store.parts)

  def test_parts_whose_last_answer_was_lost_are_a_put(self):
    # The copy's completion: the first If-None-Match that has an upload.
    def lose(h):
      if 'If-None-Match' in h.headers:
        lose_answer(h)
      else:
        serve(h)

    data = os.urandom(_UPLOAD + 9)
    self.store.fault(lose, method='POST', path='uploadId', times=2)
    self.open(part_bytes=_UPLOAD).put('k', data)
    self.assertEqual(self.store.injected, 2)
    self.assertTrue(self.store.objects == {'/abc/k': data})

  def test_parts_yield_to_another_one_put_meanwhile(self):
    def be_overtaken(h):
      h.server.objects['/abc/k'] = b'other'
      serve(h)

    self.store.fault(be_overtaken, path='partNumber=1')
    with self.assertRaises(interface.ObjectExistsError):
      self.open(part_bytes=_UPLOAD).put('k', bytes(_UPLOAD + 9))
    self.assertEqual(self.store.objects, {'/abc/k': b'other'})

  def test_no_more_requests_at_once_than_allowed(self):
    self.store.objects['/abc/k'] = b'data'
    pairs = threading.Barrier(2, timeout=PATIENCE)
    active, most = [], []

    def meet(h):
      active.append(h)
      most.append(len(active))
      pairs.wait()  # there are two, or this test fails
      active.remove(h)
      serve(h)

    self.store.fault(meet, times=6)
    own = self.open(requests=2)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
      got = list(pool.map(lambda _: own.get('k', 4), range(6)))
    self.assertEqual(got, [b'data'] * 6)
    self.assertEqual(self.store.injected, 6)
    self.assertLessEqual(max(most), 2)

  @parameterized.parameters(False, True)
  def test_a_redirect_to_another_host_leads_nowhere(self, is_own):
    other = Store()
    other.objects['/abc/k'] = b'data'
    thread = threading.Thread(target=other.serve_forever, args=(0.01,))
    thread.start()
    self.addCleanup(other.server_close)
    self.addCleanup(thread.join)
    self.addCleanup(other.shutdown)
    there = f'http://localhost:{other.server_port}/abc/k'
    self.store.fault(lambda h: h.reply(307, Location=there), times=4)
    theirs = (
      self.open()
      if is_own
      else bucket_lib.open_for_reading(
        self.location, allow_local=True, settings=self.settings()
      )
    )
    for act in lambda: theirs.get('k', 4), lambda: theirs.head('k'):
      with self.assertRaisesRegex(
        interface.StoreError, 'the store redirects to another host'
      ):
        act()
    self.assertEmpty(other.log)
    self.assertLen(self.store.log, 2)
    # The host itself is read.
    self.store.faults.clear()
    self.store.objects['/abc/k'] = b'data'
    self.assertEqual(theirs.get('k', 4), b'data')

  def test_a_redirect_in_a_circle_is_not_tried_again(self):
    here = f'{self.location.endpoint}/abc/k'
    self.store.fault(lambda h: h.reply(301, Location=here), times=99)
    with self.assertRaisesRegex(interface.StoreError, 'in a circle'):
      self.open().get('k', 4)
    self.assertLen(self.store.log, 11)

  @parameterized.parameters('http://', '')
  def test_all_goes_through_an_operators_proxy(self, scheme):
    other, environ = self.store, {'no_proxy': 'inner.example.org'}
    environ['http_proxy'] = f'{scheme}127.0.0.1:{other.server_port}'
    there = 'http://inner.example.org/abc/k'
    other.fault(lambda h: h.reply(307, Location=there))
    with mock.patch.dict(os.environ, environ):
      theirs = bucket_lib.open_for_reading(
        location_lib.Location('s3', 'abc', endpoint='http://s3.example.org'),
        allow_local=True,
        settings=self.settings(),
      )
      with self.assertRaises(interface.MissingObjectError):
        theirs.get('k', 4)
    self.assertRegex(other.log[0], r'^GET http://s3.example.org/abc/k')
    # So does a redirect: the proxy decides, and nothing is reached beside it.
    self.assertRegex(other.log[1], r'^GET http://inner.example.org/abc/k')

  def test_the_bucket_can_be_in_the_name_of_the_host(self):
    proxy = {'http_proxy': self.location.endpoint}
    self.store.objects['http://abc.s3.example.org/k'] = b'data'
    with mock.patch.dict(os.environ, proxy):
      theirs = bucket_lib.open_for_reading(
        location_lib.Location(
          's3', 'abc', endpoint='http://s3.example.org', style='virtual'
        ),
        allow_local=True,
        settings=self.settings(),
      )
      self.assertEqual(theirs.get('k', 4), b'data')

  def test_the_environment_leads_nothing_astray(self):
    self.store.objects['/abc/k'] = b'data'
    environ = {
      'AWS_ACCESS_KEY_ID': 'operator',
      'AWS_SECRET_ACCESS_KEY': 'operator',
      'AWS_SESSION_TOKEN': 'operator',
      'AWS_ENDPOINT_URL': 'http://127.0.0.1:9',
      'AWS_ENDPOINT_URL_S3': 'http://127.0.0.1:9',
      'AWS_REGION': 'operator',
      'AWS_SKIP_SIGNATURE': 'true',
      'AWS_VIRTUAL_HOSTED_STYLE_REQUEST': 'true',
      'AWS_REQUEST_PAYER': 'true',
    }
    with_key = location_lib.Location(
      's3', 'abc', '', self.location.endpoint, key_id='reader', secret='public'
    )
    with mock.patch.dict(os.environ, environ):
      for location in (self.location, with_key):
        theirs = bucket_lib.open_for_reading(
          location, allow_local=True, settings=self.settings()
        )
        self.assertEqual(theirs.get('k', 4), b'data')
    self.assertLen(self.store.log, 2)
    self.assertNotIn('operator', str(self.store.headers))
    self.assertNotIn('authorization', self.store.headers[0])
    self.assertIn('reader', self.store.headers[1]['authorization'])

  @parameterized.parameters(
    ('http://127.0.0.1:9000', ()),
    ('https://127.0.0.1', ()),
    ('https://10.0.0.1', ()),
    ('https://localhost', ()),
    ('https://s3.example.org', ()),
    ('https://s3.example.org', ('example.org', 'org')),
    ('https://s3.example.org:444', ('s3.example.org',)),
    ('http://s3.example.org', ('s3.example.org',)),
  )
  def test_strangers_lead_nowhere_else(self, endpoint, hosts):
    location = location_lib.Location('s3', 'abc', endpoint=endpoint)
    with self.assertRaisesRegex(
      interface.AccessDeniedError, 'expected https and R2'
    ):
      bucket_lib.open_for_reading(location, hosts=hosts)

  @parameterized.parameters(
    ('s3://abc', ()),
    ('s3://abc?endpoint=https://s3.example.org', ('s3.example.org',)),
    ('s3://abc?endpoint=https://s3.example.org:1', ('s3.example.org:1',)),
    (f'r2://{"a" * 32}/abc?key_id={"b" * 32}&secret={"c" * 64}', ()),
    (
      f'r2://{"a" * 32}/abc?jurisdiction=eu&key_id={"b" * 32}'
      f'&secret={"c" * 64}',
      (),
    ),
    ('s3://abc?region=cn-north-1', ()),
    (
      's3://abc?endpoint=https://s3.example.org&style=virtual',
      ('s3.example.org',),
    ),
  )
  def test_strangers_are_read_elsewhere(self, text, hosts):
    location = location_lib.Location.parse(text)
    theirs = bucket_lib.open_for_reading(location, hosts=hosts)
    self.assertEqual(theirs.location, text)


if __name__ == '__main__':
  absltest.main()
