"""A validator's vote: the manifest that it stands for on the chain."""

from collections.abc import Callable

from covenant.chain import interface as chain_lib
from covenant.node import base as node_lib
from covenant.node import collect
from covenant.node import follow
from covenant.node import validator_role as role_lib
from covenant.protocol import apply
from covenant.protocol import membership as membership_lib
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.wire import manifest as manifest_lib
from covenant.wire import payload as payload_lib

Collected = role_lib.Collected
Validator = role_lib.Validator


Propose = Callable[[Validator, Collected, int], bytes]
StandFor = Callable[[Validator, int, bytes, int], None]


def vote(
  propose: Propose,
  stand_for: StandFor,
  node: Validator,
  command: round_lib.Command,
  head: int,
) -> None:
  """Stands for the first manifest, by rank, that it can verify.

  A validator whose turn comes proposes its own. As soon as it sees a proposal
  of a lower rank that it can verify, it stands for that one instead, so that
  validators that proposed in one block agree in the next ones.

  Raises:
    RetryLaterError: the vote is missing, or may still change.
  """
  collected, r = node.role.collected, command.round
  assert collected is not None
  now = membership_lib.read(
    node.chain, node.schedule.finalized(head), node.schedule
  )
  mine = _vote_of(now, now.uid(node.chain.hotkey), r)
  if mine is not None and mine not in node.manifests:
    return  # before it was started again
  if mine is not None and _is_settled(node, now, mine, r, head):
    return
  found = _first_proposal(propose, node, now, mine, r, head)
  if found is None:
    raise node_lib.RetryLaterError
  rank, data = found
  if data is not None:
    stand_for(node, r, data, head)
  if rank > 0:
    raise node_lib.RetryLaterError


def _first_proposal(
  propose: Propose,
  node: Validator,
  now: membership_lib.Membership,
  mine: bytes | None,
  round_index: int,
  head: int,
) -> tuple[int, bytes | None] | None:
  """Returns the rank of the proposal to stand for, and its manifest.

  The manifest is None for the one that the node stands for already. None is
  returned if there is no proposal.
  """
  collected, r = node.role.collected, round_index
  assert collected is not None
  proposals = _proposals(node, now, r)
  for rank, peer in enumerate(_order(node, collected.membership)):
    if head < node.schedule.proposes(r, rank):
      break
    if peer.hotkey == node.chain.hotkey:
      return rank, propose(node, collected, r) if mine is None else None
    digest = _vote_of(proposals, peer.uid, r)
    if digest is None:
      continue
    # Another one of the same maker is not taken up: it could go on for ever.
    if mine and (digest == mine or _is_by(node, mine, peer)):
      return rank, None
    data = _verified(node, collected, now, peer, digest, r)
    if data is not None:
      return rank, data
  return None


def _vote_of(
  membership: membership_lib.Membership, uid: int, round_index: int
) -> bytes | None:
  """Returns the digest that a validator stands for in a round, if any."""
  voted = membership.votes.get(uid) == round_index
  return membership.commitments[uid].digest if voted else None


def _is_by(node: Validator, digest: bytes, peer: chain_lib.Peer) -> bool:
  """Returns whether a known manifest is the proposal of a peer."""
  try:
    data = node.manifests[digest]
    return manifest_lib.decode(data, node.chain.verify).hotkey == peer.hotkey
  except manifest_lib.ManifestError:
    return False


def _order(
  node: Validator, membership: membership_lib.Membership
) -> list[chain_lib.Peer]:
  """Returns the candidates; a node that is none yet is the last one."""
  order = membership.candidates
  if all(peer.hotkey != node.chain.hotkey for peer in order):
    order.append(membership.peers[membership.uid(node.chain.hotkey)])
  return order


def _is_settled(
  node: Validator,
  now: membership_lib.Membership,
  mine: bytes,
  round_index: int,
  head: int,
) -> bool:
  """Returns whether the own vote holds already, or is too late to change."""
  if head >= node.schedule.last_decision_block(round_index):
    return True
  stakes = now.stakes(round_index)
  held = round_lib.decide(round_index, now.commitments, stakes, last=False)
  return held is not None and held.digest == mine


def _proposals(
  node: Validator, now: membership_lib.Membership, round_index: int
) -> membership_lib.Membership:
  """Returns the state whose proposals are looked at, equal for all in the end.

  Else a proposal in the last blocks would divide those who see it from those
  who do not.
  """
  last = node.schedule.last_proposal_block(round_index)
  if now.block <= last:
    return now
  return membership_lib.read(node.chain, last, node.schedule)


def proposal(node: Validator, collected: Collected, round_index: int) -> bytes:
  """Returns the signed manifest that this validator would choose."""
  manifest = manifest_lib.Manifest(
    node.shared_model.run,
    round_index,
    node.root,
    node.fingerprint(),
    node.chain.hotkey,
    tuple(collected.entries[uid] for uid in collected.chosen),
  )
  return manifest_lib.encode(manifest, node.chain.sign)


def publish(node: Validator, round_index: int, data: bytes, head: int) -> None:
  """Publishes a manifest and commits its digest as this validator's vote."""
  digest = run_storage_lib.digest(data)
  node.manifests[digest] = data
  node.objects.put_once(
    node.objects.key('proposals', round_index, digest), data
  )
  follow.commit(node, round_index, digest, head)


def _verified(
  node: Validator,
  collected: Collected,
  now: membership_lib.Membership,
  peer: chain_lib.Peer,
  digest: bytes,
  round_index: int,
) -> bytes | None:
  """Returns a proposal of `peer`, or None where it cannot be vouched for.

  Its choice need not be this validator's; but every payload that it lists must
  be committed in time, available and valid.
  """
  try:
    data = apply.fetch_manifest(node.objects, now, round_index, digest)
    manifest = manifest_lib.decode(data, node.chain.verify)
    apply.check_matches(manifest, node.root, node.fingerprint())
    if (manifest.run, manifest.round) != (node.shared_model.run, round_index):
      return None
    if manifest.hotkey != peer.hotkey:
      return None  # its maker's own vote is looked at by itself
    for entry in manifest.entries:
      if collected.entries.get(entry.uid) != entry:
        return None
    node.payloads |= apply.fetch_payloads(
      node.objects,
      now,
      round_index,
      manifest.entries,
      node.shared_model.spec.payload_bytes,
      node.payloads,
    )
  except (
    store_lib.StoreError,
    manifest_lib.ManifestError,
    apply.OutOfSyncError,
  ):
    return None
  for entry in manifest.entries:
    if entry.digest in node.decoded:
      continue
    decoded = collect.decode(node, entry, node.payloads[entry.digest])
    if isinstance(decoded, payload_lib.PayloadError):
      return None
    node.decoded[entry.digest] = decoded
  return data
