"""Tests for covenant.data.remote: over HTTP and S3 on the loopback."""

import http.server
import logging
import os
import pathlib
import re
import threading
import urllib.request
from unittest import mock

import numpy as np
from absl.testing import absltest
from absl.testing import parameterized
from moto import server as moto_server

from covenant import config as config_lib
from covenant.data import readers
from covenant.data import remote
from covenant.data import shards
from covenant.data import sources
from covenant.data import tokenize
from covenant.data import tokens as tokens_lib
from tests.data import text_files

TEXTS = [f'{i} ' + 'the cat sat\n' * (i % 7 + 1) for i in range(40)]


class _Files(http.server.SimpleHTTPRequestHandler):
  """A folder over HTTP, with ranges; `broken` counts answers to spoil."""

  protocol_version = 'HTTP/1.1'
  broken = 0
  asked: list[str] = []

  def log_message(self, *args):
    del args

  def do_GET(self):
    path = pathlib.Path(self.translate_path(self.path))
    type(self).asked.append(self.path)
    if not path.is_file():
      self.send_error(404)
      return
    content, status = path.read_bytes(), 200
    if match := re.match(r'bytes=(\d+)-(\d*)', self.headers.get('Range', '')):
      start, end = int(match[1]), int(match[2] or len(content) - 1)
      total = len(content)
      content, status = content[start : end + 1], 206
    self.send_response(status)
    if status == 206:
      last = start + len(content) - 1
      self.send_header('Content-Range', f'bytes {start}-{last}/{total}')
    if type(self).broken and path.suffix == '.tokens':
      type(self).broken -= 1
      content = b'\xff' + content[1:]
    self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    self.wfile.write(content)


class RemoteCase(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = pathlib.Path(cls.create_tempdir(cls()).full_path)
    handler = lambda *args: _Files(*args, directory=str(cls.root))  # noqa: E731
    cls.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    cls.url = f'http://127.0.0.1:{cls.server.server_port}'
    threading.Thread(target=cls.server.serve_forever, daemon=True).start()

  @classmethod
  def tearDownClass(cls):
    cls.server.shutdown()
    cls.server.server_close()
    super().tearDownClass()

  def setUp(self):
    super().setUp()
    _Files.broken, _Files.asked = 0, []
    cache = self.create_tempdir().full_path
    self.enter_context(mock.patch.dict('os.environ', {'XDG_CACHE_HOME': cache}))

  def config(self, path):
    return config_lib.Config(
      data=config_lib.Data(source='text', path=str(path))
    )

  def write_shards(self, name: str) -> pathlib.Path:
    text_files.write_rows(self.root / f'{name}.jsonl', TEXTS)
    tokenize.run(
      self.config(self.root / f'{name}.jsonl'), str(self.root / name)
    )
    return self.root / name


class HttpTest(RemoteCase):
  @parameterized.parameters(*text_files.ROWS, 'txt.gz')
  def test_sources_are_streamed(self, suffix):
    path = self.root / f'a.{suffix}'
    if suffix in text_files.ROWS:
      text_files.write_rows(path, TEXTS)
    else:
      path.write_bytes(text_files.packed('\n'.join(TEXTS).encode(), suffix))
    (file,) = sources.find(f'{self.url}/a.{suffix}')
    self.assertEqual(file.size, path.stat().st_size)
    if suffix in text_files.ROWS:
      self.assertEqual(list(readers.rows(file, 'text')), TEXTS)
    else:
      self.assertEqual(''.join(readers.blocks(file)), '\n'.join(TEXTS))

  def test_shards_are_read_by_ranges(self):
    folder = self.write_shards('b')
    local = shards.open_shards(folder).train
    data = shards.open_shards(f'{self.url}/b')
    self.assertLen(_Files.asked, 1)  # the manifest
    ids = np.arange(local.num_sequences(16))
    batches = np.array_split(ids, 5)
    got = list(tokens_lib.prefetch(data.train, batches, 16))
    np.testing.assert_array_equal(np.concatenate(got), local.read(ids, 16))
    asked = len(_Files.asked)
    data.train.read(ids, 16)  # from the cache
    self.assertLen(_Files.asked, asked)

  def test_a_damaged_answer_is_asked_for_again(self):
    folder = self.write_shards('c')
    _Files.broken = 1
    with self.assertLogs(level='WARNING') as logged:
      got = shards.open_shards(f'{self.url}/c').train.read([3], 16)
    self.assertIn(
      'train-00000.tokens is damaged (try 1 of 3)', logged.output[0]
    )
    expected = shards.open_shards(folder).train.read([3], 16)
    np.testing.assert_array_equal(got, expected)
    _Files.broken = 99
    with self.assertRaisesRegex(config_lib.ConfigError, 'chunk 0 .bytes 0 to'):
      shards.open_shards(f'{self.url}/c').train.read([3], 16)

  def test_missing(self):
    with self.assertRaisesRegex(
      config_lib.ConfigError, 'manifest.json.*no suc'
    ):
      shards.open_shards(f'{self.url}/nothing')
    with self.assertRaisesRegex(remote.DataError, 'does not list folders'):
      sources.find(f'{self.url}/folder')
    with self.assertRaises((FileNotFoundError, remote.DataError)):
      sources.find(f'{self.url}/no.jsonl')

  @parameterized.parameters(
    ('http://example.com/a.jsonl', r'expected s3://, r2:// or https://'),
    ('ftp://example.com/a.jsonl', r'expected s3://, r2:// or https://'),
    ('s3://bucket/a.jsonl?secret=x', 'expected endpoint and region after'),
    ('s3://b/a.jsonl', 'bucket: expected 3 to 63'),
  )
  def test_malformed_url(self, url, message):
    with self.assertRaisesRegex(remote.DataError, message):
      sources.find(url)


class S3Test(RemoteCase):
  def test_folders_globs_and_shards(self):
    logging.getLogger('werkzeug').setLevel(logging.ERROR)
    keys = {'DATA_ACCESS_KEY_ID': 'own', 'DATA_SECRET_ACCESS_KEY': 'secret'}
    self.enter_context(mock.patch.dict('os.environ', keys))
    server = moto_server.ThreadedMotoServer('127.0.0.1', port=0)
    server.start()
    self.addCleanup(server.stop)
    host, port = server.get_host_and_port()

    def put(key: str, content: bytes | None = None) -> None:
      request = urllib.request.Request(
        f'http://{host}:{port}/corpus{key}',
        content,
        {'Content-Type': 'application/octet-stream'},
        method='PUT',
      )
      urllib.request.urlopen(request, timeout=10).close()

    put('')
    folder = self.write_shards('d')
    for path in folder.rglob('*'):
      if path.is_file():
        put(f'/tokens/{path.relative_to(folder)}', path.read_bytes())
    text = (self.root / 'd.jsonl').read_bytes()
    for key in ('raw/train/1.jsonl', 'raw/val/2.jsonl', 'raw/.x/3.jsonl'):
      put(f'/{key}', text)
    query = f'?endpoint=http://{host}:{port}'
    found = sources.find(f's3://corpus/raw{query}')
    self.assertEqual(
      [(f.name, f.split, f.size) for f in found],
      [
        ('train/1.jsonl', 'train', len(text)),
        ('val/2.jsonl', 'heldout', len(text)),
      ],
    )
    self.assertEqual(list(readers.rows(found[1], 'text')), TEXTS)
    (found,) = sources.find(f's3://corpus/raw/*/1.jsonl{query}')
    self.assertEqual(found.name, 'train/1.jsonl')
    data = shards.open_shards(f's3://corpus/tokens{query}', verify=True)
    local = shards.open_shards(folder)
    np.testing.assert_array_equal(
      data.train.read([5, 2], 16), local.train.read([5, 2], 16)
    )


class CredentialsTest(parameterized.TestCase):
  @parameterized.parameters(
    ({}, None),
    ({'AWS_ACCESS_KEY_ID': 'a'}, None),
    ({'AWS_ACCESS_KEY_ID': 'a', 'AWS_SECRET_ACCESS_KEY': 'b'}, ('a', 'b')),
    (
      {
        'AWS_ACCESS_KEY_ID': 'a', 'AWS_SECRET_ACCESS_KEY': 'b',
        'DATA_ACCESS_KEY_ID': 'c', 'DATA_SECRET_ACCESS_KEY': 'd',
      },
      ('c', 'd'),
    ),
    (
      {
        'AWS_ACCESS_KEY_ID': 'a', 'AWS_SECRET_ACCESS_KEY': 'b',
        'DATA_ACCESS_KEY_ID': '',
      },
      None,
    ),
  )  # fmt: skip
  def test_choice(self, environ, expected):
    with mock.patch.object(remote.backend, 'connect') as connect:
      remote.RemoteFolder('r2://' + '0' * 32 + '/corpus/x', environ)
    location, key, *_ = connect.call_args.args
    self.assertEqual(key and (key.key_id, key.secret), expected)
    self.assertNotIn('secret', repr(key).lower().replace('credentials', ''))
    self.assertEqual(location.bucket, 'corpus')


class ChunkCacheTest(parameterized.TestCase):
  def test_is_bounded_and_keeps_what_was_used_last(self):
    folder = pathlib.Path(self.create_tempdir().full_path, 'a', 'b')
    cache = remote.ChunkCache(30, 10, folder)
    for i in range(3):
      cache.put(i, b'%d' % i * (i + 1))
    self.assertEqual(cache.get(0), b'0')
    cache.put(3, b'3' * 10)
    cache.put(0, b'zero')
    self.assertIsNone(cache.get(1))
    self.assertEqual(
      [cache.get(i) for i in (0, 2, 3)], [b'zero', b'222', b'3' * 10]
    )
    for i in range(4, 100):
      cache.put(i, bytes(10))
    self.assertEqual(os.fstat(cache._file).st_size, 30)
    self.assertEmpty(list(folder.iterdir()))  # it has no name


if __name__ == '__main__':
  absltest.main()
