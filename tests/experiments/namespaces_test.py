"""Namespaces whose links are limited, and that leave nothing behind."""

import os
import subprocess
import sys

import pytest
from absl.testing import absltest

from experiments import namespaces

LINK = namespaces.Link(1.5e6, 3e6, 0.04)
_SEND = """
import socket
with socket.create_server(('10.77.255.1', 9000)) as server:
  print('ready', flush=True)
  link, _ = server.accept()
  with link:
    got = b''.join(iter(lambda: link.recv(1 << 16), b''))
    print(len(got), flush=True)
"""
_RECEIVE = """
import socket
with socket.create_connection(('10.77.255.1', 9000)) as link:
  link.sendall(bytes(20_000))
"""


@pytest.mark.network
class WiresTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    if os.geteuid():
      self.skipTest('network namespaces need root')

  def _spaces(self):
    listed = subprocess.run(
      ['ip', 'netns', 'list'], check=True, capture_output=True, text=True
    )
    return {line.split()[0] for line in listed.stdout.splitlines()}

  def test_bytes_cross_a_limited_link(self):
    with namespaces.Wires(['a'], LINK) as wires:
      own = {wires.hub, *wires.spaces.values()}
      self.assertLessEqual(own, self._spaces())
      rates = subprocess.run(
        ['tc', '-n', wires.spaces['a'], 'qdisc', 'show'],
        check=True,
        capture_output=True,
        text=True,
      )
      self.assertIn('rate 1500Kbit', rates.stdout)
      with subprocess.Popen(
        [*wires.under('hub'), sys.executable, '-c', _SEND],
        stdout=subprocess.PIPE,
      ) as server:
        assert server.stdout is not None
        self.assertEqual(server.stdout.readline(), b'ready\n')
        subprocess.run(
          [*wires.under('a'), sys.executable, '-c', _RECEIVE], check=True
        )
        self.assertEqual(server.stdout.readline(), b'20000\n')
    self.assertEmpty(own & self._spaces())


if __name__ == '__main__':
  absltest.main()
