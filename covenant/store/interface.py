"""The interface of an object store. Every implementation passes a contract.

An object is whole or not there. Every call ends before a deadline, after
retries where they may help. An object of another peer never takes more memory
than the caller allows.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from covenant import errors


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
