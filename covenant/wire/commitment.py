"""A commitment on the chain: a role, the location of a bucket, and a digest.

  role u8 | round u32 | digest 32 | location, the rest

The first byte declares the role of the hotkey (`Role`). The chain's validator
permit does not: it goes to whoever has stake.

A miner commits the digest of its payload of a round before others can read
it: the chain says when, and the bucket cannot show two readers two payloads. A
validator commits the digest of the manifest that it stands for: its vote.
"""

import enum
import hashlib
import struct
from typing import NamedTuple

_FORMAT = struct.Struct('<BI32s')
_NO_ROUND = 2**32 - 1
MAX_LOCATION = 128 - _FORMAT.size  # bytes


class Role(enum.Enum):
  """The declared role of a hotkey; its value is the first byte.

  1 began the commitments of an earlier format, which had no role.
  """

  MINER = 2
  VALIDATOR = 3


class Commitment(NamedTuple):
  """The decoded commitment of one hotkey."""

  role: Role
  location: bytes  # of the bucket, as the store packs it
  round: int | None = None  # None: nothing yet but the location
  digest: bytes = bytes(32)


_ROLES = {role.value: role for role in Role}


def digest(data: bytes) -> bytes:
  """Returns the BLAKE2b-256 of an object, 32 bytes."""
  return hashlib.blake2b(data, digest_size=32).digest()


def encode(commitment: Commitment) -> bytes:
  """Returns the bytes of a commitment, at most 128.

  Raises:
    ValueError: the location is too long for the chain.
  """
  if len(commitment.location) > MAX_LOCATION:
    raise ValueError(
      f'a bucket location of {len(commitment.location)} bytes does not fit '
      f'the chain; at most {MAX_LOCATION}: use shorter names'
    )
  number = _NO_ROUND if commitment.round is None else commitment.round
  role = commitment.role.value
  return _FORMAT.pack(role, number, commitment.digest) + commitment.location


def decode(data: bytes) -> Commitment | None:
  """Returns the commitment in bytes; None for bytes of another kind."""
  if len(data) < _FORMAT.size:
    return None
  first, number, committed = _FORMAT.unpack_from(data)
  if first not in _ROLES:
    return None
  role, location = _ROLES[first], bytes(data[_FORMAT.size :])
  if number == _NO_ROUND:
    return None if any(committed) else Commitment(role, location)
  return Commitment(role, location, number, committed)
