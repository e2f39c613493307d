"""Reads parts of one object, such as the sections of a few tensors."""

import asyncio
from collections.abc import Sequence

from covenant import extras
from covenant.store import backend
from covenant.store import bucket as bucket_lib
from covenant.store import interface

with extras.needed('run'):
  import obstore

_SECONDS = 30.0


def read(
  bucket: interface.Bucket, key: str, spans: Sequence[tuple[int, int]]
) -> list[bytes]:
  """Returns the bytes of an object from each start to each end.

  Neighboring spans are read together. The caller verifies the bytes.

  Args:
    bucket: the bucket, of any peer.
    key: the key of the object.
    spans: starts and ends, in bytes.

  Raises:
    StoreError: they cannot be had in half a minute, or there are fewer.
  """
  interface.check_key(key)
  if not isinstance(bucket, bucket_lib.ObstoreBucket):
    raise interface.StoreError(f'{key}: this store has no ranges')
  wanted = [span for span in spans if span[0] < span[1]]
  starts, ends = [a for a, _ in wanted], [b for _, b in wanted]

  store = bucket.open()

  async def act() -> list[bytes]:
    got = await obstore.get_ranges_async(store, key, starts=starts, ends=ends)
    return [bytes(part) for part in got]

  future = asyncio.run_coroutine_threadsafe(act(), backend.event_loop())
  try:
    got = iter(future.result(_SECONDS))
  except TimeoutError:
    future.cancel()
    raise interface.StoreUnavailableError(
      f'{key}: no answer in {_SECONDS:.0f} s'
    ) from None
  except Exception as e:
    raise backend.explain(e) from None
  found = [next(got) if a < b else b'' for a, b in spans]
  if any(len(x) != b - a for x, (a, b) in zip(found, spans, strict=True)):
    raise interface.StoreError(f'{key}: the object ends before a range')
  return found
