"""The amendments of a run, as its validators publish them.

A node that was away for long does not know in which blocks the rounds are that
it missed, if an amendment changed their length. It takes the list of amendments
that validators with more than half of the stake publish. Their stake is counted
without any schedule: of all that committed as validators within the last
blocks. The history that the node then proves must have adopted the same.
"""

import hashlib
from collections.abc import Iterable

from covenant.chain import interface as chain_lib
from covenant.protocol import amendments as amendments_lib
from covenant.protocol import membership as membership_lib
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import amendment as amendment_lib
from covenant.wire import commitment as commitment_lib

Adopted = tuple[amendment_lib.Amendment, ...]
_KIND = 'rules'


def publish(storage: run_storage_lib.RunStorage, data: bytes) -> None:
  """Puts an encoded list of amendments into the own bucket."""
  storage.bucket.put(storage.key(_KIND, 0), data, replace=True)


def read(
  chain: chain_lib.Chain,
  storage: run_storage_lib.RunStorage,
  shared_model: shared_state_lib.SharedModel,
  head: int,
  known: Adopted,
) -> Adopted:
  """Returns the amendments to begin a catch-up with.

  It is the list that validators with more than half of the stake publish, or
  else the known one.

  Args:
    chain: the chain as the node sees it.
    storage: the storage of the node.
    shared_model: the model of the run.
    head: the newest block.
    known: the amendments that the node knows.

  Raises:
    ChainError: the chain cannot be read.
  """
  schedule = amendments_lib.schedule(shared_model.genesis, known)
  block = max(schedule.finalized(head), 0)
  membership = membership_lib.read(chain, block, schedule)
  voters = _voters(membership, schedule, shared_model, block)
  opened = [
    (peer, bucket)
    for peer in voters
    if (location := membership.location(peer.uid))
    and (bucket := storage.bucket_at(location)) is not None
  ]
  got = storage.fetch_each(
    storage.key(_KIND, 0),
    [bucket for _, bucket in opened],
    amendment_lib.MAX_ADOPTED_BYTES + 64,
  )
  lists: list[tuple[float, Adopted]] = []
  for (peer, _), data in zip(opened, got, strict=True):
    if isinstance(data, store_lib.StoreError):
      continue
    try:
      adopted = amendment_lib.decode_adopted(
        data, shared_model.run, peer.hotkey, chain.verify
      )
    except amendment_lib.AmendmentError:
      continue
    lists.append((peer.stake, adopted))
  longest = _longest(lists, sum(peer.stake for peer in voters))
  return longest if len(longest) > len(known) else known


def _voters(
  membership: membership_lib.Membership,
  schedule: round_lib.Schedule,
  shared_model: shared_state_lib.SharedModel,
  block: int,
) -> list[chain_lib.Peer]:
  """Returns the validators that have committed within the last rounds.

  Of a run that is over these are the last ones before its end.
  """
  phases = [schedule.phases, *(segment.phases for segment in schedule.later)]
  length = max(p.round_blocks for p in phases)
  rounds = membership_lib.OUTAGE * shared_model.genesis.phases.active_rounds
  committed = {
    uid: membership.committed[uid]
    for uid, peer in membership.peers.items()
    if peer.permit and membership.role(uid) is commitment_lib.Role.VALIDATOR
  }
  last = min(block, max(committed.values(), default=block))
  return [
    membership.peers[uid]
    for uid, at in committed.items()
    if at >= last - rounds * length
  ]


def _longest(lists: Iterable[tuple[float, Adopted]], total: float) -> Adopted:
  """Returns the longest list behind which is more than half of the stake.

  Args:
    lists: the stake of each publisher, and its list.
    total: the stake of all validators.
  """
  behind: dict[bytes, float] = {}  # by the digest of a beginning of a list
  found: Adopted = ()
  for stake, adopted in lists:
    # Who has adopted more has adopted each beginning of it, too.
    running = hashlib.blake2b(digest_size=32, person=b'covenant.rules')
    for n, amendment in enumerate(adopted, start=1):
      running.update(amendment.digest)
      key = running.digest()
      behind[key] = behind.get(key, 0.0) + stake
      if 2 * behind[key] > total and n > len(found):
        found = adopted[:n]
  return found
