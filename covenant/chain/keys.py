"""Hotkeys of the embedded chain: ed25519, so that a signature is reproducible.

Bittensor's own sr25519 signs with fresh randomness; runs that must repeat bit
for bit cannot use it. Addresses are in Substrate's SS58 format, as Bittensor's.
"""

import functools
import hashlib
from typing import NoReturn, final

from covenant import extras

with extras.needed('run'):
  from nacl import exceptions
  from nacl import signing

SEED_BYTES = 32
_SIGNATURE_BYTES = 64
_PREFIX = b'*'  # 42: a key of no particular chain
_BASE_58 = '123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz'
_DIGITS = {letter: digit for digit, letter in enumerate(_BASE_58)}
_ADDRESS_LENGTH = 48  # of 35 bytes whose first is 42


@final
class Key:
  """The key of one hotkey. Neither printing nor pickling shows the secret."""

  __slots__ = ('_secret', 'address')

  def __init__(self, secret: signing.SigningKey):
    self._secret = secret
    self.address: str = _address(bytes(secret.verify_key))

  @classmethod
  def from_seed(cls, seed: bytes) -> 'Key':
    """Returns the key of a secret seed; equal seeds give equal keys.

    >>> Key.from_seed(bytes(32))
    Key(5DQcDYQ3wwobcrJ5aE5CzGp34ZWYNeYfYZ1yLbPiU2RcSvwm)

    Args:
      seed: 32 bytes, such as a blake2b digest of a run's seed and a name.

    Raises:
      ValueError: for another length. The seed is not in the message.
    """
    if len(seed) != SEED_BYTES:
      raise ValueError(
        f'seed of a key: expected {SEED_BYTES} bytes, got {len(seed)}'
      )
    return cls(signing.SigningKey(bytes(seed)))

  def sign(self, data: bytes) -> bytes:
    """Signs data; 64 bytes, the same every time."""
    return self._secret.sign(bytes(data)).signature

  def __repr__(self) -> str:
    return f'Key({self.address})'

  def __reduce__(self) -> NoReturn:
    raise TypeError(
      f'{self!r} has a secret, so it is neither pickled nor copied'
    )


def verify(address: str, data: bytes, signature: bytes) -> bool:
  """Returns whether the key of `address` signed `data`.

  Malformed input gives False, as do a second encoding of a signature and keys
  of a small order, for which one signature fits many messages.
  """
  if not (
    isinstance(address, str)
    and isinstance(data, bytes)
    and isinstance(signature, bytes)
    and len(signature) == _SIGNATURE_BYTES
  ):
    return False
  public = _public(address)
  if public is None:
    return False
  try:
    signing.VerifyKey(public).verify(data, signature)
  except exceptions.BadSignatureError:
    return False
  return True


def is_address(address: str) -> bool:
  """Returns whether a text is the one spelling of a key's address.

  Addresses of other chains' prefixes, and of the key of zeros, for which
  anybody can sign, are none.

  >>> is_address('5DQcDYQ3wwobcrJ5aE5CzGp34ZWYNeYfYZ1yLbPiU2RcSvwm')
  True
  """
  return any(_public(address) or b'')


@functools.lru_cache(maxsize=4096)
def _public(address: str) -> bytes | None:
  """Returns the public key of an SS58 address; None if it is none."""
  if len(address) != _ADDRESS_LENGTH:
    return None
  number = 0
  for letter in address:
    digit = _DIGITS.get(letter)
    if digit is None:
      return None
    number = number * 58 + digit
  try:
    public = number.to_bytes(35, 'big')[1:33]
  except OverflowError:
    return None
  return public if _address(public) == address else None


def _address(public: bytes) -> str:
  """Returns the SS58 address of a public key."""
  payload = _PREFIX + public
  checksum = hashlib.blake2b(b'SS58PRE' + payload).digest()[:2]
  number = int.from_bytes(payload + checksum, 'big')
  letters = []
  while number:
    number, digit = divmod(number, 58)
    letters.append(_BASE_58[digit])
  return ''.join(reversed(letters))
