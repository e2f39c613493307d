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

  Raises:
    RetryLaterError: there is none, and it is others' turn to make one.
  """
  collected, r = node.role.collected, command.round
  assert collected is not None
  now = membership_lib.read(node.chain, node.schedule.finalized(head))
  mine = now.commitments.get(now.uid(node.chain.hotkey))
  if mine is not None and mine.round == r:
    return  # before it was started again
  for rank, peer in enumerate(collected.membership.validators):
    if peer.hotkey == node.chain.hotkey:
      if head >= node.schedule.proposes(r, rank):
        data = propose(node, collected, r)
        stand_for(node, r, data, head)
        return
      continue
    choice = now.commitments.get(peer.uid)
    if choice is None or choice.round != r:
      continue
    data = _verified(node, collected, now, peer, choice.digest, r)
    if data is not None:
      stand_for(node, r, data, head)
      return
  raise node_lib.RetryLaterError


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
