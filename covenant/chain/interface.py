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


class Subnet(NamedTuple):
  """The rules of a subnet at one block; None where a chain has no such rule.

  Periods are in blocks, stakes in the unit of `Peer.stake`.
  """

  block: int  # at which they were read
  runtime: int | None = None  # spec version of the chain's program
  sdk: str = ''  # library that reads it, and its version
  tempo: int | None = None  # from one epoch to the next
  commitment_bytes: int | None = None  # per hotkey and epoch
  weights_interval: int | None = None  # from one set of weights to the next
  min_weights: int | None = None  # weights of one set that are not 0
  stake_threshold: float | None = None  # least stake that may set weights
  version_key: int | None = None  # least version of weights
  sealed: bool | None = None  # weights are revealed some epochs later
  reveal_epochs: int | None = None
  mechanisms: int | None = None
  owner_uids: tuple[int, ...] | None = None  # whose pay is burned
  permits: int | None = None  # number of the largest stakes that get one
  immunity: int | None = None  # time in which a newcomer is not replaced
  oldest: int | None = None  # a block whose state was found; None: not sought
  weights_error: str = ''  # why weights could not be composed, if that failed


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

  def check_weights(
    self, weights: Mapping[int, float], sent: int
  ) -> str | None:
    """Says whether weights that were sent are in force.

    Chains that seal weights reveal them later, and tell nobody if that fails.

    Args:
      weights: the argument of `set_weights`.
      sent: the newest block at that time.

    Returns:
      Empty: they are. None: they may still be. Else the reason why they are
      not, as far as it can be found.
    """
    ...

  def subnet(self, age: int = 0) -> Subnet | None:
    """Returns the rules of the subnet now; None for a chain without any.

    Args:
      age: looks whether the state of so many blocks ago can be read.
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
