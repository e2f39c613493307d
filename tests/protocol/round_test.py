import dataclasses
import itertools

import hypothesis
import hypothesis.strategies as st
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.protocol import round as round_lib
from covenant.wire import commitment as commitment_lib

Phase = round_lib.Phase
ROLES = (round_lib.MINER, round_lib.VALIDATOR)
# Rounds of twenty blocks, with a phase of each length.
PLAN = round_lib.Schedule(
  config_lib.Phases(
    origin=3,
    round_blocks=20,
    put_blocks=4,
    select_blocks=5,
    takeover_blocks=3,
    confirmations=2,
  )
)


def parsed(phases):
  """The phases as a config has them; raises ConfigError."""
  config = dataclasses.replace(config_lib.Config(), phases=phases)
  return config_lib.parse(dataclasses.asdict(config)).phases


@st.composite
def plans(draw):
  """Any that a config may have, tight ones above all."""
  small = st.integers(1, 4)
  phases = config_lib.Phases(
    origin=draw(st.integers(0, 5)),
    put_blocks=draw(small) + 1,
    confirmations=(confirmations := draw(small)),
    select_blocks=2 * confirmations + draw(small),
    takeover_blocks=draw(small),
  )
  others = phases.put_blocks + phases.select_blocks + phases.takeover_blocks
  least = others + 2 * confirmations + 1
  blocks = least + draw(st.integers(0, 9))
  phases = dataclasses.replace(phases, round_blocks=blocks)
  return round_lib.Schedule(phases, draw(st.booleans()))


class World:
  """The world around a node: how rounds are decided, and what works when.

  Args:
    silent: rounds without a majority at the first look.
    broken: by what is to be done, the blocks at which it fails.
  """

  def __init__(self, silent=(), broken=None):
    self._silent = silent
    self._broken = broken or {}

  def works(self, do, head):
    return head not in self._broken.get(do, ())

  def decision(self, command):
    if command.round in self._silent:
      return round_lib.Decision(None) if command.last else None
    return round_lib.Decision(bytes([command.round % 256]) * 32)


class Node:
  """Obeys as node.Node does, and writes down what it was told."""

  def __init__(self, plan, can, world, round_index=0):
    self.plan, self.can, self.world = plan, can, world
    self.state = round_lib.RoundState(round_index)
    self.log = []  # (block, command, done, state before)

  def poll(self, head):
    """Until there is nothing to do; returns when to ask again."""
    for _ in range(100):
      command = round_lib.next_command(self.plan, self.can, self.state, head)
      if command is None:
        return round_lib.next_wakeup(self.plan, self.state, head)
      done = self.world.works(command.phase, head)
      self.log.append((head, command, done, self.state))
      if not done:
        return head + 1
      if command.phase is Phase.CATCH_UP:
        self.state = round_lib.RoundState(max(self.plan.round_at(head) - 1, 0))
      else:
        decision = None
        if command.phase is Phase.DECIDE:
          decision = self.world.decision(command)
        self.state = round_lib.transition(self.state, command, decision)
    raise AssertionError(f'no end of commands at block {head}: {command}')

  def follow(self, heads):
    for head in heads:
      self.poll(head)
    return self

  def sleep_until(self, end):
    """Asks only when told to."""
    head = 0
    while head < end:
      wake = self.poll(head)
      assert wake > head, f'asked at {head}, told to come back at {wake}'
      head = wake
    return self

  def told(self, *dos):
    """(block, round) of what was done."""
    return [
      (h, c.round) for h, c, done, _ in self.log if done and c.phase in dos
    ]


@st.composite
def nodes(draw, rounds=3):
  """A node before its first block, and the block at which all is over."""
  plan = draw(plans())
  can = draw(st.sampled_from((round_lib.miner(plan), round_lib.VALIDATOR)))
  end = plan.start(rounds)
  blocks = st.integers(0, end)
  outage = st.tuples(blocks, st.integers(0, 15)).map(
    lambda o: range(o[0], o[0] + o[1])
  )
  broken = {
    do: set(itertools.chain(*draw(st.lists(outage, max_size=2))))
    for do in sorted(can, key=str)
  }
  silent = draw(st.sets(st.integers(0, rounds)))
  return Node(plan, can, World(silent, broken)), end


class SafetyTest(parameterized.TestCase):
  @hypothesis.given(
    nodes(),
    st.integers(0, 3),
    st.lists(st.sampled_from([1, 0, 2, 3, 7, 30]), max_size=40).filter(any),
  )
  def test_whatever_the_order_of_events(self, built, first, jumps):
    node, end = built
    node.state = round_lib.RoundState(first)
    heads = itertools.accumulate(itertools.cycle(jumps))
    node.follow(itertools.takewhile(lambda head: head < end, heads))
    self.check(node)

  def check(self, node):
    """All that must hold of a log."""
    done_before = set()
    for head, command, done, state in node.log:
      try:
        self.check_one(node, head, command, state, done_before)
      except AssertionError as e:
        e.add_note(f'block {head}: {command} in {state}')
        raise
      if done and command.phase is Phase.CATCH_UP:
        done_before.clear()  # what was thrown away may be done again
      elif done:
        done_before.add(command)
    later = [*(state for *_, state in node.log), node.state][1:]
    for (_, command, done, state), then in zip(node.log, later, strict=True):
      if not (done and command.phase is Phase.CATCH_UP):
        applied = done and command.phase is Phase.APPLY
        self.assertEqual(then.round, state.round + applied)
      if not done:
        self.assertEqual(then, state)

  def check_one(self, node, head, command, state, done_before):
    plan, r, do = node.plan, command.round, command.phase
    settled, behind = plan.finalized(head), plan.round_at(head) - command.round
    self.assertIn(do, node.can)
    self.assertEqual(r, state.round + (do is Phase.BEGIN))
    self.assertNotIn(command, done_before)
    patience = 1 if state.decision is None else 2
    self.assertEqual(do is Phase.CATCH_UP, behind > patience)
    first_look = round_lib.Command(Phase.DECIDE, r)
    match do:
      case Phase.BEGIN:
        self.assertGreaterEqual(settled, plan.assignment_block(r))
        committed = round_lib.Command(Phase.COMMIT, r - 1) in done_before
        self.assertTrue(committed or head >= plan.put_closes(r - 1))
        self.assertNotIn(round_lib.Command(Phase.APPLY, r - 1), done_before)
      case Phase.TRAIN:
        self.assertGreaterEqual(settled, plan.start(r))
        self.assertLess(head, plan.put_closes(r))
      case Phase.UPLOAD:
        self.assertIn(round_lib.Command(Phase.COMMIT, r), done_before)
        self.assertIsNone(state.decision)
      case Phase.COMMIT:
        # It is in the next block at the earliest.
        self.assertIn(round_lib.Command(Phase.TRAIN, r), done_before)
        self.assertBetween(head, plan.put_opens(r), plan.put_closes(r) - 1)
      case Phase.COLLECT:
        self.assertGreaterEqual(settled, plan.collection_block(r))
      case Phase.VOTE:
        self.assertIn(round_lib.Command(Phase.COLLECT, r), done_before)
        self.assertGreaterEqual(settled, plan.collection_block(r))
      case Phase.DECIDE:
        look = plan.last_decision_block if command.last else plan.decision_block
        self.assertGreaterEqual(settled, look(r))
        self.assertEqual(command.last, first_look in done_before)
      case Phase.APPLY:
        self.assertIn(first_look, done_before)
        self.assertIsNotNone(state.decision)
      case Phase.SCORE | Phase.KEEP:
        self.assertIn(round_lib.Command(Phase.APPLY, r - 1), done_before)

  def test_what_was_done_is_not_done_again(self):
    """Every flag is obeyed: block after block, each once a round."""
    for can in ROLES:
      node = Node(PLAN, can, World()).follow(range(PLAN.start(3)))
      for do in can - {Phase.CATCH_UP, Phase.DECIDE}:
        rounds = [r for _, r in node.told(do)]
        self.assertEqual(rounds, sorted(set(rounds)), do)
        self.assertNotEmpty(rounds, do)

  def test_a_failed_command_comes_back_at_the_next_block(self):
    opens = PLAN.put_opens(1)
    broken = {Phase.COMMIT: {opens, opens + 1}}
    node = Node(PLAN, round_lib.MINER, World(broken=broken))
    node.follow(range(PLAN.start(2)))
    self.assertIn((opens + 2, 1), node.told(Phase.COMMIT))

  def test_who_cannot_commit_in_time_does_not_publish(self):
    broken = {Phase.COMMIT: range(PLAN.put_closes(1))}
    node = Node(PLAN, round_lib.MINER, World(broken=broken))
    node.follow(range(PLAN.start(3)))
    self.assertEqual([r for _, r in node.told(Phase.COMMIT)], [2])
    self.assertEqual([r for _, r in node.told(Phase.UPLOAD)], [2])
    self.assertEqual([r for _, r in node.told(Phase.APPLY)], [0, 1])

  def test_a_store_that_is_down_keeps_nobody_from_training(self):
    for can in ROLES:
      node = Node(PLAN, can, World(broken={Phase.KEEP: range(1000)}))
      node.follow(range(PLAN.start(3)))
      self.assertEqual([r for _, r in node.told(Phase.APPLY)], [0, 1])
      if Phase.TRAIN in can:
        self.assertEqual([r for _, r in node.told(Phase.TRAIN)], [0, 1, 2])


class RoundTest(parameterized.TestCase):
  def test_a_miner_does_this_when(self):
    node = Node(PLAN, round_lib.MINER, World(silent={1}))
    node.follow(range(PLAN.start(2) + 15))
    self.assertEqual(
      [(h, c.phase, c.round, c.last) for h, c, *_ in node.log],
      [
        (5, Phase.TRAIN, 0, False),
        (19, Phase.COMMIT, 0, False),
        (19, Phase.UPLOAD, 0, False),
        (30, Phase.DECIDE, 0, False),
        (30, Phase.APPLY, 0, False),
        (30, Phase.TRAIN, 1, False),
        (30, Phase.KEEP, 1, False),
        (39, Phase.COMMIT, 1, False),
        (39, Phase.UPLOAD, 1, False),
        (50, Phase.DECIDE, 1, False),
        (53, Phase.DECIDE, 1, True),
        (53, Phase.APPLY, 1, False),
        (53, Phase.TRAIN, 2, False),
        (53, Phase.KEEP, 2, False),
      ],
    )

  def test_where_rounds_overlap_a_miner_does_not_wait(self):
    plan = PLAN._replace(overlap=True)
    node = Node(plan, round_lib.miner(plan), World())
    node.sleep_until(plan.start(2) + 3)
    self.assertEqual(
      [(h, c.phase, c.round) for h, c, *_ in node.log],
      [
        (5, Phase.TRAIN, 0),
        (19, Phase.COMMIT, 0),
        (19, Phase.UPLOAD, 0),
        (21, Phase.BEGIN, 1),  # once the block that draws the data is settled
        (30, Phase.DECIDE, 0),
        (30, Phase.APPLY, 0),
        (30, Phase.TRAIN, 1),
        (30, Phase.KEEP, 1),
        (39, Phase.COMMIT, 1),
        (39, Phase.UPLOAD, 1),
        (41, Phase.BEGIN, 2),
      ],
    )

  def test_a_long_put_window_has_the_devices_begin_before_the_commitment(self):
    phases = dataclasses.replace(PLAN.phases, put_blocks=8)
    plan = round_lib.Schedule(phases, overlap=True)
    node = Node(plan, round_lib.miner(plan), World())
    node.sleep_until(plan.start(1) + 3)
    opens, unsure = plan.put_opens(0), phases.confirmations
    self.assertEqual(
      [(h, c.phase, c.round) for h, c, *_ in node.log][1:],
      [
        (opens + unsure, Phase.BEGIN, 1),
        (opens + unsure, Phase.COMMIT, 0),
        (opens + unsure, Phase.UPLOAD, 0),
      ],
    )

  def test_a_validator_does_this_when(self):
    node = Node(PLAN, round_lib.VALIDATOR, World())
    node.follow(range(PLAN.start(2)))
    self.assertEqual(
      [(h, c.phase, c.round) for h, c, *_ in node.log],
      [
        (26, Phase.COLLECT, 0),
        (26, Phase.VOTE, 0),
        (30, Phase.DECIDE, 0),
        (30, Phase.APPLY, 0),
        (30, Phase.SCORE, 1),
        (30, Phase.KEEP, 1),
      ],
    )

  def test_nobody_counts_where_nobody_stood_for_anything(self):
    node = Node(PLAN, round_lib.MINER, World(silent={0}))
    node.follow(range(PLAN.last_decision_block(0) + 2))
    self.assertIsNone(node.state.decision)
    node.poll(PLAN.last_decision_block(0) + 2)
    *_, (_, command, _, state), _, _ = node.log
    self.assertEqual(command, round_lib.Command(Phase.APPLY, 0))
    self.assertEqual(state.decision, round_lib.Decision(None))

  def test_who_is_lost_does_nothing_but_catch_up(self):
    state = round_lib.RoundState(1, out_of_sync=True)
    for can, head in itertools.product(ROLES, range(PLAN.start(3))):
      command = round_lib.next_command(PLAN, can, state, head)
      self.assertEqual(command, round_lib.Command(Phase.CATCH_UP, 1))

  def test_who_has_read_the_decision_may_look_for_it_a_round_longer(self):
    decided = round_lib.RoundState(0, decision=round_lib.Decision(bytes(32)))
    for state, until in (
      (round_lib.RoundState(0), PLAN.start(2)),
      (decided, PLAN.start(3)),
    ):
      for head, want in ((until - 1, False), (until, True)):
        command = round_lib.next_command(PLAN, round_lib.MINER, state, head)
        self.assertEqual(command.phase is Phase.CATCH_UP, want)

  def test_catching_up_follows_no_rule_here(self):
    command = round_lib.Command(Phase.CATCH_UP, 0)
    with self.assertRaisesRegex(ValueError, 'CATCH_UP'):
      round_lib.transition(round_lib.RoundState(0), command)


class LivenessTest(absltest.TestCase):
  @hypothesis.given(nodes())
  def test_asleep_or_awake_is_the_same(self, built):
    """A node that sleeps until `wake` is told the same at the same blocks."""
    node, end = built
    asleep = Node(node.plan, node.can, node.world).sleep_until(end)
    awake = node.follow(range(end))
    self.assertEqual(asleep.log, awake.log)
    self.assertEqual(asleep.state, awake.state)

  @hypothesis.given(nodes(), st.integers(0, 2), st.integers(0, 9))
  def test_everybody_reaches_the_current_round(self, built, first, later):
    """Once all works again: within two rounds, and for good."""
    node, end = built
    plan = node.plan
    node.state = round_lib.RoundState(first)
    node.follow(range(end))
    broken = {do: set() for do in node.can}
    node.world = World(silent=range(0, 100, 2), broken=broken)
    ready = plan.start(plan.round_at(end + 15) + 2 + later)
    latest = 0
    for head in range(ready, plan.start(plan.round_at(ready) + 4)):
      node.poll(head)
      now = plan.round_at(head)
      self.assertBetween(node.state.round, now - 1, now)
      if plan.finalized(head) >= plan.last_decision_block(now - 1):
        self.assertEqual(node.state.round, now)
        latest = now
    self.assertEqual(latest, plan.round_at(ready) + 3)
    if Phase.UPLOAD in node.can:  # and takes part in all of them
      trained = {r for _, r in node.told(Phase.UPLOAD)}
      self.assertContainsSubset(range(plan.round_at(ready) + 1, now), trained)

  @hypothesis.given(plans(), st.integers(2, 50))
  def test_who_comes_late_catches_up_once(self, plan, rounds):
    for can in ROLES:
      node = Node(plan, can, World())
      node.follow(range(plan.start(rounds), plan.start(rounds + 2)))
      self.assertLen(node.told(Phase.CATCH_UP), 1)
      self.assertEqual(
        [r for _, r in node.told(Phase.APPLY)], [rounds - 1, rounds]
      )


class ScheduleTest(absltest.TestCase):
  @hypothesis.given(plans(), st.integers(0, 1000))
  def test_phases_follow_each_other(self, plan, r):
    phases = parsed(plan.phases)
    turns = [
      plan.start(r),
      plan.put_opens(r),
      plan.put_closes(r),
      plan.proposes(r, 0),
      plan.decision_block(r),
      plan.last_decision_block(r),
    ]
    self.assertEqual(turns, sorted(set(turns)))
    self.assertEqual(plan.proposes(r, 0), plan.start(r + 1))
    self.assertEqual(
      plan.put_closes(r) - plan.put_opens(r) + 1, phases.put_blocks
    )
    # The leader's vote is in a block before the first look ...
    voted = plan.collection_block(r) + phases.confirmations + 1
    self.assertLessEqual(voted, plan.decision_block(r))
    # ... and that of any validator, however many are silent before it, by the
    # end of this window, once it has seen that no earlier one proposes ...
    proposal = plan.collection_block(r) + phases.confirmations + 1
    for rank in (1, 2, 3, 10, 1000):
      turn = plan.proposes(r, rank)
      self.assertLessEqual(turn, plan.decision_block(r))
      self.assertGreaterEqual(turn, plan.proposes(r, rank - 1))
      seen = proposal + phases.confirmations
      self.assertGreaterEqual(turn, min(seen, plan.decision_block(r)))
      proposal = turn + 1
    self.assertBetween(
      plan.last_proposal_block(r),
      plan.decision_block(r),
      plan.last_decision_block(r) - 1,
    )
    # ... and after the last one there is time to train.
    applied = plan.last_decision_block(r) + phases.confirmations
    self.assertLess(applied, plan.put_opens(r + 1))

  @hypothesis.given(plans(), st.integers(0, 1000))
  def test_a_block_is_in_one_round(self, plan, block):
    r = plan.round_at(block)
    self.assertBetween(block, plan.start(r), plan.start(r + 1) - 1)

  def test_impossible_phases_are_refused(self):
    for change, field in (
      (dict(round_blocks=16), 'round_blocks'),
      (dict(put_blocks=1), 'put_blocks'),
      (dict(select_blocks=2), 'select_blocks'),
      (dict(confirmations=0), 'confirmations'),
    ):
      with self.assertRaisesRegex(config_lib.ConfigError, f'phases.{field}'):
        parsed(dataclasses.replace(PLAN.phases, **change))
    parsed(PLAN.phases)


def vote(digest, round_index=7):
  return commitment_lib.Commitment(
    commitment_lib.Role.VALIDATOR, b'', round_index, digest
  )


_DIGESTS = [bytes([i]) * 32 for i in range(4)]
# TAO in whole rao, as chains have them; ties are likely.
_STAKES = st.sampled_from([0.0, 1.0, 2.0, 3.0]) | st.integers(0, 10**15).map(
  lambda rao: rao / 10**9
)


@st.composite
def elections(draw):
  """(votes, stakes); some uids vote without stake, some have it and do not."""
  uids = st.integers(0, 7)
  rounds = st.sampled_from([7, 7, 7, 6, 8, None])
  ballots = st.builds(vote, st.sampled_from(_DIGESTS), rounds)
  votes = draw(st.dictionaries(uids, ballots))
  return votes, draw(st.dictionaries(uids, _STAKES))


class DecideTest(parameterized.TestCase):
  @hypothesis.given(elections(), st.booleans(), st.randoms())
  def test_is_a_function_of_votes_and_stakes_only(self, election, last, random):
    def shuffled(mapping):
      items = list(mapping.items())
      random.shuffle(items)
      return dict(items)

    votes, stakes = election
    self.assertEqual(
      round_lib.decide(7, votes, stakes, last),
      round_lib.decide(7, shuffled(votes), shuffled(stakes), last),
    )

  def test_sums_do_not_depend_on_an_order(self):
    votes = {0: vote(self.B), 1: vote(self.B), 2: vote(self.B), 3: vote(self.A)}
    stakes = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.6}  # added up, 0.6 or a bit more
    backwards = dict(reversed(stakes.items()))
    self.assertEqual(
      round_lib.decide(7, votes, stakes, True),
      round_lib.decide(7, votes, backwards, True),
    )

  @hypothesis.given(elections())
  def test_what_a_majority_wants_stays(self, election):
    votes, stakes = election
    first = round_lib.decide(7, votes, stakes, False)
    last = round_lib.decide(7, votes, stakes, True)
    self.assertIsNotNone(last)
    if first is not None:
      self.assertIsNotNone(first.digest)
      self.assertEqual(first, last)

  @hypothesis.given(elections(), st.booleans())
  def test_strangers_and_other_rounds_do_not_vote(self, election, last):
    votes, stakes = election
    counted = {
      uid: v for uid, v in votes.items() if uid in stakes and v.round == 7
    }
    got = round_lib.decide(7, votes, stakes, last)
    self.assertEqual(got, round_lib.decide(7, counted, stakes, last))
    if got is not None and got.digest is not None:
      self.assertIn(got.digest, {v.digest for v in counted.values()})
    if last and not counted:
      self.assertEqual(got, round_lib.Decision(None, majority=False))

  @hypothesis.given(elections())
  def test_it_takes_more_than_half_of_all_stake(self, election):
    votes, stakes = election
    got = round_lib.decide(7, votes, stakes, True)

    def weight(digest):
      return sum(
        stake
        for uid, stake in sorted(stakes.items())
        if votes.get(uid) == vote(digest)
      )

    total = sum(stakes[uid] for uid in sorted(stakes))
    wanted = [d for d in _DIGESTS if 2 * weight(d) > total]
    self.assertEqual([got.digest], wanted or [None])
    self.assertEqual(got.majority, bool(wanted))
    first = round_lib.leading(7, votes, stakes)
    if first is not None:
      self.assertEqual(weight(first), max(map(weight, _DIGESTS)))

  A, B = _DIGESTS[1], _DIGESTS[2]

  @parameterized.parameters(
    # votes, stakes, at the first look, at the last one
    ({}, {}, None, (None,)),
    ({}, {0: 5.0}, None, (None,)),
    ({0: A}, {0: 5.0}, (A,), (A,)),
    ({0: A}, {0: 5.0, 1: 5.0}, None, (None,)),
    ({0: A}, {0: 5.0, 1: 4.0}, (A,), (A,)),
    ({0: A, 1: B}, {0: 5.0, 1: 4.0}, (A,), (A,)),
    ({0: B, 1: A}, {0: 5.0, 1: 5.0}, None, (None,)),
    ({0: A, 1: B}, {0: 5.0, 1: 5.0}, None, (None,)),
    ({0: A, 1: B, 2: B}, {0: 5.0, 1: 3.0, 2: 4.0}, (B,), (B,)),
    ({0: A, 1: B}, {0: 5.0, 1: 4.0, 2: 3.0}, None, (None,)),
    ({0: B}, {0: 0.0}, None, (None,)),
    ({0: B, 1: A}, {0: 0.0, 1: 0.0}, None, (None,)),
    ({0: B, 1: A}, {0: 1.0, 1: 0.0}, (B,), (B,)),
    ({5: A}, {0: 1.0}, None, (None,)),
  )
  def test_examples(self, votes, stakes, first, last):
    votes = {uid: vote(digest) for uid, digest in votes.items()}
    for looks, want in ((False, first), (True, last)):
      if want is not None:
        # What a majority wants, it wants at the first look.
        want = round_lib.Decision(*want, majority=first is not None)
      self.assertEqual(round_lib.decide(7, votes, stakes, looks), want)


if __name__ == '__main__':
  absltest.main()
