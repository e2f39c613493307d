"""The checks of a round's submissions before any message is evaluated.

The cheapest check comes first. Every uid gets one finding of a closed list and
a line that its operator can act on. A finding is a function of the data on the
chain and in the stores, so validators with the same data find the same.

Similar messages of one round are all valid, but only one of them may count:
nobody can tell by two messages which of two miners did the work, and one that
repeats another's training could be the first to commit. Which of them is paid
follows from what each proves on its own data (rating_update.py).
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from covenant import typing as ct
from covenant.gauntlet import findings
from covenant.gauntlet import similarity
from covenant.optim import compression as compression_lib
from covenant.optim import reduce
from covenant.wire import lazy
from covenant.wire import payload

CheckFinding = findings.CheckFinding
CheckReport = findings.CheckReport
CheckResult = findings.CheckResult

_FEW = 3  # messages below which a median means nothing


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
  decoded: payload.Decoded | payload.PayloadError | None = None


class Expected(NamedTuple):
  """The requirements on this round's submissions."""

  opens: int  # first block of the put window
  closes: int  # first block after the put window
  root: bytes  # history root at the start of the round
  # Receipt of as much assigned data as the header declares, by uid; a uid
  # without one passes.
  receipts: Mapping[int, bytes]
  sequences: int  # sequences assigned to each uid
  # Usual norm of a message by the rounds before; 0: there are too few.
  usual_norm: float = 0.0
  # The usual work of uids that sent a valid message lately; only they tell a
  # fault of this node's network from one of their own. None: all, alike.
  answering: Mapping[int, float] | None = None


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
    sought = [s.uid for s in ordered if s.fetch or s.digest]
    if expected.answering is not None:
      sought = [uid for uid in sought if uid in expected.answering]
    failed = [
      u for u in sought if checks[u].finding is CheckFinding.UNREACHABLE
    ]
    work = expected.answering or {}
    fault = 2 * sum(work.get(u, 1.0) for u in failed) > sum(
      work.get(u, 1.0) for u in sought
    )
    if fault:
      checks |= {
        u: checks[u]._replace(finding=CheckFinding.EXCUSED) for u in failed
      }
    found = {
      s.uid: s.decoded
      for s in ordered
      if checks[s.uid].valid and isinstance(s.decoded, payload.Decoded)
    }
    norms = {uid: self._norm(content) for uid, content in found.items()}
    checks |= {
      uid: found._replace(block=checks[uid].block)
      for uid, found in judge_norms(norms, expected.usual_norm).items()
    }
    messages = {u: x.message for u, x in found.items() if checks[u].valid}
    self._find_copies(checks, messages, previous or {}, seed, threshold)
    return CheckReport(checks, fault)

  def _norm(self, content: payload.Decoded) -> float:
    """Returns the norm of a whole message, exact but for one rounding."""
    if isinstance(content, payload.Measured):
      norms_P = content.norms
    else:
      norms_P = np.asarray(self._norms(content.message))
    return math.sqrt(math.fsum(float(n) ** 2 for n in norms_P))

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
    if isinstance(previous, lazy.Messages):  # of which a few blocks are read
      previous = previous.packed
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
            finding=CheckFinding.REPLAY,
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
  if header.root != expected.root:
    return reject(
      CheckFinding.UNSYNCHRONIZED,
      f'its root is {header.root.hex()}, not {expected.root.hex()}',
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
  return CheckResult(CheckFinding.VALID, '', s.block)


def judge_norms(
  norms: Mapping[int, float], usual: float = 0.0
) -> dict[int, CheckResult]:
  """Returns the results of valid messages with these norms, by uid.

  A norm is too large, or too small, only if it is by the median of the round
  and by the rounds before: half of the uids could set the median, but not what
  earlier manifests hold. Before there are such rounds the upper quartile stands
  for them.

  Args:
    norms: the L2 norm of each message.
    usual: that of earlier rounds; 0: it is not known.

  >>> judge_norms({0: 1.0, 1: 1.0, 2: 0.0})[2].finding.name
  'TINY'
  >>> judge_norms({0: 1.0, 1: 99.0, 2: 1.0}, usual=20.0)[1].finding.name
  'VALID'
  """
  ordered = sorted(norms.values())
  few, last = len(ordered) < _FEW, len(ordered) - 1
  median = 0.0 if few else ordered[last // 2]
  usual = usual or (0.0 if few else ordered[3 * last // 4])
  known = [x for x in (median, usual) if x]
  results = {}
  for uid, norm in norms.items():
    finding = CheckFinding.VALID
    if norm == 0 or (known and norm < findings.SMALLEST_NORM * min(known)):
      finding = CheckFinding.TINY
    elif known and norm > findings.LARGEST_NORM * max(known):
      finding = CheckFinding.HUGE
    text = f'L2 norm {norm:.3g}, median {median:.3g}, usual {usual:.3g}'
    detail = '' if finding is CheckFinding.VALID else text
    results[uid] = CheckResult(
      finding,
      detail,
      relative_norm=norm / median if median else None,
      largest=norm / max(known) if known else None,
      least=norm / min(known) if known else None,
    )
  return results


def judge_copies(
  checks: dict[int, CheckResult],
  uids: Sequence[int],
  similarity_RxR: np.ndarray,
  threshold: float,
) -> None:
  """Finds the first of similar messages, by block and then by uid.

  A miner uploads once its commitment is in a block, so a copier commits in a
  later one. Similar messages of one block were made together.

  Args:
    checks: results by uid; changed in place.
    uids: the uids of the compared messages.
    similarity_RxR: their similarities.
    threshold: the similarity from which on messages count once.
  """
  blocks = {uid: checks[uid].block or 0 for uid in uids}
  order = {uid: (blocks[uid], uid) for uid in uids}
  origins, near = dict[int, int](), dict[int, int]()
  rows = dict(zip(uids, similarity_RxR, strict=True))
  for uid in sorted(uids, key=order.__getitem__):
    earlier = [
      (float(share), v)
      for v, share in zip(uids, rows[uid], strict=True)
      if v != uid and blocks[v] <= blocks[uid]
    ]
    if earlier:
      share, twin = max(earlier)
      checks[uid] = checks[uid]._replace(similarity=share, twin=twin)
    for found, least in (
      (origins, threshold),
      (near, threshold - findings.SIMILARITY_MARGIN),
    ):
      similar = [found[v] for a, v in earlier if a >= least and v in found]
      found[uid] = min(similar, key=order.__getitem__, default=uid)
  for uid, origin in near.items():
    checks[uid] = checks[uid]._replace(near=origin)
  for origin in {o for u, o in origins.items() if o != u}:
    group = [uid for uid in uids if origins[uid] == origin]
    twins = sum(blocks[uid] == blocks[origin] for uid in group)
    for uid in group:
      same = blocks[uid] == blocks[origin]
      finding = CheckFinding.TWIN if same else CheckFinding.COPY
      if same and twins == 1:
        finding = CheckFinding.VALID
      detail = f'of uid {origin}, in block {blocks[origin]}; this in '
      checks[uid] = checks[uid]._replace(
        finding=finding,
        detail='' if uid == origin else f'{detail}{blocks[uid]}',
        twin=checks[uid].twin if uid == origin else origin,
        origin=origin,
        twins=twins,
      )
