import io
import json
from unittest import mock

from absl.testing import absltest

from covenant.chain import interface as chain_lib
from covenant.chain import keys
from covenant.node import connect
from covenant.node import published_status
from covenant.report import status as status_lib
from tests.node import network as network_lib

CONFIG = network_lib.CONFIG
ROUND = CONFIG.phases.round_blocks
STRANGER = keys.Key.from_seed(b's' * 32)  # not registered


class StatusTest(absltest.TestCase):
  """A network in its round 2, seen by somebody who is no member."""

  def setUp(self):
    super().setUp()
    self.network = network_lib.Network(self)
    chain = self.network.chain.seen_by(STRANGER)
    for name, value in (
      ('chain', lambda config, reads_only: chain),
      ('objects', lambda *_, writes: self.network.objects(3)),
    ):
      self.enterContext(mock.patch.object(connect, name, value))
    self.network.block = ROUND
    self.network.commit(2, 0)  # and then never again
    self.network.block = 6 * ROUND
    self.network.commit(0, 5)
    self.network.commit(1, 5)
    self.network.commit(3, 5)
    self.network.block += 1

  def publish(self, uid, **fields):
    made = published_status.make('miner', 'running', 6, 2.5, '')
    run, key = network_lib.shared_model().run, network_lib.KEYS[uid]
    data = published_status.encode(made._replace(**fields), run, key.sign)
    published_status.publish(self.network.objects(uid), data)

  def judge(self, data):
    objects = self.network.objects(3)
    objects.bucket.put(objects.key('verdicts', 4), data)

  def peers(self):
    return status_lib.Observer(CONFIG).look().peers

  def test_who_is_alive_and_where(self):
    self.publish(0)
    self.publish(1, round=4, error='train: lost round')
    zero, one, two, three, *others = self.peers()
    self.assertEqual(
      (zero.role, zero.is_alive, zero.round, zero.lag, zero.loss),
      ('miner', True, 6, 0, 2.5),
    )
    self.assertEqual(
      (one.round, one.lag, one.error), (4, 2, 'train: lost round')
    )
    self.assertEqual((two.is_alive, two.round, two.lag), (False, 0, 6))
    self.assertEqual((three.role, three.stake), ('validator', 60.0))
    self.assertEqual([p.role for p in others], ['', ''])

  def test_a_node_that_says_that_it_has_stopped(self):
    self.publish(0, phase='stopped')
    self.assertFalse(self.peers()[0].is_alive)

  def test_weights_and_refusals_of_a_validator(self):
    decisions = [
      {'uid': 1, 'verdict': 'LATE'},
      {'uid': 0, 'verdict': 'VALID'},
    ]
    verdict = {'round': 4, 'decisions': decisions, 'weights': {'0': 0.75}}
    self.judge(json.dumps(verdict).encode())
    observer = status_lib.Observer(CONFIG)
    found = observer.look()
    self.assertEqual(found.judged, 4)
    zero, one, *_ = found.peers
    self.assertEqual((zero.weight, zero.error), (0.75, ''))
    self.assertEqual((one.weight, one.error), (0.0, 'LATE'))

  def test_a_verdict_that_is_none(self):
    for data in (b'[]', b'\xff', b'{"weights": {"x": 1}, "decisions": []}'):
      self.assertIsNone(status_lib._parse(data))
    self.judge(b'{}')
    self.assertIsNone(status_lib.Observer(CONFIG).look().judged)

  def test_the_table(self):
    self.publish(0, error='a\x1b[2Jb' + 'x' * 100)
    text = status_lib.table(status_lib.Observer(CONFIG).look())
    title, header, first, *rest = text.splitlines()
    self.assertIn('3 of 6 peers alive', title)
    self.assertEqual(header.split(), list(status_lib._HEADER))
    self.assertIn('a?[2Jb', first)
    self.assertLen(rest, 5)
    self.assertNotIn('\x1b', text)

  def test_before_the_first_block(self):
    found = status_lib.RunStatus(-1, 0, None, [])
    self.assertIn('0 of 0 peers', status_lib.table(found))

  def test_watches_until_it_is_asked_to_stop(self):
    stream, slept = io.StringIO(), []
    status_lib.watch(
      CONFIG, stream, True, lambda: len(slept) == 2, slept.append
    )
    self.assertEqual(stream.getvalue().count('peers alive'), 2)

  def test_a_chain_that_does_not_answer(self):
    failing = chain_lib.ChainUnreachableError('no answer')
    stream, slept = io.StringIO(), []
    with mock.patch.object(status_lib.Observer, 'look', side_effect=failing):
      status_lib.watch(CONFIG, stream, True, lambda: bool(slept), slept.append)
      self.assertIn('no answer', stream.getvalue())
      with self.assertRaises(chain_lib.ChainUnreachableError):
        status_lib.watch(CONFIG, stream, False, lambda: False)


if __name__ == '__main__':
  absltest.main()
