"""Hotkeys of the embedded chain: ed25519, so that a signature is reproducible.

Bittensor's own sr25519 signs with fresh randomness; runs that must repeat bit
for bit cannot use it.
"""

from typing import Any, final

import bittensor_core

_core: Any = bittensor_core  # compiled, without stubs
_ED25519 = _core.CRYPTO_ED25519
SEED_BYTES = 32


@final
class Key:
  """The key of one hotkey. Neither printing nor pickling shows the secret."""

  __slots__ = ('_pair', 'address')

  def __init__(self, pair: Any):  # a bittensor_core.Keypair with a secret
    self._pair = pair
    self.address: str = pair.ss58_address

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
    return cls(_core.Keypair.from_seed(bytes(seed), _ED25519))

  def sign(self, data: bytes) -> bytes:
    """Signs data; 64 bytes, the same every time."""
    return self._pair.sign(bytes(data))

  def __repr__(self) -> str:
    return f'Key({self.address})'


def verify(address: str, data: bytes, signature: bytes) -> bool:
  """Returns whether the key of `address` signed `data`.

  Malformed input gives False. Like wallets, it accepts a signature of
  b'<Bytes>' + data + b'</Bytes>' as one of `data`; sign nothing of that form.
  """
  if not (
    isinstance(address, str)
    and isinstance(data, bytes)
    and isinstance(signature, bytes)
  ):
    return False
  try:
    return _core.verify(data, signature, address, _ED25519)
  except ValueError:  # no ss58 address, or not 64 bytes
    return False
