"""Reads one object in parts, and many from many buckets before a deadline."""

import asyncio
import collections
import hashlib
import io
import queue
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, TypeVar

from covenant import extras
from covenant.store import backend
from covenant.store import interface

with extras.needed('run'):
  import obstore

PARTS_AT_ONCE = 4  # of one object
_CHUNK_BYTES = 2**16  # bytes that a break may lose


class ObjectReader:
  """The reader of one object, with the parts read so far."""

  def __init__(
    self,
    store: obstore.store.ObjectStore,
    key: str,
    limit: int,
    slots: asyncio.Semaphore,
    part_bytes: int,
  ):
    self._store = store
    self._key = key
    self._limit = limit
    self._slots = slots
    self._part_bytes = part_bytes
    self._restart()

  def _restart(self) -> None:
    self._size = 0
    self._identity: tuple | None = None  # of the object, once it answered
    self._parts = [bytearray()]

  async def read(self) -> bytes:
    """Returns the whole object; after a failure, call again to resume."""
    try:
      # Without a range: one request is enough for a small object, and tells the
      # size of a large one.
      await self._fill(0)
      count = max(1, -(-self._size // self._part_bytes))
      self._parts += [bytearray() for _ in range(count - len(self._parts))]
      turns = asyncio.Semaphore(PARTS_AT_ONCE)
      async with asyncio.TaskGroup() as group:
        for index in range(1, count):
          group.create_task(self._fill_in_turn(index, turns))
    except Exception as e:
      error = backend.explain(e)
      if isinstance(error, backend.ObjectReplacedError):
        self._restart()
      raise error from None
    whole = io.BytesIO()  # gives its bytes away without a copy
    for part in self._parts:
      whole.write(part)
      part.clear()
    return whole.getvalue()

  async def _fill_in_turn(self, index: int, turns: asyncio.Semaphore) -> None:
    async with turns:
      await self._fill(index)

  async def _fill(self, index: int) -> None:
    part = self._parts[index]
    at = index * self._part_bytes + len(part)
    end = (index + 1) * self._part_bytes
    options: obstore.GetOptions = {}
    if self._identity is not None:
      end = min(end, self._size)
      if at >= end:
        return
      options['range'] = (at, end)
      if e_tag := self._identity[1]:
        options['if_match'] = e_tag
    async with self._slots:
      result = await obstore.get_async(self._store, self._key, options=options)
      self._meet(result.meta)
      end = min(end, self._size)
      # Received bytes are counted, whatever length was announced.
      async for chunk in result.stream(_CHUNK_BYTES):
        part += chunk[: end - at]
        at = min(at + len(chunk), end)
        if at == end:
          return
    if at < end:
      raise interface.StoreUnavailableError(
        'the object broke off in the middle'
      )

  def _meet(self, meta: 'obstore.ObjectMeta') -> None:
    identity = meta['size'], meta['e_tag'], meta['last_modified']
    if self._identity not in (None, identity):
      raise backend.ObjectReplacedError(
        'the object was replaced while it was read'
      )
    if meta['size'] > self._limit:
      raise interface.ObjectTooLargeError(
        f'it has {meta["size"]} bytes, {self._limit} are allowed'
      )
    self._size, self._identity = meta['size'], identity


_Name = TypeVar('_Name', bound=Hashable)


class ObjectRequest(NamedTuple):
  """A request for one object, from the first bucket that has it."""

  buckets: tuple[interface.Bucket, ...]  # bucket of the owner, then mirrors
  key: str
  limit: int  # bytes
  digest: bytes | None = None  # blake2b, 32 bytes; None accepts any bytes
  accepts: Callable[[bytes], bool] | None = None  # True for the right bytes


Note = Callable[[interface.Bucket, interface.StoreError | None], None]
# Tries per bucket that nobody waits for any more, but that are not over.
_MOST_ABANDONED = 4
_FAIR = 0.2  # seconds below which no answer says nothing about a bucket


class _Try:
  """One request to one bucket, on a thread of its own."""

  _lock = threading.Lock()
  _abandoned: collections.Counter[int] = collections.Counter()  # by bucket

  def __init__(self, bucket: interface.Bucket):
    self.bucket = bucket
    self._over = self._is_abandoned = False

  @classmethod
  def is_too_many(cls, bucket: interface.Bucket) -> bool:
    """Returns whether a bucket still owes too many answers."""
    return cls._abandoned[id(bucket)] >= _MOST_ABANDONED

  def abandon(self) -> None:
    """Notes that nobody waits for the answer any more."""
    with self._lock:
      if not self._over:
        self._is_abandoned = True
        self._abandoned[id(self.bucket)] += 1

  def end(self) -> None:
    """Notes that the bucket has answered, or given up."""
    with self._lock:
      self._over = True
      if self._is_abandoned:
        self._abandoned[id(self.bucket)] -= 1
        if not self._abandoned[id(self.bucket)]:
          del self._abandoned[id(self.bucket)]

  def run(
    self,
    answers: queue.SimpleQueue,
    name: Hashable,
    index: int,
    request: ObjectRequest,
  ) -> None:
    """Puts the bytes, if they are right, or the error on `answers`."""
    answer: bytes | Exception
    try:
      answer = _read(self.bucket, request)
    except Exception as e:
      answer = e
    self.end()
    answers.put((name, index, answer))


def _read(bucket: interface.Bucket, request: ObjectRequest) -> bytes:
  data = bucket.get(request.key, request.limit)
  digest = hashlib.blake2b(data, digest_size=32).digest()
  if request.digest is not None and request.digest != digest:
    raise interface.StoreError(
      f'{request.key} in {bucket!r}: expected bytes of digest '
      f'{request.digest.hex()[:16]}, got {digest.hex()[:16]}'
    )
  if request.accepts is not None and not request.accepts(data):
    raise interface.StoreError(
      f'{request.key} in {bucket!r}: not the object that was asked for'
    )
  return data


def fetch(
  requests: Mapping[_Name, ObjectRequest],
  deadline_seconds: float,
  workers: int = 64,
  note: Note = lambda bucket, error: None,
) -> dict[_Name, bytes | interface.StoreError]:
  """Fetches the object of each request.

  A bucket that fails, or whose bytes have another digest, is skipped at once.
  A slow bucket gets its share of the time; then the next is tried as well, and
  the first good answer counts. After its share a try delays no other request,
  so every request gets its turn before the deadline.

  Args:
    requests: the requests by name, such as a uid.
    deadline_seconds: the time for all requests. Reads that are under way then
      end by their buckets' own deadlines, unused.
    workers: parallel tries within their share.
    note: told of every answer of a bucket; with an error of those that have
      not answered in time, too.

  Returns:
    The bytes of each name, or an error with one reason per bucket.
  """
  for name, request in requests.items():
    if not request.buckets:
      raise ValueError(f'request {name!r}: expected one bucket or more')
  most = max((len(request.buckets) for request in requests.values()), default=1)
  share = deadline_seconds / (most * max(1, -(-len(requests) // workers)))
  deadline = time.monotonic() + deadline_seconds
  answers = queue.SimpleQueue()  # (name, index of the bucket, what came)
  waiting = collections.deque((name, 0) for name in requests)
  within = {}  # (name, index) -> end of its share; they end in this order
  running: dict[tuple[_Name, int], _Try] = {}
  pending = collections.Counter(requests.keys())  # tries that wait or run
  asked = collections.Counter(requests.keys())  # and those that are over
  errors: dict[_Name, list[interface.StoreError]] = {n: [] for n in requests}
  results = {}

  def ask_next(name: _Name) -> None:
    if asked[name] < len(requests[name].buckets):
      waiting.append((name, asked[name]))
      asked[name] += 1
      pending[name] += 1

  while len(results) < len(requests):
    while waiting and len(within) < workers:
      name, index = waiting.popleft()
      if name not in results:
        within[name, index] = time.monotonic() + share
        bucket = requests[name].buckets[index]
        if _Try.is_too_many(bucket):
          busy = interface.StoreUnavailableError(
            f'{bucket!r} has not answered {_MOST_ABANDONED} earlier requests'
          )
          answers.put((name, index, busy))
          continue
        running[name, index] = one = _Try(bucket)
        args = answers, name, index, requests[name]
        threading.Thread(target=one.run, args=args, daemon=True).start()
    until = min([deadline, *list(within.values())[:1]])
    try:
      left = max(0, until - time.monotonic())
      name, index, answer = answers.get(timeout=left)
    except queue.Empty:
      if until == deadline:
        break
      slow = next(iter(within))
      del within[slow]
      ask_next(slow[0])
      continue
    pending[name] -= 1
    running.pop((name, index), None)
    is_good = isinstance(answer, bytes)
    if is_good or isinstance(answer, interface.StoreError):
      note(requests[name].buckets[index], None if is_good else answer)
    in_time = within.pop((name, index), None) is not None
    if name in results:
      continue
    if isinstance(answer, bytes):
      results[name] = answer
    elif isinstance(answer, interface.StoreError):
      errors[name].append(answer)
      if in_time:
        ask_next(name)
      if not pending[name]:
        results[name] = _joined(errors[name])
    else:
      raise answer  # a bug of a bucket
  late = interface.StoreUnavailableError(
    f'not there within {deadline_seconds:g} s'
  )
  for one in running.values():
    one.abandon()
    if deadline_seconds >= _FAIR:
      note(one.bucket, late)
  return {
    name: results[name] if name in results else _joined([*errors[name], late])
    for name in requests
  }


def _joined(errors: list[interface.StoreError]) -> interface.StoreError:
  """Joins errors into one, of their class if they share it."""
  kinds = {type(e) for e in errors}
  kind = kinds.pop() if len(kinds) == 1 else interface.StoreUnavailableError
  return kind('; '.join(map(str, errors)))
