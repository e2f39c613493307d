"""The interface of an object store. Every implementation passes a contract.

An object is whole or not there. Every call ends before a deadline, after
retries where they may help. An object of another peer never takes more memory
than the caller allows.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from covenant import errors

MAX_KEY = 512  # characters
_PART = r'(?!\.{1,2}(/|$))[A-Za-z0-9._-]{1,200}'
_KEY = re.compile(f'{_PART}(/{_PART})*')


class StoreError(errors.CovenantError):
  """The store did not execute a call; the message says which and why."""


class MissingObjectError(StoreError):
  """There is no such object."""


class ObjectExistsError(StoreError):
  """There is such an object already, and it must not be replaced."""


class ObjectTooLargeError(StoreError):
  """The object is larger than the caller allowed; it was not read."""


class AccessDeniedError(StoreError):
  """The credentials are wrong, or lack a permission."""


class StoreUnavailableError(StoreError):
  """The store did not answer before the deadline, retries included.

  Attributes:
    most_tries: the number of tries after which another one is no use. Only
      buckets of strangers are given up so early.
  """

  most_tries = 1 << 30


class Info(NamedTuple):
  """An object without its data."""

  key: str
  size: int  # bytes
  modified: float  # Unix seconds, by the store's clock


class Bucket(Protocol):
  """Objects by key: relative paths of [A-Za-z0-9._/-], no empty parts."""

  location: str  # public address, for others to read it

  def put(self, key: str, data: bytes, *, replace: bool = False) -> None:
    """Stores an object, whole or not at all.

    Raises:
      ObjectExistsError: there is one, and `replace` is False.
      AccessDeniedError, StoreUnavailableError: it may or may not be stored.
    """
    ...

  def get(self, key: str, limit: int) -> bytes:
    """Returns an object of at most `limit` bytes.

    Raises:
      MissingObjectError, ObjectTooLargeError, AccessDeniedError,
      StoreUnavailableError.
    """
    ...

  def head(self, key: str) -> Info:
    """Returns an object's size and time; raises as `get`."""
    ...

  def list(self, prefix: str) -> Sequence[Info]:
    """Returns all objects in the folder `prefix`, in order of their keys."""
    ...

  def delete(self, keys: Sequence[str]) -> None:
    """Deletes objects; missing ones are no error."""
    ...


def is_key(text: str) -> bool:
  """Returns whether a text can be the key of an object."""
  return len(text) <= MAX_KEY and bool(_KEY.fullmatch(text))


def check_key(key: str) -> None:
  """Raises StoreError unless a text can be the key of an object."""
  if not is_key(key):
    raise StoreError(
      f'key: expected parts of 1 to 200 of A-Z, a-z, 0-9 and "._-", none of '
      f'them "." or "..", with "/" between, {MAX_KEY} characters in all; got '
      f'{ascii(key[:MAX_KEY])}'
    )
