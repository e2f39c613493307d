"""The deadlines, sizes and retries of a bucket."""

import asyncio
import concurrent.futures
import dataclasses
import random
from collections.abc import Awaitable, Callable
from typing import Any


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
