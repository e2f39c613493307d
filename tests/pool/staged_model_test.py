"""The shared model of a head, with stages that have taken every step."""

import pathlib
from unittest import mock

import numpy as np
from absl.testing import absltest

from covenant import config as config_lib
from covenant.config import amend
from covenant.pool import orders as orders_lib
from covenant.pool import staged_model
from covenant.protocol import run_storage
from covenant.store import interface as store_lib
from covenant.train import shared_state as shared_state_lib
from tests.pool import stages


class Seats:
  """Stages that have done at once what they are told."""

  def __init__(self, log):
    self.log = log
    self.tensors = {'params.x': ['00' * 32]}
    self.here = True
    self.gone = set()
    self.banned = []

  def give(self, order):
    self.log.add(order)

  def rebase(self, base):
    self.log.rebase(base)

  def wait(self, stop, until):
    del until
    return self.here or not stop()

  def missing(self):
    return {0}

  def lost(self):
    return self.gone

  def stand_in(self, stage, digests, square):
    del square
    self.tensors = {**digests, 'params.stage': [f'{stage:064x}']}

  def worker(self, stage):
    return ''

  def states(self):
    return [('a', self.tensors), ('b', self.tensors), ('', self.tensors)]

  def ban(self, name):
    self.banned.append(name)

  def digests(self):
    return [self.tensors]

  def square(self):
    return 9.0


class StagedModelTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = pathlib.Path(self.create_tempdir().full_path)
    self.model = staged_model.StagedModel(stages.make_config())
    self.log = orders_lib.OrderLog(folder, 'g')
    self.seats = Seats(self.log)
    self.auditor = mock.Mock()
    self.is_stopped = True
    self.model.attach(
      self.seats, self.log, self.auditor, lambda: self.is_stopped
    )
    self.first = self.model.init()
    sizes = [100] * len(self.model.spec.tensors)
    self.data = bytes(86 + sum(sizes) + 96)
    tensors = len(sizes)
    self.norms = {0: np.ones(tensors, np.float32)}
    whole = staged_model.WholePayload(None, self.data, 4)
    self.messages = {0: whole}
    ends = [86 + 100 * i for i in range(tensors + 1)]
    self.enterContext(
      mock.patch.object(
        staged_model.payload, 'section_ends', lambda data, spec: ends
      )
    )

  def apply(self, shared):
    return self.model.apply_round(shared, self.messages, norms=self.norms)

  def test_the_state_is_a_number_and_the_fingerprint_that_of_stages(self):
    after, norm = self.apply(self.first)
    self.assertEqual((int(after.params['orders']), norm), (1, 3.0))
    order = self.log.get(0)
    self.assertEqual((order.sources[0].uid, order.sources[0].round), (0, 4))
    np.testing.assert_array_equal(order.factors_RxP, 1.0)
    want = shared_state_lib.state_fingerprint(
      {
        'params.x': [bytes(32)],
        'steps': list(
          shared_state_lib.pieces_lib.piece_digests(np.asarray(after.steps))
        ),
      }
    )
    self.assertEqual(self.model.fingerprint(after), want)

  def test_an_amended_model_orders_by_its_rules(self):
    one, _ = self.apply(self.first)
    changes = {'optim.outer.momentum': 0.25, 'gauntlet.contributors': 3}
    config = amend.amended(self.model.genesis, 1, changes)
    self.model = self.model.amended(config)
    self.apply(one)
    self.assertEqual(self.log.get(0).changes, {})
    self.assertEqual(self.log.get(1).changes, {'optim.outer.momentum': 0.25})

  def test_keeps_the_payloads_of_two_orders(self):
    digest, shared = run_storage.digest(self.data).hex(), self.first
    amended = self.model.amended(
      config_lib.edit(self.model.genesis, ['rounds=9'])
    )
    self.model.locate({digest: ('2f61',)}, ['2f62'])
    for number in range(4):
      self.data = bytes([number]) + self.data[1:]
      self.messages = {0: self.messages[0]._replace(data=self.data)}
      shared, _ = self.apply(shared)
      self.model, amended = amended, self.model
    sources = [self.log.get(number).sources[0] for number in range(4)]
    self.assertEqual(sources[0].locations, ('2f61',))
    # Payloads of rounds before, as in catching up, are in the mirrors.
    self.assertEqual(sources[1].locations, ('2f62',))
    for model in self.model, amended:
      unknown = sources[0]._replace(locations=())
      self.assertEqual(model.places(unknown), ('2f62',))
      self.assertEqual(model.places(sources[0]), ('2f61',))
    for model in self.model, amended:
      found = list(map(model.payload, sources))
      self.assertEqual(found[:2], [None, None])
      self.assertEqual([data[0] for data in found[2:]], [2, 3])

  def test_without_messages_nothing_moves(self):
    self.assertIs(self.model.apply_round(self.first, {})[0], self.first)
    self.assertEqual(self.log.number, 0)

  def test_a_head_that_was_restarted_repeats_its_orders(self):
    one, _ = self.apply(self.first)
    first = self.model.fingerprint(one)
    two, _ = self.apply(one)
    end = self.log.id
    self.seats.tensors = {'params.x': ['11' * 32]}
    again, norm = self.apply(self.first)
    self.assertTrue(np.isnan(norm))
    self.assertEqual(self.model.fingerprint(again), first)
    self.assertEqual((self.log.number, self.log.id), (2, end))
    del two

  def test_a_head_repeats_what_led_to_the_checkpoint_of_its_stages(self):
    """It was saved before it, and the orders until then are forgotten."""
    shared, prints = self.first, []
    for _ in range(3):
      shared, _ = self.apply(shared)
      prints.append(self.model.fingerprint(shared))
    base = orders_lib.Base(2, self.log.state(2))
    self.log.rebase(base)
    end, again = self.log.id, self.first
    for want in prints:
      again, norm = self.apply(again)
      self.assertEqual(self.model.fingerprint(again), want)
      self.assertEqual((self.log.number, self.log.id), (3, end))
    self.assertEqual((self.log.base, norm), (base, 3.0))
    self.assertIsNotNone(self.log.get(2))

  def test_a_state_that_is_forgotten_is_that_of_nobody(self):
    """The orders are lost, and the head was saved; it catches up then."""
    self.is_stopped = False
    for number in 1, 7:
      state = self.first._replace(params={'orders': np.int32(number)})
      self.assertEqual(self.model.fingerprint(state), '0' * 32)

  def test_stopping_ends_the_wait_for_stages(self):
    self.seats.here = False
    with self.assertRaisesRegex(staged_model.StagesMissingError, 'step 0'):
      self.model.fingerprint(self.first)

  def test_the_head_takes_the_step_of_a_stage_that_was_lost(self):
    self.seats.here = self.is_stopped = False
    self.seats.gone = {0}
    self.auditor.outer_step.side_effect = [
      orders_lib.OrderError('nobody has the payload'),
      ({'params.x': ['44' * 32]}, 1.0),
      ({'params.x': ['44' * 32]}, 1.0),
    ]
    with mock.patch.object(staged_model, '_AGAIN_SECONDS', 0.0):
      after, norm = self.apply(self.first)
    self.assertEqual((int(after.params['orders']), norm), (1, 3.0))
    self.assertEqual(self.auditor.outer_step.call_args_list, [mock.call(0)] * 2)
    steps = shared_state_lib.pieces_lib.piece_digests(np.asarray(after.steps))
    want = shared_state_lib.state_fingerprint(
      {
        'params.x': [b'D' * 32],
        'params.stage': [bytes(32)],
        'steps': list(steps),
      }
    )
    self.assertEqual(self.model.fingerprint(after), want)

  def test_a_step_that_nobody_can_take_is_tried_again_by_the_node(self):
    """So it may catch up from a newer checkpoint, when it is too late."""
    self.seats.here = self.is_stopped = False
    self.seats.gone, now = {0}, [0.0]
    lacks = orders_lib.OrderError('nobody has the payload')
    self.auditor.outer_step.side_effect = lacks

    def sleep(seconds):
      now[0] += seconds
      self.assertLess(now[0], 99.0)

    clock = mock.Mock(monotonic=lambda: now[0], sleep=sleep)
    with mock.patch.object(staged_model, 'time', clock):
      with self.assertRaisesRegex(
        store_lib.StoreUnavailableError,
        r'take outer step 1: 0 \(no worker\); .* nobody has the payload',
      ):
        self.apply(self.first)
    self.assertAlmostEqual(now[0], 60.0, delta=2.0)

  def test_who_said_false_digests_is_banned_and_nobody_else(self):
    """The third stage was told of by somebody who has left."""
    self.apply(self.first)
    self.log.set_fingerprint(1, 'false')
    made = (self.seats.tensors, 4.0), ({}, 4.0), ({}, 4.0)
    self.auditor.outer_step.side_effect = made
    is_false, liars = self.model.check_stages()
    self.assertEqual((is_false, [*liars]), (True, ['b']))
    self.assertRegex(liars['b'], 'stage 1, outer step 1: its tensors')
    self.assertEqual(self.seats.banned, ['b'])
    self.assertIsNone(self.log.fingerprint(1))

  def test_nobody_is_accused_before_all_stages_are_computed(self):
    self.apply(self.first)
    self.log.set_fingerprint(1, 'false')
    before = self.seats.tensors
    lacks = orders_lib.OrderError('nobody has the payload')
    self.auditor.outer_step.side_effect = [({}, 4.0), lacks]
    with self.assertRaisesRegex(orders_lib.OrderError, 'nobody'):
      self.model.check_stages()
    self.assertEqual((self.seats.tensors, self.seats.banned), (before, []))

  def test_begins_from_a_checkpoint_of_any_history(self):
    files = {'params.x': ['22' * 32], 'steps': ['33' * 32]}
    steps = np.ones(16, np.float32)
    shared = self.model.adopt(7, files, ['here'], {'steps': steps}.get)
    self.assertEqual(int(shared.params['orders']), 7)
    np.testing.assert_array_equal(shared.steps, steps)
    self.assertEqual(self.log.base.places, ('here',))
    self.assertEqual(self.log.number, 7)

  def test_newcomers_begin_from_a_checkpoint_of_this_history(self):
    after, _ = self.apply(self.first)
    fingerprint = self.model.fingerprint(after)
    steps = shared_state_lib.pieces_lib.piece_digests(np.asarray(after.steps))
    files = {'params.x': ['00' * 32], 'steps': [x.hex() for x in steps]}
    self.apply(after)
    self.assertFalse(self.model.rebase({'params.x': []}, ['here']))
    self.assertTrue(self.model.rebase(files, ['here']))
    self.assertEqual((self.log.base.number, self.log.number), (1, 2))
    self.assertEqual(self.log.fingerprint(1), fingerprint)


if __name__ == '__main__':
  absltest.main()
