"""The checks of a round's submissions before any message is evaluated.

The cheapest check comes first. Every uid gets one finding of a closed list and
a line that its operator can act on. A finding is a function of the data on the
chain and in the stores, so validators with the same data find the same.
"""

import enum
import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from covenant import typing as ct
from covenant.gauntlet import similarity
from covenant.optim import compression as compression_lib
from covenant.optim import reduce
from covenant.wire import payload

# Ratios of a message's L2 norm to the round's median. Newcomers have no error
# feedback yet and send several times less, so the lower limit is far below.
LARGEST_NORM = 10.0
SMALLEST_NORM = 0.01
_FEW = 3  # messages below which a median means nothing
# Distance from a limit at which validators that have fetched other messages,
# and so know another median, still find the same.
_NORM_MARGIN, _SIMILARITY_MARGIN = 1.25, 0.05


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
  AWAITED = 'nothing yet, as its work may take some rounds'
  DIGEST = 'the payload is not the one that was committed to'
  REFUSED = 'the payload was refused'
  UNSYNCHRONIZED = 'trained from other parameters than the round began with'
  RECEIPT = 'trained on other data than was assigned'
  TINY = 'the message holds next to nothing'
  HUGE = 'the message is absurdly large'
  COPY = 'the message copies an earlier one'
  TWIN = 'the same work under two uids, committed before either could be read'


class Submission(NamedTuple):
  """The data of one uid that a validator has when the put window closes."""

  uid: int
  block: int | None = None  # block of this round's commitment; None: no one
  committed: bytes = b''  # digest in the commitment
  twice: bool = False  # True if it committed to two digests in this round
  # The reason for a missing payload: 'absent' if the store has none, 'failed'
  # if the store gave an error or no answer; '' if it came or was not requested.
  fetch: str = ''
  detail: str = ''  # the store's answer, for people
  digest: bytes = b''  # digest of the fetched payload
  decoded: payload.Payload | payload.PayloadError | None = None


class Expected(NamedTuple):
  """The requirements on this round's submissions."""

  opens: int  # first block of the put window
  closes: int  # first block after the put window
  root: bytes  # history root at the start of the round
  # Receipt of as much assigned data as the header declares, by uid; a uid
  # without one passes.
  receipts: Mapping[int, bytes]
  sequences: int  # sequences assigned to each uid
  # Roots of earlier rounds, latest first, whose parameters are not too old.
  older: Sequence[bytes] = ()


class CheckResult(NamedTuple):
  """The outcome for one uid; None where the checks ended before."""

  finding: CheckFinding
  detail: str = ''  # for people
  block: int | None = None  # block of the commitment
  relative_norm: float | None = None  # L2 norm of the message over the median
  similarity: float | None = None  # largest, to messages committed no later
  twin: int | None = None  # uid of that message
  staleness: int = 0  # age in rounds of a valid payload's start parameters

  @property
  def valid(self) -> bool:
    return self.finding is CheckFinding.VALID


class CheckReport(NamedTuple):
  """The checks of one round."""

  checks: dict[int, CheckResult]  # of all submissions, by uid
  fault: bool  # True if most payloads could not be fetched: all are excused

  @property
  def valid(self) -> list[int]:
    """The uids that may count, in order."""
    return sorted(u for u, c in self.checks.items() if c.valid)

  def clear(self, threshold: float) -> list[int]:
    """Returns the valid uids that other validators find valid, too, in order.

    Norms and similarities are held against the messages that a validator has,
    and others have others. Without a margin a message at a limit would divide
    them.

    Args:
      threshold: see `Checker.threshold`.
    """
    most, least = LARGEST_NORM / _NORM_MARGIN, SMALLEST_NORM * _NORM_MARGIN
    likest = threshold - _SIMILARITY_MARGIN
    return [
      uid
      for uid in self.valid
      for check in [self.checks[uid]]
      if check.relative_norm is None or least < check.relative_norm < most
      if check.similarity is None or check.similarity < likest
    ]


class Checker:
  """The checks of one run, compiled once.

  Besides the norms, R readable messages cost R^2 intersections of at most 32
  blocks' bits, and as many with the messages of the previous round.

  Args:
    abstract_params: the shapes and dtypes of the parameters.
    compression: the compression of the messages.
  """

  def __init__(
    self,
    abstract_params: ct.Params,
    compression: compression_lib.Compression,
  ):
    self._sketcher = similarity.Sketcher(abstract_params, compression)
    # Signs agree more often than sparse indices do, by an unknown amount.
    sparse = isinstance(compression, compression_lib.TopK)
    self._least = 0.0 if sparse else 0.9
    self._norms = functools.partial(
      reduce.message_norms,
      abstract_params=abstract_params,
      compression=compression,
    )

  def check(
    self,
    submissions: Sequence[Submission],
    expected: Expected,
    seed: bytes,
    previous: Mapping[int, ct.Message] | None = None,
    threshold: float = 0.5,
  ) -> CheckReport:
    """Checks the submissions of a round.

    Args:
      submissions: one per uid, for all uids that should have sent a message.
      expected: the requirements on them.
      seed: unknown before the put window closed, such as the hash of block
        `expected.closes`; draws the blocks of the messages to compare.
      previous: messages of the previous round, by uid, to find copies of them;
        None or {} compares within the round only.
      threshold: the similarity from which on a message is a copy; at least 0.9
        for messages that send every value.
    """
    threshold = self.threshold(threshold)
    ordered = sorted(submissions, key=lambda s: s.uid)
    checks = {s.uid: first_check(s, expected) for s in ordered}
    sought = [s for s in ordered if s.fetch or s.digest]
    failed = [
      u for u, c in checks.items() if c.finding is CheckFinding.UNREACHABLE
    ]
    fault = 2 * len(failed) > len(sought)
    if fault:
      checks |= {
        u: checks[u]._replace(finding=CheckFinding.EXCUSED) for u in failed
      }
    messages = {
      s.uid: s.decoded.message
      for s in ordered
      if checks[s.uid].valid and isinstance(s.decoded, payload.Payload)
    }
    norms = {u: _total(self._norms(m)) for u, m in messages.items()}
    checks |= {
      uid: found._replace(
        block=checks[uid].block, staleness=checks[uid].staleness
      )
      for uid, found in judge_norms(norms).items()
    }
    messages = {u: m for u, m in messages.items() if checks[u].valid}
    self._find_copies(checks, messages, previous or {}, seed, threshold)
    return CheckReport(checks, fault)

  def threshold(self, threshold: float) -> float:
    """Returns the similarity from which on messages of this run are copies."""
    return max(threshold, self._least)

  def _find_copies(
    self,
    checks: dict[int, CheckResult],
    messages: Mapping[int, ct.Message],
    previous: Mapping[int, ct.Message],
    seed: bytes,
    threshold: float,
  ) -> None:
    """Replaces the findings of copies in `checks`."""
    sketch_RxW = self._sketcher.sketch(messages, seed)
    before_SxW = self._sketcher.sketch(previous, seed)
    if not sketch_RxW.size:
      return
    uids, old_uids = list(messages), list(previous)
    others = ~np.eye(len(uids), dtype=bool)
    similarity_RxR = similarity.similarities(
      similarity.shared_fractions(sketch_RxW, sketch_RxW), others
    )
    judge_copies(checks, uids, similarity_RxR, threshold)
    if before_SxW.size:
      shared_RxS = similarity.shared_fractions(sketch_RxW, before_SxW)
      similarity_RxS = similarity.similarities(
        shared_RxS, np.ones_like(shared_RxS, bool)
      )
      for uid, similarity_S in zip(uids, similarity_RxS, strict=True):
        nearest = int(np.argmax(similarity_S))
        if checks[uid].valid and similarity_S[nearest] >= threshold:
          source = old_uids[nearest]
          checks[uid] = checks[uid]._replace(
            finding=CheckFinding.COPY,
            detail=f'it is the message of uid {source} of the previous round',
            similarity=float(similarity_S[nearest]),
            twin=source,
          )


def first_check(s: Submission, expected: Expected) -> CheckResult:
  """Checks one submission by itself, the cheapest condition first."""

  def reject(finding: CheckFinding, detail: str = '') -> CheckResult:
    return CheckResult(finding, detail, s.block)

  window = f'the window is blocks {expected.opens} to {expected.closes - 1}'
  if s.block is None:
    return reject(CheckFinding.MISSING)
  if s.block < expected.opens:
    return reject(CheckFinding.EARLY, f'in block {s.block}; {window}')
  if s.block >= expected.closes:
    return reject(CheckFinding.LATE, f'in block {s.block}; {window}')
  if s.twice:
    return reject(CheckFinding.TWICE, 'one payload a round: commit once')
  if s.fetch:
    absent = s.fetch == 'absent'
    return reject(
      CheckFinding.ABSENT if absent else CheckFinding.UNREACHABLE, s.detail
    )
  if s.digest != s.committed:
    return reject(
      CheckFinding.DIGEST,
      f'committed {s.committed.hex()[:16]}, found {s.digest.hex()[:16]}',
    )
  if s.decoded is None:
    raise ValueError(f'uid {s.uid}: a payload came but was not decoded')
  if isinstance(s.decoded, payload.PayloadError):
    root = s.decoded.reason is payload.Reason.ROOT
    return reject(
      CheckFinding.UNSYNCHRONIZED if root else CheckFinding.REFUSED,
      str(s.decoded),
    )
  header = s.decoded.header
  # Payloads from older parameters have been refused before.
  root = (expected.root, *expected.older)[header.staleness]
  if header.root != root:
    return reject(
      CheckFinding.UNSYNCHRONIZED,
      f'its root is {header.root.hex()}, not {root.hex()}',
    )
  # Fewer are allowed: they are paid for their gain.
  if not 1 <= header.sequences <= expected.sequences:
    return reject(
      CheckFinding.RECEIPT,
      f'{header.sequences} sequences; {expected.sequences} were assigned',
    )
  if header.receipt != expected.receipts.get(s.uid, header.receipt):
    return reject(
      CheckFinding.RECEIPT,
      f'its receipt is {header.receipt.hex()}, '
      f'not {expected.receipts[s.uid].hex()}',
    )
  return CheckResult(
    CheckFinding.VALID, '', s.block, staleness=header.staleness
  )


def judge_norms(norms: Mapping[int, float]) -> dict[int, CheckResult]:
  """Returns the results of valid messages with these norms, by uid.

  >>> judge_norms({0: 1.0, 1: 1.0, 2: 0.0})[2].finding.name
  'TINY'
  """
  ordered = sorted(norms.values())
  median = ordered[(len(ordered) - 1) // 2] if len(ordered) >= _FEW else 0.0
  results = {}
  for uid, norm in norms.items():
    relative = norm / median if median else None
    finding = CheckFinding.VALID
    if norm == 0 or (relative is not None and relative < SMALLEST_NORM):
      finding = CheckFinding.TINY
    elif relative is not None and relative > LARGEST_NORM:
      finding = CheckFinding.HUGE
    text = f'L2 norm {norm:.3g}, median {median:.3g}'
    detail = '' if finding is CheckFinding.VALID else text
    results[uid] = CheckResult(finding, detail, relative_norm=relative)
  return results


def judge_copies(
  checks: dict[int, CheckResult],
  uids: Sequence[int],
  similarity_RxR: np.ndarray,
  threshold: float,
) -> None:
  """Blames the later of two similar messages, or both of one block.

  A miner uploads once its commitment is in a block, so a copy is committed in
  a later block. Similar messages of one block were made together.

  Args:
    checks: results by uid; changed in place.
    uids: the uids of the compared messages.
    similarity_RxR: their similarities.
    threshold: the similarity from which on a message is a copy.
  """
  if len(uids) < 2:
    return
  blocks = {uid: checks[uid].block or 0 for uid in uids}
  for row, uid in enumerate(uids):
    earlier = [
      (float(a), v)
      for v, a in zip(uids, similarity_RxR[row], strict=True)
      if v != uid and blocks[v] <= blocks[uid]
    ]
    if not earlier:
      continue
    share, twin = max(earlier)
    checks[uid] = checks[uid]._replace(similarity=share, twin=twin)
    if share < threshold:
      continue
    block, source = min((blocks[v], v) for a, v in earlier if a >= threshold)
    same = block == blocks[uid]
    detail = f'of uid {source}, in block {block}; this in {blocks[uid]}'
    checks[uid] = checks[uid]._replace(
      finding=CheckFinding.TWIN if same else CheckFinding.COPY,
      detail=f'{detail}; similarity {share:.2f}',
      twin=source,
    )


def _total(norms_P: jax.Array) -> float:
  """Returns the norm of a whole message, exact but for one rounding."""
  return math.sqrt(math.fsum(float(n) ** 2 for n in np.asarray(norms_P)))
