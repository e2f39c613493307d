"""The interface of a chain. Every implementation passes one contract.

Time is counted in blocks. Answers about a past block never change: `peers`,
`commitments` and `block_hash` of a block are the same for every node whenever
it asks. That is how nodes agree without talking to each other.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from covenant import errors

MAX_COMMITMENT = 128  # bytes; the size of Bittensor's Raw128


class ChainError(errors.CovenantError):
  """The chain did not execute a call; the message says which and why."""


class ChainUnreachableError(ChainError):
  """The chain did not answer in time. A later call may succeed."""


class ChainRejectedError(ChainError):
  """The chain rejected a call: not registered, too often, too large."""


class Peer(NamedTuple):
  """A registered hotkey."""

  uid: int
  hotkey: str  # ss58 address
  stake: float  # in the chain's own unit: only ratios count
  permit: bool  # may set weights; it declares no role
  registered: int  # block; another block is another peer with the same uid


class CommittedData(NamedTuple):
  """The last data that a peer put on the chain."""

  block: int  # block that included it
  data: bytes  # MAX_COMMITMENT at most


class Chain(Protocol):
  """One subnet, as one hotkey sees it."""

  hotkey: str  # own ss58 address
  block_seconds: float  # nominal

  def head(self) -> int:
    """Returns the newest block that has a state; -1 before the first."""
    ...

  def block_hash(self, block: int) -> bytes:
    """Returns 32 bytes that were unpredictable before the block.

    Raises:
      ChainRejectedError: the block does not exist yet, or is too old.
    """
    ...

  def timestamp(self, block: int) -> float:
    """Returns the Unix seconds of a block. Raises like `block_hash`."""
    ...

  def peers(self, block: int) -> tuple[Peer, ...]:
    """Returns the peers registered at the end of a block, in order of uid.

    Raises like `block_hash`.
    """
    ...

  def commitments(self, block: int) -> dict[int, CommittedData]:
    """Returns the last commitment of every uid at the end of a block.

    Raises like `block_hash`.
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
    """Votes for the pay of each uid; only ratios of weights count.

    Raises:
      ChainRejectedError: not a validator, too often, or a weight that is
        negative or not finite.
    """
    ...

  def earned(self, block: int) -> dict[int, float]:
    """Returns the pay of each uid until a block's end, in the chain's unit.

    Bittensor does not keep sums: there it is the pay of the last epoch.
    """
    ...

  def sign(self, data: bytes) -> bytes:
    """Signs with the own hotkey; 64 bytes."""
    ...

  def verify(self, hotkey: str, data: bytes, signature: bytes) -> bool:
    """Returns whether `hotkey` signed `data`; False for malformed input."""
    ...
