"""Tests of a chain whose nodes fail, hang or refuse."""

import asyncio
import threading

from absl.testing import absltest
from absl.testing import parameterized
from bittensor._transport import errors

from covenant.chain import connection
from covenant.chain import interface
from tests.chain import control
from tests.chain import substrate

_IMPATIENT = connection.Patience(0.1, 0.02, 0.1, 0.0)


class ConnectionTest(control.ChainTestCase):
  def test_mends_a_dropped_connection(self):
    self.subnet.faults += [
      substrate.DROPPED,
      None,
      substrate.DROPPED,
    ]
    self.assertEqual(self.chain.head(), 3)
    self.assertEqual(self.subnet.dials, 3)
    self.assertEmpty(self.subnet.faults)

  def test_asks_again_what_got_no_answer(self):
    chain = self.open(connection.Patience(60.0, 0.1, 60.0, 0.0))
    dials = self.subnet.dials
    self.subnet.faults += [substrate.HANG]
    self.assertEqual(chain.head(), 3)
    self.assertGreater(self.subnet.dials, dials)

  def test_gives_up_and_recovers(self):
    chain = self.open(control.ONCE)
    self.subnet.faults += [substrate.DROPPED]
    with self.assertRaisesRegex(
      interface.ChainUnreachableError,
      'peers at block 3: in.memory: .*no route to host',
    ):
      chain.peers(3)
    self.assertLen(chain.peers(3), 3)

  def test_goes_on_dialing_where_one_ran_out_of_patience(self):
    gate = asyncio.Event()
    link = self.chain._connection
    self.subnet.faults += [substrate.DROPPED, gate]
    link._patience = control.ONCE
    with self.assertRaisesRegex(interface.ChainUnreachableError, 'no route'):
      self.chain.head()
    link._patience = control.ONCE._replace(attempt=0.02)
    with self.assertRaisesRegex(
      interface.ChainUnreachableError, 'no answer in time'
    ):
      self.chain.head()
    link._loop.call_soon_threadsafe(gate.set)
    link._patience = control.ONCE
    self.assertEqual(self.chain.head(), 3)
    self.assertEqual(self.subnet.dials, 2)

  def test_nothing_waits_for_ever(self):
    self.subnet.faults += 999 * [substrate.HANG]
    self.chain._connection._patience = _IMPATIENT
    with self.assertRaisesRegex(
      interface.ChainUnreachableError, 'no answer in time'
    ):
      self.chain.head()
    with self.assertRaises(interface.ChainUnreachableError):
      self.chain.commit(b'x')
    with self.assertRaises(interface.ChainUnreachableError):
      self.open(_IMPATIENT)

  def test_an_endpoint_that_is_fed_up_is_not_asked_again(self):
    self.subnet.faults += [
      errors.RpcPolicyRejection('rate limited this source (HTTP 429)')
    ]
    with self.assertRaisesRegex(interface.ChainUnreachableError, 'HTTP 429'):
      self.chain.head()
    self.assertEqual(self.subnet.dials, 1)

  def test_is_not_sent_twice(self):
    # Answers to: uid, compose, sign; then the node hangs up on the send.
    self.subnet.faults += [
      None,
      None,
      None,
      errors.SubstrateRequestException(
        'Connection dropped while an extrinsic submission was in flight'
      ),
    ]
    with self.assertRaisesRegex(
      interface.ChainUnreachableError, 'in flight; it may have been included'
    ):
      self.chain.commit(b'x')
    self.assertEmpty(self.subnet.faults)
    self.assertEmpty(self.subnet.sent)
    self.chain.commit(b'y')
    self.assertLen(self.subnet.sent, 1)

  def test_a_send_that_hangs_leaves_no_nonce_behind(self):
    chain = self.open(connection.Patience(60.0, 60.0, 0.2, 0.0))
    self.subnet.faults += [None, None, None, substrate.HANG]
    with self.assertRaisesRegex(
      interface.ChainUnreachableError, 'may have been'
    ):
      chain.commit(b'x')
    self.subnet.faults.clear()
    chain._connection._patience = connection.Patience()
    chain.commit(b'y')

  @parameterized.parameters(
    ('Transaction is outdated', interface.ChainUnreachableError),
    ('Custom error: 6', interface.ChainRejectedError),
    ('Inability to pay some fees', interface.ChainRejectedError),
  )
  def test_the_pool_says_no(self, reason, error):
    self.subnet.faults += [None, None, None, substrate.invalid(reason)]
    with self.assertRaises(error) as caught:
      self.chain.commit(b'x')
    self.assertNotIn('\n', str(caught.exception))

  def test_many_threads(self):
    heads = []
    threads = [
      threading.Thread(target=lambda: heads.append(self.chain.head()))
      for _ in range(8)
    ]
    self.subnet.faults += [substrate.DROPPED, None, None, substrate.DROPPED]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    self.assertEqual(heads, [3] * 8)

  def test_no_answer(self):
    self.subnet.down = True
    with self.assertRaisesRegex(
      interface.ChainUnreachableError, 'subnet 1: in.memory: .*no route to host'
    ) as caught:
      self.open(control.ONCE)
    self.assertNotIn('secret', str(caught.exception))

  def test_nobody_listens(self):
    with self.assertRaisesRegex(interface.ChainUnreachableError, '127.0.0.1'):
      self.open(control.ONCE, network='ws://127.0.0.1:1', dial=None)


if __name__ == '__main__':
  absltest.main()
