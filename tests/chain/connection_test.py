"""Tests of a chain whose nodes fail, hang or refuse."""

import asyncio
import threading
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from covenant.chain import connection
from covenant.chain import interface
from covenant.chain import session as session_lib
from tests.chain import control
from tests.chain import node as node_lib

READ = 'state_getStorageAt'
SEND = 'author_submitAndWatchExtrinsic'
DROP, HANG = node_lib.DROP, node_lib.HANG
IMPATIENT = connection.Patience(0.1, 0.02, 0.1, 0.0)


def invalid(reason):
  """The answer of a pool that does not take a transaction."""
  return {'code': 1010, 'message': 'Invalid Transaction', 'data': reason}


class ConnectionTest(control.ChainTestCase):
  def test_mends_a_dropped_connection(self):
    self.node.fail(READ, DROP, None, DROP)
    self.assertEqual(self.chain.uid(), 0)
    self.assertEqual(self.chain.uid(), 0)
    self.assertEqual(self.node.planned(READ), 0)
    self.assertGreater(self.node.connections, 1)

  def test_mends_a_connection_that_was_cut_between_calls(self):
    self.node.drop()
    self.assertEqual(self.chain.uid(), 0)

  def test_asks_again_what_got_no_answer(self):
    chain = self.open(connection.Patience(60.0, 1.0, 60.0, 0.0))
    before = self.node.connections
    self.node.fail(READ, HANG)
    self.assertEqual(chain.uid(), 0)
    self.assertGreater(self.node.connections, before)

  def test_gives_up_and_recovers(self):
    chain = self.open(control.ONCE)
    self.node.go_down()
    with self.assertRaisesRegex(
      interface.ChainUnreachableError, 'peers at block 3: 127.0.0.1: '
    ):
      chain.peers(3)
    self.node.come_up()
    chain._connection._patience = connection.Patience()
    self.assertLen(chain.peers(3), 3)

  def test_nothing_waits_for_ever(self):
    self.node.fail(READ, *(999 * [HANG]))
    self.chain._connection._patience = IMPATIENT
    with self.assertRaisesRegex(
      interface.ChainUnreachableError, 'no answer in time'
    ):
      self.chain.uid()
    with self.assertRaises(interface.ChainUnreachableError):
      self.chain.commit(b'x')
    with self.assertRaises(interface.ChainUnreachableError):
      self.open(IMPATIENT)

  def test_a_session_that_opens_as_patience_runs_out_is_kept(self):
    client = mock.AsyncMock()

    async def connect(network, substrate):
      return session_lib.Session(client, substrate, 1)

    async def race():
      attempt = asyncio.create_task(link._once(lambda session: None))
      await asyncio.sleep(0)
      link._session.add_done_callback(lambda _: attempt.cancel())
      await asyncio.wait([attempt])
      return attempt.cancelled()

    link = connection.Connection(self.node.url)
    with mock.patch.object(session_lib, 'connect', connect):
      self.assertTrue(link._run('race', race(), 10))
    self.assertIsNotNone(link._session)
    client.close.assert_not_awaited()
    link.close()
    client.close.assert_awaited_once()

  def test_a_session_is_closed_though_patience_runs_out(self):
    closing = asyncio.Event()
    client = mock.AsyncMock()

    async def connect(network, substrate):
      return session_lib.Session(client, substrate, 1)

    async def close():
      closing.set()
      await asyncio.sleep(0.01)
      client.closed()

    async def fail(session):
      raise ConnectionResetError('reset')

    async def race():
      attempt = asyncio.create_task(link._once(fail))
      await closing.wait()
      attempt.cancel()
      await asyncio.wait([attempt])

    client.close = close
    client.closed = mock.Mock()
    link = connection.Connection(self.node.url)
    with mock.patch.object(session_lib, 'connect', connect):
      link._run('race', race(), 10)
    link.close()
    client.closed.assert_called_once()

  def test_an_endpoint_that_is_fed_up_is_not_asked_again(self):
    refusal = {'code': -32004, 'message': 'Storage work rate limit exceeded'}
    self.node.fail(READ, refusal)
    with self.assertRaisesRegex(interface.ChainUnreachableError, 'rate limit'):
      self.chain.uid()
    self.assertEqual(self.node.connections, 1)
    self.assertEqual(self.chain.uid(), 0)

  def test_is_not_sent_twice(self):
    self.node.fail(SEND, DROP)
    with self.assertRaisesRegex(
      interface.ChainUnreachableError, 'in flight; .* it may have been included'
    ):
      self.chain.commit(b'x')
    self.assertEqual(self.node.asked[SEND], 1)
    self.assertEmpty(self.subnet.sent)
    self.chain.commit(b'y')
    self.assertLen(self.subnet.sent, 1)

  def test_a_send_that_hangs_leaves_no_nonce_behind(self):
    chain = self.open(connection.Patience(60.0, 60.0, 0.5, 0.0))
    self.node.fail(SEND, HANG)
    with self.assertRaisesRegex(
      interface.ChainUnreachableError, 'may have been'
    ):
      chain.commit(b'x')
    chain._connection._patience = connection.Patience()
    chain.commit(b'y')
    self.assertLen(self.subnet.sent, 1)

  @parameterized.parameters(
    ('Transaction is outdated', interface.ChainUnreachableError),
    ('Custom error: 6', interface.ChainRejectedError),
    ('Inability to pay some fees', interface.ChainRejectedError),
  )
  def test_the_pool_says_no(self, reason, error):
    self.node.fail(SEND, invalid(reason))
    with self.assertRaises(error) as caught:
      self.chain.commit(b'x')
    self.assertNotIn('\n', str(caught.exception))

  def test_many_threads(self):
    uids = []
    threads = [
      threading.Thread(target=lambda: uids.append(self.chain.uid()))
      for _ in range(8)
    ]
    self.node.fail(READ, DROP, None, None, DROP)
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    self.assertEqual(uids, [0] * 8)

  def test_no_answer(self):
    self.node.go_down()
    with self.assertRaisesRegex(
      interface.ChainUnreachableError, 'subnet 1: 127.0.0.1: '
    ) as caught:
      self.open(control.ONCE)
    self.assertNotIn('secret', str(caught.exception))
    self.node.come_up()

  def test_garbage_is_no_answer(self):
    chain = self.open(control.ONCE)
    for garbage in (7, 'x', [], {'number': 'x'}):
      with self.subTest(garbage):
        self.node.answers['chain_getHeader'] = lambda params, it=garbage: it
        with self.assertRaises(interface.ChainError) as caught:
          chain.block_hash(3)
          self.subnet.step(5)
          chain.head()
        self.assertNotIn('\n', str(caught.exception))


class SdkErrorTest(control.ChainTestCase):
  """Whatever the SDK raises is an error of the chain."""

  RAISED = (
    ValueError('no such item'),
    KeyError('hotkeys'),
    IndexError('7'),
    TypeError("'NoneType' object is not iterable"),
    AttributeError('total_stake'),
    NotImplementedError('not in this version'),
    OverflowError('int too big'),
    UnicodeDecodeError('utf-8', b'\xff', 0, 1, 'invalid start byte'),
  )
  LOST = (
    OSError('no route to host'),
    TimeoutError(),
    ConnectionResetError(104, 'reset'),
    EOFError(),
    RuntimeError('the event loop is closed'),
  )

  def reads(self):
    return (
      self.chain.head,
      lambda: self.chain.peers(2),
      lambda: self.chain.commitments(2),
      lambda: self.chain.timestamp(2),
      lambda: self.chain.block_hash(2),
      self.chain.uid,
      self.chain.subnet,
    )

  @parameterized.parameters(*RAISED)
  def test_what_one_does_not_know_of_the_other(self, error):
    self.subnet.step()
    link = self.chain._connection

    async def ask(session):
      raise error

    spoken = mock.Mock()
    with mock.patch.object(connection.sys, 'stderr', spoken):
      for _ in range(3):
        with self.assertRaisesRegex(
          interface.ChainRejectedError,
          r'weather: the runtime of 127.0.0.1, spec 462, is not what SDK '
          r'\d+\.\d+\.\d+ knows: ' + type(error).__name__,
        ):
          link.read('weather', ask)
        with self.assertRaises(interface.ChainRejectedError):
          link.write('weather', ask)
    said = ''.join(call.args[0] for call in spoken.write.call_args_list)
    self.assertEqual(said.count('is not what SDK'), 1)  # once
    self.assertEqual(self.node.connections, 1)
    for read in self.reads():  # and it goes on
      read()

  @parameterized.parameters(*LOST)
  def test_what_another_connection_may_mend(self, error):
    link, times = self.chain._connection, []

    async def ask(session):
      times.append(0)
      if len(times) < 3:
        raise error
      return 7

    self.assertEqual(link.read('weather', ask), 7)
    link._patience = connection.Patience(0.5, 0.5, 0.5, pause=60.0)
    times.clear()
    with self.assertRaises(interface.ChainUnreachableError):
      link.read('weather', ask)
    times.clear()
    with self.assertRaises(interface.ChainUnreachableError):
      link.write('weather', ask)

  def test_a_panic_of_compiled_code(self):
    panic = type('PanicException', (BaseException,), {})

    async def ask(session):
      raise panic('called `Option::unwrap()` on a `None` value')

    for call in (self.chain._connection.read, self.chain._connection.write):
      with self.assertRaisesRegex(
        interface.ChainRejectedError, 'PanicException: called'
      ):
        call('weather', ask)


if __name__ == '__main__':
  absltest.main()
