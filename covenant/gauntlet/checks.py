"""What a round's submissions are worth before anything is evaluated.

Ordered cheap to dear. Every uid gets one verdict of a closed list and a line
that its operator can act on. A verdict is a function of what the chain and
the stores showed, so two validators that saw the same say the same.
"""

import enum
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from covenant.gauntlet import similarity
from covenant.optim import aggregate
from covenant.optim import compression as compression_lib
from covenant.wire import payload

# Of a message's L2 norm to the round's median. Newcomers have no error
# feedback yet and send several times less: tiny is only what holds nothing.
LARGEST_NORM = 10.0
SMALLEST_NORM = 0.01
_FEW = 3  # messages without which there is no median to speak of


class Verdict(enum.Enum):
  """A closed list; the value is for people."""

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
  """What a validator holds of one uid at the close of the put window."""

  uid: int
  block: int | None = None  # of this round's commitment; None: there is none
  committed: bytes = b''  # the digest that it holds
  twice: bool = False  # this round had another commitment with another digest
  # Why no payload came: 'absent', the store says that there is none; 'failed',
  # the store gave no answer or an error; '' where one came or none was sought.
  fetch: str = ''
  detail: str = ''  # what the store said, for people
  digest: bytes = b''  # of the payload that came, to compare with `committed`
  decoded: payload.Payload | payload.PayloadError | None = None


class Expected(NamedTuple):
  """What this round's submissions must be."""

  opens: int  # first block of the put window
  closes: int  # first block after it
  root: bytes  # of the history that the round began with
  # uid -> the receipt of as much assigned data as its header says; who is not
  # in it passes.
  receipts: Mapping[int, bytes]
  sequences: int  # that were assigned to each
  # Of earlier rounds, latest first, whose parameters are not yet too old.
  older: Sequence[bytes] = ()


class Check(NamedTuple):
  """The outcome for one uid. None: it did not get so far."""

  verdict: Verdict
  detail: str = ''  # for people
  block: int | None = None  # of the commitment
  relative_norm: float | None = None  # L2 of the message over the median
  similarity: float | None = None  # to whom of those not later it is most like
  twin: int | None = None  # that peer; see `overlap`
  staleness: int = 0  # of a payload that is valid: how old its parameters were

  @property
  def valid(self) -> bool:
    return self.verdict is Verdict.VALID


class Report(NamedTuple):
  """The checks of one round."""

  checks: dict[int, Check]  # of all submissions, by uid
  fault: bool  # most payloads could not be fetched: nobody pays for it

  @property
  def valid(self) -> list[int]:
    """The uids that may count, rising."""
    return sorted(u for u, c in self.checks.items() if c.valid)


class Checker:
  """The checks of one run, compiled once.

  Cost of R readable messages, besides their norms: R^2 intersections of at
  most 32 blocks' bits, and as many with the round before: 0.4 s each for 256
  peers and blocks of 4096 elements, on one core.
  """

  def __init__(self, like: Any, compression: compression_lib.Compression):
    """Of parameters shaped like `like`, sent by `compression`."""
    self._sketcher = similarity.Sketcher(like, compression)
    # Signs are alike more often than sparse indices are, by an unknown amount.
    sparse = isinstance(compression, compression_lib.TopK)
    self._least = 0.0 if sparse else 0.9
    self._norms = jax.jit(
      functools.partial(
        aggregate.message_norms, like=like, compression=compression
      )
    )

  def check(
    self,
    submissions: Sequence[Submission],
    expected: Expected,
    seed: bytes,
    previous: Mapping[int, Any] | None = None,
    threshold: float = 0.5,
  ) -> Report:
    """The verdicts of a round.

    Args:
      submissions: one a uid, of all uids that should have sent something.
      expected: what they must be.
      seed: unknown before the put window closed, such as the hash of block
        `expected.closes`: decides which blocks of the messages are compared.
      previous: messages of the round before, by uid, to find copies of these;
        None or {} compares within the round only.
      threshold: the similarity from which on a message is a copy; 0.9 at
        least of messages that send every value.
    """
    threshold = max(threshold, self._least)
    ordered = sorted(submissions, key=lambda s: s.uid)
    checks = {s.uid: first_check(s, expected) for s in ordered}
    sought = [s for s in ordered if s.fetch or s.digest]
    failed = [u for u, c in checks.items() if c.verdict is Verdict.UNREACHABLE]
    fault = 2 * len(failed) > len(sought)
    if fault:
      checks |= {u: checks[u]._replace(verdict=Verdict.EXCUSED) for u in failed}
    messages = {
      s.uid: s.decoded.message
      for s in ordered
      if checks[s.uid].valid and isinstance(s.decoded, payload.Payload)
    }
    norms = {u: _total(self._norms(m)) for u, m in messages.items()}
    checks |= {
      uid: checks[uid]._replace(**found)
      for uid, found in judge_norms(norms).items()
    }
    messages = {u: m for u, m in messages.items() if checks[u].valid}
    self._find_copies(checks, messages, previous or {}, seed, threshold)
    return Report(checks, fault)

  def _find_copies(
    self,
    checks: dict[int, Check],
    messages: Mapping[int, Any],
    previous: Mapping[int, Any],
    seed: bytes,
    threshold: float,
  ) -> None:
    """Edits `checks`."""
    sketch_RxW = self._sketcher.sketch(messages, seed)
    before_SxW = self._sketcher.sketch(previous, seed)
    if not sketch_RxW.size:
      return
    uids, old_uids = list(messages), list(previous)
    others = ~np.eye(len(uids), dtype=bool)
    alike_RxR = similarity.similarities(
      similarity.overlaps(sketch_RxW, sketch_RxW), others
    )
    judge_copies(checks, uids, alike_RxR, threshold)
    if before_SxW.size:
      overlap_RxS = similarity.overlaps(sketch_RxW, before_SxW)
      alike_RxS = similarity.similarities(
        overlap_RxS, np.ones_like(overlap_RxS, bool)
      )
      for uid, alike_S in zip(uids, alike_RxS, strict=True):
        nearest = int(np.argmax(alike_S))
        if checks[uid].valid and alike_S[nearest] >= threshold:
          whose = old_uids[nearest]
          checks[uid] = checks[uid]._replace(
            verdict=Verdict.COPY,
            detail=f'it is the message of uid {whose} of the round before',
            similarity=float(alike_S[nearest]),
            twin=whose,
          )


def first_check(s: Submission, expected: Expected) -> Check:
  """The verdict on one submission by itself, cheapest question first."""

  def no(verdict: Verdict, detail: str = '') -> Check:
    return Check(verdict, detail, s.block)

  window = f'the window is blocks {expected.opens} to {expected.closes - 1}'
  if s.block is None:
    return no(Verdict.MISSING)
  if s.block < expected.opens:
    return no(Verdict.EARLY, f'in block {s.block}; {window}')
  if s.block >= expected.closes:
    return no(Verdict.LATE, f'in block {s.block}; {window}')
  if s.twice:
    return no(Verdict.TWICE, 'one payload a round: commit once')
  if s.fetch:
    absent = s.fetch == 'absent'
    return no(Verdict.ABSENT if absent else Verdict.UNREACHABLE, s.detail)
  if s.digest != s.committed:
    return no(
      Verdict.DIGEST,
      f'committed {s.committed.hex()[:16]}, found {s.digest.hex()[:16]}',
    )
  if s.decoded is None:
    raise ValueError(f'uid {s.uid}: a payload came but was not decoded')
  if isinstance(s.decoded, payload.PayloadError):
    root = s.decoded.reason is payload.Reason.ROOT
    return no(
      Verdict.UNSYNCHRONIZED if root else Verdict.REFUSED, str(s.decoded)
    )
  header = s.decoded.header
  # What is older still has been refused as such.
  root = (expected.root, *expected.older)[header.staleness]
  if header.root != root:
    return no(
      Verdict.UNSYNCHRONIZED,
      f'its root is {header.root.hex()}, not {root.hex()}',
    )
  # Fewer are no lie: who says so is paid for what they gain.
  if not 1 <= header.sequences <= expected.sequences:
    return no(
      Verdict.RECEIPT,
      f'{header.sequences} sequences; {expected.sequences} were assigned',
    )
  if header.receipt != expected.receipts.get(s.uid, header.receipt):
    return no(
      Verdict.RECEIPT,
      f'its receipt is {header.receipt.hex()}, '
      f'not {expected.receipts[s.uid].hex()}',
    )
  return Check(Verdict.VALID, '', s.block, staleness=header.staleness)


def judge_norms(norms: Mapping[int, float]) -> dict[int, dict[str, Any]]:
  """What to replace in the checks of messages of these norms, by uid.

  >>> judge_norms({0: 1.0, 1: 1.0, 2: 0.0})[2]['verdict'].name
  'TINY'
  """
  ordered = sorted(norms.values())
  median = ordered[(len(ordered) - 1) // 2] if len(ordered) >= _FEW else 0.0
  found: dict[int, dict[str, Any]] = {}
  for uid, norm in norms.items():
    relative = norm / median if median else None
    found[uid] = {'relative_norm': relative}
    text = f'L2 norm {norm:.3g}, median {median:.3g}'
    if norm == 0 or (relative is not None and relative < SMALLEST_NORM):
      found[uid] |= {'verdict': Verdict.TINY, 'detail': text}
    elif relative is not None and relative > LARGEST_NORM:
      found[uid] |= {'verdict': Verdict.HUGE, 'detail': text}
  return found


def judge_copies(
  checks: dict[int, Check],
  uids: Sequence[int],
  alike_RxR: np.ndarray,
  threshold: float,
) -> None:
  """Blames who came later of two that are alike; of one block, both.

  A miner uploads once its commitment is in a block, so a copy is committed to
  in a later one. Who are alike in one block have made it together.

  Args:
    checks: of the uids; edited.
    uids: whose messages were compared.
    alike_RxR: their similarities.
    threshold: from which on they are alike.
  """
  if len(uids) < 2:
    return
  blocks = {uid: checks[uid].block or 0 for uid in uids}
  for row, uid in enumerate(uids):
    earlier = [
      (float(a), v)
      for v, a in zip(uids, alike_RxR[row], strict=True)
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
      verdict=Verdict.TWIN if same else Verdict.COPY,
      detail=f'{detail}; similarity {share:.2f}',
      twin=source,
    )


def _total(norms_P: jax.Array) -> float:
  return float(np.sqrt(np.square(np.asarray(norms_P, np.float64)).sum()))
