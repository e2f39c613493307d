"""The tools and the memory of a validator."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from covenant import typing as ct
from covenant.data import tokens as tokens_lib
from covenant.gauntlet import checks as checks_lib
from covenant.gauntlet import ratings
from covenant.gauntlet import scores as scores_lib
from covenant.node import base as node_lib
from covenant.protocol import apply
from covenant.protocol import membership as membership_lib
from covenant.protocol import rollback
from covenant.protocol import round as round_lib
from covenant.wire import amendment as amendment_lib
from covenant.wire import manifest as manifest_lib
from covenant.wire import payload as payload_lib


class Judge(NamedTuple):
  """The programs that all validators of a process share, compiled once."""

  checker: checks_lib.Checker
  scorer: scores_lib.Scorer
  split: tokens_lib.Split  # of training
  heldout: tokens_lib.Split | None = None


class Evidence(NamedTuple):
  """The data behind a report, for what comes after it."""

  submissions: Sequence[checks_lib.Submission]
  expected: checks_lib.Expected
  previous: Mapping[int, ct.Message]  # of the round before, by uid


class Collected(NamedTuple):
  """The contributions to a round that is being agreed upon."""

  membership: membership_lib.Membership  # at the close of the put window
  before: apply.Position  # the state that the round started from
  entries: Mapping[int, manifest_lib.Entry]  # by uid, committed in time
  payloads: Mapping[int, payload_lib.Decoded]  # by uid, readable
  report: checks_lib.CheckReport
  chosen: list[int]  # the uids that should count, in this validator's eyes
  # Those of them that no lot chose; None: all.
  firm: Collection[int] | None = None
  evidence: Evidence | None = None


@dataclasses.dataclass
class Ballot:
  """The proposals of a round that a validator has seen.

  Attributes:
    proposals: the bytes of manifests, by digest.
    refused: the digests of those that it will not vote for.
    withheld: the digests that nobody had when it asked.
    own: its own proposal, once made: signed again it would be another one.
  """

  proposals: dict[bytes, bytes] = dataclasses.field(default_factory=dict)
  refused: set[bytes] = dataclasses.field(default_factory=set)
  withheld: set[bytes] = dataclasses.field(default_factory=set)
  own: bytes = b''


class Verdict(NamedTuple):
  """A validator's findings about a round."""

  round: int
  decisions: list[dict[str, ct.Json]]  # one per uid
  weights: dict[int, float]


@dataclasses.dataclass
class ValidatorRole:
  """The memory of a validator.

  Attributes:
    judge: the programs that it checks and scores with.
    standings: its ratings of the miners.
    announce: called with every verdict.
    take: called with the digest and the bytes of each payload as it comes.
    collected: the contributions to the round in agreement.
    ballot: the proposals of that round.
    passed: the last round in which a validator was passed over, by hotkey: its
      turn came before that of the maker of the manifest that held.
    to_score: those to the round before, until they are scored.
    scores: the scores of that round, once there: they are made from parameters
      that they change.
    to_keep: objects to store, as (key, bytes).
    weights: to be set on the chain.
    sent: weights that were set, each with the newest block at that time, until
      it is known whether any of them is in force.
    supports: the signatures of validators under amendments that the run may
      adopt, by amendment and hotkey.
    supported: the round since which an amendment has had a majority.
    targets: the states of wanted rollbacks whose checkpoints are in its bucket.
    losses: the held-out losses of the last rounds that were well.
    prints: the fingerprints of its last states, by round.
    diverged: why the model should be rolled back; empty if it is well.
    published_rules: the number of adopted amendments that it has published.
    notes: what its policy remembers, by name; a restart forgets it.
  """

  judge: Judge
  standings: ratings.Ratings = dataclasses.field(
    default_factory=ratings.Ratings
  )
  announce: Callable[[Verdict], None] = lambda verdict: None
  take: Callable[[bytes, bytes], None] = lambda digest, data: None
  collected: Collected | None = None
  ballot: Ballot = dataclasses.field(default_factory=Ballot)
  passed: dict[str, int] = dataclasses.field(default_factory=dict)
  to_score: Collected | None = None
  scores: Mapping[int, scores_lib.Score] | None = None
  to_keep: list[tuple[str, bytes]] = dataclasses.field(default_factory=list)
  weights: dict[int, float] | None = None
  sent: list[tuple[int, dict[int, float]]] = dataclasses.field(
    default_factory=list
  )
  supports: dict[amendment_lib.Amendment, dict[str, bytes]] = dataclasses.field(
    default_factory=dict
  )
  supported: dict[amendment_lib.Amendment, int] = dataclasses.field(
    default_factory=dict
  )
  targets: set[rollback.Target] = dataclasses.field(default_factory=set)
  losses: list[float] = dataclasses.field(default_factory=list)
  prints: dict[int, str] = dataclasses.field(default_factory=dict)
  diverged: str = ''
  published_rules: int = 0
  notes: dict[str, Any] = dataclasses.field(default_factory=dict)

  def is_savable(self, state: round_lib.RoundState) -> bool:
    """True once nothing is left to do about the round before."""
    return state.previous_round_done(round_lib.VALIDATOR)

  def save(
    self, state: round_lib.RoundState
  ) -> tuple[dict[str, ct.PyTree], ct.Json]:
    del state
    sent = [[block, list(weights.items())] for block, weights in self.sent]
    standings = ratings.to_json(self.standings)
    found: dict[str, ct.Json] = {
      'standings': standings,
      'sent': sent,
      'passed': self.passed,
    }
    prints = [[r, text] for r, text in self.prints.items()]
    if self.targets:
      found['targets'] = sorted(self.targets)
    return {}, found | {'losses': self.losses, 'prints': prints}

  def load(
    self, tree: dict[str, ct.PyTree], text: ct.Json, state: round_lib.RoundState
  ) -> round_lib.RoundState:
    del tree
    self.standings = ratings.from_json(text['standings'])
    self.passed = dict(text.get('passed', {}))
    self.losses = list(text.get('losses', []))
    self.prints = dict(text.get('prints', []))
    self.targets = {rollback.Target(*x) for x in text.get('targets', [])}
    self.sent = [(block, dict(pairs)) for block, pairs in text.get('sent', [])]
    return state

  def restart(self, params: ct.Params, round_index: int) -> None:
    """Goes on: ratings are of miners, not of the model."""
    del params, round_index
    self.diverged = ''


Validator: TypeAlias = node_lib.Node[ValidatorRole]


def lottery(node: Validator, round_index: int) -> bytes:
  """Returns a seed that nobody knew before all payloads were committed."""
  return node.chain.block_hash(node.schedule.put_closes(round_index))


def seats(node: Validator) -> int:
  """Returns the number of uids that it looks at, see `scores.seats`."""
  return scores_lib.seats(node.config, node.role.judge.split)


def identities(
  membership: membership_lib.Membership,
) -> dict[int, ratings.Identity]:
  """Returns the hotkey and registration of each miner, by uid."""
  return {
    peer.uid: ratings.Identity(peer.hotkey, peer.registered)
    for peer in membership.miners
  }
