"""The program of a validator: check, agree, apply, score, keep.

It fetches what miners committed, votes on the chain for a manifest (the leader
makes it, the others verify it), rates who contributed what, sets weights, and
re-hosts what others need to follow or to join.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from covenant.chain import interface as chain_lib
from covenant.data import assignment
from covenant.data import receipt as receipt_lib
from covenant.data import tokens as tokens_lib
from covenant.gauntlet import checks as checks_lib
from covenant.gauntlet import incentives
from covenant.gauntlet import ratings
from covenant.gauntlet import scores as scores_lib
from covenant.gauntlet import selection
from covenant.node import base as node_lib
from covenant.protocol import apply
from covenant.protocol import membership as membership_lib
from covenant.protocol import published_checkpoint
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.train import local as local_lib
from covenant.wire import manifest as manifest_lib
from covenant.wire import payload as payload_lib

Phase = round_lib.Phase


class Judge(NamedTuple):
  """What all validators of a process share, compiled once."""

  checker: checks_lib.Checker
  scorer: scores_lib.Scorer
  split: tokens_lib.Split  # of training


class Collected(NamedTuple):
  """What a validator holds of a round that is being agreed upon."""

  membership: membership_lib.Membership  # at the close of the put window
  before: apply.Position  # the state that the round started from
  entries: Mapping[int, manifest_lib.Entry]  # of who committed in time
  payloads: Mapping[int, payload_lib.Payload]  # by uid, that can be read
  report: checks_lib.Report
  chosen: list[int]  # who should count, in its own eyes


class Verdict(NamedTuple):
  """What a validator has found about a round."""

  round: int
  decisions: list[dict[str, Any]]  # one a uid
  weights: dict[int, float]


class Validator(node_lib.Node):
  """One validator.

  Args:
    *args: as `node.Node`.
    judge: compiled once for all validators of a process.
    standings: what it remembers of the miners, if it did.
    announce: told of every verdict.
    **kwargs: as `node.Node`.
  """

  can = round_lib.VALIDATOR

  def __init__(
    self,
    *args: Any,
    judge: Judge,
    standings: ratings.State | None = None,
    announce: Callable[[Verdict], None] = lambda verdict: None,
    **kwargs: Any,
  ):
    super().__init__(*args, **kwargs)
    self.standings = standings or ratings.State()
    self._judge = judge
    self._announce = announce
    self._collected: Collected | None = None  # of the round in agreement
    self._to_score: Collected | None = None  # of the round before
    self._manifests: dict[bytes, bytes] = {}  # own and verified, by digest
    self._to_keep: list[tuple[str, bytes]] = []  # key, bytes
    self._weights: dict[int, float] | None = None  # to be set
    self._obey |= {
      Phase.COLLECT: self._collect,
      Phase.VOTE: self._vote,
      Phase.SCORE: self._score,
    }

  def _collect(self, command: round_lib.Command, head: int) -> None:
    """Fetches and checks what was committed, and chooses who should count."""
    r, plan = command.round, self.plan
    closes = plan.put_closes(r)
    membership = membership_lib.read(self.chain, closes)
    self.standings = ratings.admit(self.standings, r, _identities(membership))
    entries, twice = self._committed(r, membership)
    wanted = self._worth_fetching(r, entries)
    payloads = self._fetch(r, membership, [entries[uid] for uid in wanted])
    submissions, readable, receipts = [], {}, {}
    for peer in membership.miners:
      uid, entry = peer.uid, entries.get(peer.uid)
      if entry is None:
        submissions.append(checks_lib.Submission(uid))
        continue
      block = membership.committed[uid]
      submission = checks_lib.Submission(
        uid, block, entry.digest, twice=uid in twice
      )
      if uid in payloads:
        data = payloads[uid]
        if isinstance(data, store_lib.ObjectTooLargeError):
          refused = payload_lib.PayloadError(
            payload_lib.Reason.LENGTH, str(data)
          )
          submission = submission._replace(digest=entry.digest, decoded=refused)
        elif isinstance(data, store_lib.StoreError):
          absent = isinstance(data, store_lib.MissingObjectError)
          submission = submission._replace(
            fetch='absent' if absent else 'failed', detail=str(data)
          )
        else:
          decoded = self._decode(entry, data)
          submission = submission._replace(
            digest=run_storage_lib.digest(data), decoded=decoded
          )
          if isinstance(decoded, payload_lib.Payload):
            self._payloads[entry.digest] = data
            self._decoded[entry.digest] = readable[uid] = decoded
            receipts[uid] = self._receipt(decoded.header)
      elif block >= plan.put_opens(r) and uid not in twice:
        continue  # in time, and nobody asked for it
      submissions.append(submission)
    report = self._judge.checker.check(
      submissions,
      checks_lib.Expected(
        opens=plan.put_opens(r),
        closes=closes + 1,
        root=self.root[:16],
        receipts=receipts,
        sequences=assignment.per_miner(self.config),
        older=apply.older_roots(self.shared_model, self.place),
      ),
      seed=self._lot(r),
      previous=self.messages or self._recall(membership),
      threshold=self.config.gauntlet.copy_similarity,
    )
    chosen = selection.contributors(
      self.standings,
      report.valid,
      self.config.gauntlet,
      r,
      self._lot(r),
    )
    self._collected = Collected(
      membership, self.place, entries, readable, report, chosen.uids
    )

  def _recall(self, membership: membership_lib.Membership) -> Mapping[int, Any]:
    """The messages of the last round, which a restart has made it forget."""
    if not self.place.round:
      return {}
    return apply.fetch_last_messages(
      self.shared_model, self.chain, self.objects, membership, self.place
    )

  def _committed(
    self, r: int, membership: membership_lib.Membership
  ) -> tuple[dict[int, manifest_lib.Entry], set[int]]:
    """Who committed to a payload of the round, and who did to several."""
    seen: dict[int, set[bytes]] = {}
    for block in range(self.plan.put_opens(r), self.plan.put_closes(r) + 1):
      then = membership_lib.read(self.chain, block)
      for uid, commitment in then.commitments.items():
        if commitment.round == r:
          seen.setdefault(uid, set()).add(commitment.digest)
    entries = {
      peer.uid: manifest_lib.Entry(
        peer.uid, peer.hotkey, membership.commitments[peer.uid].digest
      )
      for peer in membership.miners
      if peer.uid in seen and membership.commitments[peer.uid].round == r
    }
    return entries, {uid for uid, digests in seen.items() if len(digests) > 1}

  def _worth_fetching(
    self, r: int, entries: Mapping[int, manifest_lib.Entry]
  ) -> list[int]:
    """Whose payloads to fetch: likely contributors, and who is evaluated."""
    gauntlet, lot = self.config.gauntlet, self._lot(r)
    likely = selection.contributors(self.standings, entries, gauntlet, r, lot)
    also = selection.to_evaluate(
      self.standings, entries, gauntlet.evaluate, r, lot
    )
    reserves = likely.reserves[: incentives.RESERVES]
    return sorted({*likely.uids, *reserves, *also})

  def _fetch(
    self,
    r: int,
    membership: membership_lib.Membership,
    entries: list[manifest_lib.Entry],
  ) -> dict[int, bytes | store_lib.StoreError]:
    wanted = [
      run_storage_lib.ObjectRef(entry.digest, membership.location(entry.uid))
      for entry in entries
    ]
    limit = self.shared_model.spec.payload_bytes
    got = self.objects.fetch('payloads', r, wanted, [], limit)
    return {entry.uid: got[entry.digest] for entry in entries}

  def _decode(
    self, entry: manifest_lib.Entry, data: bytes
  ) -> payload_lib.Payload | payload_lib.PayloadError:
    try:
      return apply.decode(
        self.shared_model, self.chain, entry, self.place, data
      )
    except payload_lib.PayloadError as e:
      return e

  def _receipt(self, header: payload_lib.Header) -> bytes:
    """What the receipt must be of who trained on as much as `header` says."""
    r = header.round - header.staleness
    seed = self.chain.block_hash(self.plan.assignment_block(r))
    task = local_lib.Task(header.uid, r, seed, header.root)
    ids_n = local_lib.assigned_ids(self.config, task, self._judge.split)
    return receipt_lib.of_sequences(
      self._judge.split, ids_n[: header.sequences], self.config.data.context
    )

  def _lot(self, r: int) -> bytes:
    """What nobody knew before all payloads of a round were committed."""
    return self.chain.block_hash(self.plan.put_closes(r))

  def _vote(self, command: round_lib.Command, head: int) -> None:
    """Stands for the first manifest, by rank, that it can verify.

    Raises:
      node_lib.RetryLaterError: there is none, and it is others' turn to make one.
    """
    collected, r = self._collected, command.round
    assert collected is not None
    now = membership_lib.read(self.chain, self.plan.finalized(head))
    mine = now.commitments.get(now.uid(self.chain.hotkey))
    if mine is not None and mine.round == r:
      return  # before it was started again
    ranked = collected.membership.validators
    for rank, peer in enumerate(ranked):
      if peer.hotkey == self.chain.hotkey:
        if head >= self.plan.proposes(r, rank):
          self._stand_for(r, self._propose(collected, r), head)
          return
        continue
      vote = now.commitments.get(peer.uid)
      if vote is None or vote.round != r:
        continue
      data = self._verified(collected, now, peer, vote.digest, r)
      if data is not None:
        self._stand_for(r, data, head)
        return
    raise node_lib.RetryLaterError

  def _propose(self, collected: Collected, r: int) -> bytes:
    """The manifest that this validator would have."""
    manifest = manifest_lib.Manifest(
      self.shared_model.run,
      r,
      self.root,
      self.fingerprint(),
      self.chain.hotkey,
      tuple(collected.entries[uid] for uid in collected.chosen),
    )
    return manifest_lib.encode(manifest, self.chain.sign)

  def _stand_for(self, r: int, data: bytes, head: int) -> None:
    """Publishes a manifest, what it lists, and the vote for it."""
    digest = run_storage_lib.digest(data)
    self._manifests[digest] = data
    self.objects.put_once(self.objects.key('proposals', r, digest), data)
    self.commit(r, digest, head)

  def _verified(
    self,
    collected: Collected,
    now: membership_lib.Membership,
    peer: chain_lib.Peer,
    digest: bytes,
    r: int,
  ) -> bytes | None:
    """A proposal of `peer`, or None where this validator cannot vouch for it.

    It need not choose whom this one would choose; but all it lists must have
    been committed in time, be had, and be valid.
    """
    try:
      data = apply.fetch_manifest(self.objects, now, r, digest)
      manifest = manifest_lib.decode(data, self.chain.verify)
      apply.check_matches(manifest, self.root, self.fingerprint())
      if (manifest.run, manifest.round) != (self.shared_model.run, r):
        return None
      if manifest.hotkey != peer.hotkey:
        return None  # its maker's own vote is looked at by itself
      for entry in manifest.entries:
        if collected.entries.get(entry.uid) != entry:
          return None
      self._payloads |= apply.fetch_payloads(
        self.objects,
        now,
        r,
        manifest.entries,
        self.shared_model.spec.payload_bytes,
        self._payloads,
      )
    except (
      store_lib.StoreError,
      manifest_lib.ManifestError,
      apply.OutOfSyncError,
    ):
      return None
    for entry in manifest.entries:
      if entry.digest in self._decoded:
        continue
      decoded = self._decode(entry, self._payloads[entry.digest])
      if isinstance(decoded, payload_lib.PayloadError):
        return None
      self._decoded[entry.digest] = decoded
    return data

  def _manifest(
    self, membership: membership_lib.Membership, round_index: int, digest: bytes
  ) -> bytes:
    if digest not in self._manifests:
      data = super()._manifest(membership, round_index, digest)
      self._manifests[digest] = data
    return self._manifests[digest]

  def _moved(self, applied: apply.AppliedRound, digest: bytes | None) -> None:
    r, data = self.state.round, b''
    if digest is not None:
      membership = membership_lib.read(self.chain, self.plan.decision_block(r))
      data = self._manifest(membership, r, digest)
      for entry in manifest_lib.decode(data, self.chain.verify).entries:
        if (payload := self._payloads.get(entry.digest)) is not None:
          key = self.objects.key('payloads', r, entry.digest)
          self._to_keep.append((key, payload))
    self._to_keep.append((self.objects.key('history', r), data))
    self._to_score, self._collected = self._collected, None
    self._manifests = {}
    super()._moved(applied, digest)

  def _resume(
    self, place: apply.Position, replayed: Mapping[int, bytes]
  ) -> None:
    """Its history has no gap: it may be the only one that is left."""
    super()._resume(place, replayed)
    self._collected = self._to_score = None
    for r, manifest in replayed.items():
      self._to_keep.append((self.objects.key('history', r), manifest))
    if replayed:
      self.state = self.state._replace(kept=False)

  def _score(self, command: round_lib.Command, head: int) -> None:
    """Evaluates, rates, sets weights. Nothing it did not see is judged."""
    collected, self._to_score = self._to_score, None
    if collected is not None:
      self._judge_round(command.round - 1, collected)
    weights, self._weights = self._weights, None
    if weights:
      try:
        self.chain.set_weights(weights)
      except chain_lib.ChainUnreachableError:
        self._weights = weights  # once more; what is refused is not
        raise

  def _judge_round(self, r: int, collected: Collected) -> None:
    report = self._late(r, collected)
    scores = self._evaluate(r, collected, report)
    gauntlet = self.config.gauntlet
    self.standings, decisions = ratings.update(
      self.standings,
      r,
      _identities(collected.membership),
      report,
      scores,
      gauntlet,
      self.config.optim.staleness,
    )
    weights = incentives.weights(self.standings, gauntlet)
    for decision in decisions:
      decision['weight'] = weights.get(decision['uid'], 0.0)
    verdict = Verdict(r, decisions, weights)
    self._announce(verdict)
    text = json.dumps(verdict._asdict())
    self._to_keep.append((self.objects.key('verdicts', r), text.encode()))
    if (r + 1) % gauntlet.weights_every == 0:
      self._weights = weights

  def _late(self, r: int, collected: Collected) -> checks_lib.Report:
    """The report, with who committed after the window told from who did not."""
    after = membership_lib.read(self.chain, self.plan.decision_block(r))
    checks = dict(collected.report.checks)
    for uid, check in checks.items():
      commitment = after.commitments.get(uid)
      if check.verdict is checks_lib.Verdict.MISSING and commitment:
        if commitment.round == r:
          checks[uid] = check._replace(
            verdict=checks_lib.Verdict.LATE, block=after.committed[uid]
          )
    return collected.report._replace(checks=checks)

  def _evaluate(
    self, r: int, collected: Collected, report: checks_lib.Report
  ) -> dict[int, scores_lib.Score]:
    """The scores of this round's turn of uids, on the state before it."""
    config, split = self.config, self._judge.split
    seed, lot = (
      self.chain.block_hash(self.plan.assignment_block(r)),
      self._lot(r),
    )
    uids = selection.to_evaluate(
      self.standings, report.valid, config.gauntlet.evaluate, r, lot
    )
    if not uids:
      return {}
    context = config.data.context
    total = split.num_sequences(context)
    everybody = max(collected.membership.peers) + 1
    random = scores_lib.random_ids(config, everybody, r, total, seed, lot)
    found = collected.payloads
    weights = {
      uid: self.shared_model.weigh(p.header) for uid, p in found.items()
    }
    listed, listed_weights = self.messages, self.weights
    if not listed:
      listed = {uid: p.message for uid, p in found.items()}
      listed_weights = weights
    shared = self._judge.scorer.open(
      collected.before.shared.params,
      listed,
      split.read(random, context),
      listed_weights,
    )
    scores = {}
    for uid in uids:
      header = found[uid].header
      claimed, began = header.sequences, r - header.staleness
      seed = self.chain.block_hash(self.plan.assignment_block(began))
      own = scores_lib.own_ids(config, uid, began, total, seed, lot, claimed)
      score = self._judge.scorer.score(
        shared, found[uid].message, split.read(own, context), weights[uid]
      )
      effort = scores_lib.effort(config, claimed)
      scores[uid] = dataclasses.replace(score, effort=effort)
    return scores

  def _keep(self, command: round_lib.Command, head: int) -> None:
    """Stores the round's history; a checkpoint when it is due; forgets.

    What the store does not take now is tried again a round later.
    """
    every, r = self.config.checkpoint.publish, self.state.round
    due = r % every == 0 or r == self.config.rounds
    if due:
      published_checkpoint.publish(
        self.objects, self.place, self.fingerprint(), self.chain.sign
      )
    while self._to_keep:
      self.objects.put_once(*self._to_keep[0])
      del self._to_keep[0]
    if due:
      keep = self.config.checkpoint.keep
      # Who is a little behind still needs what has just been applied.
      oldest = min(published_checkpoint.prune(self.objects, keep), r - 2)
      for kind in 'payloads', 'proposals', 'history', 'verdicts':
        self.objects.delete_before(kind, oldest)

  @property
  def savable(self) -> bool:
    return self.state.previous_round_done(self.can)

  def load(self, saved: dict[str, Any]) -> dict[str, Any]:
    text = super().load(saved)
    self.standings = ratings.from_json(text['standings'])
    return text

  def _text(self) -> dict[str, Any]:
    return super()._text() | {'standings': ratings.to_json(self.standings)}


def _identities(
  membership: membership_lib.Membership,
) -> dict[int, ratings.Identity]:
  return {
    peer.uid: ratings.Identity(peer.hotkey, peer.registered)
    for peer in membership.miners
  }
