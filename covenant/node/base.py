"""What every node does: follow the rounds, apply what was agreed, catch up.

A node obeys the state machine of `round.py`. It knows the others only through
a chain and a store. Whatever fails there is told to `observe` and tried again
at the next block; nothing is raised but what its operator must mend.
"""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from covenant import config as config_lib
from covenant import errors
from covenant.chain import interface as chain_lib
from covenant.optim import weight as weight_lib
from covenant.protocol import apply
from covenant.protocol import catchup
from covenant.protocol import membership as membership_lib
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import commitment as commitment_lib
from covenant.wire import manifest as manifest_lib
from covenant.wire import payload as payload_lib

Phase = round_lib.Phase


class RetryLaterError(errors.CovenantError):
  """Not to be done at this block; perhaps at the next one."""


class Event(NamedTuple):
  """Something that a node did, or could not do."""

  block: int
  round: int
  what: str  # a `round.Phase`
  error: str = ''  # empty: it was done
  seconds: float = 0.0  # of wall-clock time that it took


Observe = Callable[[Event], None]


class Node:
  """A member of a run. Subclasses add what their role does.

  Args:
    config: the run's.
    chain: as seen by this node's hotkey.
    objects: with this node's own bucket.
    shared_model: compiled once for all nodes of a process.
    place: where the run begins, or where this node was when it stopped.
    applied: what the nodes of one process have applied last, by root and
      digest: those who stand at the same root share the result.
    observe: told of everything that the node does.
    sole: whether nobody else holds its parameters, before and after a round:
      a large model is then moved in place.
  """

  can: frozenset[Phase] = frozenset()

  def __init__(
    self,
    config: config_lib.Config,
    chain: chain_lib.Chain,
    objects: run_storage_lib.RunStorage,
    shared_model: shared_state_lib.SharedModel,
    place: apply.Position,
    applied: dict[Any, apply.AppliedRound] | None = None,
    observe: Observe = lambda event: None,
    sole: bool = False,
  ):
    self.config = config
    self.chain = chain
    self.objects = objects
    self.shared_model = shared_model
    self.plan = round_lib.Schedule(config.phases, bool(config.optim.overlap))
    self.state = round_lib.RoundState(place.round)
    self.shared = place.shared
    self.root = place.root
    self.past = place.past
    self.delta_norm = 0.0  # of the last round, L2
    self.messages: Mapping[int, Any] = {}  # of the last round
    self.weights: Mapping[int, weight_lib.Weight] = {}  # theirs
    self._applied = {} if applied is None else applied
    self._observe = observe
    self._sole = sole
    self._payloads: dict[bytes, bytes] = {}  # of this round, by digest
    # Of these, those that can be read.
    self._decoded: dict[bytes, payload_lib.Payload] = {}
    self._obey: dict[Phase, Callable[[round_lib.Command, int], Any]] = {
      Phase.DECIDE: self._decide,
      Phase.APPLY: self._apply,
      Phase.KEEP: self._keep,
      Phase.CATCH_UP: self._catch_up,
    }

  @property
  def place(self) -> apply.Position:
    return apply.Position(self.state.round, self.root, self.shared, self.past)

  def poll(self, head: int) -> int:
    """Does one thing at most; returns the block at which to ask again.

    That is `head` itself while there may be more to do.
    """
    command = round_lib.next_command(self.plan, self.can, self.state, head)
    if command is None:
      return round_lib.next_wakeup(self.plan, self.state, head)
    error, began = '', time.perf_counter()
    try:
      outcome = self._obey[command.phase](command, head)
      if command.phase is not Phase.CATCH_UP:
        self.state = round_lib.transition(self.state, command, outcome)
    except RetryLaterError:
      return head + 1
    except apply.OutOfSyncError as e:
      self.state = self.state._replace(out_of_sync=True)
      error = f'Lost: {e}'
    except (chain_lib.ChainError, store_lib.StoreError, OSError) as e:
      error = f'{type(e).__name__}: {e}'  # OSError: the own disk is full
    seconds = round(time.perf_counter() - began, 6)
    self._observe(
      Event(head, command.round, command.phase.value, error, seconds)
    )
    return head + 1 if error else head

  def commit(self, round_index: int, digest: bytes, head: int) -> None:
    """Puts a digest on the chain; once a round, for it cannot be taken back.

    Raises:
      ChainError: it may not be there.
    """
    membership = membership_lib.read(self.chain, head)
    mine = membership.commitments.get(membership.uid(self.chain.hotkey))
    if mine is None or mine.round != round_index:
      location = self.objects.location
      new = commitment_lib.Commitment(location, round_index, digest)
      self.chain.commit(commitment_lib.encode(new))
    elif mine.digest != digest:
      raise chain_lib.ChainRejectedError(
        f'round {round_index}: this hotkey has committed to other bytes '
        'already; is it in use twice?'
      )

  def _decide(
    self, command: round_lib.Command, head: int
  ) -> round_lib.Decision | None:
    """Which manifest holds, from the state of the chain at one block."""
    r = command.round
    look = (
      self.plan.last_decision_block
      if command.last
      else self.plan.decision_block
    )
    membership = membership_lib.read(self.chain, look(r))
    stakes = {peer.uid: peer.stake for peer in membership.validators}
    return round_lib.decide(r, membership.commitments, stakes, command.last)

  def _apply(self, command: round_lib.Command, head: int) -> None:
    """Fetches what counts and takes the outer step.

    Raises:
      apply.OutOfSyncError: the others have another history or other parameters.
      StoreError: nobody has what the manifest lists, for now.
    """
    decision, r = self.state.decision, command.round
    assert decision is not None
    digest, applied = decision.digest, None
    if digest is not None:
      try:
        applied = self._counted(r, digest, head)
      except manifest_lib.ManifestError:
        digest = None  # the same bytes for everybody: nobody counts
      except apply.OutOfSyncError:
        # A minority that voted alone does not say what the others hold.
        if decision.majority:
          raise
        digest = None
    if applied is None:
      applied = apply.AppliedRound(self.shared, self.shared, 0.0, {}, {})
    links = apply.kept_links(self.shared_model)
    after = self.place.advance(digest, applied.shared, links)
    self._moved(applied, digest)
    self.root, self.past = after.root, after.past

  def _counted(self, r: int, digest: bytes, head: int) -> apply.AppliedRound:
    """What the manifest of a digest does, if nobody here knows it yet."""
    key = (self.root, digest)
    known = self._applied.get(key)
    if known is None or known.before is not self.shared:
      known = self._outer_step(r, digest, head)
      self._applied.clear()
      self._applied[key] = known
    return known

  def _outer_step(self, r: int, digest: bytes, head: int) -> apply.AppliedRound:
    membership = membership_lib.read(self.chain, self.plan.finalized(head))
    data = self._manifest(membership, r, digest)
    manifest = manifest_lib.decode(data, self.chain.verify)
    if (manifest.run, manifest.round) != (self.shared_model.run, r):
      raise manifest_lib.ManifestError(
        f'manifest: not of round {r} of this run'
      )
    apply.check_matches(manifest, self.root, self.fingerprint())
    self._payloads = apply.fetch_payloads(
      self.objects,
      membership,
      r,
      manifest.entries,
      self.shared_model.spec.payload_bytes,
      self._payloads,
    )
    return apply.outer_step(
      self.shared_model,
      self.chain,
      self.place,
      manifest.entries,
      self._payloads,
      self._decoded,
      consume=self._sole,
    )

  def _moved(self, applied: apply.AppliedRound, digest: bytes | None) -> None:
    """Takes over what a round led to, by the manifest of a digest if any."""
    self.shared = applied.shared
    self.delta_norm = applied.delta_norm
    self.messages, self.weights = applied.messages, applied.weights
    self._payloads, self._decoded = {}, {}

  def _manifest(
    self, membership: membership_lib.Membership, round_index: int, digest: bytes
  ) -> bytes:
    return apply.fetch_manifest(self.objects, membership, round_index, digest)

  def _keep(self, command: round_lib.Command, head: int) -> None:
    """Deletes payloads that validators mirror by now, or that never counted."""
    self.objects.delete_before('payloads', before=self._oldest_kept())

  def _oldest_kept(self) -> int:
    """The first round whose objects a joiner may still need."""
    keep = self.config.checkpoint
    newest = self.state.round // keep.publish
    return max(newest - keep.keep, 0) * keep.publish

  def _catch_up(self, command: round_lib.Command, head: int) -> None:
    """Replays what the others applied, from a checkpoint if that is nearer."""
    place = None if self.state.out_of_sync else self.place
    attempt = catchup.CatchUp(
      self.chain,
      self.objects,
      self.shared_model,
      self.plan,
      head,
      self.config.rounds,
    )
    self._resume(attempt.run(place), attempt.replayed)

  def _resume(
    self, place: apply.Position, replayed: Mapping[int, bytes]
  ) -> None:
    """Goes on from where catching up led, over the manifests `replayed`."""
    self.shared, self.root, self.past = place.shared, place.root, place.past
    self.state = round_lib.RoundState(place.round)
    self.messages, self.weights = {}, {}
    self._payloads, self._decoded = {}, {}

  @property
  def savable(self) -> bool:
    """Whether this is a point from which a restart loses nothing."""
    raise NotImplementedError

  def save(self) -> dict[str, Any]:
    """All that this node knows and cannot get from the others."""
    return {'shared': self.shared, 'text': json.dumps(self._text())}

  def load(self, saved: dict[str, Any]) -> dict[str, Any]:
    """Goes on from what `save` returned; also returns its text, parsed."""
    text = json.loads(saved['text'])
    self.shared, self.root = saved['shared'], bytes.fromhex(text['root'])
    self.past = apply.links_from_json(text['past'])
    self.state = round_lib.RoundState(text['round'])
    return text

  def _text(self) -> dict[str, Any]:
    return {
      'round': self.state.round,
      'root': self.root.hex(),
      'past': apply.links_to_json(self.past),
    }

  def fingerprint(self) -> str:
    return self.shared_model.fingerprint(self.shared)
