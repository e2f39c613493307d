"""The settings, stores, errors and event loop of obstore.

obstore has one interface for memory, folders and S3; its quirks stay here.
"""

import asyncio
import atexit
import concurrent.futures
import dataclasses
import datetime
import errno
import functools
import os
import random
import re
import threading
import time
import urllib.request
import weakref
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from covenant import extras
from covenant.store import interface
from covenant.store import location as location_lib

with extras.needed('run'):
  import obstore.exceptions
  import obstore.store


@dataclasses.dataclass(frozen=True)
class StoreSettings:
  """Limits of one bucket, and its clock and dice, which tests replace.

  The defaults carry a part over 9 Mbit/s, four at a time, before it stalls.
  """

  deadline_seconds: float = 60.0  # of a call, plus its bytes / slowest_rate
  slowest_rate: float = 2.0**21  # bytes/s
  stall_seconds: float = 30.0  # of silence, or of sending one part
  part_bytes: int = 2**23  # larger objects are split into parts; S3 wants 5 MiB
  requests: int = 8  # in parallel
  backoff_seconds: float = 0.2  # longest first pause; doubles from there
  backoff_limit_seconds: float = 5.0
  rng: random.Random = dataclasses.field(default_factory=random.Random)
  sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
  # Returns the result of a call, or raises TimeoutError after these seconds.
  wait: Callable[[concurrent.futures.Future, float], Any] = (
    concurrent.futures.Future.result
  )


_memory = weakref.WeakValueDictionary()  # name -> store, while anyone has it

_NOWHERE = '127.0.0.1:0'
# Of the answer of a store, messages quote the code alone: error pages echo
# requests, and an untrusted server may have written them.
_CODE = re.compile(r'(?:<Code>|\(code: )([A-Za-z0-9.]{1,40})(?:</Code>|\))')
_SERVER_TIME = re.compile(r'<ServerTime>([-0-9T:.]{19,26}Z)</ServerTime>')
_CODES = {
  'NoSuchBucket': 'there is no such bucket',
  'NoSuchUpload': 'the store forgot the upload before it was complete',
  'InvalidAccessKeyId': 'the store does not know the access key id',
  'SignatureDoesNotMatch': 'the secret does not belong to the access key id',
  'RequestTimeTooSkewed': 'the clock of this machine is wrong',
  'RequestExpired': 'the clock of this machine is wrong',
  'AccessDenied': 'the credentials lack this right, or the bucket is one whose '
  'requesters pay, which nodes do not',
  'UserProjectMissing': 'requesters pay for this bucket, which nodes do not',
  'SecondLevelDomainForbidden': 'the store wants style=virtual in the location',
  'NotImplemented': 'the store lacks a function of S3 that nodes need, most '
  'likely conditional writes (If-None-Match); use another store',
  'AuthorizationHeaderMalformed': 'the region is wrong',
  'PermanentRedirect': 'the bucket is in another region',
  'SlowDown': 'the store asks for fewer requests',
}
_NETWORK = {
  'TimedOut': 'no answer',
  'IncompleteBody': 'the connection broke in the middle',
}
_HOSTS = {
  'dns error': 'the name of the host is not known',
  'failed to lookup address': 'the name of the host is not known',
  'certificate': 'the certificate of the host is not trusted',
  'tls': 'the host does not speak TLS',
  'invalidcontenttype': 'the host does not speak TLS',
}
_TRANSIENT = (408, 409, 425, 429)  # and 500 to 599, but for 501
_DENIED = ('AccessDenied', 'InvalidAccessKeyId', 'SignatureDoesNotMatch')
_FAILING = ('InternalError', 'NoSuchUpload', 'ServiceUnavailable', 'SlowDown')
_BUSY_TRIES = 3  # of a stranger's bucket that refuses for now


class ObjectReplacedError(interface.StoreUnavailableError):
  """The object was replaced since its reading began."""


@dataclasses.dataclass(frozen=True)
class Credentials:
  """S3 credentials, never printed."""

  key_id: str = dataclasses.field(repr=False)
  secret: str = dataclasses.field(repr=False)
  token: str | None = dataclasses.field(default=None, repr=False)


def connect(
  location: location_lib.Location,
  key: Credentials | None,
  make_folder: bool,
  settings: StoreSettings,
  retries: int,
) -> obstore.store.ObjectStore:
  """Returns the obstore store of a location.

  Args:
    location: the location.
    key: S3 credentials; None reads anonymously.
    make_folder: makes the missing folder of a 'file'.
    settings: the deadline and stall time of each request.
    retries: the retries of one request by obstore itself.

  Raises:
    interface.MissingObjectError: there is no such folder.
  """
  if location.kind == 'memory':
    return _memory.setdefault(location.bucket, obstore.store.MemoryStore())
  if location.kind == 'file':
    if not make_folder and not os.path.isdir(location.bucket):
      raise interface.MissingObjectError(
        f'{location.name}: there is no such folder'
      )
    return obstore.store.LocalStore(
      location.bucket, mkdir=make_folder, automatic_cleanup=True
    )
  return _connect_s3(location, key, make_folder, settings, retries)


def _connect_s3(
  location: location_lib.Location,
  key: Credentials | None,
  own: bool,
  settings: StoreSettings,
  retries: int,
) -> obstore.store.S3Store:
  deadline, stall = settings.deadline_seconds, settings.stall_seconds
  region = location.region or 'us-east-1'
  copy = 'multipart'  # completed only if there is no such object
  if location.kind == 'r2':
    region, copy = 'auto', 'header: cf-copy-destination-if-none-match: *'
  scheme, _, host = location.url.partition('://')
  if location.style == 'virtual':
    host = f'{location.bucket}.{host}'
  endpoint = f'{scheme}://{host}'
  # obstore takes missing options from AWS_* variables. So both endpoints are
  # set, and credentials by a provider: neither requests nor the operator's
  # session token must go to another server.
  credentials = key and {
    'access_key_id': key.key_id,
    'secret_access_key': key.secret,
    'token': key.token,
    'expires_at': None,
  }
  return obstore.store.S3Store(
    location.bucket,
    endpoint=endpoint,
    aws_endpoint_url_s3=endpoint,
    region=region,
    virtual_hosted_style_request=location.style == 'virtual',
    conditional_put='etag',
    copy_if_not_exists=copy,
    skip_signature=key is None,
    request_payer=False,
    s3_express=False,
    credential_provider=(lambda: credentials) if credentials else None,
    # Else AWS_SSE_CUSTOMER_KEY_BASE64 of the operator went to every store. It
    # is an option of writes, of which others' buckets get none.
    **({} if own else {'server_side_encryption': 'AES256'}),
    client_options={
      'allow_http': endpoint.startswith('http://'),
      'connect_timeout': datetime.timedelta(seconds=min(stall, 5)),
      'read_timeout': datetime.timedelta(seconds=stall),
      'timeout': datetime.timedelta(seconds=deadline),
      **_proxy(scheme, host),
    },
    retry_config={
      'max_retries': retries,
      'retry_timeout': datetime.timedelta(seconds=deadline),
      'backoff': {'max_backoff': datetime.timedelta(seconds=5)},
    },
  )


def _proxy(scheme: str, host: str) -> Mapping[str, str]:
  """Returns client options that lead redirects to other hosts nowhere.

  obstore follows redirects to any host, with all headers but the signature. So
  every host but this one, and names below it, is behind a proxy where nobody
  can listen, or behind the operator's proxy, if this one is.
  """
  if os.environ.get('AWS_PROXY_URL'):  # obstore's own variable
    return {}
  name, proxies = host.partition(':')[0], urllib.request.getproxies()
  proxy = proxies.get(scheme) or proxies.get('all')
  if proxy and not urllib.request.proxy_bypass(host):
    return {'proxy_url': proxy if '://' in proxy else f'http://{proxy}'}
  return {'proxy_url': f'http://{_NOWHERE}', 'proxy_excludes': name}


def info(meta: 'obstore.ObjectMeta') -> interface.Info:
  """Returns what obstore says of an object."""
  return interface.Info(
    meta['path'], meta['size'], meta['last_modified'].timestamp()
  )


def explain(error: Exception) -> interface.StoreError:
  """Converts an error of obstore into one of ours, with its reason.

  A StoreUnavailableError may be gone on the next try. An error that does not
  come from a store is a bug, and is raised.
  """
  if isinstance(error, ExceptionGroup):
    error = error.exceptions[0]
  if isinstance(error, interface.StoreError):
    return error
  if type(error).__name__ == 'RustPanic':  # of a location it cannot parse
    return interface.StoreError('the location is of no use to the client')
  if not isinstance(error, (obstore.exceptions.BaseError, OSError)):
    raise error
  text = str(error)
  status = re.search(r'non-2xx status code: (\d{3})', text)
  if isinstance(error, obstore.exceptions.PreconditionError):
    return ObjectReplacedError('the object was replaced while it was read')
  if isinstance(error, obstore.exceptions.AlreadyExistsError):
    # S3's 409 says that another write of the key is under way: ask again.
    if status is None or status[1] != '409':
      return interface.ObjectExistsError('there is one already')
  if status or _CODE.search(text):  # S3 also tells of errors after a 200
    return _of_answer(int(status[1]) if status else 200, text)
  if 'redirect without LOCATION' in text:
    return interface.StoreError(_CODES['PermanentRedirect'])
  if 'TooManyRedirects' in text:
    return interface.StoreError('the store redirects in a circle')
  if _NOWHERE in text:
    return interface.StoreError('the store redirects to another host')
  if isinstance(error, FileNotFoundError):
    return interface.MissingObjectError('there is no such object')
  number = re.search(r'\(os error (\d+)\)', text)
  if 'HTTP error' in text:
    for mark, words in _HOSTS.items():
      if mark in text.lower():
        return _given_up(words, 1)
    if 'ConnectionRefused' in text:
      return _given_up('connection refused', _BUSY_TRIES)
    known = [words for mark, words in _NETWORK.items() if mark in text]
    return interface.StoreUnavailableError(
      known[0] if known else 'the connection failed'
    )
  if number:
    if int(number[1]) == errno.ENOTDIR:
      return interface.MissingObjectError('there is no such object')
    reason = os.strerror(int(number[1])).lower()
    if int(number[1]) in (errno.EACCES, errno.EPERM, errno.EROFS):
      return interface.AccessDeniedError(reason)
    return interface.StoreError(reason)
  return interface.StoreError('the answer of the store is malformed')


def _given_up(reason: str, tries: int) -> interface.StoreUnavailableError:
  """Returns an error of which a stranger's bucket may have so many."""
  error = interface.StoreUnavailableError(reason)
  error.most_tries = tries
  return error


def _of_answer(status: int, text: str) -> interface.StoreError:
  match = _CODE.search(text)
  code = match[1] if match else ''
  known = _CODES.get(code or 'NotImplemented' * (status == 501), '')
  if known == _CODES['RequestTimeTooSkewed']:
    known += _skew(text)
  told = ', '.join(filter(None, (f'HTTP {status}', code)))
  reason = f'{known} ({told})' if known else told
  if status in (401, 403) or code in _DENIED:
    return interface.AccessDeniedError(reason)
  if status in _TRANSIENT:
    return _given_up(reason, _BUSY_TRIES)
  if status >= 500 and status != 501 or code in _FAILING:
    return interface.StoreUnavailableError(reason)
  if status == 404:
    return interface.MissingObjectError(
      reason if known else 'there is no such object'
    )
  return interface.StoreError(reason)


def _skew(text: str) -> str:
  """Returns how far this clock is from that of the store, if it says so."""
  match = _SERVER_TIME.search(text)
  try:
    there = datetime.datetime.fromisoformat(match[1] if match else '')
  except ValueError:
    return ''
  ahead = time.time() - there.timestamp()
  return f': {abs(ahead):.0f} s {"ahead" if ahead > 0 else "behind"}'


_RELEASE_SECONDS = 0.05


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
  """Returns a loop that runs on a thread: callers may have their own loop.

  obstore takes cancellations and deadlines only from a loop.
  """
  loop = asyncio.new_event_loop()
  thread = threading.Thread(target=loop.run_forever, name='store', daemon=True)
  thread.start()

  def end() -> None:
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    # obstore's threads still release objects; one that needs the interpreter
    # after its end would abort the process.
    time.sleep(_RELEASE_SECONDS)

  atexit.register(end)
  return loop
