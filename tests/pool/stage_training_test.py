"""Rounds of a pipeline whose stages are lost, late or dishonest."""

import contextlib
import io
import threading
import types
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import metrics
from covenant.node import base as node_lib
from covenant.pool import miner as pool_miner
from covenant.pool import seat_events
from covenant.pool import stage_training
from covenant.train import island as island_lib
from covenant.train import local as local_lib
from covenant.train import pieces as pieces_lib
from covenant.train import replica as replica_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train import step as step_lib
from covenant.wire import payload
from tests.pool import stages

AMENDMENT = {
  'rounds': 9,
  'optim.inner.learning_rate': 0.003,
  'optim.inner.weight_decay': 0.5,
  'optim.outer.learning_rate': 0.5,
}
# Besides 'forward' and 'backward', with tests of their own: the first message
# of the first stage, or of the last, and the workers: three have a neighbor
# with room, and four a spare.
KILLED = (
  ('begin', 3), ('begin', 4), ('last', 3), ('last', 4), ('seal', 3),
  ('order', 4),
)  # fmt: skip


class Once:
  """A fault at a message of a kind: the first, or one `after` some of it."""

  def __init__(self, what, act, after=0):
    self.what, self.act, self.after = what, act, after
    self.who = ''

  def __call__(self, worker, index, text, answer):
    if text['do'] == self.what and not self.who:
      if self.after:
        self.after -= 1
        return answer()
      self.who = worker.address
      return self.act(worker, answer)
    return answer()


def kill(worker, answer):
  """Closes the channel without an answer."""
  del answer
  worker.stopping.set()


def lie(worker, answer):
  """Sends other coordinates."""
  del worker
  reply, sent = answer()
  return reply, bytes(x ^ 0x77 for x in sent[:-16]) + sent[-16:]


def make_up(worker, answer):
  """Sends numbers of its own."""
  del worker
  reply, sent = answer()
  draw = np.random.default_rng(1)
  return reply, draw.bytes(len(sent) - 16) + sent[-16:]


def not_finite(worker, answer):
  """Sends NaN as the step of each position."""
  del worker
  reply, sent = answer()
  return reply, sent[:-64] + b'\xc0\x7f' * 32


class FaultCase(stages.StagesCase):
  """A case whose rounds are delivered, whatever stages do."""

  def check_paid(self, *cheats):
    """The accounts sum, and a cheat has nothing."""
    totals = self.ledger.totals()
    earned = totals.pop('earned')
    self.assertEqual(sum(totals.values()), earned)
    for cheat in cheats:
      self.assertEqual(self.ledger.account(cheat), (0, 0, 0))

  def deliver(self, round_index, pay=0):
    """Trains and applies a round; the network accepts what is sent."""
    trained = self.train(round_index, pay)
    self.assertIsNotNone(trained)
    header, data = self.payload(trained, round_index)
    payload.decode(
      data, header, self.model.abstract_params, self.model.spec,
      lambda *_: True,
    )  # fmt: skip
    self.apply(data, header)
    # The head does not wait for whoever comes in the place of a lost stage.
    self.assertTrue(self.seats.wait(lambda: False))
    return trained

  def killed(self, what, workers):
    """A worker is killed at a message of a kind; the round is delivered."""
    fault = Once(what, kill)
    for i in range(workers):
      stages.Worker(self, f'w{i}', fault)
    self.deliver(0, pay=1000)
    self.deliver(1, pay=2000)
    self.assertTrue(fault.who)
    self.assertGreater(self.seats.replaced, 0)
    self.assertNotIn(fault.who, [self.seats.worker(s) for s in range(3)])
    self.check_paid()


class SectionsTest(parameterized.TestCase):
  @parameterized.parameters(
    dict(norm=1e200, sizes=[1]), dict(norm=10**400, sizes=[1]),
    dict(norm=1.0, sizes=[1e999]), dict(norm=1.0, sizes=3),
    dict(norm=float('nan'), sizes=[1]),
  )  # fmt: skip
  def test_numbers_that_are_none_cost_their_sender_alone(self, **text):
    tensors = types.SimpleNamespace(
      own=[[0], [1]],
      spec=types.SimpleNamespace(tensors=[None, None]),
      sections=lambda stage, sizes, data: [data],
      unchanged=lambda i: b'unchanged',
    )
    head = types.SimpleNamespace(
      _tensors=tensors,
      _refused={},
    )
    right = {'norm': 3.0, 'sizes': [1]}
    sealed = [
      seat_events.Event(0, 'sealed', right, b'right', 'a'),
      seat_events.Event(1, 'sealed', text, b'wrong', 'b'),
    ]
    work = types.SimpleNamespace(seal=lambda: sealed)
    found = stage_training.StageTraining._sections(head, work)
    self.assertEqual(found, ((b'right', b'unchanged'), 3.0))
    self.assertNotIn('a', head._refused)


class ObserveTest(absltest.TestCase):
  def test_a_node_is_told_of_each_step(self):
    step = local_lib.InnerStep(0, 3, 1, 7, 0, 64, 2.5, 1.5, 2.0, 0.5)
    seen = []

    def train_round(task, split, late, pay, observe):
      del late, pay
      self.assertEqual((task.uid, split), (5, 'split'))
      observe(step)

    trainer = types.SimpleNamespace(split='split', observe=seen.append)
    state = local_lib.MinerState(np.int32(2), None, None)
    config = stages.make_config('rounds=9')  # by an amendment
    node = types.SimpleNamespace(
      config=config,
      role=types.SimpleNamespace(
        slot=types.SimpleNamespace(trainer=trainer),
        miner_state=node_lib.Future.done(state),
      ),
    )
    head = mock.create_autospec(stage_training.StageTraining, instance=True)
    head.train_round, head._missed = train_round, -1
    head._ledger, head._stop, head._seats = None, lambda: False, mock.Mock()
    head._seats.missing.return_value = {2, 0}
    head._seats.worker = ['', 'a', 'b'].__getitem__
    head._say_missed = lambda r: stage_training.StageTraining._say_missed(
      head, r
    )
    task = local_lib.Task(5, 3, b'', bytes(32))
    said = self.enterContext(contextlib.redirect_stderr(io.StringIO()))
    with mock.patch.object(pool_miner, 'network_pay', return_value=0):
      for _ in range(2):
        with self.assertRaises(node_lib.RetryLaterError):  # nothing is trained
          stage_training.StageTraining.train(head, node, task, None, None)
    (line,) = said.getvalue().splitlines()
    self.assertRegex(
      line, r'round 3 is missed: .* there: 0 \(no worker\), 2 \(b\)'
    )
    seen.pop()
    steps = node.config.optim.inner_steps
    self.assertEqual(seen, [step._replace(uid=5, joined=2 * steps)])
    self.assertIs(head._config, config)


@pytest.mark.slow
class StageTrainingTest(FaultCase):
  def test_rounds_equal_the_emulated_pipeline(self):
    """Round 1 is by the rules of an amendment."""
    workers = [stages.Worker(self, f'w{i}') for i in range(3)]
    for r in range(2):
      trained = self.train(r, pay=1000 * (r + 1))
      header, data = self.payload(trained, r)
      self.assertEqual(data, self.want_round(r))
      self.apply(data, header)
      self.assertEqual(
        self.model.fingerprint(self.shared),
        self.want.fingerprint(self.want_shared),
      )
      record = self.records[r]
      # 3 steps of 2 microbatches through a layer each.
      self.assertEqual(record['work'], {w.address: 6 for w in workers})
      self.assertEqual((record['replays'], record['caught']), (0, {}))
      # Audits and newcomers begin from the newest published checkpoint.
      self.publish(r + 1)
      self.assertEqual(self.log.base.number, r + 1)
      if not r:
        self.amend(AMENDMENT)
    self.check_paid()
    for worker in workers:
      self.check_measured(worker)
    self.check_newcomer()

  def check_newcomer(self):
    """Nobody is left, and another takes all layers from the checkpoint."""
    self.worker_settings = {'stages': 3}
    stages.Worker(self, 'newcomer')
    self.assertTrue(self.seats.wait(lambda: False))
    leaves = shared_state_lib.named_leaves(self.want_shared)
    for _, digests in self.seats.states():
      for name, found in digests.items():
        want = pieces_lib.piece_digests(leaves[name])
        self.assertEqual(found, [x.hex() for x in want], name)

  def check_measured(self, worker):
    """A stage has written its inner steps, and its first round."""
    worker.stop()
    steps, rounds = (
      metrics.read(worker.process._workdir.path / 'metrics.jsonl', [kind])
      for kind in (metrics.Step, metrics.NodeRound)
    )
    self.assertEqual([x.round for x in steps], [1, 1, 1, 2, 2, 2])
    self.assertEqual([x.step for x in steps], [*range(6)])
    inner, context = self.config.optim.inner, self.config.data.context
    for step in steps:
      self.assertEqual(step.tokens, inner.batch_size * context)
      self.assertGreater(step.learning_rate, 0)
      self.assertGreater(step.loss * step.gradient_norm, 0)
    rate = float(self.want.method.schedule(steps[-1].step))
    self.assertAlmostEqual(steps[-1].learning_rate, rate)
    self.assertEqual([x.round for x in rounds], [1, 2])
    for found in rounds:
      self.assertGreater(found.train_seconds, 0)
      self.assertGreater(found.pool_bytes_sent * found.pool_bytes_received, 0)

  def test_a_spare_takes_the_place_of_a_stage(self):
    self.killed('backward', workers=4)
    self.assertGreater(self.records[0]['replays'], 0)
    self.assertEqual(self.records[0]['steps'], 3)

  def test_a_neighbor_takes_over_the_layers(self):
    self.killed('forward', workers=3)
    self.assertGreater(self.records[0]['replays'], 0)
    # One that comes takes them from the neighbor when it has caught up.
    newcomer = stages.Worker(self, 'newcomer')
    with self.seats._changed:
      self.seats._changed.wait_for(
        lambda: any(
          seat.number == self.log.number for seat in self.seats._coming.values()
        )
      )
    self.assertNotIn(newcomer.address, self.records[1]['holders'])
    self.deliver(2, pay=3000)
    record = self.records[2]
    self.assertIn(newcomer.address, record['holders'])
    self.assertEqual((record['steps'], record['replays']), (3, 0))
    self.assertLen({*record['holders']}, 3)

  def test_a_liar_is_caught_and_paid_nothing(self):
    fault = Once('forward', lie)  # of the worker that gets the first stage
    for i in range(4):
      stages.Worker(self, f'w{i}', fault)
    self.deliver(0)
    self.assertEqual([*self.records[0]['caught']], [fault.who])
    for r in (1, 2):
      self.deliver(r, pay=1000 * r)
      self.assertNotIn(fault.who, self.records[r]['work'])
    self.check_paid(fault.who)

  def test_made_up_activations_of_a_later_step_are_found(self):
    # Two microbatches pass two stages forward in a step.
    fault = Once('forward', make_up, after=5)
    for i in range(3):
      stages.Worker(self, f'w{i}', fault)
    self.train(0)
    self.assertEqual([*self.records[0]['caught']], [fault.who])
    self.assertIn('step 1', self.records[0]['caught'][fault.who])

  def test_who_says_false_digests_is_caught(self):
    def lie_of_digests(worker, answer):
      del worker
      reply, sent = answer()
      # Of a layer, since all stages say digests of the embedding.
      name = next(n for n in reply['digests'] if 'layers' in n)
      reply['digests'][name] = ['00' * 32]
      return reply, sent

    fault = Once('order', lie_of_digests)
    for i in range(4):
      stages.Worker(self, f'w{i}', fault)
    self.deliver(0, pay=1000)
    self.want_round(0)
    want = self.want.fingerprint(self.want_shared)
    self.assertNotEqual(self.model.fingerprint(self.shared), want)
    is_false, liars = self.model.check_stages()
    self.assertEqual((is_false, [*liars]), (True, [fault.who]))
    self.assertEqual(self.model.fingerprint(self.shared), want)
    self.training.accuse(liars)
    self.deliver(1, pay=2000)
    self.assertEqual([*self.records[1]['caught']], [fault.who])
    self.assertNotIn(fault.who, self.records[1]['holders'])
    self.check_paid(fault.who)
    self.assertEqual(self.model.check_stages(), (False, {}))

  def test_numbers_that_are_not_finite_cost_their_sender_the_pay(self):
    fault = Once('last', not_finite)
    for i in range(4):
      stages.Worker(self, f'w{i}', fault)
    trained = self.deliver(0, pay=1000)
    self.assertTrue(np.isfinite(trained.losses).all())
    self.assertEqual([*self.records[0]['refused']], [fault.who])
    self.assertNotIn(fault.who, self.records[0]['work'])
    self.check_paid(fault.who)


@pytest.mark.slow
class BypassTest(FaultCase):
  worker_settings = {'stages': 1}  # no neighbor takes over
  changes = ('pool.bypass_steps=9',)

  def fault(self, worker, index, text, answer):
    """Kills the first two holders of stage 1; in round 1 stage 0 waits."""
    if index == 1 and (worker in self.lost or len(self.lost) < 2):
      if text['do'] == 'forward':
        self.lost.add(worker)
        return kill(worker, answer)
    if index == 0 and text['do'] == 'backward' and len(self.lost) == 2:
      stages.Worker(self, 'third')
      self.assertTrue(self.seats.wait(lambda: False))
      self.lost.add(worker)
    return answer()

  def test_others_go_on_as_the_emulated_pipeline_without_the_stage(self):
    self.lost = set()
    workers = [stages.Worker(self, f'w{i}', self.fault) for i in range(3)]
    trained = self.train(0, pay=1000)
    header, data = self.payload(trained, 0)
    island = island_lib.of(self.config, 0)
    kind = replica_lib.kind(island)
    whole = self.trainer._replicas[kind]
    step = step_lib.inner_step(self.config, None, island, frozenset({1}))
    self.trainer._replicas[kind] = whole._replace(step=step)
    self.assertEqual(data, self.want_round(0))
    record = self.records[0]
    self.assertEqual(record['bypassed'], [0, 3, 0])
    self.assertEqual(record['caught'], {})
    self.assertEqual(sorted(record['work'].values()), [6, 6])
    stages.Worker(self, 'second', self.fault)
    self.apply(data, header)
    self.assertEqual(
      self.model.fingerprint(self.shared),
      self.want.fingerprint(self.want_shared),
    )
    trained = self.deliver(1, pay=2000)
    self.assertTrue(np.isfinite(trained.losses).all())
    record = self.records[1]
    self.assertEqual((record['steps'], record['bypassed']), (3, [0, 1, 0]))
    self.assertEqual(record['caught'], {})
    self.assertEqual(sorted(record['work'].values()), [4, 6, 6])
    self.check_paid()
    del workers


@pytest.mark.slow
class RestartTest(parameterized.TestCase, FaultCase):
  """A head is started again, and the last stage does not come back."""

  worker_settings = {'stages': 1}

  def setUp(self):
    super().setUp()
    self.seats._began -= 100.0  # nobody is expected any more

  @parameterized.parameters(1, 2)
  def test_a_stage_that_never_comes(self, room):
    """A neighbor takes it over, or the round is missed and the next is not."""
    self.worker_settings = {'stages': room}
    workers = [stages.Worker(self, f'w{i}') for i in range(2)]
    if room == 2:
      self.deliver(0, pay=1000)
      holders = self.records[0]['holders']
      self.assertEqual({*holders}, {w.address for w in workers})
      return
    late = lambda: len(self.seats.missing()) == 1  # noqa: E731
    self.assertIsNone(self.train(0, late=late))
    self.seats._patience = 1.0
    # The head takes the step of others' payloads for it.
    header = payload.Header(self.model.run, 0, 0, bytes(16), b'', 0)
    self.apply(self.want_round(0), header)
    self.assertEqual(
      self.model.fingerprint(self.shared),
      self.want.fingerprint(self.want_shared),
    )
    stages.Worker(self, 'newcomer')
    self.assertTrue(self.seats.wait(lambda: False))
    self.deliver(1, pay=1000)
    self.assertEqual(self.records[0]['steps'], 3)


class NobodyTest(parameterized.TestCase, FaultCase):
  """Nobody takes over the stage of a worker that is killed."""

  worker_settings = {'stages': 1}
  changes = ('pool.bypass_steps=9',)

  def round(self, round_index):
    """Trains and applies a round; all members would have this state."""
    trained = self.train(round_index, pay=1000 * (round_index + 1))
    self.assertIsNotNone(trained)
    header, data = self.payload(trained, round_index)
    whole = self.want.decode(data, header, lambda *_: True)
    self.want_shared, _ = self.want.apply_round(
      self.want_shared, {0: whole.message}
    )
    self.apply(data, header)
    self.assertEqual(
      self.model.fingerprint(self.shared),
      self.want.fingerprint(self.want_shared),
    )
    return self.records[-1]

  def killed_alone(self, stage, what):
    """Kills the holder of a stage at a message; another comes later."""
    killed = []

    def fault(worker, index, text, answer):
      if index == stage and text['do'] == what and not killed:
        killed.append(worker.address)
        return kill(worker, answer)
      return answer()

    for i in range(3):
      stages.Worker(self, f'w{i}', fault)
    wait = self.seats.wait
    self.assertTrue(wait(lambda: False))

    def short_wait(stop, until=None):
      """Ends at once for a stage that nobody holds."""
      return wait(
        lambda: stop() or not all(map(self.seats.worker, range(3))), until
      )

    with mock.patch.object(self.seats, 'wait', short_wait):
      records = [self.round(0)]
      if stage == 1:
        records.append(self.round(1))
    self.assertLen(killed, 1)
    self.assertEqual(self.seats.missing(), {stage})
    stages.Worker(self, 'newcomer')
    self.assertTrue(self.seats.wait(lambda: False))
    last = self.round(len(records))
    self.assertEqual((last['steps'], last['bypassed']), (3, [0, 0, 0]))
    self.assertEqual(sorted(last['work'].values()), [6, 6, 6])
    self.assertNotIn(killed[0], last['work'])
    self.assertEqual(
      [r['caught'] for r in (*records, last)], [{}] * len(records) + [{}]
    )
    self.check_paid()
    return records

  @parameterized.parameters(
    ('forward', 3), ('order', 0), ('begin', 3), ('seal', 0)
  )
  @pytest.mark.rows(0, 2)
  def test_an_inner_stage_costs_its_part(self, what, missed):
    first, second = self.killed_alone(1, what)
    self.assertEqual((first['steps'], first['bypassed']), (3, [0, missed, 0]))
    self.assertEqual((second['steps'], second['bypassed']), (3, [0, 3, 0]))
    self.assertEqual(sorted(second['work'].values()), [6, 6])

  @parameterized.parameters((0, 'seal'), (2, 'order'))
  @pytest.mark.slow
  def test_an_outer_stage_costs_nothing_after_the_steps(self, stage, what):
    (first,) = self.killed_alone(stage, what)
    self.assertEqual((first['steps'], first['bypassed']), (3, [0, 0, 0]))

  @pytest.mark.slow
  def test_an_outer_stage_costs_the_steps_that_were_not_taken(self):
    """Nobody comes before the time is over."""
    updates = []

    def fault(worker, index, text, answer):
      if index == 0 and text['do'] == 'update':
        updates.append(text['step'])
      if index == 0 and text['do'] == 'backward' and len(updates) == 1:
        return kill(worker, answer)
      return answer()

    for i in range(3):
      stages.Worker(self, f'w{i}', fault)
    self.assertTrue(self.seats.wait(lambda: False))
    with mock.patch.object(
      self,
      'train',
      lambda r, pay: stages.StagesCase.train(
        self, r, pay, late=lambda: not self.seats.worker(0)
      ),
    ):
      record = self.round(0)
    self.assertEqual(
      (record['steps'], record['sequences']), (1, self.island.batch)
    )
    self.check_paid()


@pytest.mark.slow
class MatrixTest(FaultCase):
  """Kills in every phase, and a stage that does not answer."""

  def test_killed_in_every_phase(self):
    for what, workers in KILLED:
      with self.subTest(what, workers=workers):
        self.doCleanups()
        self.setUp()
        self.killed(what, workers)

  def test_a_slow_stage_costs_steps_and_not_the_round(self):
    slow, over = threading.Event(), threading.Event()

    def late():
      if slow.is_set():
        over.set()
      return over.is_set()

    def fault(worker, index, text, answer):
      del worker
      if index == 1 and text['do'] == 'update':
        slow.set()
        over.wait()
      return answer()

    workers = [stages.Worker(self, f'w{i}', fault) for i in range(3)]
    self.addCleanup(over.set)  # before its worker is stopped
    trained = self.train(0, pay=1000, late=late)
    header, data = self.payload(trained, 0)
    self.apply(data, header)
    record = self.records[0]
    self.assertEqual((record['steps'], record['replaced']), (1, 0))
    self.assertEqual(record['work'], {w.address: 2 for w in workers})
    self.assertEqual(trained.sequences, self.island.batch)
    for i in self.tensors.own[1]:
      self.assertNotEqual(trained.message[i], self.tensors.unchanged(i))
    self.check_paid()

  def test_who_sends_nothing_in_a_later_step_is_caught(self):
    updates = []

    def fault(worker, index, text, answer):
      del worker
      if index == 1 and text['do'] == 'update':
        updates.append(text['step'])
      reply = answer()
      if index == 1 and text['do'] == 'forward' and len(updates) == 1:
        return reply[0], bytes(len(reply[1]))
      return reply

    for i in range(3):
      stages.Worker(self, f'w{i}', fault)
    self.assertIsNotNone(self.train(0, pay=1000))
    (cheat,) = self.records[0]['caught']
    self.assertRegex(self.records[0]['caught'][cheat], 'stage 1, step 1')
    self.assertNotIn(cheat, self.records[0]['work'])
    self.check_paid(cheat)

  def test_a_stage_that_does_not_answer_is_replaced(self):
    never = threading.Event()

    def wait(worker, answer):
      never.wait()
      return answer()

    self.training.patience = 5.0
    fault = Once('backward', wait)
    for i in range(4):
      stages.Worker(self, f'w{i}', fault)
    self.addCleanup(never.set)  # before its worker is stopped
    self.deliver(0)
    self.assertGreater(self.seats.replaced, 0)


if __name__ == '__main__':
  absltest.main()
