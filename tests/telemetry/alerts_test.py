import contextlib
import io
import json
import pathlib
import shlex
import sys

from absl.testing import absltest

from covenant import config as config_lib
from covenant.telemetry import alerts as alerts_lib


class AlertsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.now = 0.0
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.file = self.folder / 'alerts.jsonl'
    code = (
      'import sys; open(sys.argv[1], "a").write(sys.stdin.read() + chr(10))'
    )
    arguments = [sys.executable, '-S', '-c', code, str(self.file)]
    self.command = shlex.join(arguments)

  def make(self, **fields):
    config = config_lib.Alerts(**fields)
    return alerts_lib.Alerts(config, {'role': 'miner'}, lambda: self.now)

  def got(self):
    if not self.file.exists():
      return []
    return [json.loads(line) for line in self.file.read_text().splitlines()]

  def test_the_command_gets_the_alert(self):
    alerts = self.make(lost=self.command)
    self.assertTrue(alerts.send('lost', "it's $(gone)", round=3))
    alerts.close()
    (alert,) = self.got()
    self.assertEqual(
      (alert['class'], alert['message'], alert['role'], alert['round']),
      ('lost', "it's $(gone)", 'miner', 3),
    )

  def test_a_class_without_a_command_sends_nothing(self):
    self.assertFalse(self.make(lost=self.command).send('disk', 'low'))

  def test_one_command_for_all_classes(self):
    alerts = self.make(command=self.command)
    self.assertTrue(all([alerts.send(k, 'x') for k in alerts_lib.CLASSES]))
    alerts.close()
    self.assertCountEqual(
      [alert['class'] for alert in self.got()], alerts_lib.CLASSES
    )

  def test_the_rate_is_limited_per_class(self):
    alerts = self.make(command=self.command, every_minutes=10.0)
    sent = []
    for self.now in (0.0, 60.0, 599.0, 600.0):
      sent.append(alerts.send('disk', 'low'))
      alerts.close()
    self.assertEqual(sent, [True, False, False, True])
    self.assertTrue(alerts.send('stalled', 'another class'))
    alerts.close()
    self.assertEqual([a['held_back'] for a in self.got()], [0, 2, 0])

  def test_a_command_that_fails_is_said_without_its_secrets(self):
    for command in ('/no/such --token=secret', 'false secret', "'"):
      err = io.StringIO()
      with contextlib.redirect_stderr(err):
        alerts = self.make(command=command)
        alerts.send('disk', 'low')
        alerts.close()
      self.assertIn('the command of an alert failed', err.getvalue())
      self.assertNotIn('secret', err.getvalue())


if __name__ == '__main__':
  absltest.main()
