"""The phases of every node: decide, apply, tidy up, catch up; and to commit."""

from collections.abc import Mapping

from covenant.chain import interface as chain_lib
from covenant.node import base as node_lib
from covenant.protocol import apply
from covenant.protocol import manifest_check
from covenant.protocol import membership as membership_lib
from covenant.protocol import rejoin
from covenant.protocol import rollback
from covenant.protocol import round as round_lib
from covenant.store import interface as store_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import commitment as commitment_lib
from covenant.wire import manifest as manifest_lib

Command = round_lib.Command
Node = node_lib.Node
Phase = round_lib.Phase
_VIRTUAL_SECONDS = 60.0  # of real time, which decides nothing then


def commit(node: Node, round_index: int, digest: bytes, head: int) -> None:
  """Puts a digest on the chain, with the location and role of the node.

  A miner does so once per round. A validator may replace its vote for one of
  the manifests that it knows.

  Raises:
    ChainError: it may not be there.
  """
  membership = membership_lib.read(node.chain, head, node.schedule)
  mine = membership.commitments.get(membership.uid(node.chain.hotkey))
  known = None if mine is None or mine.round != round_index else mine.digest
  if known is None or (known != digest and known in node.manifests):
    location, role = node.objects.location, round_lib.role(node.phases)
    new = commitment_lib.Commitment(role, location, round_index, digest)
    node.chain.commit(commitment_lib.encode(new))
  elif known != digest:
    raise chain_lib.ChainRejectedError(
      f'round {round_index}: this hotkey has committed to other bytes '
      'already; is it in use twice?'
    )


def patience(node: Node, head: int, until: int) -> float:
  """Returns the seconds that a phase may wait for others at a block.

  It is half of the time to the block at which the phase must be over, so that
  as much is left for what comes after the waiting; at least half a block.
  """
  if node.context.virtual:
    return _VIRTUAL_SECONDS
  return max(until - head, 1) / 2 * node.chain.block_seconds


def decide(
  node: Node, command: Command, head: int
) -> round_lib.Decision | None:
  """Returns the manifest that holds, by the state of the chain at one block."""
  del head
  r, schedule = command.round, node.schedule
  look = (
    schedule.last_decision_block if command.last else schedule.decision_block
  )
  membership = membership_lib.read(node.chain, look(r), node.schedule)
  stakes = membership.stakes(r)
  return round_lib.decide(r, membership.commitments, stakes, command.last)


def apply_round(node: Node, command: Command, head: int) -> None:
  """Fetches the payloads that count and takes the outer step.

  Raises:
    OutOfSyncError: the others have another history or other parameters.
    StoreError: nobody has what the manifest lists, for now.
  """
  move(node, *next_state(node, command.round, head))


def next_state(
  node: Node, round_index: int, head: int
) -> tuple[apply.AppliedRound, bytes | None]:
  """Returns the state after a round and the digest of the manifest, if any.

  Raises:
    OutOfSyncError, StoreError: as `apply_round`.
  """
  decision = node.state.decision
  assert decision is not None
  digest = decision.digest if decision.majority else None
  applied = None
  if digest is not None:
    try:
      applied = _counted(node, round_index, digest, head)
    except manifest_lib.ManifestError:
      digest = None  # void for all nodes: nobody counts
  if applied is None:
    applied = apply.AppliedRound(node.shared, node.shared, 0.0, {}, {})
  return applied, digest


def move(node: Node, applied: apply.AppliedRound, digest: bytes | None) -> None:
  """Moves a node to the state after a round, by the manifest of a digest."""
  after = node.place.advance(digest, applied.shared, applied.adoption)
  if target := rollback.due(after):
    after = after._replace(shared=_restored(node, target))
  node.enter(after)
  if target:
    node.role.restart(after.shared.params, after.round)
  node.delta_norm = applied.delta_norm
  node.messages, node.weights = applied.messages, applied.weights
  node.payloads, node.decoded, node.manifests = {}, {}, {}


def _restored(
  node: Node, target: rollback.Target
) -> shared_state_lib.SharedState:
  """Returns the state of a rollback; the nodes of a process share it.

  Raises:
    OutOfSyncError: nobody has it now; the node catches up instead.
  """
  known, key = node.context.applied, (b'', bytes.fromhex(target.fingerprint))
  if key not in known:
    block = node.schedule.finalized(node.head)
    membership = membership_lib.read(node.chain, block, node.schedule)
    around = rollback.Surroundings(
      node.chain,
      node.objects,
      node.shared_model,
      rollback.sources(node.objects, membership),
    )
    try:
      shared = rollback.load(around, target)
    except store_lib.StoreError as e:
      raise apply.OutOfSyncError(str(e)) from e
    if node.context.sole:
      return shared
    known[key] = apply.AppliedRound(shared, shared, 0.0, {}, {})
  return known[key].shared


def fetch_manifest(
  node: Node,
  membership: membership_lib.Membership,
  round_index: int,
  digest: bytes,
) -> bytes:
  """Returns the bytes of a manifest, kept until the round is applied."""
  if digest not in node.manifests:
    node.manifests[digest] = apply.fetch_manifest(
      node.objects, membership, round_index, digest
    )
  return node.manifests[digest]


def _counted(
  node: Node, round_index: int, digest: bytes, head: int
) -> apply.AppliedRound:
  """Returns the result of a manifest; the nodes of a process share it."""
  known = node.context.applied
  key = (node.root, digest)
  found = known.get(key)
  if found is None or found.before is not node.shared:
    known.clear()
    if Phase.SCORE not in node.phases:
      # Before the next payloads come: a miner has memory for one round of them.
      node.messages = {}
    found = _outer_step(node, round_index, digest, head)
    known[key] = found
  return found


def _outer_step(
  node: Node, round_index: int, digest: bytes, head: int
) -> apply.AppliedRound:
  membership = membership_lib.read(
    node.chain, node.schedule.finalized(head), node.schedule
  )
  data = fetch_manifest(node, membership, round_index, digest)
  manifest = manifest_lib.decode(data, node.chain.verify)
  if (manifest.run, manifest.round) != (node.shared_model.run, round_index):
    raise manifest_lib.ManifestError(
      f'manifest: not of round {round_index} of this run'
    )
  closing = membership_lib.read(
    node.chain, node.schedule.put_closes(round_index), node.schedule
  )
  manifest_check.check_entries(
    manifest, closing, node.schedule, node.shared_model.most_entries
  )
  apply.check_matches(manifest, node.root, node.fingerprint())
  incoming = apply.Incoming(
    node.shared_model, node.chain, node.place, manifest.entries, node.decoded
  )
  node.payloads = apply.fetch_payloads(
    node.objects,
    membership,
    round_index,
    manifest.entries,
    node.shared_model.spec.payload_bytes,
    node.payloads,
    # Bytes that have come are kept, and the rest is asked for again.
    patience(node, head, node.schedule.put_opens(round_index + 1)),
    incoming.take,
  )
  applied = apply.outer_step(
    node.shared_model,
    node.chain,
    node.place,
    manifest.entries,
    node.payloads,
    consume=node.context.sole,
    incoming=incoming,
    # A validator scores from the parameters before the round.
    keep_params=Phase.SCORE in node.phases,
  )
  return applied._replace(adoption=manifest.adoption)


def forget_payloads(node: Node, command: Command, head: int) -> None:
  """Deletes own payloads that validators mirror by now, or never counted."""
  del command, head
  keep = node.config.checkpoint
  newest = node.state.round // keep.publish
  # Older rounds are in every checkpoint that a joiner may start from.
  oldest = max(newest - keep.keep, 0) * keep.publish
  node.objects.delete_before('payloads', before=oldest)


def catch_up(node: Node, command: Command, head: int) -> Mapping[int, bytes]:
  """Replays what the others applied, from a checkpoint if that is nearer.

  Returns:
    The manifests that were replayed, by round.
  """
  del command
  place, replayed = rejoin.follow(
    node.chain,
    node.objects,
    node.context.shared_model,
    head,
    node.refused,
    None if node.state.out_of_sync else node.place,
    node.amendments,
  )
  jump(node, place)
  return replayed


def jump(node: Node, place: apply.Position) -> None:
  """Goes on from a later position, without the rounds between."""
  first = node.state.round
  node.enter(place)
  if rollback.between(place, first):
    node.role.restart(place.shared.params, place.round)
  node.state = round_lib.RoundState(place.round)
  node.messages, node.weights = {}, {}
  node.payloads, node.decoded = {}, {}


HANDLERS: node_lib.Handlers = {
  Phase.DECIDE: decide,
  Phase.APPLY: apply_round,
  Phase.KEEP: forget_payloads,
  Phase.CATCH_UP: catch_up,
}
