"""A model of the vote: honest validators, attackers, and any order of events.

The assumption is that honest validators that are up hold more than half of the
active stake. It is enough: in every case the manifest that holds lists nothing
but what honest validators found valid, and at least half of their choice; and
there is one.

The validators run the real code against a chain and buckets in memory. Each
honest one polls once per block, in any order. Attackers do anything at any
block: they vote for a manifest that is valid, empty or harmful, for two one
after the other, or for one that nobody ever sees, or that is shown late.
"""

import functools
import os
from typing import NamedTuple
from unittest import mock

import hypothesis
import pytest
from absl.testing import absltest
from hypothesis import strategies as st

from covenant.chain import keys
from covenant.gauntlet import checks as checks_lib
from covenant.node import base as node_lib
from covenant.node import validator_role as role_lib
from covenant.node import vote as vote_lib
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.wire import manifest as manifest_lib
from tests.node import network as network_lib

Finding = checks_lib.CheckFinding
FIRST = 3  # uid of the first validator
HARMFUL = 2  # uid of a miner whose message is not valid
SCHEDULE = round_lib.Schedule(network_lib.CONFIG.phases)
BLOCKS = range(SCHEDULE.start(1), SCHEDULE.last_decision_block(0) + 1)
KEYS = {u: keys.Key.from_seed(bytes([u]) * 32) for u in range(FIRST + 5)}


class Act(NamedTuple):
  """An action of an attacker at a block."""

  listed: tuple[int, ...]  # uids; it votes for this manifest
  shown: int  # blocks until the bytes can be fetched; many: never


class Case(NamedTuple):
  """A round of the model."""

  stakes: tuple[int, ...]
  attackers: frozenset[int]  # indices
  acts: dict[tuple[int, int], Act]  # by block and attacker
  orders: dict[int, tuple[int, ...]]  # by block: who polls, in this order


MANIFESTS = st.sampled_from([(), (0,), (1,), (0, 1), (2,), (0, 1, 2)])
ACTS = st.builds(Act, MANIFESTS, st.sampled_from([0, 0, 1, 2, 3, 4, 99]))


@st.composite
def cases(draw):
  """Draws stakes of which honest validators have more than half."""
  n = draw(st.integers(3, 5))
  stakes = tuple(draw(st.integers(1, 9)) for _ in range(n))
  # The largest stakes may be attackers', as long as the rest has a majority.
  attackers, left = set(), sum(stakes)
  for i in draw(st.permutations(range(n))):
    if 2 * (left - stakes[i]) > sum(stakes) and draw(st.integers(0, 3)):
      attackers.add(i)
      left -= stakes[i]
  acts = {}
  for block in BLOCKS:
    for i in sorted(attackers):
      if draw(st.integers(0, 2)) == 0:
        acts[block, i] = draw(ACTS)
  orders = {b: tuple(draw(st.permutations(range(n)))) for b in BLOCKS}
  return Case(stakes, frozenset(attackers), acts, orders)


@functools.cache
def payloads():
  """The payloads of the miners, which do not depend on a chain."""
  network = network_lib.Network(absltest.TestCase())
  network.block = SCHEDULE.put_opens(0)
  return {u: network.payload(network.miner(u)) for u in network_lib.MINERS}


class Model:
  """One round of a case."""

  def __init__(self, test: absltest.TestCase, case: Case):
    self.case = case
    self.network = network = network_lib.Network(test)
    network.block = SCHEDULE.put_opens(0)
    self.entries = {
      uid: manifest_lib.Entry(
        uid, KEYS[uid].address, network.publish(uid, 0, data)
      )
      for uid, data in payloads().items()
    }
    network.block = SCHEDULE.start(1)
    closing = network.read(SCHEDULE.put_closes(0))
    findings = dict.fromkeys(self.entries, Finding.VALID)
    findings[HARMFUL] = Finding.HUGE
    report = checks_lib.CheckReport(
      {u: checks_lib.CheckResult(f) for u, f in findings.items()}, False
    )
    self.nodes = {}
    for i in range(len(case.stakes)):
      node = network.validator(FIRST + i)
      node.role.collected = role_lib.Collected(
        closing, node.place, self.entries, {}, report, [0, 1]
      )
      for uid, entry in self.entries.items():
        node.payloads[entry.digest] = payloads()[uid]
        node.decoded[entry.digest] = uid
      self.nodes[i] = node
    self.hidden = []  # (block, index, manifest)

  def run(self):
    """Returns the decision and the uids of its manifest."""
    for block in BLOCKS:
      self.network.block = block
      for shown, i, data in self.hidden:
        if shown == block:
          self.show(i, data)
      for i in self.case.orders[block]:
        if i not in self.case.attackers:
          self.poll(self.nodes[i], block)
        elif act := self.case.acts.get((block, i)):
          self.attack(i, act, block)
    self.network.block = BLOCKS[-1] + 1
    for last, look in (
      (False, SCHEDULE.decision_block(0)),
      (True, SCHEDULE.last_decision_block(0)),
    ):
      seen = self.network.read(look)
      held = round_lib.decide(0, seen.commitments, seen.stakes(0), last)
      if held is not None:
        return held, self.listed(held.digest)

  def poll(self, node, block):
    """Tells a node what the state machine would, once."""
    finalized = SCHEDULE.finalized(block)
    if node.state.voted and not node.state.undecided:
      if finalized >= SCHEDULE.decision_block(0):
        look = self.network.read(SCHEDULE.decision_block(0))
        held = round_lib.decide(0, look.commitments, look.stakes(0), False)
        node.state = node.state._replace(decision=held, undecided=held is None)
    command = round_lib.next_command(
      SCHEDULE, frozenset({round_lib.Phase.VOTE}), node.state, block
    )
    if command is None:
      return
    try:
      vote_lib.vote(vote_lib.proposal, vote_lib.publish, node, command, block)
      node.state = round_lib.transition(node.state, command)
    except node_lib.RetryLaterError:
      pass

  def attack(self, i, act, block):
    entries = [self.entries[uid] for uid in act.listed]
    data = self.network.manifest(FIRST + i, entries)
    self.network.commit(FIRST + i, 0, run_storage_lib.digest(data))
    if act.shown:
      self.hidden.append((block + act.shown, i, data))
    else:
      self.show(i, data)

  def show(self, i, data):
    objects = self.network.objects(FIRST + i)
    digest = run_storage_lib.digest(data)
    objects.put_once(objects.key('proposals', 0, digest), data)

  def listed(self, digest):
    if digest is None:
      return None
    for i in range(len(self.case.stakes)):
      objects = self.network.objects(FIRST + i)
      try:
        data = objects.bucket.get(
          objects.key('proposals', 0, digest), manifest_lib.MAX_BYTES
        )
      except Exception:
        continue
      manifest = manifest_lib.decode(data, self.network.chain.verify)
      return {entry.uid for entry in manifest.entries}


class VoteModelTest(absltest.TestCase):
  def check(self, case):
    stakes = {FIRST + i: float(s) for i, s in enumerate(case.stakes)}
    known = {u: k for u, k in KEYS.items() if u < FIRST or u in stakes}
    with mock.patch.multiple(network_lib, STAKES=stakes, KEYS=known):
      held, listed = Model(self, case).run()
    self.assertIsNotNone(held.digest, f'a round was lost: {case}')
    self.assertNotIn(HARMFUL, listed)
    self.assertTrue(listed, case)

  @hypothesis.settings(max_examples=40, deadline=None)
  @hypothesis.given(cases())
  def test_an_honest_majority_is_enough(self, case):
    self.check(case)

  @pytest.mark.thorough
  @hypothesis.settings(
    max_examples=int(os.environ.get('VOTE_CASES', '400')), deadline=None
  )
  @hypothesis.given(cases())
  def test_an_honest_majority_is_enough_in_many_cases(self, case):
    self.check(case)


if __name__ == '__main__':
  absltest.main()
