"""Traffic through the head of a pipeline, message by message."""

import collections

from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.plan import hardware
from covenant.plan import relay
from covenant.train.pipeline import subspace

HEAD, STAGE = 'on 80 Mb/s / 40 Mb/s up', 'on 40 Mb/s / 8 Mb/s up'


def ring(stages, near=False):
  text = (
    f'1xany with 1 GFLOP/s with 8 GB {HEAD} with 20 ms, '
    f'{stages}xany with 1 GFLOP/s with 8 GB {STAGE} with 30 ms'
  )
  groups = hardware.parse_inventory(text, config_lib.Plan())
  return relay.Ring(groups, (1, stages), 0, near)


def walk(ring_, messages):
  """Sends messages (from, to, bytes) by host; 0 is the head.

  Returns:
    The bytes that leave and that reach each host, and the seconds of all.
  """
  out, into, seconds = collections.Counter(), collections.Counter(), 0.0
  group = lambda host: ring_.groups[host > 0]  # noqa: E731
  for start, end, size in messages:
    legs = [(start, end)] if not start or not end else [(start, 0), (0, end)]
    for a, b in legs:
      out[a] += size
      into[b] += size
      # Half of the time there and back of whichever is not the head.
      seconds += size / min(group(a).upload, group(b).download)
      seconds += group(max(a, b)).latency / 2
  return out, into, seconds


class RelayTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 5)
  def test_a_sequence(self, stages):
    found = relay.sequence(ring(stages), 1000.0)
    hosts = list(range(stages + 1))
    around = list(zip(hosts, [*hosts[1:], 0], strict=True))
    messages = [(a, b, 500) for a, b in around]
    messages += [(b, a, 500) for a, b in around]
    out, into, seconds = walk(ring(stages), messages)
    self.assertAlmostEqual(found.sent, out.total())
    self.assertAlmostEqual(found.life, seconds)
    groups = ring(stages).groups
    busiest = max(
      max(out[h] / groups[h > 0].upload, into[h] / groups[h > 0].download)
      for h in hosts
    )
    self.assertAlmostEqual(found.slot, busiest)

  @parameterized.parameters(1, 2, 5)
  def test_the_fits_of_a_round(self, stages):
    found = relay.fit(ring(stages), 64, 20, 300.0)
    size = subspace.fit_bytes(64, 20) + 300
    messages = [(a, a + 1, size) for a in range(stages)]
    out, _, seconds = walk(ring(stages), messages)
    self.assertAlmostEqual(found.sent, out.total())
    # The last stage waits for an answer that it does not send.
    self.assertBetween(found.seconds - seconds, 0.0, 0.0151)
    self.assertEqual(relay.fit(ring(stages), 64, 0, 300.0), (0.0, 0.0))

  def test_payload_of_a_round(self):
    ring_ = ring(3)
    sections = relay.Sections([100_000.0, 1_000_000.0], 50_000.0)
    found = relay.exchange(ring_, sections, 4)
    self.assertEqual(found.sent, 3_150_000)
    self.assertEqual(found.relayed, 3_000_000)
    # 1 MB/s of a stage is slower than 10 MB/s for three at the head.
    self.assertAlmostEqual(found.upload, 1.0 + 0.03 + 3.15 / 5 + 0.02)
    self.assertEqual(found.fetched, 4 * (3 * 1_050_000 + 150_000))
    self.assertAlmostEqual(found.gather, 4 * 1.05 / 5 + 0.03)

  def test_machines_at_one_site_pass_nothing_through_a_head(self):
    near = ring(3, near=True)
    found = relay.sequence(near, 1000.0)
    self.assertAlmostEqual(found.slot, 1000.0 / near.groups[0].device.outside)
    self.assertEqual(found.sent, 0)
    self.assertEqual(relay.fit(near, 64, 20, 300.0), (0.0, 0.0))


if __name__ == '__main__':
  absltest.main()
