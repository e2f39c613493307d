"""A round as a pure state machine: the next command of a node, and its block.

Nothing here reads a clock, a chain or a store. A node calls `next_command`
with the newest block, executes the command, and passes the outcome to
`transition`. A command that failed changes nothing, so the next block repeats
it for as long as it makes sense. That is the whole error handling of a round.

Round r starts with block `start(r)`, whose hash assigns the training data.
Payloads may be committed in its last blocks. The validators agree on it in the
first blocks of the next round:

  start(r)          put_opens(r)   start(r+1)      decision_block(r)
  |----- train ----------|- commit, ---|- check, ----------|- others ---|
                            upload       propose, vote        propose
                                                     last_decision_block(r)

With `optim.overlap` a miner begins to train for the next round once it has
trained and the put window's first block is final, then commits, and completes
that training once it has applied this round.
"""

import enum
from collections.abc import Mapping
from typing import NamedTuple

from covenant import config as config_lib
from covenant.wire import commitment as commitment_lib


class Segment(NamedTuple):
  """Rounds of other phases, by an amendment."""

  round: int  # the first one
  block: int  # its first block
  phases: config_lib.Phases

  def start(self, round_index: int) -> int:
    return self.block + (round_index - self.round) * self.phases.round_blocks


class Schedule(NamedTuple):
  """The blocks of every phase of every round."""

  phases: config_lib.Phases  # of the first rounds
  overlap: bool = False  # begin a round before the last one is applied
  later: tuple[Segment, ...] = ()  # rounds increase
  first: int = 0  # the round that begins with block `phases.origin`

  def amended(self, round_index: int, phases: config_lib.Phases) -> 'Schedule':
    """Returns the schedule with other phases from a round on, the last one."""
    if phases == self.at(round_index):
      return self
    new = Segment(round_index, self.start(round_index), phases)
    return self._replace(later=(*self.later, new))

  def at(self, round_index: int) -> config_lib.Phases:
    """The phases of a round."""
    return self._segment(round_index).phases

  def _segment(self, round_index: int) -> Segment:
    for segment in reversed(self.later):
      if round_index >= segment.round:
        return segment
    return Segment(self.first, self.phases.origin, self.phases)

  def start(self, round_index: int) -> int:
    """The first block of a round."""
    return self._segment(round_index).start(round_index)

  def assignment_block(self, round_index: int) -> int:
    """The block whose hash assigns the training data.

    With overlap a miner that has trained begins the next round at once.
    """
    if self.overlap and round_index != self.first:
      return self.put_opens(round_index - 1)
    return self.start(round_index)

  def put_opens(self, round_index: int) -> int:
    """The first block in which a payload may be committed."""
    return self.start(round_index + 1) - self.at(round_index).put_blocks

  def put_closes(self, round_index: int) -> int:
    """The last block in which a payload may be committed."""
    return self.start(round_index + 1) - 1

  def collection_block(self, round_index: int) -> int:
    """The block that must be final before payloads are fetched.

    By then the last miner has seen its commitment and has uploaded.
    """
    return self.put_closes(round_index) + self.phases.confirmations

  def proposes(self, round_index: int, rank: int) -> int:
    """The first block in which a validator may propose; rank 0 leads.

    The turns walk down the ranks as fast as each sees the proposal of the one
    before. All that are left propose in the decision block, so that any number
    of silent validators costs one window.
    """
    if rank == 0:
      return self.start(round_index + 1)
    seen = 2 + self.phases.confirmations  # blocks until others see a proposal
    turn = self.collection_block(round_index) + rank * seen
    turn += self.phases.confirmations
    return min(turn, self.decision_block(round_index))

  def last_proposal_block(self, round_index: int) -> int:
    """The last block whose proposals others still take up.

    Half of the takeover window is left to vote for them.
    """
    half = self.at(round_index).takeover_blocks // 2
    return self.decision_block(round_index) + half

  def closing_block(self, round_index: int) -> int:
    """The last block whose votes others see in time to follow them.

    By its state the validators that have not agreed yet agree.
    """
    seen = 1 + self.phases.confirmations  # blocks until a vote follows it
    return self.last_decision_block(round_index) - seen

  def decision_block(self, round_index: int) -> int:
    """The block whose votes decide, if more than half of the stake agrees."""
    return self.start(round_index + 1) + self.at(round_index).select_blocks

  def last_decision_block(self, round_index: int) -> int:
    """The block whose votes decide if there was no majority before."""
    takeover = self.at(round_index).takeover_blocks
    return self.decision_block(round_index) + takeover

  def round_at(self, block: int) -> int:
    """The round of a block; below the first one before it begins."""
    here = Segment(self.first, self.phases.origin, self.phases)
    for segment in self.later:
      if block >= segment.block:
        here = segment
    return here.round + (block - here.block) // here.phases.round_blocks

  def finalized(self, head: int) -> int:
    """The newest block that the chain will not take back."""
    return head - self.phases.confirmations


class Phase(enum.Enum):
  """The work of one round that a node can be told to do."""

  BEGIN = 'begin'
  TRAIN = 'train'
  COMMIT = 'commit'
  UPLOAD = 'upload'
  COLLECT = 'fetch what was committed'
  VOTE = 'vote'
  DECIDE = 'decide'
  APPLY = 'apply'
  KEEP = 'keep'
  SCORE = 'score'
  CATCH_UP = 'catch up'


_COMMON = {Phase.DECIDE, Phase.APPLY, Phase.KEEP, Phase.CATCH_UP}
MINER = frozenset(_COMMON | {Phase.TRAIN, Phase.COMMIT, Phase.UPLOAD})
VALIDATOR = frozenset(_COMMON | {Phase.COLLECT, Phase.VOTE, Phase.SCORE})


def miner(schedule: Schedule) -> frozenset[Phase]:
  """Returns the phases of a miner."""
  return MINER | {Phase.BEGIN} if schedule.overlap else MINER


def role(can: frozenset[Phase]) -> commitment_lib.Role:
  """Returns the role that a node with some phases declares on the chain."""
  role = commitment_lib.Role
  return role.VALIDATOR if Phase.VOTE in can else role.MINER


class Command(NamedTuple):
  """One phase of one round, to be executed."""

  phase: Phase
  round: int
  last: bool = False  # of DECIDE: at the last look; of VOTE: for the last time


class Decision(NamedTuple):
  """The decision about a round, as the chain has it."""

  digest: bytes | None  # digest of the manifest; None: no message counts
  majority: bool = True  # True if more than half of the stake voted for it


class RoundState(NamedTuple):
  """The progress of a node in its current round."""

  round: int  # the first round that the node has not applied
  out_of_sync: bool = False  # its state differs from the state of the others
  trained: bool = False
  committed: bool = False
  uploaded: bool = False
  begun: bool = False  # training of the next round
  collected: bool = False
  voted: bool = False
  undecided: bool = False  # no majority at the decision block
  decision: Decision | None = None
  # Of the previous round, after it was applied:
  kept: bool = True
  scored: bool = True
  closed: bool = False  # voted for the last time, as there was no majority

  def previous_round_done(self, can: frozenset['Phase']) -> bool:
    """Returns whether no work on the previous round is left."""
    return self.kept and (self.scored or Phase.SCORE not in can)


def next_command(
  schedule: Schedule, can: frozenset[Phase], state: RoundState, head: int
) -> Command | None:
  """Returns the command for block `head`, or None to wait for a later block.

  Args:
    schedule: the blocks of the phases.
    can: the phases of the node's role, such as `MINER` or `VALIDATOR`.
    state: the progress of the node.
    head: the newest block, which may be the same as in the last call.
  """
  r, finalized = state.round, schedule.finalized(head)
  # Later the chain may no longer have the votes on this round. A node that has
  # read the decision gets one more round to fetch the payloads.
  patience = 1 if state.decision is None else 2
  if state.out_of_sync or schedule.round_at(head) > r + patience:
    return Command(Phase.CATCH_UP, r)
  decide_at = (
    schedule.last_decision_block(r)
    if state.undecided
    else schedule.decision_block(r)
  )
  # A transaction sent at a block is in the next block at the earliest.
  training = finalized >= schedule.start(r) and head < schedule.put_closes(r)
  undecided = state.decision is None
  over = state.trained or head >= schedule.put_closes(r)
  # The devices go on before the commitment is sent, which takes blocks.
  known = schedule.assignment_block(r + 1)
  begins = (
    Phase.BEGIN in can
    and not state.begun
    and finalized <= known
    and known + schedule.phases.confirmations < schedule.put_closes(r) - 1
  )
  wanted = {
    Phase.APPLY: not undecided,
    # Before DECIDE, even if the decision is there: a validator that restarted
    # after its vote still judges this round.
    Phase.COLLECT: (
      undecided
      and not state.collected
      and finalized >= schedule.collection_block(r)
    ),
    Phase.DECIDE: undecided and finalized >= decide_at,
    Phase.BEGIN: not state.begun
    and over
    and finalized >= schedule.assignment_block(r + 1),
    Phase.VOTE: (
      finalized >= schedule.collection_block(r)
      if not state.voted
      else _is_closing(schedule, state, finalized)
    ),
    Phase.TRAIN: not state.trained and training,
    Phase.UPLOAD: undecided and state.committed and not state.uploaded,
    Phase.COMMIT: (
      state.trained
      and not state.committed
      and training
      and head >= schedule.put_opens(r)
      and not begins
    ),
    Phase.SCORE: not state.scored,
    Phase.KEEP: not state.kept,
  }
  for phase, now in wanted.items():
    if now and phase in can:
      about = r + 1 if phase is Phase.BEGIN else r
      last = phase is Phase.DECIDE and state.undecided
      return Command(phase, about, last or phase is Phase.VOTE and state.voted)
  return None


def _is_closing(schedule: Schedule, state: RoundState, finalized: int) -> bool:
  """Returns whether a vote without a majority may have to change, once."""
  is_open = state.undecided and not state.closed and state.decision is None
  return is_open and finalized >= schedule.closing_block(state.round)


def transition(
  state: RoundState, command: Command, decision: Decision | None = None
) -> RoundState:
  """Returns the state after a command succeeded.

  Args:
    state: the state before.
    command: any command but CATCH_UP, whose outcome only the node knows.
    decision: of DECIDE: the decision, or None if there is none yet.
  """
  match command.phase:
    case Phase.BEGIN:
      return state._replace(begun=True)
    case Phase.TRAIN:
      return state._replace(trained=True)
    case Phase.COMMIT:
      return state._replace(committed=True)
    case Phase.UPLOAD:
      return state._replace(uploaded=True)
    case Phase.COLLECT:
      return state._replace(collected=True)
    case Phase.VOTE:
      return state._replace(voted=True, closed=command.last)
    case Phase.DECIDE:
      return state._replace(decision=decision, undecided=decision is None)
    case Phase.APPLY:
      return RoundState(state.round + 1, kept=False, scored=False)
    case Phase.KEEP:
      return state._replace(kept=True)
    case Phase.SCORE:
      return state._replace(scored=True)
  raise ValueError(f'expected a command with a successor state, got {command}')


def next_wakeup(schedule: Schedule, state: RoundState, head: int) -> int:
  """Returns the first block after `head` that may bring a command.

  For a node that has no command at `head`.
  """
  r, unsettled = state.round, schedule.phases.confirmations
  turns = (
    schedule.assignment_block(r + 1) + unsettled,
    schedule.start(r) + unsettled,
    schedule.put_opens(r),
    schedule.collection_block(r) + unsettled,
    schedule.decision_block(r) + unsettled,
    schedule.closing_block(r) + unsettled,
    schedule.last_decision_block(r) + unsettled,
  )
  return min((block for block in turns if block > head), default=head + 1)


def decide(
  round_index: int,
  votes: Mapping[int, commitment_lib.Commitment],
  stakes: Mapping[int, float],
  last: bool,
) -> Decision | None:
  """Returns the manifest that the validators voted for, equal on every node.

  It is the one of more than half of all stake; without such a majority no
  message counts.

  Args:
    round_index: the round to decide.
    votes: the validators' commitments at one block, by uid.
    stakes: the stake of every validator of the run at the same block, by uid
      (`membership.Membership.stakes`).
    last: True at the last decision block, which leaves nothing open.

  Returns:
    The decision, or None if it must wait for the last decision block.
  """
  best = leading(round_index, votes, stakes)
  if best is not None:
    total = sum(stakes[uid] for uid in sorted(stakes))
    if 2 * _weights(round_index, votes, stakes)[best] > total:
      return Decision(best)
  return Decision(None, majority=False) if last else None


def leading(
  round_index: int,
  votes: Mapping[int, commitment_lib.Commitment],
  stakes: Mapping[int, float],
) -> bytes | None:
  """Returns the digest with the most stake; ties go to the smaller digest.

  It decides nothing: it may be a minority's.
  """
  weight = _weights(round_index, votes, stakes)
  return min(weight, key=lambda digest: (-weight[digest], digest), default=None)


def _weights(
  round_index: int,
  votes: Mapping[int, commitment_lib.Commitment],
  stakes: Mapping[int, float],
) -> dict[bytes, float]:
  """Returns the stake behind each digest."""
  weight: dict[bytes, float] = {}
  for uid in sorted(stakes):
    vote = votes.get(uid)
    if vote is not None and vote.round == round_index:
      weight[vote.digest] = weight.get(vote.digest, 0.0) + stakes[uid]
  return weight
