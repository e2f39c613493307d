"""The state of a whole run, from its chain and its stores alone."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TextIO

from covenant import config as config_lib
from covenant.chain import interface as chain_lib
from covenant.gauntlet import findings
from covenant.node import connect
from covenant.node import published_status
from covenant.protocol import amendments as amendments_lib
from covenant.protocol import membership as membership_lib
from covenant.protocol import published_rules
from covenant.report import progress
from covenant.store import interface as store_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import amendment as amendment_lib

_HEADER = (
  'uid', 'role', 'alive', 'round', 'lag', 'loss', 'stake', 'weight', 'error',
)  # fmt: skip
_MAX_VERDICT = 4 << 20  # bytes
_MOST_VERDICTS = 3  # newest ones that are looked at
_ERROR_WIDTH = 40


class PeerStatus(NamedTuple):
  """One registered peer."""

  uid: int
  role: str  # declared; empty: none
  is_alive: bool  # has committed within the last `phases.active_rounds` rounds
  round: int | None  # rounds that it has completed; None: unknown
  lag: int | None  # rounds behind the chain
  loss: float | None  # of its last training, in its own words
  stake: float
  weight: float  # by the newest verdict of the leading validator that has one
  error: str  # its own last one, or why its last payload was refused


class RunStatus(NamedTuple):
  """A run at one block."""

  block: int
  round: int  # rounds that have begun on the chain
  judged: int | None  # the round of the verdict that weights are from
  peers: list[PeerStatus]
  changes: Sequence[str] = ()  # a line per amendment


class Observer:
  """Looks at a run without being a member of it.

  Args:
    config: of the run; needs neither a registered hotkey nor a bucket.
  """

  def __init__(self, config: config_lib.Config):
    self._config = config
    self._shared_model = shared_state_lib.SharedModel(config)
    self._run = self._shared_model.run
    self._chain = connect.chain(config, reads_only=True)
    self._objects = connect.objects(config, self._run, writes=False)
    self._adopted: tuple[amendment_lib.Amendment, ...] = ()

  def look(self) -> RunStatus:
    """Returns the present state; raises ChainError."""
    head = self._chain.head()
    if head < 0:
      return RunStatus(head, 0, None, [])
    around = self._chain, self._objects, self._shared_model, head
    self._adopted = published_rules.read(*around, self._adopted)
    schedule = amendments_lib.schedule(self._config, self._adopted)
    membership = membership_lib.read(self._chain, head, schedule)
    now = max(schedule.round_at(head), 0)
    judged, verdict = self._verdict(membership)
    peers = [
      self._peer(peer, membership, head, now, verdict)
      for _, peer in sorted(membership.peers.items())
    ]
    changes = [
      amendments_lib.describe(
        amendments_lib.record(self._config, self._adopted[:i], one, now)
      )
      for i, one in enumerate(self._adopted)
    ]
    return RunStatus(head, now, judged, peers, changes)

  def _peer(
    self,
    peer: chain_lib.Peer,
    membership: membership_lib.Membership,
    head: int,
    now: int,
    verdict: 'Verdict',
  ) -> PeerStatus:
    uid = peer.uid
    schedule = amendments_lib.schedule(self._config, self._adopted)
    phases = schedule.at(now)
    role, commitment = membership.role(uid), membership.commitments.get(uid)
    own = None
    if commitment is not None and commitment.location:
      own = published_status.read(
        self._objects,
        self._run,
        commitment.location,
        peer.hotkey,
        self._chain.verify,
      )
    completed = own.round if own else None
    if completed is None and commitment and commitment.round is not None:
      completed = commitment.round
    recent = head - phases.active_rounds * phases.round_blocks
    alive = uid in membership.committed and membership.committed[uid] >= recent
    return PeerStatus(
      uid,
      role.name.lower() if role else '',
      alive and (own is None or own.phase == 'running'),
      completed,
      None if completed is None else max(now - completed, 0),
      own.loss if own else None,
      peer.stake,
      verdict.weights.get(uid, 0.0),
      (own.error if own else '') or verdict.refused.get(uid, ''),
    )

  def _verdict(
    self, membership: membership_lib.Membership
  ) -> tuple[int | None, 'Verdict']:
    """Returns the newest verdict of the first validator that has one."""
    for peer in membership.validators:
      bucket = self._objects.bucket_at(membership.location(peer.uid))
      if bucket is None:
        continue
      try:
        rounds = self._objects.rounds('verdicts', bucket)
        for r in rounds[: -_MOST_VERDICTS - 1 : -1]:
          data = bucket.get(self._objects.key('verdicts', r), _MAX_VERDICT)
          if (found := _parse(data)) is not None:
            return r, found
      except store_lib.StoreError:
        continue
    return None, Verdict({}, {})


class Verdict(NamedTuple):
  """The part of a validator's verdict that people ask for, by uid."""

  weights: Mapping[int, float]
  refused: Mapping[int, str]


def _parse(data: bytes) -> Verdict | None:
  """Returns a verdict; None for bytes that are none, as they are a peer's."""
  try:
    raw = json.loads(data)
    weights = {int(uid): float(x) for uid, x in raw['weights'].items()}
    refused = {
      int(d['uid']): str(d['verdict'])[:_ERROR_WIDTH]
      for d in raw['decisions']
      if d['verdict'] not in findings.VALID_NAMES
    }
  except (
    ArithmeticError,
    AttributeError,
    KeyError,
    RecursionError,
    TypeError,
    ValueError,
  ):
    return None
  return Verdict(weights, refused)


def table(status: RunStatus) -> str:
  """Returns the state of a run as lines for a terminal."""
  alive = sum(peer.is_alive for peer in status.peers)
  title = (
    f'block {status.block}, round {status.round}: {alive} of '
    f'{len(status.peers)} peers alive'
  )
  if status.judged is not None:
    title += f'; weights of round {status.judged}'
  rows = [_HEADER, *(_row(peer) for peer in status.peers)]
  changes = [
    ''.join(c if c.isprintable() else '?' for c in x) for x in status.changes
  ]
  return '\n'.join([title, *progress.aligned(rows), *changes])


def _row(peer: PeerStatus) -> tuple[str, ...]:
  return (
    str(peer.uid),
    peer.role or '-',
    'yes' if peer.is_alive else 'no',
    '' if peer.round is None else str(peer.round),
    '' if peer.lag is None else str(peer.lag),
    '' if peer.loss is None else f'{peer.loss:.3f}',
    f'{peer.stake:,.0f}',
    f'{peer.weight:.3f}' if peer.weight else '',
    printable(peer.error),
  )


def printable(text: str) -> str:
  """Returns a peer's text without what a terminal would obey."""
  clean = _clean(text)
  if len(clean) > _ERROR_WIDTH:
    clean = clean[: _ERROR_WIDTH - 3] + '...'
  return clean


def _clean(text: str) -> str:
  return ''.join(c if c.isprintable() else '?' for c in text)


def watch(
  config: config_lib.Config,
  stream: TextIO,
  repeat: bool,
  stop: Callable[[], bool],
  sleep: Callable[[float], None] = time.sleep,
) -> None:
  """Prints the table once, or again with every block until asked to stop.

  Args:
    config: of the run.
    stream: output, such as stdout.
    repeat: True: goes on; a chain that does not answer is a line of its own.
    stop: asked between two tables.
    sleep: waits some seconds.

  Raises:
    ChainError: the chain does not answer, without `repeat`.
  """
  observer, lines = Observer(config), 0
  while True:
    try:
      text = table(observer.look())
    except chain_lib.ChainError as e:
      if not repeat:
        raise
      text = f'{type(e).__name__}: {e}'
    up = f'\x1b[{lines}F\x1b[J' if lines and stream.isatty() else ''
    print(up + text, file=stream, flush=True)
    lines = text.count('\n') + 1
    if not repeat or stop():
      return
    sleep(min(max(config.network.block_seconds, 1.0), 12.0))
    if stop():
      return
