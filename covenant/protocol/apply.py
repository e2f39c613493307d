"""From what was agreed upon to the next shared state.

Every node calls these, whether it follows the rounds or replays old ones:
that is why all of them stay identical.
"""

import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from covenant import errors
from covenant.chain import interface as chain_lib
from covenant.optim import weight as weight_lib
from covenant.protocol import membership as membership_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import manifest as manifest_lib
from covenant.wire import payload as payload_lib


class OutOfSyncError(errors.CovenantError):
  """What a node holds is not what the others hold."""


class Link(NamedTuple):
  """A round of a history: it led on to `manifest_lib.extend` of this."""

  root: bytes  # before it
  digest: bytes | None  # of the manifest that was applied, if any


class Place(NamedTuple):
  """A state of the run, and the history that led to it."""

  round: int  # that has not been applied yet
  root: bytes
  shared: shared_state_lib.SharedState
  # The last rounds, latest first: `kept_links`, or all if there were fewer.
  past: tuple[Link, ...] = ()

  def after(
    self, digest: bytes | None, shared: shared_state_lib.SharedState, links: int
  ) -> 'Place':
    """The next place, by the manifest of a digest; keeps so many links."""
    root = manifest_lib.extend(self.root, self.round, digest)
    past = (Link(self.root, digest), *self.past)[:links]
    return Place(self.round + 1, root, shared, past)


def links_to_json(past: Sequence[Link]) -> list[list[str]]:
  return [[root.hex(), (digest or b'').hex()] for root, digest in past]


def links_from_json(raw: Sequence[Sequence[str]]) -> tuple[Link, ...]:
  """Raises ValueError or TypeError where it is none."""
  return tuple(
    Link(bytes.fromhex(root), bytes.fromhex(digest) or None)
    for root, digest in raw
  )


def older_roots(
  shared_model: shared_state_lib.SharedModel, place: Place
) -> list[bytes]:
  """Of rounds before, latest first, that a payload may be trained from."""
  return [link.root[:16] for link in place.past[: shared_model.most_stale]]


def kept_links(shared_model: shared_state_lib.SharedModel) -> int:
  """How many rounds back a node must know the root.

  Payloads of this round and, to compare them with, of the last one may be
  trained from parameters that are so old.
  """
  return shared_model.most_stale + 1 if shared_model.most_stale else 0


class Applied(NamedTuple):
  """What a round did to the shared state."""

  before: shared_state_lib.SharedState
  shared: shared_state_lib.SharedState
  delta_norm: float  # L2 norm of the aggregated delta
  messages: Mapping[int, Any]  # by uid, of everybody who counted
  weights: Mapping[int, weight_lib.Weight]  # theirs


def compare(
  manifest: manifest_lib.Manifest, root: bytes, fingerprint: str
) -> None:
  """Raises OutOfSyncError where a manifest speaks of another state than the given."""
  for name, ours, theirs in (
    ('history root', root.hex(), manifest.root.hex()),
    ('fingerprint', fingerprint, manifest.fingerprint),
  ):
    if ours != theirs:
      raise OutOfSyncError(
        f'round {manifest.round}: the {name} here is {ours}, in the manifest '
        f'that holds {theirs}'
      )


def mirrors(
  objects: run_storage_lib.Objects, membership: membership_lib.Membership
) -> list[store_lib.Bucket]:
  """The buckets of the validators, the leader's first."""
  locations = [membership.location(peer.uid) for peer in membership.validators]
  return objects.buckets_at(filter(None, locations))


def fetch_manifest(
  objects: run_storage_lib.Objects,
  membership: membership_lib.Membership,
  round_index: int,
  digest: bytes,
) -> bytes:
  """The bytes of a manifest, from any validator; raises StoreError."""
  got = objects.fetch(
    'proposals',
    round_index,
    [run_storage_lib.Wanted(digest, b'')],
    mirrors(objects, membership),
    manifest_lib.MAX_BYTES,
  )[digest]
  if isinstance(got, store_lib.StoreError):
    raise got
  return got


def fetch_payloads(
  objects: run_storage_lib.Objects,
  membership: membership_lib.Membership,
  round_index: int,
  entries: Sequence[manifest_lib.Entry],
  limit: int,
  have: Mapping[bytes, bytes],
) -> dict[bytes, bytes]:
  """The payloads of a manifest's entries, by digest.

  Args:
    objects: of the node that asks.
    membership: where they may be.
    round_index: of the manifest.
    entries: which.
    limit: bytes a payload.
    have: what need not be fetched, by digest.

  Raises:
    StoreError: one of them is not to be had, for now; names its uid.
  """
  missing = [
    run_storage_lib.Wanted(entry.digest, membership.location(entry.uid))
    for entry in entries
    if entry.digest not in have
  ]
  got = {}
  if missing:
    sources = mirrors(objects, membership)
    got = objects.fetch('payloads', round_index, missing, sources, limit)
  payloads = {}
  for entry in entries:
    data = have.get(entry.digest) or got[entry.digest]
    if isinstance(data, store_lib.StoreError):
      raise type(data)(f'payload of uid {entry.uid}: {data}')
    payloads[entry.digest] = data
  return payloads


def decode(
  shared_model: shared_state_lib.SharedModel,
  chain: chain_lib.Chain,
  entry: manifest_lib.Entry,
  place: Place,
  data: bytes,
) -> payload_lib.Payload:
  """A payload of a place's round, of who committed it; raises Refused."""
  expected = payload_lib.Header(
    shared_model.run, place.round, entry.uid, place.root[:16], b'', 0
  )
  older = older_roots(shared_model, place)
  return shared_model.decode(
    data,
    expected,
    lambda text, sig: chain.verify(entry.hotkey, text, sig),
    older,
  )


def recall(
  shared_model: shared_state_lib.SharedModel,
  chain: chain_lib.Chain,
  objects: run_storage_lib.Objects,
  membership: membership_lib.Membership,
  place: Place,
) -> dict[int, Any]:
  """The messages that led to a place, by uid, for who has forgotten them.

  None where nobody counted, or no validator has them any more.
  """
  r, limit = place.round - 1, shared_model.spec.payload_bytes
  for bucket in [objects.bucket, *mirrors(objects, membership)]:
    try:
      data = bucket.get(objects.key('history', r), manifest_lib.MAX_BYTES)
      if not data:
        return {}
      manifest = manifest_lib.decode(data, chain.verify)
      entries = manifest.entries
      payloads = fetch_payloads(objects, membership, r, entries, limit, {})
    except (store_lib.StoreError, manifest_lib.ManifestError):
      continue
    if manifest_lib.extend(manifest.root, r, run_storage_lib.digest(data)) != (
      place.root
    ):
      continue  # of another history
    past = place.past[1:]
    before = place._replace(round=r, root=manifest.root, past=past)
    found = _read(shared_model, chain, before, entries, payloads)
    return {uid: content.message for uid, content in found.items()}
  return {}


def outer_step(
  shared_model: shared_state_lib.SharedModel,
  chain: chain_lib.Chain,
  place: Place,
  entries: Sequence[manifest_lib.Entry],
  payloads: Mapping[bytes, bytes],
  decoded: Mapping[bytes, payload_lib.Payload] | None = None,
  consume: bool = False,
) -> Applied:
  """The state after a round.

  Args:
    shared_model: of the run.
    chain: knows whose signature is whose.
    place: the state before.
    entries: of the manifest.
    payloads: theirs, by digest.
    decoded: payloads that were decoded at this place before, by digest.
    consume: whether nobody else holds the state before, see
      `SharedModel.apply_round`.

  A payload that is refused counts for nothing, on every node alike: all have
  the same bytes and the same rules. With none left, the state does not move.
  """
  found = _read(shared_model, chain, place, entries, payloads, decoded or {})
  messages = {uid: content.message for uid, content in found.items()}
  weights = {uid: shared_model.weigh(c.header) for uid, c in found.items()}
  shared, delta_norm = shared_model.apply_round(
    place.shared, messages, consume, weights
  )
  before = shared if consume else place.shared
  return Applied(before, shared, delta_norm, messages, weights)


def _read(
  shared_model: shared_state_lib.SharedModel,
  chain: chain_lib.Chain,
  place: Place,
  entries: Sequence[manifest_lib.Entry],
  payloads: Mapping[bytes, bytes],
  decoded: Mapping[bytes, payload_lib.Payload] = types.MappingProxyType({}),
) -> dict[int, payload_lib.Payload]:
  """What the payloads of a round hold, by uid; without those refused."""
  found = {}
  for entry in entries:
    if entry.digest in decoded:
      found[entry.uid] = decoded[entry.digest]
      continue
    try:
      content = decode(
        shared_model, chain, entry, place, payloads[entry.digest]
      )
    except payload_lib.PayloadError:
      continue
    found[entry.uid] = content
  return found
