"""A node: a loop over the handlers of the phases of a round.

A node obeys the state machine of `round.py` and knows the others only through
a chain and a store. A failure of either is reported to `Context.observe` and
retried at the next block; only errors that the operator must mend are raised.

A role is data: its handlers, one function per phase, and what it remembers.
`follow.HANDLERS` are those of a node that only follows the run; a miner
(miner.py) and a validator (validator.py) add their own.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from covenant import config as config_lib
from covenant import errors
from covenant import typing as ct
from covenant.chain import interface as chain_lib
from covenant.node import beside as beside_lib
from covenant.optim import weight as weight_lib
from covenant.protocol import amendments as amendments_lib
from covenant.protocol import apply
from covenant.protocol import catchup
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import amendment as amendment_lib
from covenant.wire import payload as payload_lib

Phase = round_lib.Phase


class RetryLaterError(errors.CovenantError):
  """A phase cannot be done at this block; perhaps at the next one."""


# The event of weights that are in force, or of the reason why they are not.
WEIGHTS = 'weights in force'
# Events of training that is not finite, and of a loss far above the last ones.
LOST_ROUND = 'lost round'
SKIPPED = 'skipped steps'
SPIKE = 'loss spike'
# The event of an amendment that this release does not know.
RELEASE = 'release'
# The event of a model that a validator wants to be rolled back.
DIVERGED = 'diverged'
NOTES = (WEIGHTS, LOST_ROUND, SKIPPED, SPIKE, RELEASE, DIVERGED)


class Event(NamedTuple):
  """One attempt of a node at one phase, or what it found about an earlier one.

  The latter are named above.
  """

  block: int
  round: int
  what: str  # the value of a `round.Phase`, or one of the names above
  error: str = ''  # empty on success
  seconds: float = 0.0  # of wall-clock time


Observe = Callable[[Event], None]
# (node, command, head) -> a `round.Decision` for DECIDE, else of no meaning.
Handler = Callable[[Any, round_lib.Command, int], Any]
Handlers = Mapping[Phase, Handler]


@dataclasses.dataclass(frozen=True)
class Context:
  """The surroundings of a node.

  Attributes:
    config: of the run.
    chain: as seen by this node's hotkey.
    objects: with this node's own bucket.
    shared_model: compiled once for all nodes of a process.
    applied: the rounds that the nodes of a process applied last, by root and
      digest; nodes at the same root share the result.
    observe: called with each event of the node.
    virtual: True if time is virtual: waiting for others takes none of it.
    sole: True if no other node holds this one's parameters, so that a large
      model can be updated in place.
    stopping: returns True if the node is asked to stop, so that training ends
      with the inner step under way.
    publisher: publishes checkpoints beside the rounds, in turn with the other
      validators. None: each validator does so between two rounds.
    publish_in_ranks: starts to publish the state of a validator of several
      processes, in its turn; None with a publisher, or for the rule above.
    retool: called when a node's config changes by an amendment, to give its
      role the programs and data of the new one.
    adopted: called with the record of each amendment that a node learns of
      (`amendments.record`).
  """

  config: config_lib.Config
  chain: chain_lib.Chain
  objects: run_storage_lib.RunStorage
  shared_model: shared_state_lib.SharedModel
  applied: dict[tuple[bytes, bytes], apply.AppliedRound] = dataclasses.field(
    default_factory=dict
  )
  observe: Observe = lambda event: None
  virtual: bool = False
  sole: bool = False
  stopping: Callable[[], bool] = lambda: False
  publisher: beside_lib.Beside | None = None
  publish_in_ranks: Callable[[Any], None] | None = None
  retool: Callable[['Node'], None] = lambda node: None
  adopted: Callable[[dict[str, ct.Json]], None] = lambda record: None


class Role(Protocol):
  """The state of a role beside the state that all nodes share."""

  def is_savable(self, state: round_lib.RoundState) -> bool:
    """True if a restart from here loses nothing."""
    ...

  def save(
    self, state: round_lib.RoundState
  ) -> tuple[dict[str, ct.PyTree], ct.Json]:
    """Returns a pytree and JSON fields for a checkpoint."""
    ...

  def load(
    self, tree: dict[str, ct.PyTree], text: ct.Json, state: round_lib.RoundState
  ) -> round_lib.RoundState:
    """Restores both; returns where the node stands by them."""
    ...

  def restart(self, params: ct.Params, round_index: int) -> None:
    """Begins anew in a round, from the parameters of a rollback."""
    ...


R = TypeVar('R', bound=Role)
T = TypeVar('T')
U = TypeVar('U')


class Node(Generic[R]):
  """A member of a run.

  Args:
    context: its surroundings.
    place: the start of the run, or where this node stopped.
    role: what its role remembers.
    handlers: what it does in each phase; it takes part in no other phase.
  """

  def __init__(
    self, context: Context, place: apply.Position, role: R, handlers: Handlers
  ):
    self.context = context
    self.config = context.config
    self.chain = context.chain
    self.objects = context.objects
    self.shared_model = context.shared_model
    self.role = role
    self.handlers = handlers
    self.schedule = amendments_lib.schedule(self.config, ())
    self.state = round_lib.RoundState(place.round)
    self.head = 0  # the block of the last `poll`
    self.shared = place.shared
    self.root = place.root
    self.amendments: tuple[amendment_lib.Amendment, ...] = ()
    if place.amendments:
      self.enter(place)
    # States that led to a mismatch, which are not tried again.
    self.refused: set[catchup.Refused] = set()
    # Of the last round:
    self.delta_norm = 0.0  # L2
    self.messages: Mapping[int, ct.Message] = {}  # by uid
    self.weights: Mapping[int, weight_lib.Weight] = {}  # by uid
    # Of this round, by digest:
    self.payloads: dict[bytes, bytes] = {}
    self.decoded: dict[bytes, payload_lib.Decoded] = {}
    self.manifests: dict[bytes, bytes] = {}

  @property
  def phases(self) -> frozenset[Phase]:
    """The phases it takes part in."""
    return frozenset(self.handlers)

  @property
  def place(self) -> apply.Position:
    return apply.Position(
      self.state.round, self.root, self.shared, self.amendments
    )

  def enter(self, place: apply.Position) -> None:
    """Goes on from a position, by the rules of its round.

    A failure leaves the node where it was, so that it can be tried again.

    Raises:
      ReleaseNeededError: this release does not know them.
      OSError, StoreError: the tools for them cannot be made now.
    """
    genesis, known = self.context.config, self.amendments
    for i, one in enumerate(place.amendments):
      if one not in known:
        before = place.amendments[:i]
        record = amendments_lib.record(genesis, before, one, place.round)
        self.context.adopted(record)
    config = amendments_lib.config_at(genesis, place.amendments, place.round)
    if config != self.config:
      old = self.config, self.shared_model
      self.config = config
      self.shared_model = self.context.shared_model.amended(config)
      try:
        self.context.retool(self)
      except BaseException:
        self.config, self.shared_model = old
        raise
    if place.amendments != known:
      self.schedule = amendments_lib.schedule(genesis, place.amendments)
    self.shared, self.root = place.shared, place.root
    self.amendments = place.amendments

  def poll(self, head: int) -> int:
    """Does at most one thing; returns the block at which to call it again.

    That is `head` itself while there may be more to do.
    """
    self.head = head
    command = round_lib.next_command(
      self.schedule, self.phases, self.state, head
    )
    if command is None:
      return round_lib.next_wakeup(self.schedule, self.state, head)
    error, began = '', time.perf_counter()
    try:
      outcome = self.handlers[command.phase](self, command, head)
      if command.phase is not Phase.CATCH_UP:
        self.state = round_lib.transition(self.state, command, outcome)
    except RetryLaterError:
      return head + 1
    except apply.OutOfSyncError as e:
      # That others could not be followed says nothing about the own state.
      if command.phase is not Phase.CATCH_UP:
        self.state = self.state._replace(out_of_sync=True)
      error = f'{type(e).__name__}: {e}'
    except (chain_lib.ChainError, store_lib.StoreError, OSError) as e:
      error = f'{type(e).__name__}: {e}'  # OSError: this node's disk is full
    seconds = round(time.perf_counter() - began, 6)
    event = Event(head, command.round, command.phase.value, error, seconds)
    self.context.observe(event)
    return head + 1 if error else head

  @property
  def savable(self) -> bool:
    """True if a restart from here loses nothing."""
    return self.role.is_savable(self.state)

  def save(self) -> dict[str, ct.PyTree]:
    """Returns all that this node knows and cannot get from the others."""
    tree, text = self.role.save(self.state)
    text |= {
      'round': self.state.round,
      'root': self.root.hex(),
    }
    if self.amendments:
      text['amendments'] = amendment_lib.list_to_json(self.amendments)
    return {'shared': self.shared, 'text': json.dumps(text), **tree}

  def load(self, saved: dict[str, ct.PyTree]) -> None:
    """Continues from what `save` returned."""
    text = json.loads(saved['text'])
    place = apply.Position(
      text['round'],
      bytes.fromhex(text['root']),
      saved['shared'],
      amendment_lib.list_from_json(text.get('amendments', [])),
    )
    self.enter(place)
    state = round_lib.RoundState(place.round)
    self.state = self.role.load(saved, text, state)

  def fingerprint(self) -> str:
    """Returns the digest of its state."""
    return apply.fingerprint(self.shared_model, self.place)


class Future(Generic[T]):
  """A value that is waited for when it is asked for, and then kept.

  Unlike `concurrent.futures.Future` it runs in the thread that asks, which lets
  the processes of one emulation exchange results in one order.

  Args:
    wait: returns the value, or raises; called once.

  >>> Future(lambda: 2).then(lambda x: x + 1).result()
  3
  """

  def __init__(self, wait: Callable[[], T]):
    self._wait: Callable[[], T] | None = wait
    self._value: Any = None
    self._error: BaseException | None = None

  @classmethod
  def done(cls, value: T) -> 'Future[T]':
    """Returns a future that has its value."""
    future = cls(lambda: value)
    future.result()
    return future

  def result(self) -> T:
    """Returns the value once it is there; raises what computing it raised."""
    if self._wait is not None:
      wait, self._wait = self._wait, None
      try:
        self._value = wait()
      except BaseException as e:
        self._error = e
    if self._error is not None:
      raise self._error
    return self._value

  @classmethod
  def run(cls, compute: Callable[[], T]) -> 'Future[T]':
    """Returns the future of what is computed now; it keeps what that raises."""
    future = cls(compute)
    with contextlib.suppress(Exception):
      future.result()
    return future

  def then(self, change: Callable[[T], U]) -> 'Future[U]':
    """Returns the future of `change` of this value."""
    return Future(lambda: change(self.result()))
