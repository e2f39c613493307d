"""A miner: it trains, commits, uploads and follows the run.

The digest of its payload goes on the chain within the put window, the bytes
into its own bucket. A `MinerPolicy` is what a miner does, one function per
part of a round; an adversary (covenant/adversaries/) wraps a policy.
"""

import base64
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from covenant import typing as ct
from covenant.chain import interface as chain_lib
from covenant.node import base as node_lib
from covenant.node import follow
from covenant.protocol import apply
from covenant.protocol import membership as membership_lib
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.train import local as local_lib
from covenant.train import trainer as trainer_lib

Command = round_lib.Command
Contribution = local_lib.Contribution
Future = node_lib.Future
Phase = round_lib.Phase
MinerState = local_lib.MinerState
Task = local_lib.Task
TrainedRound = local_lib.TrainedRound


class MinerSlot(Protocol):
  """The devices that a miner trains on."""

  trainer: trainer_lib.Trainer

  def init(self, params: ct.Params, round_index: int) -> MinerState:
    """Returns the state of a miner that joins in a round."""
    ...

  def train(
    self,
    params: ct.Params,
    state: MinerState,
    task: Task,
    batches: Iterable[np.ndarray],
    begun: local_lib.RoundInProgress | None = None,
  ) -> Future[tuple[TrainedRound, MinerState]]:
    """Starts `trainer.train`; consumes `state`."""
    ...


class LocalSlot:
  """The devices of this process: training is over when `train` returns."""

  def __init__(self, trainer: trainer_lib.Trainer):
    self.trainer = trainer

  def init(self, params: ct.Params, round_index: int) -> MinerState:
    return self.trainer.init(params, round_index)

  def train(
    self,
    params: ct.Params,
    state: MinerState,
    task: Task,
    batches: Iterable[np.ndarray],
    begun: local_lib.RoundInProgress | None = None,
  ) -> Future[tuple[TrainedRound, MinerState]]:
    return Future.run(
      lambda: self.trainer.train(params, state, task, batches, begun)
    )


@dataclasses.dataclass
class MinerRole:
  """The memory of a miner.

  Attributes:
    slot: where it trains.
    miner_state: its optimizer state and error feedback.
    contribution: what it made last, if anything.
    begun: a round that it has begun to train before the last one was applied.
    trained: the round that it trained last, with the losses and the norms of
      the gradients of its steps.
    notes: what its policy remembers, by name; a restart forgets it.
  """

  slot: MinerSlot
  miner_state: Future[MinerState]
  contribution: Future[Contribution | None] = dataclasses.field(
    default_factory=lambda: Future.done(None)
  )
  begun: local_lib.RoundInProgress | None = None
  trained: tuple[int, tuple[float | None, ...], tuple[float | None, ...]] = (
    -1,
    (),
    (),
  )
  notes: dict[str, Any] = dataclasses.field(default_factory=dict)

  def wait(self) -> None:
    """Returns once no training is under way; raises what the training did."""
    self.miner_state.result()
    self.contribution.result()

  def is_savable(self, state: round_lib.RoundState) -> bool:
    """True between TRAIN and COMMIT: training again would change the error.

    Early steps of the next round would be lost.
    """
    return state.trained and not state.committed and not state.begun

  def save(
    self, state: round_lib.RoundState
  ) -> tuple[dict[str, ct.PyTree], ct.Json]:
    made, text = self.contribution.result(), None
    held = np.zeros(self.slot.trainer.payload_bytes, np.uint8)
    if made is not None and state.trained:
      payload, *numbers = made
      held[: len(payload)] = np.frombuffer(payload, np.uint8)
      text = [len(payload), *numbers]
    tree = {'private': self.miner_state.result(), 'payload': held}
    return tree, {'contribution': text}

  def load(
    self, tree: dict[str, ct.PyTree], text: ct.Json, state: round_lib.RoundState
  ) -> round_lib.RoundState:
    self.miner_state = Future.done(tree['private'])
    if text['contribution'] is None:
      return state
    size, *numbers = text['contribution']
    if 'payload' in tree:
      payload = np.asarray(tree['payload'])[:size].tobytes()
    else:  # saved as text, by an earlier release
      payload = base64.b64decode(size)
    made = Contribution(payload, *numbers)
    self.contribution = Future.done(made)
    return state._replace(trained=True)

  def restart(self, params: ct.Params, round_index: int) -> None:
    """Forgets moments and error feedback, which led away from `params`."""
    self.miner_state = Future.done(self.slot.init(params, round_index))
    self.begun = None


def role(slot: MinerSlot, start: apply.Position) -> MinerRole:
  """Returns the role of a miner that begins at a place."""
  state = slot.init(start.shared.params, start.round)
  return MinerRole(slot, Future.done(state))


Miner: TypeAlias = node_lib.Node[MinerRole]
Batches = Iterable[np.ndarray]


class MinerPolicy(NamedTuple):
  """The actions of a miner in the order of a round; plain functions.

  Attributes:
    batches: the tokens of its inner steps.
    train: starts training from the given parameters. None instead of work
      means that it sends nothing.
    seal: makes the signed payload of its work.
    begin: starts a round before the last one is applied (`optim.overlap`).
    commit: puts the digest of its payload on the chain.
    upload: puts the payload into its bucket.
  """

  batches: Callable[[Miner, Task], Batches]
  train: Callable[
    [Miner, Task, ct.Params, Batches], Future[TrainedRound | None]
  ]
  seal: Callable[[Miner, Task, TrainedRound], Contribution | None]
  begin: Callable[[Miner, Command, int], None]
  commit: Callable[[Miner, Command, int], None]
  upload: Callable[[Miner, Command, int], None]


def handlers(policy: MinerPolicy, overlap: bool = False) -> node_lib.Handlers:
  """Returns the handlers of a miner that acts by a policy.

  Args:
    policy: its actions.
    overlap: True if rounds overlap, see `optim.overlap`.
  """

  def train(node: Miner, command: Command, head: int) -> None:
    del head
    made = node.role.contribution.result()
    if made is None or made.round < command.round:
      due = task(node, command.round)
      batches = policy.batches(node, due)
      work = policy.train(node, due, node.shared.params, batches)
      node.role.contribution = work.then(
        lambda work: None if work is None else policy.seal(node, due, work)
      )

  def catch_up(node: Miner, command: Command, head: int) -> None:
    # Its state outlives an absence: the error feedback is still owed.
    follow.catch_up(node, command, head)
    node.role.contribution = Future.done(None)

  found = {
    **follow.HANDLERS,
    Phase.TRAIN: train,
    Phase.COMMIT: policy.commit,
    Phase.UPLOAD: policy.upload,
    Phase.CATCH_UP: catch_up,
  }
  return found | ({Phase.BEGIN: policy.begin} if overlap else {})


def task(node: Miner, round_index: int) -> Task:
  """Returns the task of a round that starts from the node's parameters."""
  block = node.schedule.assignment_block(round_index)
  uid = membership_lib.read(node.chain, block, node.schedule).uid(
    node.chain.hotkey
  )
  seed = node.chain.block_hash(block)
  return Task(uid, round_index, seed, node.root)


def due(node: Miner, round_index: int) -> Contribution | None:
  """Returns what there is to send in a round, if anything."""
  made = node.role.contribution.result()
  return made if made is not None and made.round == round_index else None


def read_batches(node: Miner, task: Task) -> Batches:
  """Yields the assigned batches until the put window opens or the node stops.

  A chain that does not answer leaves time for another step.
  """
  return node.role.slot.trainer.batches(task, deadline(node, task.round))


def deadline(node: Miner, round_index: int) -> Callable[[], bool]:
  """Returns a function that tells if no further step of a round is begun."""

  def is_late() -> bool:
    if node.context.stopping():
      return True
    try:
      return node.chain.head() >= node.schedule.put_opens(round_index)
    except chain_lib.ChainError:
      return False

  return is_late


def train(
  node: Miner, task: Task, params: ct.Params, batches: Batches
) -> Future[TrainedRound | None]:
  """Starts the inner steps of a round; advances the miner's state.

  A miner whose round is lost sits it out, and starts again from the shared
  parameters with a new state.
  """
  role = node.role
  state, begun = role.miner_state.result(), role.begun
  trained = role.slot.train(params, state, task, batches, begun)
  role.begun = None

  def outcome() -> tuple[TrainedRound | None, MinerState]:
    try:
      work, after = trained.result()
    except local_lib.DivergedError as e:
      _note(node, task, node_lib.LOST_ROUND, f'{e}; it sits out this round')
      return None, role.slot.init(node.shared.params, task.round + 1)
    role.trained = task.round, work.losses, work.norms
    if work.skipped:
      _note(node, task, node_lib.SKIPPED, f'{work.skipped} were not finite')
    return work, after

  done = Future(outcome)
  role.miner_state = done.then(lambda result: result[1])
  return done.then(lambda result: result[0])


def _note(node: Miner, task: Task, what: str, text: str) -> None:
  node.context.observe(node_lib.Event(node.head, task.round, what, text))


def seal(node: Miner, task: Task, work: TrainedRound) -> Contribution:
  """Encodes and signs the work of a task."""
  return node.role.slot.trainer.seal(work, task, node.chain.sign)


def begin(node: Miner, command: Command, head: int) -> None:
  """Starts the first steps of a round and returns while they are under way.

  The devices work on them while this program exchanges the last round.
  """
  del head
  role, made = node.role, node.role.contribution.result()
  if made is None or made.round < command.round:
    due = task(node, command.round)
    role.begun, state = role.slot.trainer.begin(
      role.miner_state.result(), due, read_batches(node, due)
    )
    role.miner_state = Future.done(state)


def commit(node: Miner, command: Command, head: int) -> None:
  """Puts the digest of the payload that is due on the chain."""
  if (made := due(node, command.round)) is not None:
    digest = run_storage_lib.digest(made.payload)
    follow.commit(node, command.round, digest, head)


def upload(node: Miner, command: Command, head: int) -> None:
  """Uploads the payload once its commitment is final.

  A copier of the bytes must then commit to a later block.

  Raises:
    RetryLaterError: the commitment is not final yet.
  """
  if (made := due(node, command.round)) is None:
    return
  digest = run_storage_lib.digest(made.payload)
  membership = membership_lib.read(
    node.chain, node.schedule.finalized(head), node.schedule
  )
  mine = membership.commitments.get(membership.uid(node.chain.hotkey))
  if mine is None or mine.digest != digest:
    raise node_lib.RetryLaterError
  key = node.objects.key('payloads', command.round, digest)
  node.objects.put_once(key, made.payload)


HONEST = MinerPolicy(read_batches, train, seal, begin, commit, upload)


def in_virtual_time(policy: MinerPolicy) -> MinerPolicy:
  """Trains whole rounds, all steps together: virtual time stands still."""
  return policy._replace(
    batches=lambda node, task: node.role.slot.trainer.batches(task),
    begin=lambda node, command, head: None,
  )
