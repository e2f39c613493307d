"""Tests of sessions that are canceled, refused or met with silence."""

import asyncio
import time
from unittest import mock

from absl.testing import absltest

from covenant.chain import connection
from covenant.chain import interface
from covenant.chain import session as session_lib
from tests.chain import control
from tests.chain import node as node_lib
from tests.chain import substrate

VERSION = 'state_getRuntimeVersion'  # which the SDK asks for while it opens
PATIENT = connection.Patience(600.0, 600.0, 600.0, 600.0)


class SessionTest(absltest.TestCase):
  """Every socket is closed, whatever ends its session."""

  def setUp(self):
    super().setUp()
    control.isolate(self)
    self.node = node_lib.Node(substrate.Subtensor())
    self.addCleanup(self.node.close)
    self.link = connection.Connection(self.node.url, PATIENT)
    self.addCleanup(self.link.close)
    self.sockets = []
    self.on_open = mock.Mock()  # called by the loop after a socket is opened
    opens = asyncio.SelectorEventLoop.create_connection

    async def create_connection(loop, *args, **kwargs):
      transport, protocol = await opens(loop, *args, **kwargs)
      self.sockets.append(transport.get_extra_info('socket'))
      self.on_open()
      return transport, protocol

    self.enterContext(
      mock.patch.object(
        asyncio.SelectorEventLoop, 'create_connection', create_connection
      )
    )

  def head(self):
    return self.link.read('head', session_lib.finalized)

  def open_sockets(self):
    return [socket for socket in self.sockets if socket.fileno() != -1]

  def test_closed_while_it_opens(self):
    self.node.fail(VERSION, node_lib.HANG)
    reading = asyncio.run_coroutine_threadsafe(
      self.link._once(session_lib.finalized), self.link._loop
    )
    while not self.node.asked[VERSION]:
      time.sleep(0.001)
    self.link.close()
    self.assertTrue(reading.cancelled())
    self.assertLen(self.sockets, 1)
    self.assertEmpty(self.open_sockets())

  def test_canceled_as_its_socket_opens(self):
    self.on_open.side_effect = lambda: self.link._session.cancel()
    with self.assertRaises(interface.ChainUnreachableError):
      self.head()
    self.on_open.side_effect = None
    self.assertEqual(self.head(), 0)
    self.assertLen(self.sockets, 2)
    self.assertLen(self.open_sockets(), 1)

  def test_a_runtime_that_cannot_be_parsed(self):
    self.node.answers['state_call'] = lambda params: '0x6d65'
    for count in range(1, 4):
      with self.assertRaisesRegex(interface.ChainRejectedError, 'metadata'):
        self.head()
      self.assertLen(self.sockets, count)
      self.assertEmpty(self.open_sockets())

  def test_an_endpoint_that_is_silent_when_it_is_closed(self):
    self.head()
    session = self.link._session.result()
    with (
      mock.patch.object(session_lib, '_CLOSE_SECONDS', 0.0),
      mock.patch.object(session.client, 'close', asyncio.Event().wait),
    ):
      self.link.close()
    self.assertLen(self.sockets, 1)
    self.assertEmpty(self.open_sockets())


if __name__ == '__main__':
  absltest.main()
