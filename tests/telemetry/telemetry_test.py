import contextlib
import errno
import io
import pathlib
import urllib.request
from unittest import mock

from absl.testing import absltest

from covenant import config as config_lib
from covenant import files
from covenant import metrics
from covenant.store import traffic
from covenant.telemetry import machine
from covenant.telemetry import telemetry as telemetry_lib


class TelemetryTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.now = 0.0
    self.alerts = []
    self.spikes = []

  def make(self, *edits):
    config = config_lib.edit(config_lib.Config(), edits)
    node = telemetry_lib.Node('miner', '5F', self.folder)
    made = telemetry_lib.Telemetry(
      config, node, self.spikes.append, lambda: self.now
    )
    made._alerts.send = lambda kind, text, **_: self.alerts.append((kind, text))
    self.addCleanup(made.close)
    return made

  def step(self, made, loss=2.5, norm=1.5, index=0, completed=1):
    step = telemetry_lib.Measured(completed, index, 512, loss, norm, 2.0, 0.5)
    speed = telemetry_lib.Speed(flops_per_token=1e6, peak=1e9)
    made.step(step, 1e-3, 77, speed)

  def read(self, kind):
    return metrics.read(self.folder / 'metrics.jsonl', [kind])

  def test_a_step(self):
    made = self.make('telemetry.prometheus=0')
    self.step(made)
    (step,) = self.read(metrics.Step)
    self.assertEqual(
      (step.loss, step.gradient_norm, step.learning_rate, step.skipped),
      (2.5, 1.5, 1e-3, 0),
    )
    self.assertEqual((step.tokens_per_second, step.mfu), (256.0, 0.256))
    self.assertEqual((step.device_bytes, step.wait_seconds), (77, 0.5))
    self.assertGreater(step.host_bytes, 0)
    with urllib.request.urlopen(made.url, timeout=10) as answer:
      text = answer.read().decode()
    self.assertIn('covenant_step_mfu 0.256', text)
    self.assertNotEmpty(list((self.folder / 'tensorboard').iterdir()))

  def test_a_step_that_is_not_finite(self):
    made = self.make()
    self.step(made, loss=None)
    self.step(made, norm=None)
    self.assertEqual([s.skipped for s in self.read(metrics.Step)], [1, 1])

  def test_a_spike_is_an_event(self):
    made = self.make('telemetry.spike_sigmas=5', 'telemetry.spike_steps=20')
    for i, loss in enumerate([2.0, 2.1] * 10 + [4.0]):
      self.step(made, loss, index=i)
    (text,) = self.spikes
    self.assertRegex(text, 'the loss of inner step 20 is 4, .* deviations')

  def test_a_round(self):
    made = self.make()
    made.pulse(4, 1.0)
    made.event('train', '', 3.0, 'train')
    made.event('commit', 'no answer', 1.0, 'commit')
    made.event('commit', '', 1.0, 'commit')
    made.event('lost round', 'why', 0.0, '')
    made.waited(2.0)
    traffic.TRAFFIC.add('write', 1000, 2.0, 3)
    traffic.TRAFFIC.add('read', 500, 1.0, 1)
    self.now = 10.0
    made.pulse(5, 1.0)
    (found,) = self.read(metrics.NodeRound)
    self.assertEqual((found.round, found.seconds), (5, 10.0))
    self.assertEqual((found.train_seconds, found.commit_seconds), (3.0, 2.0))
    self.assertEqual((found.failures, found.queue_seconds), (1, 2.0))
    self.assertEqual((found.bytes_sent, found.send_rate), (1000, 500.0))
    self.assertEqual((found.bytes_received, found.receive_rate), (500, 500.0))
    self.assertEqual(found.retries, 2)
    self.assertGreater(found.host_free_bytes, 0)
    self.assertIsNone(found.pool_bytes_sent)  # it is in no pool

  def test_a_round_in_a_pool(self):
    made = self.make()
    traffic.POOLS.add('read', 7, 0.0, 1)  # before the first round
    made.pulse(4, 1.0)
    traffic.POOLS.add('write', 1000, 0.0, 1)
    traffic.POOLS.add('read', 500, 0.0, 1)
    traffic.POOLS.add('open', 0, 0.0, 2)
    self.now = 10.0
    made.pulse(5, 1.0)
    (found,) = self.read(metrics.NodeRound)
    self.assertEqual(
      (found.pool_bytes_sent, found.pool_bytes_received), (1000, 500)
    )
    self.assertEqual(
      (found.pool_send_rate, found.pool_receive_rate), (100.0, 50.0)
    )
    self.assertEqual((found.retries, found.bytes_sent), (1, 0))

  def test_a_restart_does_its_last_round_again(self):
    for n in range(2):
      made = self.make()
      self.step(made, completed=1 + n)
      self.step(made, completed=2)
      made.close()
    self.assertEqual([s.round for s in self.read(metrics.Step)], [1, 2, 2])

  def test_a_restart_with_sealed_work_keeps_its_steps(self):
    made = self.make()
    self.step(made, completed=1)
    self.step(made, completed=2)
    made.close()
    again = self.make()
    again.pulse(1, 1.0)
    again.pulse(2, 1.0)
    self.assertEqual([s.round for s in self.read(metrics.Step)], [1, 2])
    self.assertLen(self.read(metrics.NodeRound), 1)

  def test_stalled(self):
    made = self.make('phases.round_blocks=20', 'alerts.stalled_rounds=2')
    for self.now in (0.0, 39.0):
      made.pulse(4, 1.0)
    self.assertEmpty(self.alerts)
    self.now = 41.0
    made.pulse(4, 1.0)
    ((kind, text),) = self.alerts
    self.assertEqual(kind, 'stalled')
    self.assertIn('no round was completed', text)

  def test_a_disk_that_is_almost_full(self):
    made = self.make('alerts.disk_gb=5')
    with mock.patch.object(machine, 'free_disk_bytes', return_value=4 * 10**9):
      made.pulse(0, 1.0)
      made.pulse(1, 1.0)
    self.assertEqual(self.alerts[0][0], 'disk')
    self.assertIn('4.0 GB are free', self.alerts[0][1])

  def test_a_full_disk_loses_a_line_and_not_the_node(self):
    made, err = self.make(), io.StringIO()
    full = OSError(errno.ENOSPC, 'No space left on device')
    self.step(made)
    with (
      mock.patch.object(files, 'append_jsonl', side_effect=full),
      contextlib.redirect_stderr(err),
    ):
      self.step(made, index=1)
      self.step(made, index=2)
    self.step(made, index=3)
    self.assertEqual([s.step for s in self.read(metrics.Step)], [0, 3])
    self.assertEqual(err.getvalue().count('No space left'), 1)
    self.assertEqual({kind for kind, _ in self.alerts}, {'disk'})


if __name__ == '__main__':
  absltest.main()
