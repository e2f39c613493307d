"""The contract of every bucket: in memory, in a folder, and over S3."""

import concurrent.futures
import contextlib
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
import urllib.request
from unittest import mock

import pytest
from absl.testing import absltest
from absl.testing import flagsaver
from absl.testing import parameterized
from moto.moto_server import werkzeug_app
from werkzeug import serving

from covenant import cli
from covenant.node import preflight
from covenant.store import backend
from covenant.store import bucket as bucket_lib
from covenant.store import interface
from covenant.store import location as location_lib
from tests import helpers

ENVIRON = {'AWS_ACCESS_KEY_ID': 'own', 'AWS_SECRET_ACCESS_KEY': 'secret'}
_KINDS = ('memory', 'file', 's3')
_NUMBERS = itertools.count()
_SMALL_PARTS = backend.StoreSettings(part_bytes=1000)
_UPLOAD = 5 * 2**20  # the least that S3 takes as a part

_RACE = """
import sys
from covenant.store import bucket, interface, location
own = bucket.open_bucket(location.Location.parse(sys.argv[1]), {})
print('ready', flush=True)
sys.stdin.readline()
won = []
for i in range(100):
  try:
    own.put(f'run/{i}', sys.argv[2].encode())
    won.append(i)
  except interface.ObjectExistsError:
    pass
print(won)
"""


class ContractTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.endpoint = cls.start()

  @classmethod
  def tearDownClass(cls):
    cls.stop()
    super().tearDownClass()

  @classmethod
  def start(cls) -> str:
    """Starts an S3 server; returns its address."""
    # S3 answers conditional writes one after the other; moto alone does not.
    app = werkzeug_app.DomainDispatcherApplication(
      werkzeug_app.create_backend_app
    )
    lock = threading.Lock()

    def one_at_a_time(environ, start_response):
      with lock:
        return app(environ, start_response)

    cls.server = serving.make_server(
      '127.0.0.1',
      0,
      one_at_a_time,
      threaded=True,
      request_handler=werkzeug_app.MotoRequestHandler,
    )
    threading.Thread(target=cls.server.serve_forever, daemon=True).start()
    return f'http://127.0.0.1:{cls.server.server_port}'

  @classmethod
  def stop(cls) -> None:
    cls.server.shutdown()
    cls.server.server_close()

  def setUp(self):
    super().setUp()
    self.name = f'bucket-{next(_NUMBERS)}'

  def location(self, kind: str) -> location_lib.Location:
    match kind:
      case 'memory':
        return location_lib.Location(kind, self.name)
      case 'file':
        return location_lib.Location(kind, self.create_tempdir().full_path)
    request = urllib.request.Request(
      f'{self.endpoint}/{self.name}', method='PUT'
    )
    urllib.request.urlopen(request).close()
    return location_lib.Location(
      kind, self.name, '', self.endpoint, key_id='reader', secret='public'
    )

  def open(self, kind: str, settings=None) -> bucket_lib.ObstoreBucket:
    return bucket_lib.open_bucket(self.location(kind), ENVIRON, settings)

  @parameterized.parameters(*_KINDS)
  def test_what_is_put_is_there(self, kind):
    own = self.open(kind)
    before = int(time.time()) - 1  # S3 tells whole seconds
    for key, data in (('a', b''), ('run/7/b.bin', b'data'), ('.c', b'\0\1')):
      own.put(key, data)
      self.assertEqual(own.get(key, len(data)), data)
      info = own.head(key)
      self.assertEqual(info[:2], (key, len(data)))
      self.assertBetween(info.modified, before, time.time() + 1)

  @parameterized.parameters(*_KINDS)
  def test_is_replaced_only_if_asked(self, kind):
    own = self.open(kind)
    own.put('a', b'one')
    for data in (b'two', b'one'):  # identical bytes are no exception
      with self.assertRaisesRegex(
        interface.ObjectExistsError, 'cannot write a in .*'
      ):
        own.put('a', data)
    self.assertEqual(own.get('a', 3), b'one')
    own.put('a', b'three', replace=True)
    self.assertEqual(own.get('a', 5), b'three')

  @parameterized.parameters(*_KINDS)
  def test_missing(self, kind):
    own = self.open(kind)
    own.put('folder/a', b'')
    for act in (lambda k: own.get(k, 1), own.head):
      for key in ('b', 'folder', 'folder/a/b'):
        with self.assertRaisesRegex(interface.MissingObjectError, key):
          act(key)

  @parameterized.parameters(*_KINDS)
  def test_larger_than_allowed_is_not_read(self, kind):
    own = self.open(kind)
    own.put('a', b'12345')
    with self.assertRaisesRegex(
      interface.ObjectTooLargeError, '5 bytes, 4 are allowed'
    ):
      own.get('a', 4)

  @parameterized.parameters(*_KINDS)
  def test_lists_a_folder_by_key(self, kind):
    own = self.open(kind)
    keys = [f'run/{i}/x' for i in range(9)] + ['run/10', 'runner/1', 'z']
    for key in keys[::-1]:
      own.put(key, key.encode())
    self.assertEqual([i.key for i in own.list('')], sorted(keys))
    found = own.list('run')
    self.assertEqual([i.key for i in found], sorted(keys[:10]))
    self.assertEqual([i.size for i in found], [len(i.key) for i in found])
    self.assertEqual(own.list('run/'), found)
    self.assertEmpty(own.list('nothing'))

  @parameterized.parameters(*_KINDS)
  def test_uploads_under_way_are_listed_only_by_name(self, kind):
    own = self.open(kind)
    for key in ('.staging/a', '.stagings'):
      own.put(key, b'')
    self.assertEqual([i.key for i in own.list('')], ['.stagings'])
    self.assertEqual([i.key for i in own.list('.staging')], ['.staging/a'])

  @parameterized.parameters(*_KINDS)
  def test_a_list_without_end_is_refused(self, kind):
    own = self.open(kind)
    for key in 'abc':
      own.put(key, b'')
    with mock.patch.object(bucket_lib, 'MAX_LISTED', 3):
      self.assertLen(own.list(''), 3)
    with mock.patch.object(bucket_lib, 'MAX_LISTED', 2):
      with self.assertRaisesRegex(
        interface.ObjectTooLargeError, 'more than 2 objects'
      ):
        own.list('')

  @parameterized.parameters(*_KINDS)
  def test_deletes_what_is_there(self, kind):
    own = self.open(kind)
    for key in 'abc':
      own.put(f'run/{key}', b'')
    own.delete(['run/a', 'run/gone', 'run/c'])
    self.assertEqual([i.key for i in own.list('')], ['run/b'])
    own.delete([])
    own.put('run/a', b'again')

  @parameterized.product(
    kind=_KINDS,
    key=(
      '',
      '/a',
      'a/',
      'a//b',
      '.',
      '..',
      '../a',
      'a/../../b',
      'a/./b',
      'a b',
      'a\n',
      'a#1',
      'ä',
      'a\0',
      'a' * 201,
      'a/' * 256 + 'a',
    ),
  )
  def test_refuses_keys_that_lead_elsewhere(self, kind, key):
    own = self.open(kind)
    acts = (
      lambda: own.put(key, b''),
      lambda: own.get(key, 1),
      lambda: own.head(key),
      lambda: own.delete([key]),
    )
    for act in acts:
      with self.assertRaisesRegex(interface.StoreError, '^key: expected'):
        act()

  @parameterized.parameters(*_KINDS)
  def test_dots_inside_a_part_are_a_name(self, kind):
    own = self.open(kind)
    own.put('..a/b..c/...', b'1')
    self.assertEqual([i.key for i in own.list('')], ['..a/b..c/...'])

  @parameterized.product(kind=_KINDS, size=(999, 1000, 1001, 12_345))
  def test_reads_in_parts(self, kind, size):
    own = self.open(kind, _SMALL_PARTS)
    data = os.urandom(size)
    if kind == 's3':  # which does not take such small parts
      bucket_lib.open_bucket(
        location_lib.Location.parse(own.location), ENVIRON
      ).put('a', data)
    else:
      own.put('a', data)
    self.assertEqual(own.get('a', size), data)

  @parameterized.parameters(*_KINDS)
  def test_of_many_at_once_exactly_one_puts(self, kind):
    own = self.open(kind)

    def put(i):
      try:
        own.put('a', bytes([i]) * 1000)
      except interface.ObjectExistsError:
        return None
      return i

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      won = [i for i in pool.map(put, range(8)) if i is not None]
    self.assertLen(won, 1)
    self.assertEqual(own.get('a', 1000), bytes(won) * 1000)

  @pytest.mark.network
  def test_of_two_processes_exactly_one_puts(self):
    own = self.open('file')
    racers = [
      subprocess.Popen(
        [sys.executable, '-c', _RACE, own.location, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
      )
      for name in 'ab'
    ]
    for racer in racers:
      self.assertEqual(racer.stdout.readline(), 'ready\n')
    for racer in racers:
      racer.stdin.write('go\n')
      racer.stdin.flush()
    won = [json.loads(racer.communicate()[0]) for racer in racers]
    self.assertCountEqual(won[0] + won[1], range(100))
    for i in range(100):
      self.assertEqual(own.get(f'run/{i}', 1), b'a' if i in won[0] else b'b')

  @parameterized.parameters(False, True)
  def test_uploads_in_parts(self, replace):
    settings = backend.StoreSettings(part_bytes=_UPLOAD)
    own = self.open('s3', settings)
    data = os.urandom(2 * _UPLOAD + 17)
    own.put('run/a', data, replace=replace)
    self.assertEqual(own.get('run/a', len(data)), data)
    self.assertEqual([i.key for i in own.list('')], ['run/a'])
    self.assertEmpty(own.list('.staging'))
    with self.assertRaises(interface.ObjectExistsError):
      own.put('run/a', data)
    own.put('run/a', data[:-1], replace=True)
    self.assertEqual(own.get('run/a', len(data)), data[:-1])

  def test_of_two_uploads_in_parts_exactly_one_stays(self):
    settings = backend.StoreSettings(part_bytes=_UPLOAD)
    own = self.open('s3', settings)

    def put(i):
      try:
        own.put('a', bytes([i]) * (_UPLOAD + 1))
      except interface.ObjectExistsError:
        return None
      return i

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      won = [i for i in pool.map(put, (1, 2)) if i is not None]
    self.assertLen(won, 1)
    self.assertEqual(own.get('a', 2 * _UPLOAD), bytes(won) * (_UPLOAD + 1))
    self.assertEmpty(own.list('.staging'))

  @parameterized.parameters(*_KINDS)
  def test_others_read_it_by_its_location(self, kind):
    own = self.open(kind)
    own.put('a', b'1')
    location = location_lib.Location.parse(own.location)
    theirs = bucket_lib.open_for_reading(location, allow_local=True)
    self.assertEqual(theirs.get('a', 1), b'1')
    with self.assertRaises(interface.AccessDeniedError):
      bucket_lib.open_for_reading(location)

  def test_a_bucket_that_is_not_there(self):
    location = location_lib.Location('s3', 'gone', endpoint=self.endpoint)
    own = bucket_lib.open_bucket(location, ENVIRON)
    for act in (lambda: own.put('a', b''), lambda: own.list('')):
      with self.assertRaisesRegex(interface.StoreError, 'no such bucket'):
        act()
    with self.assertRaisesRegex(interface.MissingObjectError, 'no such bucket'):
      own.get('a', 1)

  def test_a_folder_that_is_not_there(self):
    path = os.path.join(self.create_tempdir().full_path, 'gone')
    location = location_lib.Location('file', path)
    with self.assertRaisesRegex(interface.MissingObjectError, 'no such folder'):
      bucket_lib.open_for_reading(location, allow_local=True)
    self.assertFalse(os.path.exists(path))
    bucket_lib.open_bucket(location, {}).put('a', b'')
    bucket_lib.open_for_reading(location, allow_local=True).head('a')

  def test_a_folder_shows_only_what_is_whole(self):
    own = self.open('file')
    path = location_lib.Location.parse(own.location).bucket
    own.put('run/a', b'1')
    for name in ('run/b#1', 'run/c d'):  # one by a put that was killed
      with open(os.path.join(path, name), 'wb') as f:
        f.write(b'half')
    self.assertEqual([i.key for i in own.list('')], ['run/a'])

  @parameterized.parameters('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY')
  def test_writing_needs_credentials(self, name):
    location = location_lib.Location('s3', 'abc', endpoint=self.endpoint)
    environ = {k: v for k, v in ENVIRON.items() if k != name}
    with self.assertRaisesRegex(interface.AccessDeniedError, name):
      bucket_lib.open_bucket(location, environ)


class PageTest(absltest.TestCase):
  def test_doctor_tries_the_bucket_that_the_docs_name(self):
    page = (helpers.ROOT / 'docs' / 'operating.md').read_text()
    (command,) = re.findall(
      r'^python (run.py --role=doctor(?:.*\\\n)*.*store_hosts(?:.*\\\n)*.*)',
      page,
      re.MULTILINE,
    )
    endpoint = ContractTest.start()
    self.addCleanup(ContractTest.stop)
    put = urllib.request.Request(f'{endpoint}/run', method='PUT')
    urllib.request.urlopen(put).close()
    words = shlex.split(command.replace('\\\n', ' '))
    for old, new in (
      ('configs/72b.py', f'{helpers.CONFIGS}/tiny.py'),
      (
        'https://s3.example.org&style=virtual',
        f'{endpoint}&key_id=reader&secret=public',
      ),
    ):
      self.assertIn(old, command)
      words = [word.replace(old, new) for word in words]
    out = io.StringIO()
    workdir = self.create_tempdir().full_path
    with (
      contextlib.redirect_stdout(out),
      mock.patch.dict('os.environ', ENVIRON),
      mock.patch.object(preflight, '_arithmetic', return_value=''),  # compiles
      flagsaver.flagsaver(workdir=workdir, verbosity=0),
      self.assertRaises(SystemExit),  # there is no chain
    ):
      cli.run(cli._parse(words))
    self.assertIn('well      bucket      s3://run can be writ', out.getvalue())


if __name__ == '__main__':
  absltest.main()
