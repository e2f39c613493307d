"""The published status: what a node says of itself, signed, in its bucket.

  RUN/status/00000000     JSON and a signature; replaced after every round

So anybody can watch a run from the chain and the store alone. What it says is
the node's own word: nothing of the protocol depends on it.
"""

import json
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import covenant
from covenant import typing as ct
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib

MAX_BYTES = 4096
_SIGNATURE_BYTES = 64
_LONGEST = 200  # characters of a text
_KIND = b'covenant.status\0'


class Status(NamedTuple):
  """The state of a node, in its own words."""

  role: str
  phase: str
  round: int  # rounds completed
  loss: float | None  # of the last training, nats per token
  error: str  # phase and class of the last error; empty: none
  release: str
  time: float  # Unix seconds


def make(
  role: str, phase: str, completed: int, loss: float | None, error: str
) -> Status:
  """Returns a status of now.

  Args:
    role: of the node.
    phase: what it does.
    completed: rounds completed.
    loss: of the last training; one that is not finite is left out.
    error: the last one, without the message: that may name places which only
      this node should know.
  """
  loss = loss if loss is not None and math.isfinite(loss) else None
  release = covenant.__version__
  error = error[:_LONGEST]
  return Status(role, phase, completed, loss, error, release, time.time())


def encode(status: Status, run: bytes, sign: ct.Sign) -> bytes:
  """Returns the signed bytes of a status."""
  body = json.dumps(status._asdict(), separators=(',', ':')).encode()
  return body + sign(_KIND + run + body)


def decode(
  data: bytes,
  run: bytes,
  hotkey: str,
  verify: Callable[[str, bytes, bytes], bool],
) -> Status | None:
  """Returns the status that a hotkey signed; None for anything else."""
  body, signature = data[:-_SIGNATURE_BYTES], data[-_SIGNATURE_BYTES:]
  if not verify(hotkey, _KIND + run + body, signature):
    return None
  try:
    raw = json.loads(body)
    found = Status(**raw)
  except (ValueError, TypeError, RecursionError):
    return None
  texts = found.role, found.phase, found.error, found.release
  if not all(isinstance(x, str) and len(x) <= _LONGEST for x in texts):
    return None
  numbers = found.time, found.loss if found.loss is not None else 0.0
  if type(found.round) is not int or not 0 <= found.round < 2**63:
    return None
  if not all(type(x) in (int, float) and abs(x) < 2**63 for x in numbers):
    return None
  return found


def publish(objects: run_storage_lib.RunStorage, data: bytes) -> None:
  """Puts the bytes of a status into the own bucket; raises StoreError."""
  objects.bucket.put(objects.key('status', 0), data, replace=True)


def read(
  objects: run_storage_lib.RunStorage,
  run: bytes,
  location: bytes,
  hotkey: str,
  verify: Callable[[str, bytes, bytes], bool],
) -> Status | None:
  """Reads the status of a peer; None if it has none that can be read."""
  bucket = objects.bucket_at(location)
  if bucket is None:
    return None
  try:
    data = bucket.get(objects.key('status', 0), MAX_BYTES)
  except store_lib.StoreError:
    return None
  return decode(data, run, hotkey, verify)
