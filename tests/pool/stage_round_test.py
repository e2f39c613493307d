"""The head's part in a round, with stages that only answer."""

import collections
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant.models import llama
from covenant.pool import seat_events
from covenant.pool import stage_round
from covenant.pool import stage_work
from covenant.train import island as island_lib
from covenant.train.pipeline import stage_bytes
from covenant.train.pipeline import stage_programs
from tests.pool import stages

Event = seat_events.Event


def ones(form):
  """Returns the bytes of arrays of ones."""
  return stage_bytes.to_bytes(
    jax.tree.map(lambda x: np.ones(x.shape, x.dtype), form)
  )


class Stages:
  """Stages that answer every message at once, and a worker for each.

  Attributes:
    faults: by (stage, message), what is done instead of an answer, once.
  """

  def __init__(self, config):
    self.config = config
    self.island = island_lib.of(config, 0)
    self.events = collections.deque()
    self.workers = ['a', 'b', 'c']
    self.spares = ['d', 'e']
    self.banned = set()
    self.faults = {}
    self.said = []
    self.done = collections.Counter()
    self.is_ready = True
    self.absent = set()
    self.under_way = self.most_under_way = 0
    self.coordinates, crossing = (
      ones(
        stage_programs.coordinates(
          config.decoder, self.island, count, config.data.context
        )
      )
      for count in (2, 32)
    )
    self.fit = ones(stage_programs.fits(config.decoder, self.island))
    self.fit += crossing

  def wait(self, stop, until=None):
    return not stop()

  def missing(self):
    return set(self.absent)

  def poll(self, seconds):
    return self.events.popleft() if self.events else None

  def worker(self, stage):
    return self.workers[stage]

  def drop(self, stage, if_another=False, holder=''):
    if holder not in ('', self.workers[stage]):
      return
    if if_another and not self.spares:
      return
    self.workers[stage] = self.spares.pop(0)
    self.events.append(Event(stage, seat_events.LOST, {}, b''))

  def send(self, stage, text, data=b''):
    what = text['do']
    self.said.append((stage, what))
    if fault := self.faults.pop((stage, what), None):
      fault(stage)
    else:
      self.answer(stage, what, text, self.coordinates)

  def say(self, stage, what, text, data):
    event = Event(stage, what, text, data, self.workers[stage])
    self.events.append(event)

  def answer(self, stage, what, text, coordinates):
    last = self.island.stages - 1
    reply = {'attempt': text.get('attempt'), 'seconds': 0.0}
    reply['microbatch'] = text.get('microbatch')
    data = coordinates
    if what == 'begin':
      fit = b'' if stage == last else self.fit
      self.say(stage, 'begun', {'seconds': 0.0}, fit)
      return
    if what == 'fit':
      return
    if what in ('abort', 'update'):
      self.done[stage] = 0
      self.under_way = 0
      return
    if what == 'seal':
      self.say(stage, 'sealed', {'seconds': 0.0}, b's')
      return
    if what == 'look_up':
      what = 'looked_up'
      self.under_way += 1
      self.most_under_way = max(self.under_way, self.most_under_way)
    if what == 'last':
      reply['nats'] = 0.5
    if what == 'backward':
      data = b'' if stage == last else data
      self.under_way -= stage == last
      self.done[stage] += 1
      if self.done[stage] == text['count']:
        names = stage_programs.names(self.config.decoder, self.island, stage)
        own = stage_programs.pick(llama.abstract(self.config.model), names.own)
        count = len(jax.tree.leaves(own))
        reply['squares'] = [1.0] * count
    self.say(stage, what, reply, data)


class StageRoundTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.config = stages.make_config(
      'optim.inner.batch_size=32', 'optim.inner_steps=2'
    )
    self.stages = Stages(self.config)
    self.seen = []

  def run_round(self, late=lambda: False, patience=60.0):
    work = stage_round.StageRound(
      self.config, self.stages.island, self.stages, 1, late, patience,
      np.random.default_rng(0), self.seen.append,
    )  # fmt: skip
    tokens = np.zeros((32, self.config.data.context + 1), np.int32)
    return work, work.train([tokens, tokens], tokens)

  def test_all_microbatches_pass_and_few_at_a_time(self):
    work, result = self.run_round()
    self.assertEqual((result.sequences, result.replays), (64, 0))
    self.assertEqual(result.losses, (8.0, 8.0))
    leaves = len(jax.tree.leaves(llama.abstract(self.config.model)))
    np.testing.assert_allclose(result.norms, leaves**0.5)
    # A layer each, 2 steps of 16 microbatches.
    self.assertEqual(result.work, {'a': 32, 'b': 32, 'c': 32})
    self.assertEqual(self.stages.most_under_way, 2 * 4)
    said = collections.Counter(self.stages.said)
    for what in 'forward', 'backward':
      self.assertEqual(said[1, what], 32)
    self.assertEqual(said[2, 'update'], 2)
    self.assertLen(result.samples, 64)
    self.assertEqual([x.data for x in work.seal()], [b's'] * 3)
    self.assertEqual([x.loss for x in self.seen], [8.0, 8.0])
    self.assertEqual([x.gradient_norm for x in self.seen], [*result.norms])
    self.assertEqual([(x.index, x.schedule_step) for x in self.seen],
                     [(0, 2), (1, 3)])  # fmt: skip
    for step in self.seen:
      self.assertEqual(step.tokens, 32 * self.config.data.context)
      self.assertGreater(step.seconds, step.wait_seconds)

  @parameterized.parameters('forward', 'backward', 'begin')
  def test_a_step_is_sent_again_after_a_loss(self, what):
    self.stages.faults[1, what] = self.stages.drop
    _, result = self.run_round()
    self.assertEqual((result.sequences, result.losses), (64, (8.0, 8.0)))
    self.assertEqual(result.work, {'a': 32, 'd': 32, 'c': 32})
    begun = self.stages.said.count((1, 'begin'))
    self.assertEqual(begun, 2)
    self.assertEqual(self.stages.said.count((0, 'begin')), 1)

  def test_a_stage_that_is_lost_again_and_again_ends_with_the_time(self):
    lost, answer = [], self.stages.answer

    def lose(stage, what, *rest):
      if (stage, what) != (1, 'begin'):
        return answer(stage, what, *rest)
      lost.append(stage)
      self.assertLess(len(lost), 99)
      self.stages.events.append(Event(stage, seat_events.LOST, {}, b''))

    self.stages.answer = lose
    self.stages.wait = lambda stop, until=None: True  # another is there
    self.assertIsNone(self.run_round(late=lambda: len(lost) > 9)[1])
    self.assertLen(lost, 10)

  @parameterized.parameters(True, False)
  def test_who_holds_up_a_whole_round_makes_room_for_another(self, is_whole):
    steps = []

    def update(stage):
      steps.append(stage)

    def stall(stage):
      steps.append(stage)  # no answer, and the time is over

    what = 'last' if is_whole else 'update'
    self.stages.faults[2, what] = stall if is_whole else update
    self.stages.drop = mock.Mock()
    with mock.patch.object(
      stage_round.stage_talk.StageTalk, 'slowest', lambda talk: 2
    ):
      _, result = self.run_round(late=lambda: bool(steps))
    if is_whole:
      self.assertIsNone(result)
      self.stages.drop.assert_called_once_with(2, if_another=True)
    else:
      self.assertLen(result.losses, 1)
      self.stages.drop.assert_not_called()

  @parameterized.parameters(0, 1)
  def test_others_go_on_for_some_steps_without_an_inner_stage(self, steps):
    def leave(stage):
      self.stages.drop(stage)
      self.stages.absent = {stage}

    def wait(stop, until=None):
      del stop, until
      self.stages.absent = set()
      return True

    self.config = stages.make_config(
      'optim.inner.batch_size=32', 'optim.inner_steps=2',
      f'pool.bypass_steps={steps}',
    )  # fmt: skip
    self.stages.faults[1, 'forward'] = leave
    self.stages.wait = wait
    _, result = self.run_round()
    self.assertEqual(result.losses, (8.0, 8.0))
    self.assertEqual(result.bypassed, (0, steps, 0))
    self.assertEqual(result.work, {'a': 32, 'd': 32 - 16 * steps, 'c': 32})
    inner = len(jax.tree.leaves(llama.abstract(self.config.model)['layers_1']))
    whole = result.norms[1] ** 2
    np.testing.assert_allclose(result.norms[0] ** 2, whole - inner * steps)
    # The last stage was given the first boundary for the ring.
    self.assertNotIn((2, 'fit'), self.stages.said)
    self.assertEqual(self.stages.said.count((1, 'update')), 2 - steps)
    crossed = {(x.stage, x.step): x.crossed for x in result.samples}
    self.assertEqual((crossed[2, 0], crossed[2, 1]), (2 - steps, 2))

  def test_others_begin_without_an_inner_stage(self):
    """It comes after a step, and then fits the boundary after it."""
    self.config = stages.make_config(
      'optim.inner.batch_size=32', 'optim.inner_steps=2', 'pool.bypass_steps=9'
    )
    self.stages.absent, self.stages.workers[1] = {1}, ''
    self.stages.wait = lambda stop, until=None: not self.stages.absent

    def come(stage):
      self.stages.absent, self.stages.workers[1] = set(), 'd'

    self.stages.faults[2, 'update'] = come
    _, result = self.run_round()
    self.assertEqual(result.losses, (8.0, 8.0))
    self.assertEqual(result.bypassed, (0, 1, 0))
    self.assertEqual(result.work, {'a': 32, 'c': 32, 'd': 16})
    self.assertEqual({*result.fits}, {1, 2})
    # The last stage learns of the boundary before the bypassed one, which it
    # was given at once, and later of its own.
    self.assertEqual(self.stages.said.count((1, 'begin')), 1)
    self.assertEqual(self.stages.said.count((2, 'fit')), 1)
    crossed = {(x.stage, x.step): x.crossed for x in result.samples}
    self.assertEqual((crossed[2, 0], crossed[2, 1]), (1, 2))

  def test_others_wait_for_an_outer_stage(self):
    self.config = stages.make_config(
      'optim.inner.batch_size=32', 'optim.inner_steps=2', 'pool.bypass_steps=9'
    )
    self.stages.faults[0, 'forward'] = self.stages.drop
    _, result = self.run_round()
    self.assertEqual((result.bypassed, result.replays), ((0, 0, 0), 1))

  def test_a_stage_that_does_not_answer_is_dropped(self):
    self.stages.faults[0, 'forward'] = lambda stage: None
    _, result = self.run_round(patience=-1.0)
    self.assertEqual(result.work, {'d': 32, 'b': 32, 'c': 32})

  @parameterized.parameters(
    (b'short', 'expected .* bytes, got 5'), (None, 'not finite')
  )
  def test_who_sends_nonsense_is_refused(self, data, why):
    def send(stage):
      sent = data or self.stages.coordinates[:-2] + b'\xc0\x7f'
      text = {'attempt': 0, 'microbatch': 0, 'seconds': 0.0}
      self.stages.say(stage, 'forward', text, sent)

    self.stages.faults[1, 'forward'] = send
    _, result = self.run_round()
    self.assertEqual([*result.refused], ['b'])
    self.assertRegex(result.refused['b'], why)
    self.assertEqual(self.stages.banned, {'b'})

  def test_nobody_is_blamed_for_who_held_the_stage_before(self):
    def send(stage):
      self.stages.say(stage, 'forward', {'attempt': 0, 'microbatch': 0}, b'x')
      self.stages.drop(stage)  # it leaves before the head reads that

    self.stages.faults[1, 'forward'] = send
    _, result = self.run_round()
    self.assertEqual([*result.refused], ['b'])
    self.assertEqual(self.stages.banned, {'b'})
    self.assertEqual(result.work, {'a': 32, 'd': 32, 'c': 32})

  def test_samples_and_work_are_of_who_sent_them(self):
    def send(stage):
      text = {'attempt': 0, 'microbatch': 0, 'seconds': 0.0}
      self.stages.say(stage, 'forward', text, self.stages.coordinates)
      self.stages.drop(stage)

    self.stages.faults[1, 'forward'] = send
    with mock.patch.object(stage_work.Samples, 'add') as add:
      _, result = self.run_round()
    samples = [call.args[0] for call in add.call_args_list]
    self.assertEqual(
      [s.worker for s in samples if s.stage == 1][:2], ['b', 'd']
    )
    self.assertEqual(result.work, {'a': 32, 'd': 32, 'c': 32})

  @parameterized.parameters(
    dict(squares=[1.0]), dict(squares='x'), dict(nats='x'), dict(nats=[1]),
    dict(nats=10**400), dict(nats=float('nan')), dict(nats=1e300),
    dict(squares=[10**400]),
  )  # fmt: skip
  def test_who_sends_other_numbers_is_refused(self, **text):
    def send(stage):
      text_ = {'attempt': 0, 'microbatch': 0, **text}
      self.stages.say(stage, 'forward', text_, self.stages.coordinates)

    self.stages.faults[1, 'forward'] = send
    self.assertEqual([*self.run_round()[1].refused], ['b'])

  @parameterized.parameters(float('nan'), float('inf'), 1e300, -1.0)
  def test_who_sends_squares_that_end_the_step_is_refused(self, square):
    answer = self.stages.answer

    def spoil(stage, what, text, coordinates):
      answer(stage, what, text, coordinates)
      if stage == 1 and self.stages.worker(1) == 'b' and self.stages.events:
        said = self.stages.events[-1].text
        if 'squares' in said:
          said['squares'][0] = square

    self.stages.answer = spoil
    _, result = self.run_round()
    self.assertEqual([*result.refused], ['b'])
    self.assertEqual(result.losses, (8.0, 8.0))

  @parameterized.parameters(b'', b'short')
  def test_who_sends_another_fit_is_refused(self, data):
    def send(stage):
      self.stages.say(stage, 'begun', {}, data)

    self.stages.faults[1, 'begin'] = send
    _, result = self.run_round()
    self.assertRegex(result.refused['b'], 'the fit: expected .* bytes')

  @parameterized.parameters(0, 9)
  def test_a_step_that_diverges_everywhere_is_not_taken(self, bypass):
    self.config = stages.make_config(
      'optim.inner.batch_size=32', 'optim.inner_steps=2',
      f'pool.bypass_steps={bypass}',
    )  # fmt: skip
    bad = self.stages.coordinates[:-2] + b'\xc0\x7f'

    def send(attempt):
      def act(stage):
        text = {'attempt': attempt, 'microbatch': 0, 'seconds': 0.0}
        self.stages.say(stage, 'forward', text, bad)

      return act

    drop = self.stages.drop

    def wait(stop, until=None):
      del stop, until
      self.stages.absent = set()
      return True

    def dropped(stage, holder):
      drop(stage, holder)
      self.stages.absent = {stage}
      self.stages.faults[1, 'forward'] = send(1)

    self.stages.drop, self.stages.wait = dropped, wait
    self.stages.faults[1, 'forward'] = send(0)
    _, result = self.run_round()
    self.assertTrue(np.isnan(result.losses[0]))
    self.assertEqual(result.losses[1], 8.0)
    self.assertEmpty(result.refused)

  def test_no_time_is_no_round_and_half_of_it_is_half(self):
    self.assertIsNone(self.run_round(late=lambda: True)[1])
    self.stages = Stages(self.config)
    steps = []

    def stall(stage):
      steps.append(stage)  # no answer, and the time is over

    def second(stage):
      self.stages.faults[2, 'update'] = None
      self.stages.faults[0, 'backward'] = stall

    self.stages.faults[2, 'update'] = second
    _, result = self.run_round(late=lambda: bool(steps))
    self.assertEqual(result.sequences, 32)


if __name__ == '__main__':
  absltest.main()
