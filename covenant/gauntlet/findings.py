"""The findings of a validator about a submission, and those of a round."""

import enum
from collections.abc import Iterable
from typing import NamedTuple

# Ratios of a message's L2 norm to those of the round and of earlier ones.
# Newcomers have no error feedback yet and send several times less, so the lower
# limit is far below.
LARGEST_NORM = 10.0
SMALLEST_NORM = 0.01
# Distance from a limit at which validators that have fetched other messages,
# and so know another median, still find the same.
NORM_MARGIN, SIMILARITY_MARGIN = 1.25, 0.05


class CheckFinding(enum.Enum):
  """The closed list of findings; each value is a text for people."""

  VALID = 'valid'
  MISSING = 'no commitment of this round'
  EARLY = 'committed before the put window'
  LATE = 'committed after the put window'
  TWICE = 'committed to two payloads in one round'
  ABSENT = 'committed, but no payload is at the address'
  UNREACHABLE = 'the store that holds the payload did not answer'
  EXCUSED = 'not judged: most payloads could not be fetched'
  DIGEST = 'the payload is not the one that was committed to'
  REFUSED = 'the payload was refused'
  UNSYNCHRONIZED = 'trained from other parameters than the round began with'
  RECEIPT = 'trained on other data than was assigned'
  TINY = 'the message holds next to nothing'
  HUGE = 'the message is absurdly large'
  REPLAY = 'the message is one of the round before'
  COPY = 'similar to a message that was committed earlier, which counts instead'
  TWIN = 'similar to another message of the same block; one of them counts'


class CheckResult(NamedTuple):
  """The outcome for one uid; None where the checks ended before."""

  finding: CheckFinding
  detail: str = ''  # for people
  block: int | None = None  # block of the commitment
  relative_norm: float | None = None  # L2 norm of the message over the median
  # The same over the larger, and the smaller, of the median and what is usual.
  largest: float | None = None
  least: float | None = None
  similarity: float | None = None  # largest, to messages committed no later
  twin: int | None = None  # uid of that message
  origin: int | None = None  # first of the similar messages: its uid
  near: int | None = None  # the same of those that others may find similar
  twins: int = 1  # number of similar messages in the block of the first one

  @property
  def valid(self) -> bool:
    return self.finding in _VALID

  @property
  def originality(self) -> float:
    """The share in the message while nobody has proven whose work it is."""
    if self.finding is CheckFinding.COPY:
      return 0.0
    return 1 / self.twins


_VALID = (CheckFinding.VALID, CheckFinding.COPY, CheckFinding.TWIN)
VALID_NAMES = frozenset(finding.name for finding in _VALID)


class CheckReport(NamedTuple):
  """The checks of one round."""

  checks: dict[int, CheckResult]  # of all submissions, by uid
  fault: bool  # True if most payloads could not be fetched: all are excused

  @property
  def valid(self) -> list[int]:
    """The uids whose messages are valid, in order."""
    return sorted(u for u, c in self.checks.items() if c.valid)

  def clear(self) -> list[int]:
    """Returns the uids that may count together in others' eyes, too, in order.

    That is one of each set of similar messages. Norms and similarities are held
    against the messages that a validator has, and others have others. Without a
    margin a message at a limit would divide them.
    """
    most, least = LARGEST_NORM / NORM_MARGIN, SMALLEST_NORM * NORM_MARGIN
    return [
      uid
      for uid in self.valid
      for check in [self.checks[uid]]
      if check.near in (None, uid)
      if check.largest is None or check.largest < most
      if check.least is None or check.least > least
    ]

  def repeats(self, uids: Iterable[int]) -> bool:
    """Returns whether two of some valid messages are similar."""
    origins = [self.checks[u].origin for u in uids if u in self.checks]
    known = [origin for origin in origins if origin is not None]
    return len(set(known)) < len(known)
