"""What a node asks of an object store. Every implementation passes a contract.

An object is whole or not there. Every call ends before a deadline, having
retried what may help; nothing that a stranger stored costs more memory than
the caller allowed.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from covenant import errors


class StoreError(errors.CovenantError):
  """The store did not do what was asked; the message says what and why."""


class MissingObjectError(StoreError):
  """There is no such object."""


class ObjectExistsError(StoreError):
  """There is one already, and it was not to be replaced."""


class ObjectTooLargeError(StoreError):
  """The object is larger than the caller allowed; it was not read."""


class AccessDeniedError(StoreError):
  """The credentials are wrong, or lack the right."""


class StoreUnavailableError(StoreError):
  """No answer before the deadline, retries included."""


class Info(NamedTuple):
  key: str
  size: int  # bytes
  modified: float  # Unix seconds, by the store's clock


class Bucket(Protocol):
  """Objects by key: relative paths of [A-Za-z0-9._/-], no empty parts."""

  location: str  # what others open to read it

  def put(self, key: str, data: bytes, *, replace: bool = False) -> None:
    """Stores an object, whole or not at all.

    Raises:
      ObjectExistsError: there is one, and `replace` is False.
      Denied, StoreUnavailableError: nothing is promised.
    """
    ...

  def get(self, key: str, limit: int) -> bytes:
    """An object of at most `limit` bytes.

    Raises:
      Missing, TooLarge, Denied, Unavailable.
    """
    ...

  def head(self, key: str) -> Info:
    """Raises Missing, Denied, Unavailable."""
    ...

  def list(self, prefix: str) -> Sequence[Info]:
    """All objects whose key starts with the folder `prefix`, by key."""
    ...

  def delete(self, keys: Sequence[str]) -> None:
    """Deletes what is there of `keys`."""
    ...
