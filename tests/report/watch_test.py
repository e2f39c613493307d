"""Runs before people; tests/emulate/results_test.py has what they return."""

import contextlib
import io
import pathlib
import threading

import pytest
from absl.testing import absltest

import covenant
from tests import helpers


class RunTest(absltest.TestCase):
  @pytest.mark.slow
  def test_stops_by_a_callback_goes_on_and_shows_it(self):
    folder = pathlib.Path(self.create_tempdir().full_path, 'run')
    config, got, out = helpers.tiny('rounds=2'), [], io.StringIO()

    def first():
      stop = [lambda record: record.kind == 'round']
      got.append(covenant.run(config, workdir=folder, callbacks=stop))

    # In a thread, which gets no signals.
    thread = threading.Thread(target=first)
    with contextlib.redirect_stdout(out):
      thread.start()
      thread.join()
    (stopped,) = got
    self.assertFalse(stopped.finished)
    self.assertEqual(stopped.rounds['round'], [1])
    self.assertIn('stopped after round 1 of 2', out.getvalue())
    with contextlib.redirect_stdout(out):
      whole = covenant.run(config, workdir=folder)
    self.assertTrue(whole.finished)
    self.assertEqual(whole.rounds['round'], [1, 2])
    self.assertEqual(whole.rounds['loss'][:1], stopped.rounds['loss'])
    self.assertTrue((folder / 'report.html').exists())
    self.assertIn(f'report: {folder}', out.getvalue())


if __name__ == '__main__':
  absltest.main()
