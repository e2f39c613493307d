"""Folders of data, on this machine or in an object store, and a cache of them.

A URL of a folder or file is

    s3://BUCKET/PATH?endpoint=https://HOST&region=R
    r2://ACCOUNT/BUCKET/PATH
    https://HOST/PATH          a file, or a folder whose files are known by name

Credentials come from DATA_ACCESS_KEY_ID and DATA_SECRET_ACCESS_KEY, else from
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN; without any, or
with an empty DATA_ACCESS_KEY_ID, requests are not signed.
"""

import collections
import contextlib
import datetime
import io
import os
import pathlib
import re
import tempfile
import threading
import urllib.parse
import weakref
from collections.abc import Hashable, Iterator, Mapping
from typing import IO, NamedTuple, Protocol

from covenant import errors
from covenant import extras
from covenant.store import backend
from covenant.store import location as location_lib

with extras.needed('run'):
  import obstore
  import obstore.store

_RETRIES = 10  # of one request, by obstore
_BLOCK = 2**22  # bytes of a request that streams a file


class DataError(errors.CovenantError):
  """Data could not be read; the message says which and why."""


class Entry(NamedTuple):
  """A file of a folder."""

  key: str  # its path below the folder
  size: int  # bytes


class Folder(Protocol):
  """Files below a path or URL.

  Attributes:
    name: the path or URL, without a query.
    is_remote: True if a read is a request to a server.
  """

  name: str
  is_remote: bool

  def read(self, key: str) -> bytes:
    """Returns the content of a file.

    Raises:
      FileNotFoundError: there is no such file.
      DataError: it could not be read.
    """
    ...

  def read_range(self, key: str, start: int, end: int) -> bytes:
    """Returns the bytes [start, end) of a file; fewer where it ends."""
    ...


def is_url(path: str) -> bool:
  """Returns True for the URL of a store, False for a path."""
  return bool(re.match(r'[a-z0-9]+://', path))


def folder(path: str) -> Folder:
  """Opens a path or URL.

  Raises:
    DataError: the URL is malformed or not supported.
  """
  return RemoteFolder(path) if is_url(path) else LocalFolder(path)


class LocalFolder:
  """See `Folder`."""

  is_remote = False

  def __init__(self, path: str | pathlib.Path):
    self._path = pathlib.Path(path)
    self.name = str(path)

  def read(self, key: str) -> bytes:
    with _explained(f'{self.name}/{key}'):
      return (self._path / key).read_bytes()

  def read_range(self, key: str, start: int, end: int) -> bytes:
    with (
      _explained(f'{self.name}/{key}'),
      open(self._path / key, 'rb', buffering=0) as f,
    ):
      return os.pread(f.fileno(), end - start, start)


class RemoteFolder:
  """See `Folder`. Safe for many threads, not across a fork."""

  is_remote = True

  def __init__(self, url: str, environ: Mapping[str, str] = os.environ):
    self._environ = environ
    base, _, query = url.partition('?')
    self.name = base.rstrip('/')
    kind, _, rest = base.partition('://')
    options = dict(urllib.parse.parse_qsl(query))
    try:
      if kind in ('s3', 'r2'):
        self._store, self._prefix = self._open_s3(kind, rest, options)
      elif kind == 'https' or _is_loopback(kind, rest):
        self._store, self._prefix = _open_http(url), ''
      else:
        raise ValueError('expected s3://, r2:// or https://')
    except ValueError as error:
      raise DataError(f'{self.name}: {error}') from None
    self.can_list = kind in ('s3', 'r2')

  def _open_s3(
    self, kind: str, rest: str, options: dict[str, str]
  ) -> tuple[obstore.store.ObjectStore, str]:
    if kind == 'r2':
      account, _, rest = rest.partition('/')
      options = {
        'endpoint': f'https://{account}.r2.cloudflarestorage.com',
        'region': 'auto',
      }
    if unknown := set(options) - {'endpoint', 'region'}:
      raise ValueError(
        f'expected endpoint and region after "?", got {", ".join(unknown)}'
      )
    bucket, _, prefix = rest.partition('/')
    location = location_lib.Location('s3', bucket, **options)
    return backend.connect(
      location,
      _credentials(self._environ),
      False,
      backend.StoreSettings(),
      _RETRIES,
    ), urllib.parse.unquote(prefix).strip('/')

  def _key(self, key: str) -> str:
    return f'{self._prefix}/{key}'.strip('/')

  def read(self, key: str) -> bytes:
    with _explained(f'{self.name}/{key}'):
      return bytes(obstore.get(self._store, self._key(key)).bytes())

  def read_range(self, key: str, start: int, end: int) -> bytes:
    with _explained(f'{self.name}/{key}'):
      found = obstore.get_range(
        self._store, self._key(key), start=start, end=end
      )
      return bytes(found)

  def size(self, key: str) -> int:
    """Returns the size of a file in bytes."""
    with _explained(f'{self.name}/{key}'):
      return obstore.head(self._store, self._key(key))['size']

  def list(self) -> Iterator[Entry]:
    """Yields the files below the folder; those of https cannot be listed."""
    if not self.can_list:
      raise DataError(
        f'{self.name}: a server of https does not list folders; name a file, '
        'or use s3:// or r2://'
      )
    start = len(self._prefix) + bool(self._prefix)
    with _explained(self.name):
      for page in obstore.list(self._store, self._prefix or None):
        for meta in page:
          yield Entry(meta['path'][start:], meta['size'])

  def open(self, key: str, size: int) -> IO[bytes]:
    """Opens a file to be read as a stream, with seeks."""
    return io.BufferedReader(_Stream(self, key, size), _BLOCK)


class _Stream(io.RawIOBase):
  """A file of a store, read by ranges."""

  def __init__(self, store: RemoteFolder, key: str, size: int):
    self._store, self._file, self._size, self._at = store, key, size, 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}
    self._at = base[whence] + offset
    return self._at

  def tell(self) -> int:
    return self._at

  def readinto(self, buffer) -> int:
    end = min(self._at + len(buffer), self._size)
    if end <= self._at:
      return 0
    found = self._store.read_range(self._file, self._at, end)
    buffer[: len(found)] = found
    self._at += len(found)
    return len(found)


def _is_loopback(kind: str, rest: str) -> bool:
  """Returns True for plain http on this machine, which nobody can listen to."""
  host = urllib.parse.urlsplit(f'{kind}://{rest}').hostname
  return kind == 'http' and host in ('127.0.0.1', 'localhost', '::1')


def _open_http(url: str) -> obstore.store.ObjectStore:
  settings = backend.StoreSettings()
  deadline = datetime.timedelta(seconds=settings.deadline_seconds)
  return obstore.store.HTTPStore(
    url,
    client_options={
      'allow_http': url.startswith('http:'),
      'connect_timeout': datetime.timedelta(seconds=5),
      'timeout': deadline,
    },
    retry_config={'max_retries': _RETRIES, 'retry_timeout': deadline},
  )


def _credentials(environ: Mapping[str, str]) -> backend.Credentials | None:
  own = environ.get('DATA_ACCESS_KEY_ID')
  if own is not None:
    secret = environ.get('DATA_SECRET_ACCESS_KEY', '')
    return backend.Credentials(own, secret) if own else None
  names = 'AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'
  if not all(environ.get(name) for name in names):
    return None
  token = environ.get('AWS_SESSION_TOKEN')
  return backend.Credentials(environ[names[0]], environ[names[1]], token)


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
  """Turns the errors of files and stores into ours."""
  try:
    yield
  except FileNotFoundError:
    raise FileNotFoundError(f'{name}: no such file') from None
  except (OSError, obstore.exceptions.BaseError) as error:
    if isinstance(error, OSError) and error.strerror:
      raise DataError(f'{name}: {error.strerror.lower()}') from None
    raise DataError(f'{name}: {backend.explain(error)}') from None


class ChunkCache:
  """The chunks that were used last, in a file of bounded size.

  The file has no name: it disappears with the process.

  Args:
    limit: bytes of the file.
    slot: bytes of the largest chunk.
    parent: the folder of the file; made when missing.
  """

  def __init__(self, limit: int, slot: int, parent: pathlib.Path):
    self._slots, self._slot = max(limit // slot, 1), slot
    parent.mkdir(parents=True, exist_ok=True)
    self._file, name = tempfile.mkstemp(dir=parent)
    weakref.finalize(self, os.close, self._file)
    os.unlink(name)
    self._lock = threading.Lock()
    # Key -> (slot, length), the one used longest ago first.
    self._used: collections.OrderedDict[Hashable, tuple[int, int]] = (
      collections.OrderedDict()
    )

  def get(self, key: Hashable) -> bytes | None:
    """Returns a chunk, or None if the cache has it no more."""
    with self._lock:
      if key not in self._used:
        return None
      self._used.move_to_end(key)
      slot, length = self._used[key]
      return os.pread(self._file, length, slot * self._slot)

  def put(self, key: Hashable, chunk: bytes) -> None:
    """Keeps a chunk, in the place of the one used longest ago if full."""
    with self._lock:
      slot = len(self._used)
      if key in self._used:
        slot, _ = self._used.pop(key)
      elif slot >= self._slots:
        _, (slot, _) = self._used.popitem(last=False)
      os.pwrite(self._file, chunk, slot * self._slot)
      self._used[key] = slot, len(chunk)


def cache_folder() -> pathlib.Path:
  """Returns the folder for caches of data."""
  base = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(base, 'covenant', 'data')
