"""A node calls its handlers, with fakes for all around it."""

import dataclasses
import json
import types

from absl.testing import absltest
from absl.testing import parameterized

from covenant.chain import interface as chain_lib
from covenant.node import base as node_lib
from covenant.protocol import apply
from covenant.protocol import round as round_lib
from covenant.store import interface as store_lib
from covenant.wire import amendment
from tests import helpers

Phase = round_lib.Phase
ROOT = b'r' * 32


class Role:
  """Remembers one word."""

  def __init__(self):
    self.word, self.ready = 'nothing', True

  def is_savable(self, state):
    return self.ready and not state.out_of_sync

  def save(self, state):
    return {'tree': state.round}, {'word': self.word}

  def load(self, tree, text, state):
    self.word = f'{text["word"]} {tree["tree"]}'
    return state._replace(trained=True)


class NodeTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.calls, self.events = [], []
    self.outcomes = {}  # by phase: what its handler returns or raises

  def node(self, phases=round_lib.MINER, round_index=0):
    context = node_lib.Context(
      helpers.tiny(),
      types.SimpleNamespace(),
      types.SimpleNamespace(),
      types.SimpleNamespace(fingerprint=lambda shared: f'digest of {shared}'),
      observe=self.events.append,
    )

    def handler(node, command, head):
      self.calls.append((command.phase, command.round, head))
      outcome = self.outcomes.get(command.phase)
      if isinstance(outcome, Exception):
        raise outcome
      return outcome

    place = apply.Position(round_index, ROOT, 'parameters')
    handlers = {phase: handler for phase in phases}
    return node_lib.Node(context, place, Role(), handlers)

  def poll(self, node, head):
    """Polls until there is nothing to do; returns the block to wait for."""
    for _ in range(20):
      wake = node.poll(head)
      if wake != head:
        return wake
    raise AssertionError(f'there is always more to do: {self.calls}')

  def test_a_round_of_a_miner(self):
    node = self.node()
    s = node.schedule
    decision = round_lib.Decision(b'd' * 32)
    head = 0
    while head <= s.decision_block(0) + 1 and node.state.round == 0:
      if head > s.decision_block(0):
        self.outcomes[Phase.DECIDE] = decision
      head = self.poll(node, head)
    at = s.decision_block(0) + 1
    self.assertEqual(
      self.calls,
      [
        (Phase.TRAIN, 0, 1),
        (Phase.COMMIT, 0, s.put_opens(0)),
        (Phase.UPLOAD, 0, s.put_opens(0)),
        (Phase.DECIDE, 0, at),
        (Phase.APPLY, 0, at),
        (Phase.TRAIN, 1, at),
        (Phase.KEEP, 1, at),
      ],
    )
    self.assertEqual(
      [(e.block, e.round, e.what) for e in self.events],
      [(head, r, phase.value) for phase, r, head in self.calls],
    )
    self.assertEqual({e.error for e in self.events}, {''})

  def test_it_takes_part_only_in_the_phases_of_its_handlers(self):
    node = self.node({Phase.TRAIN, Phase.DECIDE})
    self.assertEqual(node.phases, {Phase.TRAIN, Phase.DECIDE})
    for head in range(node.schedule.start(1)):
      self.poll(node, head)
    self.assertEqual(self.calls, [(Phase.TRAIN, 0, 1)])

  def test_nothing_to_do_names_the_block_that_brings_something(self):
    node = self.node()
    self.assertEqual(node.poll(0), node.schedule.start(0) + 1)
    self.assertEqual(node.head, 0)
    self.assertEmpty(self.events)
    self.assertEqual(self.poll(node, 1), node.schedule.put_opens(0))

  def test_a_phase_that_must_wait_is_no_event_and_is_repeated(self):
    node = self.node()
    self.outcomes[Phase.TRAIN] = node_lib.RetryLaterError()
    self.assertEqual(node.poll(1), 2)
    self.assertFalse(node.state.trained)
    self.assertEmpty(self.events)
    self.outcomes.clear()
    self.assertEqual(node.poll(2), 2)
    self.assertTrue(node.state.trained)
    self.assertEqual(self.calls, [(Phase.TRAIN, 0, 1), (Phase.TRAIN, 0, 2)])

  @parameterized.parameters(
    (store_lib.StoreUnavailableError('no route'), 'StoreUnavailableError'),
    (store_lib.MissingObjectError('no route'), 'MissingObjectError'),
    (chain_lib.ChainUnreachableError('no route'), 'ChainUnreachableError'),
    (OSError('no route'), 'OSError'),
  )
  def test_an_error_of_the_surroundings_is_an_event_and_retried(
    self, error, name
  ):
    node = self.node()
    self.outcomes[Phase.TRAIN] = error
    self.assertEqual(node.poll(1), 2)
    self.assertFalse(node.state.trained)
    self.assertFalse(node.state.out_of_sync)
    self.outcomes.clear()
    self.assertEqual(node.poll(2), 2)
    first, second = self.events
    self.assertEqual(first.error, f'{name}: no route')
    self.assertEqual((first.block, first.what), (1, 'train'))
    self.assertEqual((second.block, second.error), (2, ''))

  def test_an_error_that_the_operator_must_mend_is_raised(self):
    node = self.node()
    self.outcomes[Phase.TRAIN] = ValueError('a bug')
    with self.assertRaisesRegex(ValueError, 'a bug'):
      node.poll(1)

  def test_out_of_sync_it_catches_up_before_all_else(self):
    node = self.node()
    self.outcomes[Phase.TRAIN] = apply.OutOfSyncError('another root')
    self.assertEqual(node.poll(1), 2)
    self.assertTrue(node.state.out_of_sync)
    self.assertEqual(self.events[0].error, 'OutOfSyncError: another root')
    self.outcomes.clear()
    node.poll(2)
    self.assertEqual(self.calls[-1], (Phase.CATCH_UP, 0, 2))
    # Its handler sets the state; nothing else may.
    self.assertTrue(node.state.out_of_sync)

  def test_only_a_decision_decides(self):
    node = self.node()
    s = node.schedule
    node.state = round_lib.RoundState(0, trained=True)
    node.poll(s.decision_block(0) + 1)
    self.assertTrue(node.state.undecided)
    self.outcomes[Phase.DECIDE] = round_lib.Decision(None)
    node.poll(s.last_decision_block(0) + 1)
    self.assertEqual(node.state.decision, round_lib.Decision(None))

  def test_a_restart_continues_where_it_stopped(self):
    node = self.node(round_index=3)
    node.role.word = 'word'
    saved = node.save()
    self.assertEqual(saved['shared'], 'parameters')
    self.assertEqual(json.loads(saved['text'])['round'], 3)
    other = self.node()
    other.load({**saved, 'shared': 'those'})
    self.assertEqual(other.place, apply.Position(3, ROOT, 'those'))
    self.assertEqual(other.role.word, 'word 3')
    self.assertTrue(other.state.trained)
    self.assertEqual(other.fingerprint(), 'digest of those')

  def test_a_failure_to_make_tools_leaves_it_where_it_was(self):
    one = amendment.make(b'r' * 16, 3, {'optim.outer.learning_rate': 0.5})
    after = apply.Position(3, b'n' * 32, 'others', (one,))
    node, made = self.node(round_index=2), []

    def retool(node):
      made.append(node.config.optim.outer.learning_rate)
      if len(made) == 1:
        raise OSError('no such file')

    model = types.SimpleNamespace(
      amended=lambda config: node.shared_model, fingerprint=str
    )
    node.context = dataclasses.replace(
      node.context, retool=retool, shared_model=model
    )
    before = node.place, node.config, node.schedule
    with self.assertRaises(OSError):
      node.enter(after)
    self.assertEqual((node.place, node.config, node.schedule), before)
    node.enter(after)
    self.assertEqual(made, [0.5, 0.5])
    self.assertEqual(node.place._replace(round=3), after)
    self.assertEqual(node.config.optim.outer.learning_rate, 0.5)
    node.enter(after)
    self.assertLen(made, 2)

  def test_its_role_says_when_a_restart_loses_nothing(self):
    node = self.node()
    self.assertTrue(node.savable)
    node.role.ready = False
    self.assertFalse(node.savable)


if __name__ == '__main__':
  absltest.main()
