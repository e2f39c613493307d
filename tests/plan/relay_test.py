"""Traffic through the head of a pipeline, message by message."""

import collections

from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.plan import hardware
from covenant.plan import relay
from covenant.train.pipeline import boundary_bytes

HEAD, STAGE = 'on 80 Mb/s / 40 Mb/s up', 'on 40 Mb/s / 8 Mb/s up'


def ring(hosts, near=False):
  """A head with one device, and hosts of two."""
  text = (
    f'1xany with 1 GFLOP/s with 8 GB {HEAD} with 20 ms, '
    f'{2 * hosts}xany in pairs with 1 GFLOP/s with 8 GB {STAGE} with 30 ms'
  )
  groups = hardware.parse_inventory(text, config_lib.Plan())
  return relay.Ring(groups, (1, hosts), 0, near)


def walk(ring_, messages):
  """Sends messages (from, to, bytes) between hosts; 0 is the head.

  Returns:
    The bytes that leave and that reach each host, and the seconds of all.
  """
  out, into, seconds = collections.Counter(), collections.Counter(), 0.0
  group = lambda host: ring_.groups[host > 0]  # noqa: E731
  for start, end, size in messages:
    for a, b in ((start, 0), (0, end)):
      if a == b:
        continue
      out[a] += size
      into[b] += size
      # Half of the time there and back of whichever is not the head.
      seconds += size / min(group(a).upload, group(b).download)
      seconds += group(max(a, b)).latency / 2
  return out, into, seconds


class RelayTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 5)
  def test_a_sequence(self, hosts):
    found = relay.sequence(ring(hosts), 1000.0)
    # The hosts of the stages in turn: the last one is beside the head.
    at = [host for host in range(1, hosts + 1) for _ in range(2)] + [0]
    around = list(zip(at, [*at[1:], at[0]], strict=True))
    messages = [(a, b, 500) for a, b in around]
    messages += [(b, a, 500) for a, b in around]
    out, into, seconds = walk(ring(hosts), messages)
    self.assertAlmostEqual(found.sent, out.total())
    self.assertAlmostEqual(found.life, seconds)
    groups = ring(hosts).groups
    busiest = max(
      max(out[h] / groups[h > 0].upload, into[h] / groups[h > 0].download)
      for h in at
    )
    self.assertAlmostEqual(found.slot, busiest)

  @parameterized.parameters(1, 2, 5)
  def test_the_fits_of_a_round(self, hosts):
    found = relay.fit(ring(hosts), 64, 20, 300.0)
    size = boundary_bytes.fit_bytes(64, 20) + 300
    at = [host for host in range(1, hosts + 1) for _ in range(2)] + [0]
    messages = [(a, b, size) for a, b in zip(at, at[1:], strict=False)]
    out, _, seconds = walk(ring(hosts), messages)
    # That the first stage receives none is not taken off.
    first = size / 5e6 + 0.03 / 2
    self.assertAlmostEqual(found.seconds - seconds, first)
    self.assertAlmostEqual(found.sent - out.total(), size)

  def test_payload_of_a_round(self):
    ring_ = ring(3)
    sections = relay.Sections([100_000.0, 500_000.0], 3_150_000.0, 50_000.0)
    found = relay.exchange(ring_, sections, 4)
    # Hosts send 1 MB at 1 MB/s, which the head takes at 10 MB/s; then it sends
    # all at 5 MB/s.
    self.assertAlmostEqual(found.upload, 1.0 + 0.03 + 3.15 / 5 + 0.02)
    # It fetches 12.6 MB at 10 MB/s, a host 4.4 MB for its two stages at 5 MB/s.
    self.assertAlmostEqual(found.gather, 1.26 + 0.02)
    more = relay.exchange(ring_, sections._replace(tables=500_000.0), 4)
    self.assertAlmostEqual(more.gather, 4 * 2 * 1.0 / 5 + 0.03)
    self.assertAlmostEqual(found.relayed, 3e6)
    self.assertAlmostEqual(found.fetched, 4 * (3.15e6 + 6 * 550_000))

  def test_machines_at_one_site_use_their_fabric(self):
    near = ring(3, near=True)
    found = relay.sequence(near, 1000.0)
    fabric = near.groups[0].device.outside
    self.assertAlmostEqual(found.slot, 6 * 1000.0 / fabric)
    sections = relay.Sections([0.0, 0.0], 5e6, 0.0)
    # The payload takes the internet link of the head all the same.
    self.assertAlmostEqual(relay.exchange(near, sections, 1).upload, 1.02)


if __name__ == '__main__':
  absltest.main()
