"""The meaning of obstore's errors, and the options of a store."""

import base64
import datetime
import errno
import http.server
import os
import threading
from unittest import mock

import obstore.exceptions
import obstore.store
from absl.testing import absltest
from absl.testing import parameterized

from covenant.store import backend
from covenant.store import interface
from covenant.store import location as location_lib

_GENERIC = obstore.exceptions.GenericError


def _status(code, word=''):
  body = f'<Error><Code>{word}</Code><Key>secret</Key></Error>' if word else ''
  return _GENERIC(f'Server returned non-2xx status code: {code} X: {body}')


class ExplainTest(parameterized.TestCase):
  @parameterized.parameters(
    (_status(503, 'SlowDown'), interface.StoreUnavailableError,
     'the store asks for fewer requests (HTTP 503, SlowDown)'),
    (_status(500), interface.StoreUnavailableError, 'HTTP 500'),
    (_status(429), interface.StoreUnavailableError, 'HTTP 429'),
    (_status(404, 'NoSuchUpload'), interface.StoreUnavailableError,
     'the store forgot the upload before it was complete '
     '(HTTP 404, NoSuchUpload)'),
    (_status(404, 'NoSuchBucket'), interface.MissingObjectError,
     'there is no such bucket (HTTP 404, NoSuchBucket)'),
    (_status(404), interface.MissingObjectError, 'there is no such object'),
    (_status(403, 'AccessDenied'), interface.AccessDeniedError,
     'the credentials lack this right, or the bucket is one whose requesters '
     'pay, which nodes do not (HTTP 403, AccessDenied)'),
    (_status(403, 'SecondLevelDomainForbidden'), interface.AccessDeniedError,
     'the store wants style=virtual in the location '
     '(HTTP 403, SecondLevelDomainForbidden)'),
    (_status(400, 'UserProjectMissing'), interface.StoreError,
     'requesters pay for this bucket, which nodes do not '
     '(HTTP 400, UserProjectMissing)'),
    (_status(501, 'NotImplemented'), interface.StoreError,
     'the store lacks a function of S3 that nodes need, most likely '
     'conditional writes (If-None-Match); use another store '
     '(HTTP 501, NotImplemented)'),
    (_status(501), interface.StoreError,
     'the store lacks a function of S3 that nodes need, most likely '
     'conditional writes (If-None-Match); use another store (HTTP 501)'),
    (_status(401, 'Unheard'), interface.AccessDeniedError,
     'HTTP 401, Unheard'),
    (_status(400, 'InvalidArgument'), interface.StoreError,
     'HTTP 400, InvalidArgument'),
    (_status(400), interface.StoreError, 'HTTP 400'),
    (_status(400, 'x' * 41), interface.StoreError, 'HTTP 400'),
    (_status(400, '\x1b[31m'), interface.StoreError, 'HTTP 400'),
    (_GENERIC('DeleteObjects request failed for key k: m '
              '(code: AccessDenied)'), interface.AccessDeniedError,
     'the credentials lack this right, or the bucket is one whose requesters '
     'pay, which nodes do not (HTTP 200, AccessDenied)'),
    (_GENERIC('error response: <Error><Code>InternalError</Code></Error>'),
     interface.StoreUnavailableError, 'HTTP 200, InternalError'),
    (_GENERIC('Received redirect without LOCATION, this normally indicates'),
     interface.StoreError, 'the bucket is in another region'),
    (_GENERIC('HTTP error: TimedOut'), interface.StoreUnavailableError,
     'no answer'),
    (_GENERIC('HTTP error: dns error: x'), interface.StoreUnavailableError,
     'the name of the host is not known'),
    (_GENERIC('HTTP error: unheard of'), interface.StoreUnavailableError,
     'the connection failed'),
    (_GENERIC('unheard of'), interface.StoreError,
     'the answer of the store is malformed'),
    (obstore.exceptions.PreconditionError('x'), backend.ObjectReplacedError,
     'the object was replaced while it was read'),
    (obstore.exceptions.AlreadyExistsError('x'), interface.ObjectExistsError,
     'there is one already'),
    (FileNotFoundError('x'), interface.MissingObjectError,
     'there is no such object'),
    (_GENERIC(f'x (os error {errno.ENOTDIR})'), interface.MissingObjectError,
     'there is no such object'),
    (_GENERIC(f'x (os error {errno.EACCES})'), interface.AccessDeniedError,
     os.strerror(errno.EACCES).lower()),
    (_GENERIC(f'x (os error {errno.ENOSPC})'), interface.StoreError,
     os.strerror(errno.ENOSPC).lower()),
  )  # fmt: skip
  def test_an_error_is_of_its_kind_and_quotes_nothing(self, error, kind, text):
    explained = backend.explain(error)
    self.assertIs(type(explained), kind)
    self.assertEqual(str(explained), text)

  @parameterized.parameters(
    ('2026-11-29T16:00:00Z', ': 90 s ahead'),
    ('2026-11-29T16:03:00.000Z', ': 90 s behind'),
    ('2026-99-29T16:00:00Z', ''),
    ('yesterday', ''),
  )
  def test_a_wrong_clock_is_off_by_so_much(self, there, words):
    now = datetime.datetime(2026, 11, 29, 16, 1, 30, tzinfo=datetime.UTC)
    error = _GENERIC(
      'Server returned non-2xx status code: 403 X: <Error>'
      '<Code>RequestTimeTooSkewed</Code><ServerTime>'
      f'{there}</ServerTime></Error>'
    )
    with mock.patch('time.time', now.timestamp):
      explained = backend.explain(error)
    self.assertEqual(
      str(explained),
      f'the clock of this machine is wrong{words} '
      '(HTTP 403, RequestTimeTooSkewed)',
    )

  def test_a_conflict_of_writes_is_no_object(self):
    """Another write of the key is under way: it is asked again."""
    error = obstore.exceptions.AlreadyExistsError(
      'Server returned non-2xx status code: 409 Conflict'
    )
    self.assertIs(type(backend.explain(error)), interface.StoreUnavailableError)

  def test_of_many_the_first_is_explained(self):
    group = ExceptionGroup('', [_status(500), _status(403)])
    self.assertIs(type(backend.explain(group)), interface.StoreUnavailableError)

  def test_an_error_of_ours_stays(self):
    error = interface.ObjectTooLargeError('too large')
    self.assertIs(backend.explain(error), error)

  def test_a_panic_of_the_client_is_a_refusal(self):
    panic = type('RustPanic', (Exception,), {})('IdnaError')
    self.assertIs(type(backend.explain(panic)), interface.StoreError)

  def test_a_bug_is_raised(self):
    with self.assertRaises(ZeroDivisionError):
      backend.explain(ZeroDivisionError())


class ConnectTest(parameterized.TestCase):
  def connect(self, location, make_folder=False):
    return backend.connect(
      location, None, make_folder, backend.StoreSettings(), retries=0
    )

  def test_memory_is_one_store_per_name_while_anyone_has_it(self):
    one = self.connect(location_lib.Location('memory', 'backend-test'))
    obstore.put(one, 'key', b'data')
    same = self.connect(location_lib.Location('memory', 'backend-test'))
    self.assertIs(same, one)
    other = self.connect(location_lib.Location('memory', 'backend-test-2'))
    self.assertIsNot(other, one)
    del one, same
    new = self.connect(location_lib.Location('memory', 'backend-test'))
    self.assertEmpty([name for batch in obstore.list(new) for name in batch])

  def test_a_folder_is_made_only_to_write(self):
    path = os.path.join(self.create_tempdir().full_path, 'new')
    location = location_lib.Location('file', path)
    with self.assertRaisesRegex(interface.MissingObjectError, 'no such folder'):
      self.connect(location)
    self.assertFalse(os.path.exists(path))
    self.connect(location, make_folder=True)
    self.assertTrue(os.path.isdir(path))
    self.assertIsInstance(self.connect(location), obstore.store.LocalStore)

  def test_r2_is_at_its_account(self):
    location = location_lib.Location(
      'r2', 'abc', 'a' * 32, key_id='b' * 32, secret='c' * 64
    )
    store = self.connect(location)
    self.assertIn(
      f'https://{"a" * 32}.r2.cloudflarestorage.com', str(store.config)
    )

  @parameterized.parameters(
    ('region=eu-west-1', 'https://s3.eu-west-1.amazonaws.com'),
    ('region=cn-north-1', 'https://s3.cn-north-1.amazonaws.com.cn'),
    ('region=eusc-de-east-1', 'https://s3.eusc-de-east-1.amazonaws.eu'),
    (
      'region=cn-northwest-1&style=virtual',
      'https://abc.s3.cn-northwest-1.amazonaws.com.cn',
    ),
    (
      'endpoint=https://oss.example.org:9000&style=virtual',
      'https://abc.oss.example.org:9000',
    ),
  )
  def test_the_server_of(self, query, endpoint):
    store = self.connect(location_lib.Location.parse(f's3://abc?{query}'))
    self.assertEqual(store.config['endpoint'], endpoint)
    style = store.config['virtual_hosted_style_request']
    self.assertEqual(style, str('virtual' in query).lower())

  @parameterized.parameters('eu', 'fedramp')
  def test_r2_with_a_jurisdiction(self, jurisdiction):
    location = location_lib.Location(
      'r2',
      'abc',
      'a' * 32,
      key_id='b' * 32,
      secret='c' * 64,
      jurisdiction=jurisdiction,
    )
    self.assertEqual(
      self.connect(location).config['endpoint'],
      f'https://{"a" * 32}.{jurisdiction}.r2.cloudflarestorage.com',
    )

  def test_the_operators_keys_stay_at_the_own_store(self):
    """Those of the environment, which obstore reads by itself."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_GET(self):  # noqa: N802
        seen.append((self.path, str(self.headers)))
        self.send_response(200)
        self.send_header('Content-Length', '1')
        self.send_header('ETag', '"1"')
        self.send_header('Last-Modified', 'Thu, 01 Jan 1970 00:00:00 GMT')
        self.end_headers()
        self.wfile.write(b'x')

      def log_message(self, *args):
        pass

    server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    self.addCleanup(thread.join)
    self.addCleanup(server.server_close)
    self.addCleanup(server.shutdown)
    secret = base64.b64encode(b'k' * 32).decode()
    environ = {
      'AWS_SERVER_SIDE_ENCRYPTION': 'sse-c',
      'AWS_SSE_CUSTOMER_KEY_BASE64': secret,
      'AWS_SSE_KMS_KEY_ID': 'SECRET-kms',
      'AWS_SECRET_ACCESS_KEY': 'SECRET-access',
      'AWS_ACCESS_KEY_ID': 'SECRET-id',
      'AWS_SESSION_TOKEN': 'SECRET-token',
      'AWS_CONTAINER_AUTHORIZATION_TOKEN': 'SECRET-container',
    }
    location = location_lib.Location(
      's3', 'runs', endpoint=f'http://127.0.0.1:{server.server_port}'
    )
    key = backend.Credentials('theirs', 'theirs')
    for credentials in (None, key):
      with mock.patch.dict(os.environ, environ):
        store = backend.connect(
          location, credentials, False, backend.StoreSettings(), retries=0
        )
        self.assertEqual(bytes(obstore.get(store, 'a').bytes()), b'x')
    self.assertLen(seen, 2)
    for path, headers in seen:
      for word in ('SECRET', secret, 'customer'):
        self.assertNotIn(word.lower(), (path + headers).lower())
    # The own store is read with the operator's key.
    with mock.patch.dict(os.environ, environ | {'AWS_SSE_KMS_KEY_ID': ''}):
      del os.environ['AWS_SSE_KMS_KEY_ID']
      store = backend.connect(
        location, None, True, backend.StoreSettings(), retries=0
      )
      obstore.get(store, 'a').bytes()
    self.assertIn('customer', seen[-1][1].lower())

  def test_credentials_are_not_printed(self):
    key = backend.Credentials('id-of-key', 'secret', 'token')
    for text in repr(key), str(key):
      for word in 'id-of-key', 'secret', 'token':
        self.assertNotIn(word, text.replace('Key(', ''))


if __name__ == '__main__':
  absltest.main()
