"""The step from an agreed manifest to the next shared state.

Every node calls these functions, whether it follows the rounds or replays old
ones. That keeps all nodes identical.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from covenant import errors
from covenant import typing as ct
from covenant.chain import interface as chain_lib
from covenant.optim import weight as weight_lib
from covenant.protocol import membership as membership_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import amendment as amendment_lib
from covenant.wire import lazy
from covenant.wire import manifest as manifest_lib
from covenant.wire import payload as payload_lib

_SECONDS = 60.0  # for objects that nobody is waited for with
_UNPACKED_BYTES = 1 << 28  # payloads of a round whose messages are unpacked


class OutOfSyncError(errors.CovenantError):
  """The state of a node differs from the state of the others."""


class Position(NamedTuple):
  """A state of the run, and the history that led to it."""

  round: int  # the first round that has not been applied
  root: bytes  # history root
  shared: shared_state_lib.SharedState
  # All that the history has adopted, whether they hold already or not.
  amendments: tuple[amendment_lib.Amendment, ...] = ()

  def advance(
    self,
    digest: bytes | None,
    shared: shared_state_lib.SharedState,
    adoption: amendment_lib.Adoption | None = None,
  ) -> 'Position':
    """Returns the position after a manifest."""
    root = manifest_lib.extend(self.root, self.round, digest)
    amendments = self.amendments
    if adoption is not None and adoption.amendment not in amendments:
      amendments = (*amendments, adoption.amendment)
    return Position(self.round + 1, root, shared, amendments)


class AppliedRound(NamedTuple):
  """The effect of a round on the shared state."""

  before: shared_state_lib.SharedState
  shared: shared_state_lib.SharedState  # after the round
  delta_norm: float  # L2 norm of the aggregated delta
  messages: Mapping[int, ct.Message]  # the messages that counted, by uid
  weights: Mapping[int, weight_lib.Weight]  # their weights, by uid
  adoption: amendment_lib.Adoption | None = None  # of its manifest


def fingerprint(
  shared_model: shared_state_lib.SharedModel, position: Position
) -> str:
  """Returns the fingerprint that a manifest names of a position."""
  return shared_state_lib.amended_fingerprint(
    shared_model.fingerprint(position.shared),
    [amendment.digest for amendment in position.amendments],
  )


def check_matches(
  manifest: manifest_lib.Manifest, root: bytes, fingerprint: str
) -> None:
  """Raises OutOfSyncError if a manifest describes another state than ours."""
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
  storage: run_storage_lib.RunStorage, membership: membership_lib.Membership
) -> list[store_lib.Bucket]:
  """Returns the buckets of the validators, the leader's first.

  Silent ones come last: they may be the only ones with old objects.
  """
  locations = [membership.location(peer.uid) for peer in membership.candidates]
  return storage.buckets_at(filter(None, locations))


def fetch_manifest(
  storage: run_storage_lib.RunStorage,
  membership: membership_lib.Membership,
  round_index: int,
  digest: bytes,
) -> bytes:
  """Fetches the bytes of a manifest from any validator; raises StoreError."""
  got = storage.fetch(
    'proposals',
    round_index,
    [run_storage_lib.ObjectRef(digest, b'')],
    mirrors(storage, membership),
    manifest_lib.MAX_BYTES,
  )[digest]
  if isinstance(got, store_lib.StoreError):
    raise got
  return got


def fetch_payloads(
  storage: run_storage_lib.RunStorage,
  membership: membership_lib.Membership,
  round_index: int,
  entries: Sequence[manifest_lib.Entry],
  limit: int,
  have: dict[bytes, bytes],
  seconds: float | None = None,
  take: Callable[[bytes, bytes], None] = lambda digest, data: None,
) -> dict[bytes, bytes]:
  """Fetches the payloads of a manifest's entries, by digest.

  Args:
    storage: the storage of the node that asks.
    membership: the locations of the buckets.
    round_index: the round of the manifest.
    entries: the entries to fetch.
    limit: bytes per payload, at most.
    have: payloads that are at hand, by digest; those that come are added, even
      if others do not.
    seconds: see `RunStorage.fetch`.
    take: see `RunStorage.fetch`.

  Raises:
    StoreError: a payload cannot be had now; the message names its uid.
  """
  missing = [
    run_storage_lib.ObjectRef(entry.digest, membership.location(entry.uid))
    for entry in entries
    if entry.digest not in have
  ]
  got: Mapping[bytes, bytes | store_lib.StoreError] = {}
  if missing:
    sources = mirrors(storage, membership)
    got = storage.fetch(
      'payloads', round_index, missing, sources, limit, seconds, take
    )
    have |= {d: x for d, x in got.items() if isinstance(x, bytes)}
  for entry in entries:
    error = got.get(entry.digest)
    if isinstance(error, store_lib.StoreError):
      raise type(error)(f'payload of uid {entry.uid}: {error}')
  return {entry.digest: have[entry.digest] for entry in entries}


def decode(
  shared_model: shared_state_lib.SharedModel,
  chain: chain_lib.Chain,
  entry: manifest_lib.Entry,
  position: Position,
  data: bytes,
) -> payload_lib.Payload:
  """Decodes a payload of the position's round; raises PayloadError.

  Its signer must be the miner that the manifest's entry names.
  """
  expected = payload_lib.Header(
    shared_model.run, position.round, entry.uid, position.root[:16], b'', 0
  )
  return shared_model.decode(
    data,
    expected,
    lambda text, sig: chain.verify(entry.hotkey, text, sig),
  )


def fetch_last_messages(
  shared_model: shared_state_lib.SharedModel,
  chain: chain_lib.Chain,
  storage: run_storage_lib.RunStorage,
  membership: membership_lib.Membership,
  position: Position,
  seconds: float = _SECONDS,
) -> Mapping[int, ct.Message]:
  """Fetches the messages that led to a position, by uid.

  Used by a node that no longer has them. Empty if no message counted, or if no
  validator has them any more, or none that answers within these seconds.
  """
  r, limit = position.round - 1, shared_model.spec.payload_bytes

  def leads_here(data: bytes) -> bool:
    try:
      root = manifest_lib.decode(data, chain.verify).root
    except manifest_lib.ManifestError:
      return False
    digest = run_storage_lib.digest(data)
    return manifest_lib.extend(root, r, digest) == position.root

  buckets = [storage.bucket, *mirrors(storage, membership)]
  key = storage.key('history', r)
  try:
    data = storage.fetch_first(
      key, buckets, manifest_lib.MAX_BYTES, leads_here, seconds / 2
    )
    manifest = manifest_lib.decode(data, chain.verify)
    payloads = fetch_payloads(
      storage, membership, r, manifest.entries, limit, {}, seconds / 2
    )
  except store_lib.StoreError:
    return {}
  before = position._replace(round=r, root=manifest.root)
  is_packed = stay_packed(shared_model, len(manifest.entries))
  found = {}
  for entry in manifest.entries:
    with contextlib.suppress(payload_lib.PayloadError):
      data = payloads[entry.digest]
      made = decode(shared_model, chain, entry, before, data)
      message = shared_model.reopen(data) if is_packed else made.message
      found[entry.uid] = message
  return lazy.Messages(found)


def stay_packed(shared_model: shared_state_lib.SharedModel, count: int) -> bool:
  """Returns whether so many messages would take too much memory unpacked."""
  return count * shared_model.spec.payload_bytes > _UNPACKED_BYTES


class _Received(NamedTuple):
  """A message that counts, unpacked or packed."""

  header: payload_lib.Header
  message: ct.Message
  norms: np.ndarray  # of each tensor


class Incoming:
  """The payloads of a round, decoded one after another as they come.

  A small model's messages stay unpacked. Those of a large one are verified,
  measured and left packed until the sum needs their blocks.

  Attributes:
    found: the messages of payloads that were not refused, by uid.

  Args:
    shared_model: the model of the run.
    chain: verifies signatures.
    position: the state before the round.
    entries: the entries of the manifest.
    decoded: payloads already decoded at this position, by digest.
  """

  def __init__(
    self,
    shared_model: shared_state_lib.SharedModel,
    chain: chain_lib.Chain,
    position: Position,
    entries: Sequence[manifest_lib.Entry],
    decoded: Mapping[bytes, payload_lib.Decoded] | None = None,
  ):
    self.found: dict[int, _Received] = {}
    self._shared_model = shared_model
    self._chain = chain
    self._position = position
    self._entries: dict[bytes, list[manifest_lib.Entry]] = {}
    for entry in entries:
      self._entries.setdefault(entry.digest, []).append(entry)
    self._decoded = decoded or {}
    self._is_packed = stay_packed(shared_model, len(entries))
    self._taken: set[bytes] = set()

  def take(self, digest: bytes, data: bytes) -> None:
    """Decodes a payload; does nothing for one that was taken or is unknown."""
    if digest in self._taken:
      return
    self._taken.add(digest)
    for entry in self._entries.get(digest, ()):
      try:
        made = self._decoded.get(digest) or decode(
          self._shared_model, self._chain, entry, self._position, data
        )
      except payload_lib.PayloadError:
        continue
      message = made.message
      if isinstance(made, payload_lib.Measured):
        norms = made.norms
      else:
        norms = self._shared_model.norms(message)
      if self._is_packed and data:
        message = self._shared_model.reopen(data)
      self.found[entry.uid] = _Received(made.header, message, norms)


def outer_step(
  shared_model: shared_state_lib.SharedModel,
  chain: chain_lib.Chain,
  position: Position,
  entries: Sequence[manifest_lib.Entry],
  payloads: Mapping[bytes, bytes],
  decoded: Mapping[bytes, payload_lib.Decoded] | None = None,
  consume: bool = False,
  incoming: 'Incoming | None' = None,
  keep_params: bool = False,
) -> AppliedRound:
  """Applies the payloads of a manifest to the shared state.

  Every node refuses the same payloads, since all have the same bytes and the
  same rules. A refused payload does not count; if none is left, the state does
  not change.

  Args:
    shared_model: the model of the run.
    chain: verifies signatures.
    position: the state before the round.
    entries: the entries of the manifest.
    payloads: their payloads, by digest.
    decoded: payloads already decoded at this position, by digest.
    consume: True if no other code holds the state before the round, see
      `SharedModel.apply_round`.
    incoming: those of the payloads that were decoded as they came.
    keep_params: True if the parameters before the round are needed even so.
  """
  if incoming is None:
    incoming = Incoming(shared_model, chain, position, entries, decoded)
  for entry in entries:
    incoming.take(entry.digest, payloads.get(entry.digest, b''))
  came = incoming.found  # in any order
  found = {e.uid: came[e.uid] for e in entries if e.uid in came}
  messages = {uid: message.message for uid, message in found.items()}
  weights = {uid: shared_model.weigh(x.header) for uid, x in found.items()}
  norms = {uid: message.norms for uid, message in found.items()}
  shared, delta_norm = shared_model.apply_round(
    position.shared, messages, consume, weights, norms, keep_params
  )
  messages = lazy.Messages(messages)
  before = shared if consume and not keep_params else position.shared
  return AppliedRound(before, shared, delta_norm, messages, weights)
