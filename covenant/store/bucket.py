"""A bucket in memory, in a folder or behind S3, as `interface.Bucket`."""

import asyncio
import concurrent.futures
import functools
import os
import threading
import time
from collections.abc import (
  Awaitable,
  Callable,
  Collection,
  Coroutine,
  Mapping,
  Sequence,
)
from typing import TypeVar

from covenant import extras
from covenant.store import backend
from covenant.store import interface
from covenant.store import location as location_lib
from covenant.store import object_reader
from covenant.store import retry as retry_lib
from covenant.store import traffic
from covenant.store import transfer as transfer_lib
from covenant.store import upload as upload_lib

with extras.needed('run'):
  import obstore
  import obstore.store

STAGING = upload_lib.STAGING
MAX_LISTED = 100_000  # objects

_T = TypeVar('_T')


def open_bucket(
  location: location_lib.Location,
  environ: Mapping[str, str] = os.environ,
  settings: backend.StoreSettings | None = None,
) -> 'ObstoreBucket':
  """Opens the own bucket, to read and write; makes a missing folder.

  Args:
    location: the public location. Its credentials to read are not used.
    environ: for S3 and R2 the credentials to write: AWS_ACCESS_KEY_ID,
      AWS_SECRET_ACCESS_KEY and, if they are temporary, AWS_SESSION_TOKEN.
    settings: deadlines and sizes.

  Raises:
    AccessDeniedError: the variables are not set.
  """
  key = None
  if location.kind in ('s3', 'r2'):
    names = 'AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'
    if not all(environ.get(name) for name in names):
      raise interface.AccessDeniedError(
        f'no credentials to write to {location.name}: set {" and ".join(names)}'
      )
    token = environ.get('AWS_SESSION_TOKEN')
    key = backend.Credentials(environ[names[0]], environ[names[1]], token)
  return ObstoreBucket(location, key, True, settings or backend.StoreSettings())


def open_for_reading(
  location: location_lib.Location,
  allow_local: bool = False,
  hosts: Collection[str] = (),
  settings: backend.StoreSettings | None = None,
) -> 'ObstoreBucket':
  """Opens another peer's bucket, to read.

  Only servers of Cloudflare and Amazon are allowed. A peer's own server could
  point back into this network, and obstore buffers error pages and listings of
  any length.

  Args:
    location: the location, such as from the chain.
    allow_local: allows memory, folders and any S3 server as well, for runs on
      one machine.
    hosts: further S3 servers to allow, as 'host' or 'host:port'.
    settings: deadlines and sizes.

  Raises:
    AccessDeniedError: the location is not allowed.
    MissingObjectError: there is no such folder.
  """
  if not allow_local:
    if location.kind in ('memory', 'file'):
      raise interface.AccessDeniedError(
        f'{location.kind}: of this machine, not opened'
      )
    scheme, _, host = location.endpoint.partition('://')
    if host and (scheme != 'https' or host not in hosts):
      raise interface.AccessDeniedError(
        f'{location.name}: expected https and R2, Amazon or one of the '
        f'{len(hosts)} other S3 hosts that this run allows (store_hosts)'
      )
  key = backend.Credentials(location.key_id, location.secret)
  key = key if location.key_id else None
  return ObstoreBucket(
    location, key, False, settings or backend.StoreSettings()
  )


class ObstoreBucket:
  """See `interface.Bucket`. Safe for many threads, not across a fork."""

  def __init__(
    self,
    location: location_lib.Location,
    key: backend.Credentials | None,
    own: bool,
    settings: backend.StoreSettings,
  ):
    """See `open_bucket` and `open_for_reading`."""
    self.location = str(location)
    self._name = location.name
    self._settings = settings
    self._s3 = location.kind in ('s3', 'r2')
    self._own = own
    # Only this layer retries: it resumes a read where it broke, and knows when
    # an upload of its own may have arrived. The one exception are the parts of
    # an upload, which obstore retries.
    connect = functools.partial(backend.connect, location, key, own, settings)
    self._connect: Callable[[], obstore.store.ObjectStore] | None = (
      functools.partial(connect, retries=0)
    )
    self._parts_store = connect(retries=10) if self._s3 and own else None
    self._connecting = threading.Lock()
    self._slots = asyncio.Semaphore(settings.requests)
    if own or not self._s3:
      self.open()  # raises where there is none
    self._loop = backend.event_loop()

  def open(self) -> obstore.store.ObjectStore:
    """Returns the client of the store; making it takes a core for 30 ms.

    For a stranger's bucket that is done in the thread that asks it first.
    """
    with self._connecting:
      if self._connect is not None:
        self._store = self._connect()
        self._uploader = upload_lib.Uploader(
          self._store,
          self._parts_store,
          self._slots,
          self._settings,
          self._own,
        )
        self._connect = None
    return self._store

  def __repr__(self) -> str:
    return f'Bucket({self._name!r})'

  def put(self, key: str, data: bytes, *, replace: bool = False) -> None:
    """See `interface.Bucket.put`.

    A large object is uploaded in parts; it appears, with the time of that
    moment, when the last one has arrived. Identical bytes raise
    ObjectExistsError, too.
    """
    interface.check_key(key)

    async def act(call: retry_lib.Call) -> None:
      await self._uploader.put(call, key, data, replace)

    self._run('write', key, act, len(data))

  def get(self, key: str, limit: int) -> bytes:
    """See `interface.Bucket.get`. A read that breaks is resumed."""
    interface.check_key(key)
    watched = transfer_lib.current()
    act = functools.partial(self._get, key=key, limit=limit, transfer=watched)
    return self._run('read', key, act, limit, watched)

  def head(self, key: str) -> interface.Info:
    """See `interface.Bucket.head`."""
    interface.check_key(key)

    async def act():
      async with self._slots:
        return backend.info(await obstore.head_async(self._store, key))

    return self._run('find', key, lambda call: self._retry(call, act))

  def list(self, prefix: str) -> Sequence[interface.Info]:
    """See `interface.Bucket.list`; '' lists all but unfinished uploads.

    Objects with keys that `put` refuses are left out.

    Raises:
      ObjectTooLargeError: there are more than MAX_LISTED.
    """
    prefix = prefix.rstrip('/')
    if prefix:
      interface.check_key(prefix)

    async def act():
      found = []
      async with self._slots:
        async for batch in obstore.list(self._store, prefix or None):
          found += batch
          if len(found) > MAX_LISTED:
            raise interface.ObjectTooLargeError(
              f'more than {MAX_LISTED} objects'
            )
      return found

    found = self._run('list', prefix, lambda call: self._retry(call, act))
    staging = f'{prefix}/'.startswith(STAGING)
    infos = [
      backend.info(meta) for meta in found if interface.is_key(meta['path'])
    ]
    return sorted(i for i in infos if staging or not i.key.startswith(STAGING))

  def delete(self, keys: Sequence[str]) -> None:
    """See `interface.Bucket.delete`."""
    for key in keys:
      interface.check_key(key)

    async def act(some):
      async with self._slots:
        await obstore.delete_async(self._store, some)

    async def each(call):
      # S3 deletes a thousand per request. A folder stops at the first missing
      # object, so its objects are deleted one by one.
      size = 1000 if self._s3 else 1
      for i in range(0, len(keys), size):
        some = list(keys[i : i + size])
        try:
          await self._retry(call, functools.partial(act, some=some))
        except interface.MissingObjectError as e:
          if self._s3:
            raise interface.StoreError(str(e)) from None

    self._run('delete', f'{len(keys)} objects', each)

  async def _get(
    self,
    call: retry_lib.Call,
    key: str,
    limit: int,
    transfer: transfer_lib.Transfer | None = None,
  ) -> bytes:
    size, is_local = self._settings.part_bytes, not self._s3
    parts = object_reader.ObjectReader(
      self._store, key, limit, self._slots, size, is_local, transfer
    )
    return await self._retry(call, parts.read)

  async def _retry(
    self, call: retry_lib.Call, act: Callable[[], Awaitable[_T]]
  ) -> _T:
    return await retry_lib.retry(call, act, self._settings, self._own)

  def _run(
    self,
    verb: str,
    what: str,
    act: Callable[[retry_lib.Call], Coroutine[object, None, _T]],
    size: int = 0,
    transfer: transfer_lib.Transfer | None = None,
  ) -> _T:
    """Runs `act` on the loop until the deadline; completes its errors."""
    self.open()
    call, began, moved = retry_lib.Call(), time.monotonic(), 0
    seconds = self._settings.deadline_seconds
    seconds += size / self._settings.slowest_rate
    message = f'cannot {verb} {what} in {self._name}'
    future = asyncio.run_coroutine_threadsafe(act(call), self._loop)
    if transfer is not None:
      transfer.on_cancel(future.cancel)
    try:
      answer = self._settings.wait(future, seconds)
      moved = len(answer) if isinstance(answer, bytes) else size
      return answer
    except interface.StoreError as e:
      raise type(e)(f'{message}: {e}') from None
    except concurrent.futures.CancelledError:
      raise interface.StoreUnavailableError(
        f'{message}: given up for another bucket'
      ) from None
    except TimeoutError:
      raise interface.StoreUnavailableError(
        f'{message}: {call.last} ({seconds:.3g} s, tries: {call.tries})'
      ) from None
    finally:
      call.over = True
      future.cancel()
      took = time.monotonic() - began
      traffic.TRAFFIC.add(verb, moved, took, call.tries)
