"""The answers of a stage that a process holds, and its file."""

import contextlib
import io
import pathlib
import types

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from covenant.pool import orders as orders_lib
from covenant.pool import stage_keeper
from covenant.train import shared_state as shared_state_lib
from tests.pool import orders_test


class Stage:
  """A stage that does next to nothing."""

  context = 3

  def __init__(self):
    self.programs = types.SimpleNamespace(index=1, has_ring=False)
    self.shared = self.initial()
    self.private = self.fresh()
    self.tokens = None
    self.followed = []

  def follow(self, changes):
    self.followed.append(dict(changes))

  def begin(self, tokens, crossing, fits, crossed):
    return b'fit', crossing

  def initial(self):
    return shared_state_lib.SharedState({'x': jnp.zeros(2)}, ())

  def fresh(self):
    return (jnp.zeros(3), np.int32(-1))

  def digests(self):
    return {'params.x': [np.asarray(self.shared.params['x']).tobytes().hex()]}

  def apply(self, sections, update):
    size = sum(len(x) for each in sections for x in each)
    x = self.shared.params['x'] + size
    self.shared = self.shared._replace(params={'x': x})
    self.private = (self.private[0] + 1, np.int32(7))
    return 2.5

  def adopt(self, tensors):
    x = jnp.asarray(np.frombuffer(tensors['params.x'], np.float32))
    self.shared = self.shared._replace(params={'x': x})

  def last(self, microbatch, tokens, came, crossed, divisor):
    self.tokens = tokens, came, crossed, divisor
    return came[::-1], 0.25

  def squares(self):
    return [4.0]

  def abort(self):
    pass


class StageKeeperTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.path = pathlib.Path(self.create_tempdir().full_path) / 'stage-1'
    self.asked = []
    self.keeper = self.make()

  def make(self):
    self.stage = Stage()

    def fetch(number, source):
      self.asked.append((number, source.uid))
      return [b'four']

    def load(pieces, places):
      self.asked.append((dict(pieces), list(places)))
      return {'params.x': np.full(2, 9, np.float32).tobytes()}

    return stage_keeper.StageKeeper(self.stage, self.path, 'g', fetch, load)

  def ask(self, what, data=b'', **text):
    return self.keeper.answer({'do': what, 'stage': 1, **text}, data)

  def order(self, number, before, **changes):
    order = orders_test.order(number, before)._replace(changes=changes)
    text, data = orders_lib.encode(order)
    reply, _ = self.ask('order', data, **text, after=order.after)
    return order, reply

  def test_takes_orders_in_turn_and_goes_on_after_a_restart(self):
    reply, _ = self.ask('take')
    self.assertEqual((reply['number'], reply['id']), (0, 'g'))
    order, reply = self.order(0, 'g')
    self.assertEqual(self.asked, [(0, 0), (0, 4)])
    self.assertEqual((reply['number'], reply['id']), (1, order.after))
    self.assertEqual((reply['stage'], reply['square']), (1, 2.5))
    _, reply = self.order(0, 'g')  # again: nothing happens
    self.assertEqual((reply['number'], len(self.asked)), (1, 2))
    self.keeper = self.make()
    reply, _ = self.ask('take')
    self.assertEqual((reply['number'], reply['id']), (1, order.after))
    np.testing.assert_array_equal(self.stage.shared.params['x'], 8.0)
    self.assertEqual(self.stage.private[1], 7)

  def test_follows_the_rules_of_an_order_and_of_a_round(self):
    first, _ = self.order(0, 'g')
    self.order(1, first.after, rounds=9)
    tokens = np.arange(4, dtype='<i4').tobytes()
    text = {'sequences': 1, 'crossing': 0, 'crossed': 1, 'fits': []}
    self.ask('begin', tokens, **text, changes={'rounds': 7})
    self.ask('begin', tokens, **text)
    self.assertEqual(
      self.stage.followed, [{}, {'rounds': 9}, {'rounds': 7}, {}]
    )

  def test_a_file_of_another_stage_is_no_state(self):
    self.order(0, 'g')
    self.path.write_bytes(self.path.read_bytes()[:-1])
    self.keeper = self.make()
    self.assertEqual(self.ask('take')[0]['number'], 0)

  def test_a_file_with_a_flipped_bit_is_no_state(self):
    self.order(0, 'g')
    whole = self.path.read_bytes()
    for at in range(len(whole)):
      flipped = bytearray(whole)
      flipped[at] ^= 1 << at % 8
      self.path.write_bytes(flipped)
      with contextlib.redirect_stderr(io.StringIO()) as err:
        self.keeper = self.make()
      self.assertEqual(self.ask('take')[0]['number'], 0, at)
      self.assertEqual(self.stage.private[1], -1)
      self.assertIn('differs from what was written', err.getvalue())

  def test_begins_from_a_checkpoint(self):
    self.order(0, 'g')
    text = {'number': 5, 'id': 'base', 'places': ['file:///x']}
    pieces = b'{"params.x": ["00"], "params.other": ["11"]}'
    reply, _ = self.ask('reset', pieces, **text)
    self.assertEqual((reply['number'], reply['id']), (5, 'base'))
    self.assertEqual(self.asked[-1], ({'params.x': ['00']}, ['file:///x']))
    np.testing.assert_array_equal(self.stage.shared.params['x'], 9.0)
    self.assertEqual(self.stage.private[1], -1)
    reply, _ = self.ask('reset', b'{}', number=0, id='g', places=[])
    np.testing.assert_array_equal(self.stage.shared.params['x'], 0.0)

  def test_squares_come_with_the_last_microbatch(self):
    tokens = np.arange(8, dtype='<i4').tobytes()
    text = {'sequences': 2, 'crossed': 1, 'divisor': 6.0, 'count': 2}
    for m in range(2):
      reply, sent = self.ask(
        'last', tokens + b'abc', microbatch=m, attempt=3, **text
      )
      self.assertEqual(sent, b'cba')
      self.assertEqual('squares' in reply, m == 1)
      self.assertEqual((reply['microbatch'], reply['attempt']), (m, 3))
    self.assertEqual(self.stage.tokens[1:], (b'abc', 1, 6.0))
    np.testing.assert_array_equal(
      self.stage.tokens[0], np.arange(8).reshape(2, 4)
    )
    self.assertIsNone(self.ask('abort'))
    reply, _ = self.ask('last', tokens, microbatch=0, attempt=4, **text)
    self.assertNotIn('squares', reply)

  def test_malformed_messages_raise(self):
    for text in {}, {'sequences': 'x'}, {'sequences': 2}:
      with self.assertRaises((KeyError, ValueError)):
        self.ask('last', b'', **text)


if __name__ == '__main__':
  absltest.main()
