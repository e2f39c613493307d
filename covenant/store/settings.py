"""How patient a bucket is, and how greedy."""

import asyncio
import concurrent.futures
import dataclasses
import random
from collections.abc import Awaitable, Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Settings:
  """Limits of one bucket, and its clock and dice, which tests replace.

  The defaults carry a part over 9 Mbit/s, four at a time, before it stalls.
  """

  deadline_seconds: float = 60.0  # of a call, whatever happens; and
  slowest_rate: float = 2.0**21  # bytes/s: the time it has for what it moves
  stall_seconds: float = 30.0  # of silence, or of sending one part
  part_bytes: int = 2**23  # larger objects move in parts; S3 wants 5 MiB
  requests: int = 8  # at once
  backoff_seconds: float = 0.2  # on average a half of it, then twice as long
  backoff_limit_seconds: float = 5.0
  rng: random.Random = dataclasses.field(default_factory=random.Random)
  sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
  # Returns the result of a call, or raises TimeoutError after these seconds.
  wait: Callable[[concurrent.futures.Future, float], Any] = (
    concurrent.futures.Future.result
  )
