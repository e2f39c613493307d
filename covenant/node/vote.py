"""A validator's vote: the manifest that it stands for on the chain."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from covenant.chain import interface as chain_lib
from covenant.gauntlet import checks as checks_lib
from covenant.node import amend
from covenant.node import base as node_lib
from covenant.node import collect
from covenant.node import follow
from covenant.node import turns as turns_lib
from covenant.node import validator_role as role_lib
from covenant.protocol import apply
from covenant.protocol import manifest_check
from covenant.protocol import membership as membership_lib
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.wire import manifest as manifest_lib
from covenant.wire import payload as payload_lib

Collected = role_lib.Collected
Finding = checks_lib.CheckFinding
Membership = membership_lib.Membership
Validator = role_lib.Validator

# Findings about a store, not about a payload: another try may find it valid.
_NOT_FETCHED = (Finding.ABSENT, Finding.UNREACHABLE, Finding.EXCUSED)

Propose = Callable[[Validator, Collected, int], bytes]
StandFor = Callable[[Validator, int, bytes, int], None]


class _Poll(NamedTuple):
  """The view of a validator, taken once per block."""

  node: Validator
  collected: Collected
  round: int
  head: int
  now: Membership  # at the newest final block
  proposals: Membership  # whose proposals may be taken up
  mine: bytes | None  # digest of the own vote


def vote(
  propose: Propose,
  stand_for: StandFor,
  node: Validator,
  command: round_lib.Command,
  head: int,
) -> None:
  """Stands for the first manifest, by rank, that it finds right.

  A validator whose turn comes proposes its own. As soon as it sees a proposal
  of a lower rank that is right in its eyes, it stands for that one instead, so
  that validators that proposed in one block agree in the next ones. In the end
  it goes with the one that has the most stake.

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
  if mine is not None and _is_over(node, now, r, head):
    return
  proposals = _proposals(node, now, r)
  poll = _Poll(node, collected, r, head, now, proposals, mine)
  _fetch_manifests(poll)
  if command.last:
    found = _find_leading(poll, node.objects.clock() + _patience(poll))
    if found is not None and found[1] is not None:
      stand_for(node, r, found[1], head)
    return
  # What is at hand first: a payload that does not come must not cost the vote.
  found = _find(propose, poll, None)
  if found is None or found[1] is None:
    found = _find(propose, poll, node.objects.clock() + _patience(poll))
  if found is None:
    raise node_lib.RetryLaterError
  rank, data = found
  if data is not None:
    stand_for(node, r, data, head)
  if rank > 0:
    raise node_lib.RetryLaterError


def _find(
  propose: Propose, poll: _Poll, deadline: float | None
) -> tuple[int, bytes | None] | None:
  """Returns the rank of the proposal to stand for, and its manifest.

  The manifest is None for the one that the node stands for already. None is
  returned if there is no proposal.

  Args:
    propose: makes the own one.
    poll: what the node sees.
    deadline: when payloads are no longer waited for, by the storage's clock;
      None leaves out all proposals with payloads that are not at hand.
  """
  node, mine, is_skipped = poll.node, poll.mine, False
  if poll.now.block >= node.schedule.closing_block(poll.round):
    found = _find_leading(poll, deadline)
    if found is not None:
      return found
  elif mine is not None and mine == _held(poll.now, poll.round):
    return 1, None  # it holds, unless others change their votes
  for rank, peer in enumerate(_turns(poll)):
    if peer.hotkey == node.chain.hotkey:
      if is_skipped and mine is None:
        return None
      if mine is not None:
        return rank, None
      ballot = node.role.ballot
      ballot.own = ballot.own or propose(node, poll.collected, poll.round)
      return rank, ballot.own
    digest = _vote_of(poll.proposals, peer.uid, poll.round)
    if digest is None:
      continue
    # Another one of the same maker is not taken up: it could go on for ever.
    if mine and (digest == mine or _is_by(node, node.manifests[mine], peer)):
      return rank, None
    data = _verified(poll, peer, digest, deadline)
    if data is not None:
      return rank, data
    is_skipped |= deadline is None and digest not in node.role.ballot.refused
  return None


def _find_leading(
  poll: _Poll, deadline: float | None
) -> tuple[int, bytes | None] | None:
  """Returns what `_find` does, once a change of the vote must be the last.

  All validators look at the state of one block, so those that find the same
  proposals right go the same way: to the most stake, then to the highest rank.
  """
  node = poll.node
  closing = node.schedule.closing_block(poll.round)
  votes = membership_lib.read(node.chain, closing, node.schedule)
  stakes = votes.stakes(poll.round)
  behind: dict[bytes, float] = {}
  for uid in sorted(stakes):
    if (digest := _vote_of(votes, uid, poll.round)) is not None:
      behind[digest] = behind.get(digest, 0.0) + stakes[uid]
  best = None
  # Among equals to the last: its voters could have gone to the first.
  for rank, peer in [*enumerate(_turns(poll))][::-1]:
    # Its maker may stand for another one by now.
    for digest, stake in behind.items():
      if best is not None and stake <= behind[best[0]]:
        continue
      data = _verified(poll, peer, digest, deadline)
      if data is not None:
        best = digest, rank, data
  if best is None:
    return None
  # The own vote may be in a block that is not final yet.
  newest = membership_lib.read(node.chain, poll.head, node.schedule)
  own = _vote_of(newest, newest.uid(node.chain.hotkey), poll.round)
  return best[1], None if own == best[0] else best[2]


def _turns(poll: _Poll) -> list[chain_lib.Peer]:
  """Returns the candidates whose turn has come."""
  order = turns_lib.turns(poll.node, poll.collected.membership, poll.round)
  proposes = poll.node.schedule.proposes
  return [
    peer
    for rank, peer in enumerate(order)
    if poll.head >= proposes(poll.round, rank)
  ]


def _vote_of(
  membership: Membership, uid: int, round_index: int
) -> bytes | None:
  """Returns the digest that a validator stands for in a round, if any."""
  voted = membership.votes.get(uid) == round_index
  return membership.commitments[uid].digest if voted else None


def _is_by(node: Validator, data: bytes, peer: chain_lib.Peer) -> bool:
  """Returns whether a manifest is the proposal of a peer."""
  try:
    return manifest_lib.decode(data, node.chain.verify).hotkey == peer.hotkey
  except manifest_lib.ManifestError:
    return False


def _is_over(
  node: Validator, now: Membership, round_index: int, head: int
) -> bool:
  """Returns whether no vote can change the decision any more."""
  schedule = node.schedule
  if head >= schedule.last_decision_block(round_index):
    return True
  look = schedule.decision_block(round_index)
  if now.block < look:
    return False
  then = membership_lib.read(node.chain, look, schedule)
  return _held(then, round_index) is not None


def _held(membership: Membership, round_index: int) -> bytes | None:
  """Returns the digest that more than half of the stake stands for, if any."""
  stakes = membership.stakes(round_index)
  held = round_lib.decide(
    round_index, membership.commitments, stakes, last=False
  )
  return held.digest if held is not None else None


def _proposals(
  node: Validator, now: Membership, round_index: int
) -> Membership:
  """Returns the state whose proposals are looked at, equal for all in the end.

  Else a proposal in the last blocks would divide those who see it from those
  who do not.
  """
  last = node.schedule.last_proposal_block(round_index)
  if now.block <= last:
    return now
  return membership_lib.read(node.chain, last, node.schedule)


def _patience(poll: _Poll) -> float:
  """Returns the seconds that payloads may be waited for at this block."""
  schedule = poll.node.schedule
  until = schedule.decision_block(poll.round)
  if poll.head >= until:
    until = schedule.last_decision_block(poll.round)
  return follow.patience(poll.node, poll.head, until)


def _fetch_manifests(poll: _Poll) -> None:
  """Fetches the proposals that have not been seen, all at the same time.

  A voter for a manifest that nobody has is not waited for twice as long.
  """
  node, ballot = poll.node, poll.node.role.ballot
  wanted = []
  for membership in poll.proposals, poll.now:
    for peer in membership.candidates:
      digest = _vote_of(membership, peer.uid, poll.round)
      if digest in node.manifests:
        ballot.proposals[digest] = node.manifests[digest]
      elif digest is not None and digest not in ballot.proposals:
        location = poll.now.location(peer.uid)
        wanted.append(run_storage_lib.ObjectRef(digest, location))
  if not wanted:
    return
  seconds = follow.patience(node, poll.head, poll.head)
  if all(digest in ballot.withheld for digest, _ in wanted):
    seconds /= 4
  got = node.objects.fetch(
    'proposals',
    poll.round,
    wanted,
    apply.mirrors(node.objects, poll.now),
    manifest_lib.MAX_BYTES,
    seconds,
  )
  for digest, data in got.items():
    if isinstance(data, bytes):
      ballot.proposals[digest] = data
    else:
      ballot.withheld.add(digest)


def proposal(node: Validator, collected: Collected, round_index: int) -> bytes:
  """Returns the signed manifest that this validator would choose."""
  manifest = manifest_lib.Manifest(
    node.shared_model.run,
    round_index,
    node.root,
    node.fingerprint(),
    node.chain.hotkey,
    tuple(collected.entries[uid] for uid in collected.chosen),
    amend.due(node, collected.membership, round_index),
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
  poll: _Poll, peer: chain_lib.Peer, digest: bytes, deadline: float | None
) -> bytes | None:
  """Returns a proposal of `peer`, or None where it is not right.

  All that it lists must be valid in this validator's eyes, no two messages may
  be similar, and at least half of this validator's own choice must be in it.
  Payloads that this validator has not fetched are fetched and checked now.
  """
  node, ballot = poll.node, poll.node.role.ballot
  data = ballot.proposals.get(digest)
  if data is None or digest in ballot.refused:
    return None
  if not _is_by(node, data, peer):
    return None  # its maker's own vote is looked at by itself
  entries = _entries(poll, data)
  unsure = None if entries is None else _unsure(poll.collected, entries)
  if entries is None or unsure is None:
    ballot.refused.add(digest)
    return None
  is_here = all(entry.digest in node.payloads for entry in entries)
  if deadline is None and not is_here:
    return None
  left = 0.0 if deadline is None else deadline - node.objects.clock()
  try:
    node.payloads |= apply.fetch_payloads(
      node.objects,
      poll.now,
      poll.round,
      entries,
      node.shared_model.spec.payload_bytes,
      node.payloads,
      # Half of what is left: the next proposal may be right.
      max(left, 0.0) / 2,
    )
  except store_lib.StoreError:
    return None
  report = poll.collected.report
  if unsure:
    late = {entry.uid: node.payloads[entry.digest] for entry in unsure}
    report = collect.check_late(node, poll.round, poll.collected, late)
  listed = {entry.uid for entry in entries}
  if not listed <= {*report.valid} or report.repeats(listed):
    ballot.refused.add(digest)
    return None
  for entry in entries:
    if entry.digest not in node.decoded:
      decoded = collect.decode(node, entry, node.payloads[entry.digest])
      if isinstance(decoded, payload_lib.PayloadError):
        ballot.refused.add(digest)
        return None
      node.decoded[entry.digest] = decoded
  return data


def _entries(poll: _Poll, data: bytes) -> Sequence[manifest_lib.Entry] | None:
  """Returns what a proposal lists; None where it is not one to vote for."""
  node, collected = poll.node, poll.collected
  try:
    manifest = manifest_lib.decode(data, node.chain.verify)
    if (manifest.run, manifest.round) != (node.shared_model.run, poll.round):
      return None
    manifest_check.check_entries(
      manifest,
      collected.membership,
      node.schedule,
      node.shared_model.most_entries,
    )
    apply.check_matches(manifest, node.root, node.fingerprint())
    amend.check(node, manifest)
  except (
    manifest_lib.ManifestError, apply.OutOfSyncError, amend.AmendmentError,
  ):  # fmt: skip
    return None
  listed = {entry.uid for entry in manifest.entries}
  firm = collected.chosen if collected.firm is None else collected.firm
  # Of places that were given by lot only the number must agree.
  if 2 * len(listed) < len(collected.chosen):
    return None
  return manifest.entries if 2 * len(listed & {*firm}) >= len(firm) else None


def _unsure(
  collected: Collected, entries: Sequence[manifest_lib.Entry]
) -> list[manifest_lib.Entry] | None:
  """Returns the entries that are yet to be checked; None if one is refused."""
  unsure = []
  for entry in entries:
    if collected.entries.get(entry.uid) != entry:
      return None
    check = collected.report.checks.get(entry.uid)
    if check is None or check.finding in _NOT_FETCHED:
      unsure.append(entry)
    elif not check.valid:
      return None
  return unsure
