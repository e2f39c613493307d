"""A validator's first phase: fetch and check what was committed."""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from covenant import typing as ct
from covenant.data import assignment
from covenant.gauntlet import checks as checks_lib
from covenant.gauntlet import incentives
from covenant.gauntlet import ratings
from covenant.gauntlet import selection
from covenant.node import follow
from covenant.node import validator_role as role_lib
from covenant.protocol import apply
from covenant.protocol import membership as membership_lib
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.train import local as local_lib
from covenant.train import step_bound
from covenant.wire import commitment as commitment_lib
from covenant.wire import manifest as manifest_lib
from covenant.wire import payload as payload_lib

Validator = role_lib.Validator
_Content = payload_lib.Decoded | payload_lib.PayloadError


class _Committed(NamedTuple):
  """The commitments to the payloads of a round."""

  entries: dict[int, manifest_lib.Entry]  # by uid
  twice: set[int]  # the uids that committed to several payloads


def collect(node: Validator, command: round_lib.Command, head: int) -> None:
  """Fetches and checks what was committed, and chooses who should count.

  A payload that has not come by the deadline is unreachable in this round. Half
  of the time to the decision is left to agree.
  """
  r, role, gauntlet = command.round, node.role, node.config.gauntlet
  seconds = follow.patience(node, head, node.schedule.decision_block(r))
  closes = node.schedule.put_closes(r)
  membership = membership_lib.read(node.chain, closes, node.schedule)
  node.objects.keep_only(membership.locations)
  role.standings = ratings.admit(
    role.standings, r, role_lib.identities(membership)
  )
  committed = _committed(node, r, membership)
  deadline = node.objects.clock() + seconds
  previous = node.messages or _recall(node, membership, seconds / 2)
  entries = committed.entries
  decoded = _Decoded(node, entries)
  role.take = decoded.take
  fetched = _fetch_in_turns(node, r, membership, entries, deadline)
  readable: dict[int, payload_lib.Decoded] = {}
  submissions = [
    submission
    for peer in membership.miners
    if (
      submission := _submission(
        node, r, peer.uid, membership, committed, fetched, readable, decoded
      )
    )
  ]
  expected = checks_lib.Expected(
    opens=node.schedule.put_opens(r),
    closes=closes + 1,
    root=node.root[:16],
    receipts={u: _receipt(node, p.header) for u, p in readable.items()},
    sequences=assignment.per_miner(node.config),
    usual_norm=float(step_bound.usual(np.asarray(node.shared.steps))),
    answering=ratings.answering(role.standings),
  )
  evidence = role_lib.Evidence(submissions, expected, previous)
  report = _check(node, r, evidence)
  chosen = selection.contributors(
    role.standings, report.clear(), gauntlet, r, role_lib.lottery(node, r)
  )
  firm: Collection[int] | None = None
  if chosen.reserves:  # else no place was given by lot
    standings = role.standings.standings
    firm = [u for u in chosen.uids if not selection.is_newcomer(standings[u])]
  role.collected = role_lib.Collected(
    membership,
    node.place,
    entries,
    readable,
    report,
    chosen.uids,
    firm,
    evidence,
  )


def _check(
  node: Validator, round_index: int, evidence: role_lib.Evidence
) -> checks_lib.CheckReport:
  return node.role.judge.checker.check(
    evidence.submissions,
    evidence.expected,
    seed=role_lib.lottery(node, round_index),
    previous=evidence.previous,
    threshold=node.config.gauntlet.copy_similarity,
  )


def check_late(
  node: Validator,
  round_index: int,
  collected: role_lib.Collected,
  payloads: Mapping[int, bytes],
) -> checks_lib.CheckReport:
  """Checks payloads beside the valid ones that were collected before.

  Args:
    node: the validator.
    round_index: the round.
    collected: its findings before.
    payloads: committed payloads that it had not fetched, by uid.
  """
  evidence, report = collected.evidence, collected.report
  assert evidence is not None
  submissions = [s for s in evidence.submissions if report.checks[s.uid].valid]
  receipts = dict(evidence.expected.receipts)
  for uid, data in payloads.items():
    entry = collected.entries[uid]
    decoded = decode(node, entry, data)
    if isinstance(decoded, payload_lib.Decoded):
      node.decoded[entry.digest] = decoded
      receipts[uid] = _receipt(node, decoded.header)
    submissions.append(
      checks_lib.Submission(
        uid,
        collected.membership.committed[uid],
        entry.digest,
        digest=entry.digest,
        decoded=decoded,
      )
    )
  expected = evidence.expected._replace(receipts=receipts)
  evidence = evidence._replace(submissions=submissions, expected=expected)
  return _check(node, round_index, evidence)


def decode(node: Validator, entry: manifest_lib.Entry, data: bytes) -> _Content:
  """Returns the content of a payload of this round, or why it is refused.

  The message of a large model is measured, and then left packed.
  """
  model, chain = node.shared_model, node.chain
  try:
    header, message = apply.decode(model, chain, entry, node.place, data)
  except payload_lib.PayloadError as e:
    return e
  norms = model.norms(message)
  if apply.stay_packed(model, model.most_entries):
    message = model.reopen(data)
  return payload_lib.Measured(header, message, norms)


class _Decoded:
  """The payloads of a round, decoded while others are being fetched.

  Args:
    node: the validator.
    entries: what was committed, by uid.
  """

  def __init__(
    self, node: Validator, entries: Mapping[int, manifest_lib.Entry]
  ):
    self._node = node
    self._entries = entries
    self._found: dict[int, _Content] = {}

  def take(self, digest: bytes, data: bytes) -> None:
    """Decodes a payload for each uid that committed to it."""
    for uid, entry in self._entries.items():
      if entry.digest == digest:
        self._found[uid] = decode(self._node, entry, data)

  def get(self, entry: manifest_lib.Entry, data: bytes) -> _Content:
    """Returns the content of a payload, or why it is refused."""
    found = self._found.get(entry.uid)
    return decode(self._node, entry, data) if found is None else found


def _submission(
  node: Validator,
  round_index: int,
  uid: int,
  membership: membership_lib.Membership,
  committed: _Committed,
  fetched: Mapping[int, bytes | store_lib.StoreError],
  readable: dict[int, payload_lib.Decoded],
  as_it_came: '_Decoded',
) -> checks_lib.Submission | None:
  """Returns what a miner submitted; None for one that nobody asked for.

  A payload that can be read is added to `readable` and kept by the node.
  """
  entry = committed.entries.get(uid)
  if entry is None:
    return checks_lib.Submission(uid)
  block, twice = membership.committed[uid], uid in committed.twice
  submission = checks_lib.Submission(uid, block, entry.digest, twice=twice)
  data = fetched.get(uid)
  if data is None:
    in_time = block >= node.schedule.put_opens(round_index) and not twice
    return None if in_time else submission
  if isinstance(data, store_lib.ObjectTooLargeError):
    refused = payload_lib.PayloadError(payload_lib.Reason.LENGTH, str(data))
    return submission._replace(digest=entry.digest, decoded=refused)
  if isinstance(data, store_lib.StoreError):
    absent = isinstance(data, store_lib.MissingObjectError)
    fetch = 'absent' if absent else 'failed'
    return submission._replace(fetch=fetch, detail=str(data))
  decoded = as_it_came.get(entry, data)
  if isinstance(decoded, payload_lib.Decoded):
    node.payloads[entry.digest] = data
    node.decoded[entry.digest] = readable[uid] = decoded
  # The storage has compared the digest of what it fetched.
  return submission._replace(digest=entry.digest, decoded=decoded)


def _recall(
  node: Validator, membership: membership_lib.Membership, seconds: float
) -> Mapping[int, ct.Message]:
  """Returns the messages of the last round, which a restart has forgotten."""
  if not node.place.round:
    return {}
  return apply.fetch_last_messages(
    node.shared_model,
    node.chain,
    node.objects,
    membership,
    node.place,
    seconds,
  )


def _committed(
  node: Validator, round_index: int, membership: membership_lib.Membership
) -> _Committed:
  newest, seats = membership.commitments, role_lib.seats(node)
  entries = {
    peer.uid: manifest_lib.Entry(peer.uid, peer.hotkey, newest[peer.uid].digest)
    for peer in membership.miners
    if peer.uid < seats
    and peer.uid in newest
    and newest[peer.uid].round == round_index
    and membership.committed[peer.uid] >= peer.registered
  }
  twice = _committed_twice(node, round_index, membership, entries)
  return _Committed(entries, twice)


def _committed_twice(
  node: Validator,
  round_index: int,
  membership: membership_lib.Membership,
  entries: Mapping[int, manifest_lib.Entry],
) -> set[int]:
  """Returns the uids that committed to several payloads in the put window.

  It walks back from the last commitment of each to the one before, and so
  reads only the blocks before those that have one.
  """
  opens, twice = node.schedule.put_opens(round_index), set()
  last = {uid: membership.committed[uid] for uid in entries}  # block
  while (block := max(last.values(), default=opens)) > opens:
    before = node.chain.commitments(block - 1)
    for uid in [uid for uid, at in last.items() if at == block]:
      del last[uid]
      included, data = before.get(uid, (-1, b''))
      earlier = commitment_lib.decode(data)
      if earlier is None or earlier.round != round_index:
        continue
      if included < membership.peers[uid].registered:
        continue  # of the hotkey that had this uid before
      if earlier.digest != entries[uid].digest:
        twice.add(uid)
      else:
        last[uid] = included
  return twice


def _worth_fetching(
  node: Validator, round_index: int, entries: Mapping[int, manifest_lib.Entry]
) -> list[int]:
  """Returns the likely contributors and the uids to be scored this round."""
  gauntlet, standings = node.config.gauntlet, node.role.standings
  lot = role_lib.lottery(node, round_index)
  likely = selection.contributors(
    standings, entries, gauntlet, round_index, lot
  )
  also = selection.to_evaluate(
    standings, entries, gauntlet.evaluate, round_index, lot
  )
  reserves = likely.reserves[: incentives.RESERVES]
  return sorted({*likely.uids, *reserves, *also})


def _fetch_in_turns(
  node: Validator,
  round_index: int,
  membership: membership_lib.Membership,
  entries: Mapping[int, manifest_lib.Entry],
  deadline: float,
) -> dict[int, bytes | store_lib.StoreError]:
  """Fetches payloads until as many came as can count, or until a deadline.

  First those from buckets that have not failed lately; then, while there are
  places, the next in line, so that any number of dead buckets keeps nobody out;
  then those from buckets that failed. Each turn leaves time for the next.

  Args:
    node: the validator.
    round_index: the round.
    membership: the locations of the buckets.
    entries: what was committed, by uid.
    deadline: by the clock of the storage.

  Returns:
    The bytes of all that were asked for, or an error, by uid.
  """
  got: dict[int, bytes | store_lib.StoreError] = {}
  failed = {
    uid for uid in entries if node.objects.failed(membership.location(uid))
  }
  trusted = {uid: e for uid, e in entries.items() if uid not in failed}
  worth = _worth_fetching(node, round_index, entries)
  places = min(node.config.gauntlet.contributors, len(entries))

  def fetch(uids: Iterable[int]) -> None:
    wanted = [entries[uid] for uid in uids if uid not in got]
    # A quarter of what is left is for others, if there are any.
    is_last = len(got) + len(wanted) == len(entries)
    left = (deadline - node.objects.clock()) * (1 if is_last else 0.75)
    if wanted and left > 0:
      got.update(_fetch(node, round_index, membership, wanted, left))

  fetch(_worth_fetching(node, round_index, trusted))
  lines = [_in_line(node, round_index, e) for e in (trusted, entries)]
  line = list(dict.fromkeys([*lines[0], *lines[1]]))
  while node.objects.clock() < deadline:
    missing = places - sum(isinstance(data, bytes) for data in got.values())
    following = [uid for uid in line if uid not in got][: 2 * missing]
    if missing <= 0 or not following:
      break
    fetch(following)
  fetch(worth)
  for uid in worth:
    late = store_lib.StoreUnavailableError('its bucket was not asked in time')
    got.setdefault(uid, late)
  return got


def _in_line(
  node: Validator, round_index: int, entries: Mapping[int, manifest_lib.Entry]
) -> list[int]:
  """Returns uids in the order in which they get places."""
  lot = role_lib.lottery(node, round_index)
  found = selection.contributors(
    node.role.standings, entries, node.config.gauntlet, round_index, lot
  )
  return [*found.uids, *found.reserves]


def _fetch(
  node: Validator,
  round_index: int,
  membership: membership_lib.Membership,
  entries: list[manifest_lib.Entry],
  seconds: float,
) -> dict[int, bytes | store_lib.StoreError]:
  wanted = [
    run_storage_lib.ObjectRef(entry.digest, membership.location(entry.uid))
    for entry in entries
  ]
  limit = node.shared_model.spec.payload_bytes
  got = node.objects.fetch(
    'payloads', round_index, wanted, [], limit, seconds, node.role.take
  )
  return {entry.uid: got[entry.digest] for entry in entries}


def _receipt(node: Validator, header: payload_lib.Header) -> bytes:
  """Returns the receipt of the sequences that a header declares."""
  r, split = header.round, node.role.judge.split
  seed = node.chain.block_hash(node.schedule.assignment_block(r))
  task = local_lib.Task(header.uid, r, seed, header.root)
  ids_n = local_lib.assigned_ids(node.config, task, split)
  return assignment.receipt_of(
    split, ids_n[: header.sequences], node.config.data.context
  )
