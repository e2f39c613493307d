"""The plan's link model against shaped links and published measurements."""

import os
import subprocess
import sys

import pytest
from absl.testing import absltest

from covenant import config as config_lib
from covenant.plan import memory
from experiments import shaped_links

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


class PublishedTest(absltest.TestCase):
  def test_one_number_explains_sixteen(self):
    shares = shaped_links.published()
    self.assertLen(shares, 16)
    for share in shares:
      self.assertBetween(share.factor, 1 / 1.25, 1.25)
    # A longer round never computes a smaller part of it, and a faster link
    # neither.
    by = {(s.rate, s.steps): s.predicted for s in shares}
    self.assertLess(by[50, 1], by[50, 8])
    self.assertLess(by[50, 8], by[200, 8])


class TransfersTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.config = config_lib.load(shaped_links.CONFIG, shaped_links.SETS)

  def test_a_phase_takes_its_bytes(self):
    size = memory.shards(self.config).payload_bytes
    found = shaped_links.transfers(self.config)
    delay = shaped_links.LINK.delay
    self.assertAlmostEqual(found['upload'], delay + 8 * size / 1.5e6)
    self.assertAlmostEqual(found['apply'], delay + 2 * 8 * size / 3e6)
    self.assertAlmostEqual(found['collect'], delay + 3 * 8 * size / 3e6)

  def test_what_is_off_by_more_than_the_bar_is_missed(self):
    added = shaped_links.transfers(self.config)
    free = {name: [1.0, 0.5, 9.0] for name in shaped_links.PHASES}
    limited = {name: [1.0 + seconds] for name, seconds in added.items()}
    limited['apply'] = [2 * limited['apply'][0]]
    phases = shaped_links.compare(self.config, free, limited)
    self.assertAlmostEqual(phases[0].error, 0)
    self.assertAlmostEqual(phases[2].error, -0.5)
    lines = list(shaped_links.table(phases))
    self.assertTrue(lines[2].endswith('+0% | met |'), lines)
    self.assertTrue(lines[-1].endswith('-50% | MISSED |'), lines)


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
    with shaped_links.Wires(['a'], shaped_links.LINK) as wires:
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
