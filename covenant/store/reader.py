"""Reads many objects from many buckets before a deadline."""

import collections
import queue
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Generic, NamedTuple, TypeVar

from covenant.store import interface
from covenant.store import transfer as transfer_lib

_Name = TypeVar('_Name', bound=Hashable)


class ObjectRequest(NamedTuple):
  """A request for one object, from the first bucket that has it."""

  buckets: tuple[interface.Bucket, ...]  # bucket of the owner, then mirrors
  key: str
  limit: int  # bytes
  digest: bytes | None = None  # blake2b, 32 bytes; None accepts any bytes
  accepts: Callable[[bytes], bool] | None = None  # True for the right bytes


Note = Callable[[interface.Bucket, interface.StoreError | None], None]
Take = Callable[[_Name, bytes], None]
# Tries per bucket that nobody waits for any more, but that are not over.
_MOST_ABANDONED = 4
_FAIR = 0.2  # seconds below which no answer says nothing about a bucket
# Silence after which the next bucket takes over; a third of a short deadline.
_STALL_SECONDS = 10.0


class _Try:
  """One request to one bucket, on a thread of its own."""

  _lock = threading.Lock()
  _abandoned: collections.Counter[int] = collections.Counter()  # by bucket

  def __init__(self, bucket: interface.Bucket, began: float, look: float):
    self.bucket = bucket
    self.transfer = transfer_lib.Transfer()
    self.look = look  # time at which its progress is looked at
    self.is_replaced = False  # True once the next bucket has taken over
    self._began = began
    self._seen = 0  # bytes that had come at the last look
    self._over = self._is_abandoned = False

  @classmethod
  def is_too_many(cls, bucket: interface.Bucket) -> bool:
    """Returns whether a bucket still owes too many answers."""
    return cls._abandoned[id(bucket)] >= _MOST_ABANDONED

  def is_stalled(self, now: float, share: float, deadline: float) -> bool:
    """Returns whether nothing came, or too little to end by the deadline.

    The rate counts only once the try has had its share of the time.
    """
    got, missing = self.transfer.received, 0
    silent, self._seen = got == self._seen, got
    if silent or not got:  # or it began again, with another object
      return True
    took = now - self._began
    if took >= share:
      missing = self.transfer.size - got
    return now + missing * took / got > deadline

  def abandon(self) -> None:
    """Ends the read, or notes that nobody waits for its answer any more."""
    with self._lock:
      if not self._over:
        self._is_abandoned = True
        self._abandoned[id(self.bucket)] += 1
    self.transfer.cancel()

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
      with transfer_lib.watch(self.transfer):
        answer = _read(self.bucket, request, self.transfer)
    except Exception as e:
      answer = e
    self.end()
    answers.put((name, index, answer))


def _read(
  bucket: interface.Bucket,
  request: ObjectRequest,
  transfer: transfer_lib.Transfer,
) -> bytes:
  data = bucket.get(request.key, request.limit)
  if request.digest is not None:
    digest = transfer.digest_of(data)
    if request.digest != digest:
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
  take: Take = lambda name, data: None,
) -> dict[_Name, bytes | interface.StoreError]:
  """Fetches the object of each request.

  One bucket at a time reads an object. If it fails, or its bytes have another
  digest, the next is asked at once. If nothing comes from it for a while, or,
  after its share of the time, too little to end by the deadline, its read is
  canceled and the next bucket takes over. After its share a try delays no
  other request, so every request gets its turn before the deadline.

  Args:
    requests: the requests by name, such as a uid.
    deadline_seconds: the time for all requests. Reads that are under way then
      are canceled.
    workers: parallel tries within their share.
    note: told of every answer of a bucket, except for errors of reads that
      were canceled; with an error of those that have not answered in time, too.
    take: called with each object as it comes, in the thread of the caller,
      while others are being read.

  Returns:
    The bytes of each name, or an error with one reason per bucket.
  """
  for name, request in requests.items():
    if not request.buckets:
      raise ValueError(f'request {name!r}: expected one bucket or more')
  fetching = _Fetch(requests, deadline_seconds, workers, note, take)
  try:
    while len(fetching.results) < len(requests):
      fetching.start_tries()
      if not fetching.wait():
        break
  finally:
    results = fetching.end()
  return results


class _Fetch(Generic[_Name]):
  """The state of one call of `fetch`, which has the arguments."""

  def __init__(
    self,
    requests: Mapping[_Name, ObjectRequest],
    seconds: float,
    workers: int,
    note: Note,
    take: Take,
  ):
    most = max((len(x.buckets) for x in requests.values()), default=1)
    self.results: dict[_Name, bytes | interface.StoreError] = {}
    self._requests = requests
    self._seconds = seconds
    self._workers = workers
    self._note = note
    self._take = take
    self._share = seconds / (most * max(1, -(-len(requests) // workers)))
    self._stall = min(_STALL_SECONDS, max(seconds / most, seconds / 3))
    self._deadline = time.monotonic() + seconds
    # (name, index of the bucket, what came)
    self._answers = queue.SimpleQueue()
    self._waiting = collections.deque((name, 0) for name in requests)
    # (name, index) -> end of its share; they end in this order
    self._within: dict[tuple[_Name, int], float] = {}
    self._running: dict[tuple[_Name, int], _Try] = {}
    self._pending = collections.Counter(requests.keys())  # wait or run
    self._asked = collections.Counter(requests.keys())  # and those over
    self._errors: dict[_Name, list[interface.StoreError]]
    self._errors = {name: [] for name in requests}

  def start_tries(self) -> None:
    """Starts the tries that are next, as many as may run."""
    while self._waiting and len(self._within) < self._workers:
      name, index = self._waiting.popleft()
      if name in self.results:
        continue
      now = time.monotonic()
      self._within[name, index] = now + self._share
      bucket = self._requests[name].buckets[index]
      if _Try.is_too_many(bucket):
        busy = interface.StoreUnavailableError(
          f'{bucket!r} has not answered {_MOST_ABANDONED} earlier requests'
        )
        self._answers.put((name, index, busy))
        continue
      one = _Try(bucket, now, now + self._stall)
      self._running[name, index] = one
      args = self._answers, name, index, self._requests[name]
      threading.Thread(target=one.run, args=args, daemon=True).start()

  def wait(self) -> bool:
    """Handles the next answer, or what is due; returns False at the end."""
    looks = [one.look for one in self._running.values()]
    until = min([self._deadline, *list(self._within.values())[:1], *looks])
    try:
      left = max(0, until - time.monotonic())
      name, index, answer = self._answers.get(timeout=left)
    except queue.Empty:
      if until == self._deadline:
        return False
      # It may be later than was due: a caller may have taken long.
      self._look(max(until, time.monotonic()))
      return True
    self._handle(name, index, answer)
    return True

  def _look(self, now: float) -> None:
    """Ends shares that are over, and tries from which nothing comes."""
    for key in [key for key, end in self._within.items() if end <= now]:
      del self._within[key]
    for (name, index), one in list(self._running.items()):
      if one.look > now:
        continue
      one.look = now + self._stall
      is_last = self._asked[name] == len(self._requests[name].buckets)
      if is_last or name in self.results:
        one.look = self._deadline
      elif one.is_stalled(now, self._share, self._deadline):
        one.look = self._deadline
        one.is_replaced = True
        self._within.pop((name, index), None)
        self._note_late(one, 'the next one took over: too little came in time')
        one.transfer.cancel()
        self._ask_next(name)

  def _ask_next(self, name: _Name) -> None:
    if self._asked[name] < len(self._requests[name].buckets):
      self._waiting.append((name, self._asked[name]))
      self._asked[name] += 1
      self._pending[name] += 1

  def _handle(self, name: _Name, index: int, answer: object) -> None:
    self._pending[name] -= 1
    one = self._running.pop((name, index), None)
    self._within.pop((name, index), None)
    bucket = self._requests[name].buckets[index]
    if isinstance(answer, bytes):
      self._note(bucket, None)
    elif name not in self.results and (one is None or not one.is_replaced):
      if isinstance(answer, interface.StoreError):
        self._note(bucket, answer)
    if name in self.results:
      return
    if isinstance(answer, bytes):
      self.results[name] = answer
      self._cancel_others(name)
      self._take(name, answer)
    elif isinstance(answer, interface.StoreError):
      self._errors[name].append(answer)
      if one is None or not one.is_replaced:
        self._ask_next(name)
      if not self._pending[name]:
        self.results[name] = _joined(self._errors[name])
    elif isinstance(answer, Exception):
      raise answer  # a bug of a bucket

  def _cancel_others(self, name: _Name) -> None:
    for (other, _), one in self._running.items():
      if other == name:
        one.transfer.cancel()

  def end(self) -> dict[_Name, bytes | interface.StoreError]:
    """Cancels what still runs; returns the result of each request."""
    text = f'not there within {self._seconds:g} s'
    late = interface.StoreUnavailableError(text)
    for (name, _), one in self._running.items():
      one.abandon()
      if name not in self.results and not one.is_replaced:
        self._note_late(one, text)
    for name in self._requests:
      if name not in self.results:
        self.results[name] = _joined([*self._errors[name], late])
    return {name: self.results[name] for name in self._requests}

  def _note_late(self, one: _Try, text: str) -> None:
    if self._seconds >= _FAIR:
      self._note(one.bucket, interface.StoreUnavailableError(text))


def _joined(errors: list[interface.StoreError]) -> interface.StoreError:
  """Joins errors into one, of their class if they share it."""
  kinds = {type(e) for e in errors}
  kind = kinds.pop() if len(kinds) == 1 else interface.StoreUnavailableError
  return kind('; '.join(map(str, errors)))
