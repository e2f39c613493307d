"""A round as a pure state machine: what a node should do next, and when.

Nothing here reads a clock, a chain or a store. A node asks `next_command`
with the newest block, does what it says, and folds what came of it into its
state with `after`. A command that failed changes nothing, so it is asked for
again at the next block for as long as it makes sense: that is the whole error
handling of a round.

Round r starts with block `start(r)`, whose hash decides who trains on what. In
its last blocks payloads may be committed; it is agreed upon in the first
blocks of the next one:

  start(r)         put_opens(r)  start(r+1)        decides(r)  decides_last(r)
  |--- train ---------|- commit, -|- check, ---------|-- others --|
                         upload      propose, vote      propose

With `optim.overlap` a miner begins to train for the next round as soon as it
has committed, and ends once it has applied this one.
"""

import enum
from collections.abc import Mapping
from typing import NamedTuple

from covenant import config as config_lib
from covenant.wire import commitment as commitment_lib


class Schedule(NamedTuple):
  """The blocks of every phase of every round."""

  phases: config_lib.Phases
  overlap: bool = False  # whether a round is begun before the last is applied

  def start(self, round_index: int) -> int:
    return self.phases.origin + round_index * self.phases.round_blocks

  def assignment_block(self, round_index: int) -> int:
    """The block whose hash decides who trains on what.

    Who has committed to the last round goes on at once, where rounds overlap.
    """
    if self.overlap and round_index:
      return self.put_opens(round_index - 1)
    return self.start(round_index)

  def put_opens(self, round_index: int) -> int:
    return self.start(round_index + 1) - self.phases.put_blocks

  def put_closes(self, round_index: int) -> int:
    """The last block in which a payload may be committed."""
    return self.start(round_index + 1) - 1

  def collection_block(self, round_index: int) -> int:
    """Once it is settled, who committed last has seen that it is: to upload."""
    return self.put_closes(round_index) + self.phases.confirmations

  def proposes(self, round_index: int, rank: int) -> int:
    """From when the validator of a rank may make the manifest; 0 leads."""
    return self.start(round_index + 1) + rank * self.phases.select_blocks

  def decision_block(self, round_index: int) -> int:
    return self.start(round_index + 1) + self.phases.select_blocks

  def last_decision_block(self, round_index: int) -> int:
    return self.decision_block(round_index) + self.phases.takeover_blocks

  def round_at(self, block: int) -> int:
    """The round that a block is in; negative before the first."""
    return (block - self.phases.origin) // self.phases.round_blocks

  def finalized(self, head: int) -> int:
    """The newest block whose state stays as it is."""
    return head - self.phases.confirmations


class Phase(enum.Enum):
  """What a node can be told to do, about one round."""

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


MINER = frozenset(
  {
    Phase.TRAIN,
    Phase.COMMIT,
    Phase.UPLOAD,
    Phase.DECIDE,
    Phase.APPLY,
    Phase.KEEP,
    Phase.CATCH_UP,
  }
)
VALIDATOR = frozenset(Phase) - {
  Phase.BEGIN,
  Phase.TRAIN,
  Phase.COMMIT,
  Phase.UPLOAD,
}


def miner(plan: Schedule) -> frozenset[Phase]:
  """What a miner does."""
  return MINER | {Phase.BEGIN} if plan.overlap else MINER


class Command(NamedTuple):
  do: Phase
  round: int
  last: bool = False  # DECIDE: whether plurality is enough


class Decision(NamedTuple):
  """What the chain says about a round."""

  digest: bytes | None  # of the manifest; None: nobody counts
  majority: bool = True  # whether more than half of all stake is for it


class State(NamedTuple):
  """Where a node stands. `round` is the one that it has not yet applied."""

  round: int
  lost: bool = False  # what it holds is not what the others hold
  trained: bool = False
  committed: bool = False
  uploaded: bool = False
  begun: bool = False  # the next round
  collected: bool = False
  voted: bool = False
  undecided: bool = False  # at the first look
  decision: Decision | None = None
  # About the round before, once it is applied:
  kept: bool = True
  scored: bool = True

  def settled(self, can: frozenset['Phase']) -> bool:
    """Whether nothing is left to do about the round before."""
    return self.kept and (self.scored or Phase.SCORE not in can)


def next_command(
  plan: Schedule, can: frozenset[Phase], state: State, head: int
) -> Command | None:
  """What to do at block `head`, or None to wait for a later one.

  Args:
    plan: when.
    can: what the node's role does: `MINER` or `VALIDATOR`.
    state: where it stands.
    head: the newest block, which may be one that it has seen before.
  """
  r, settled = state.round, plan.finalized(head)
  # Later the chain may not know any more how this round was decided. Who has
  # read the decision may take a round more to find what it lists.
  patience = 1 if state.decision is None else 2
  if state.lost or plan.round_at(head) > r + patience:
    return Command(Phase.CATCH_UP, r)
  decide_at = (
    plan.last_decision_block(r) if state.undecided else plan.decision_block(r)
  )
  # What is sent at a block is in the next one at the earliest.
  training = settled >= plan.start(r) and head < plan.put_closes(r)
  undecided = state.decision is None
  over = state.committed or head >= plan.put_closes(r)
  wanted = {
    Phase.APPLY: not undecided,
    # Before the decision, though it may be there: who was started again after
    # the vote still judges this round.
    Phase.COLLECT: (
      undecided and not state.collected and settled >= plan.collection_block(r)
    ),
    Phase.DECIDE: undecided and settled >= decide_at,
    Phase.BEGIN: not state.begun
    and over
    and settled >= plan.assignment_block(r + 1),
    Phase.VOTE: not state.voted and settled >= plan.collection_block(r),
    Phase.TRAIN: not state.trained and training,
    Phase.UPLOAD: undecided and state.committed and not state.uploaded,
    Phase.COMMIT: (
      state.trained
      and not state.committed
      and training
      and head >= plan.put_opens(r)
    ),
    Phase.SCORE: not state.scored,
    Phase.KEEP: not state.kept,
  }
  for do, now in wanted.items():
    if now and do in can:
      about = r + 1 if do is Phase.BEGIN else r
      return Command(do, about, last=do is Phase.DECIDE and state.undecided)
  return None


def transition(
  state: State, command: Command, decision: Decision | None = None
) -> State:
  """The state once `command` has been done; DECIDE may have found nothing.

  What catching up led to, only the node knows.
  """
  match command.do:
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
      return state._replace(voted=True)
    case Phase.DECIDE:
      return state._replace(decision=decision, undecided=decision is None)
    case Phase.APPLY:
      return State(state.round + 1, kept=False, scored=False)
    case Phase.KEEP:
      return state._replace(kept=True)
    case Phase.SCORE:
      return state._replace(scored=True)
  raise ValueError(f'no state follows from {command}')


def next_wakeup(plan: Schedule, state: State, head: int) -> int:
  """The first block after `head` at which there may be something to do.

  For a node that has nothing to do at `head`.
  """
  r, unsettled = state.round, plan.phases.confirmations
  turns = (
    plan.assignment_block(r + 1) + unsettled,
    plan.start(r) + unsettled,
    plan.put_opens(r),
    plan.collection_block(r) + unsettled,
    plan.decision_block(r) + unsettled,
    plan.last_decision_block(r) + unsettled,
  )
  return min((block for block in turns if block > head), default=head + 1)


def decide(
  round_index: int,
  votes: Mapping[int, commitment_lib.Commitment],
  stakes: Mapping[int, float],
  last: bool,
) -> Decision | None:
  """Which manifest the validators stand for, as everybody reads it.

  Args:
    round_index: which round.
    votes: commitments by uid, all of one block.
    stakes: of every validator, by uid, at the same block.
    last: whether the manifest with the most stake holds, even without a
      majority, and nobody counts where there is none. Before, more than half
      of all stake must stand for one.

  Returns:
    The decision, or None if it must wait for the last look. Equal stakes go
    to the smaller digest.
  """
  weight: dict[bytes, float] = {}
  for uid in sorted(stakes):
    vote = votes.get(uid)
    if vote is not None and vote.round == round_index:
      weight[vote.digest] = weight.get(vote.digest, 0.0) + stakes[uid]
  if not weight:
    return Decision(None, majority=False) if last else None
  best = min(weight, key=lambda digest: (-weight[digest], digest))
  total = sum(stakes[uid] for uid in sorted(stakes))
  majority = 2 * weight[best] > total
  return Decision(best, majority) if last or majority else None
