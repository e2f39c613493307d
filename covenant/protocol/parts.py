"""Objects that are stored in parts, listed by digest.

Stores copy and put at most 5 GB in one request, and an upload that a restart
breaks off begins anew. So a large object is cut: its parts lie beside it under
their digests, and its own key has their list. Parts that are there already are
not sent again. The list is not trusted: the whole must have its digest.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from covenant.store import interface
from covenant.store import reader
from covenant.wire import commitment as commitment_lib

PART_BYTES = 1 << 28
_MAGIC = b'covenant.parts\0\0'
_DIGEST_BYTES = 32


def is_cut(size: int) -> bool:
  """Returns whether an object of so many bytes may be stored in parts."""
  return size > PART_BYTES


def cut(data: bytes) -> Iterator[bytes]:
  """Yields the parts of an object."""
  for start in range(0, len(data), PART_BYTES):
    yield data[start : start + PART_BYTES]


def make_list(digests: Sequence[bytes]) -> bytes:
  """Returns the object that lists parts."""
  return _MAGIC + b''.join(digests)


def read_list(data: bytes, limit: int) -> list[bytes] | None:
  """Returns the digests that a list names; None for anything else.

  >>> read_list(make_list([bytes(32)]), 100)[0] == bytes(32)
  True

  Args:
    data: bytes of a stranger.
    limit: the most bytes that the whole may have.
  """
  body = data[len(_MAGIC) :]
  most = -(-limit // PART_BYTES) * _DIGEST_BYTES
  if not data.startswith(_MAGIC) or not body or len(body) > most:
    return None
  if len(body) % _DIGEST_BYTES:
    return None
  starts = range(0, len(body), _DIGEST_BYTES)
  return [body[start : start + _DIGEST_BYTES] for start in starts]


def request(
  sources: tuple[interface.Bucket, ...], key: str, limit: int, name: bytes
) -> reader.ObjectRequest:
  """Returns the request for an object by its digest, or for its list.

  Args:
    sources: buckets that may have it.
    key: its key.
    limit: the most bytes that it may have.
    name: its digest.
  """
  if not is_cut(limit):
    return reader.ObjectRequest(sources, key, limit, name)

  def accepts(data: bytes) -> bool:
    is_list = read_list(data, limit) is not None
    return is_list or commitment_lib.digest(data) == name

  return reader.ObjectRequest(sources, key, PART_BYTES, accepts=accepts)


def fetch(
  requests: Mapping[bytes, reader.ObjectRequest],
  limit: int,
  seconds: float,
  workers: int,
  note: reader.Note,
  take: Callable[[bytes, bytes], None],
) -> dict[bytes, bytes | interface.StoreError]:
  """Fetches objects that may be in parts, see `reader.fetch`.

  The parts of an object are read as soon as its list has come, within an equal
  share of the time that is left. Afterwards those that failed are tried again,
  in the same way, with the list of each bucket alone: the first list may be
  that of another object. So a source that hangs takes no other object's time.

  Args:
    requests: those of `request`, by the digest of the whole.
    limit: the most bytes of a whole.
    seconds: the time for all of them.
    workers: parallel reads.
    note: told of every answer of a bucket.
    take: called with each whole object as it comes.
  """
  deadline = time.monotonic() + seconds
  found: dict[bytes, bytes | interface.StoreError] = {}

  def keep(name: bytes, data: bytes, until: float) -> bool:
    got = _whole(name, requests[name], data, limit, workers, until, note)
    if isinstance(got, bytes):
      found[name] = got
      take(name, got)
    else:
      found.setdefault(name, got)  # the first error says most
    return isinstance(got, bytes)

  def meet(name: bytes, data: bytes) -> None:
    keep(name, data, _share(deadline, len(requests) - len(found)))

  first = reader.fetch(requests, seconds / 2, workers, note, meet)
  again = []
  for name, got in first.items():
    if isinstance(got, interface.StoreError):
      found[name] = got
    if isinstance(found[name], interface.StoreError):
      if not isinstance(got, interface.MissingObjectError):
        again.append(name)
  for i, name in enumerate(again):
    end = _share(deadline, len(again) - i)
    buckets = requests[name].buckets
    for j, bucket in enumerate(buckets):
      until = _share(end, len(buckets) - j)
      if (left := until - time.monotonic()) <= 0:
        break
      alone = requests[name]._replace(buckets=(bucket,))
      data = reader.fetch({name: alone}, left / 2, note=note)[name]
      if isinstance(data, bytes) and keep(name, data, until):
        break
  return {name: found[name] for name in requests}


def _share(deadline: float, count: int) -> float:
  """Returns the end of the share of one of so many that wait."""
  now = time.monotonic()
  return now + max(deadline - now, 0.0) / count


def _whole(
  name: bytes,
  asked: reader.ObjectRequest,
  data: bytes,
  limit: int,
  workers: int,
  deadline: float,
  note: reader.Note,
) -> bytes | interface.StoreError:
  """Returns the object that `data` is or lists the parts of."""
  if commitment_lib.digest(data) == name:
    return data
  folder, listed = asked.key.rpartition('/')[0], read_list(data, limit) or []
  parts = {
    part: reader.ObjectRequest(
      asked.buckets, f'{folder}/{part.hex()}', PART_BYTES, part
    )
    for part in listed
  }
  left = max(deadline - time.monotonic(), 0.0)
  got = reader.fetch(parts, left, workers, note)
  for answer in got.values():
    if isinstance(answer, interface.StoreError):
      return answer
  whole = b''.join(x for part in listed if isinstance(x := got[part], bytes))
  if len(whole) > limit or commitment_lib.digest(whole) != name:
    return interface.StoreError(
      f'{asked.key}: its list is that of another object'
    )
  return whole
