import contextlib
import io
import pathlib
import urllib.request

from absl.testing import absltest

from covenant import config as config_lib
from covenant import metrics
from covenant.telemetry import copies as copies_lib
from covenant.telemetry import trackers

_FAILING = """
class Tracker:
  def log(self, values):
    raise OSError('no answer')
  def finish(self):
    pass
make = lambda run: Tracker()
"""


class CopiesTest(absltest.TestCase):
  def test_a_tracker_that_fails_is_left_out(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    file = self.create_tempfile('failing.py', _FAILING).full_path
    config = config_lib.Telemetry(
      trackers=(f'{file}:make',), prometheus='127.0.0.1:0'
    )
    run = trackers.Run('p', 'n', folder, {}, False)
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
      copies = copies_lib.Copies(config, run, {'role': 'miner'})
      for step in range(3):
        copies.record(metrics.Step(1, step, 8, 2.5 + step, 1.0, 1e-3))
      with urllib.request.urlopen(copies.url, timeout=10) as answer:
        text = answer.read().decode()
      copies.close()
      copies.close()
    self.assertIn('covenant_step_loss 4.5', text)
    self.assertEqual(err.getvalue().count('no answer'), 1)


if __name__ == '__main__':
  absltest.main()
