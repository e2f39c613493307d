"""Emulations that end within a round, and go on in another process."""

import itertools
import json
import pathlib
import tempfile
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest

from covenant.emulate import emulation
from covenant.train import local as local_lib
from tests import helpers


class PausedTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.finished = pathlib.Path(folder, 'run')
    cls.outcome = emulation.run(helpers.tiny(), cls.finished)

  def workdir(self, name='run'):
    return pathlib.Path(self.create_tempdir().full_path, name)

  @pytest.mark.slow
  def test_paused_within_rounds_it_equals_an_uninterrupted_run(self):
    """A round has nine inner steps; whose are done is not trained again."""
    parts, rounds, done = self.workdir('parts'), [], 0
    for after in (4, 0, 7, 16, 5):
      asked = itertools.count()
      found = emulation.run(
        helpers.tiny(),
        parts,
        pause=lambda n=after, asked=asked: next(asked) >= n,
      )
      self.assertFalse(found.finished)
      rounds.append(found.state.counters.round)
      done += len(json.loads(found.state.protocol)['contributions'])
    self.assertEqual(rounds, [0, 0, 1, 2, 3])
    self.assertGreater(done, 3)
    got = emulation.run(helpers.tiny(), parts)
    self.assertTrue(got.finished)
    self.assertEqual(
      helpers.everything(got.state), helpers.everything(self.outcome.state)
    )
    for name in 'metrics.jsonl', 'steps.jsonl':
      self.assertEqual(
        helpers.untimed(parts / name), helpers.untimed(self.finished / name)
      )

  @pytest.mark.slow
  def test_paused_where_several_miners_train(self):
    parts, asked = self.workdir('parts'), itertools.count()
    first = emulation.run(
      helpers.tiny(), parts, pause=lambda: next(asked) >= 11
    )
    self.assertFalse(first.finished)
    got = emulation.run(helpers.tiny(), parts)
    self.assertEqual(
      helpers.everything(got.state), helpers.everything(self.outcome.state)
    )

  @pytest.mark.slow
  def test_a_miner_whose_round_was_lost_before_the_pause(self):
    """It trains again from its state before, and loses the round again."""
    train_round, ends = local_lib.train_round, []

    def lossy(replica, compress, params, state, run, observe):
      if (run.task.uid, run.task.round) == (0, 1):
        ends.append(np.asarray(state.joined).item())
        raise local_lib.DivergedError('lost')
      return train_round(replica, compress, params, state, run, observe)

    with mock.patch.object(local_lib, 'train_round', lossy):
      want = emulation.run(helpers.tiny(), self.workdir('whole'))
      parts, asked = self.workdir('parts'), itertools.count()
      first = emulation.run(
        helpers.tiny(), parts, pause=lambda: next(asked) >= 12
      )
      self.assertFalse(first.finished)
      self.assertEqual(first.state.counters.round, 1)
      got = emulation.run(helpers.tiny(), parts)
    self.assertEqual(ends, [0, 0, 0])
    self.assertEqual(
      helpers.everything(got.state), helpers.everything(want.state)
    )


if __name__ == '__main__':
  absltest.main()
