"""What a node asks of a chain. Every implementation passes one contract.

Time is counted in blocks. What was true at a block that is past stays true:
`peers`, `commitments` and `block_hash` of one block give every node the same
answer whenever it asks, which is how nodes agree without talking.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from covenant import errors

MAX_COMMITMENT = 128  # bytes; what Bittensor's Raw128 holds


class ChainError(errors.CovenantError):
  """The chain did not do what was asked; the message says what and why."""


class ChainUnreachableError(ChainError):
  """No answer in time. Asking again later may help."""


class ChainRejectedError(ChainError):
  """The chain answered no: not registered, too often, too large."""


class Peer(NamedTuple):
  uid: int
  hotkey: str  # ss58 address
  stake: float  # in the chain's own unit: only ratios count
  validator: bool  # may set weights and lead
  registered: int  # block: another one is another peer, though the uid be old


class Commitment(NamedTuple):
  block: int  # that included it
  data: bytes  # MAX_COMMITMENT at most


class Chain(Protocol):
  """One subnet, seen by one hotkey."""

  hotkey: str  # own ss58 address
  block_seconds: float  # nominal

  def head(self) -> int:
    """The newest block that can be asked about."""
    ...

  def block_hash(self, block: int) -> bytes:
    """32 bytes that nobody knew before the block.

    Raises:
      ChainRejectedError: the block is not there yet, or too old to ask for.
    """
    ...

  def timestamp(self, block: int) -> float:
    """Unix seconds of a block. Raises as `block_hash`."""
    ...

  def peers(self, block: int) -> tuple[Peer, ...]:
    """Who was registered at the end of a block, by uid.

    Raises as `block_hash`.
    """
    ...

  def commitments(self, block: int) -> dict[int, Commitment]:
    """The last commitment of every uid at the end of a block.

    Raises as `block_hash`.
    """
    ...

  def commit(self, data: bytes) -> None:
    """Replaces the own commitment; returns once it is in a block.

    Raises:
      ChainRejectedError: not registered, too long, or too often.
      ChainUnreachableError: it may or may not have been included.
    """
    ...

  def set_weights(self, weights: Mapping[int, float]) -> None:
    """What each uid deserves, in the own eyes; only ratios count.

    Raises:
      ChainRejectedError: not a validator, too often, or a weight below 0 or not finite.
    """
    ...

  def earned(self, block: int) -> dict[int, float]:
    """What each uid has been paid by the end of a block, in the chain's unit.

    Bittensor does not keep sums: there it is the pay of the last epoch.
    """
    ...

  def sign(self, data: bytes) -> bytes:
    """64 bytes, by the own hotkey."""
    ...

  def verify(self, hotkey: str, data: bytes, signature: bytes) -> bool:
    """Whether `hotkey` signed `data`. False for anything malformed."""
    ...
