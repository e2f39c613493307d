"""Amendments of an emulated run: proposed, adopted, resumed and shown."""

import json
import pathlib

import pytest
from absl.testing import absltest

from covenant import config as config_lib
from covenant.emulate import emulation
from covenant.emulate import proposals
from covenant.protocol import amendments
from covenant.report import amendments as shown
from covenant.report import page
from tests import helpers

EDITS = ['optim.outer.learning_rate=0.5', 'rounds=6', 'phases.round_blocks=140']


class ProposalsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.config = helpers.tiny(
      'rounds=4', 'validators=2', 'optim.inner.decay_steps=12'
    )
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def run_all(self, folder, *stop_after):
    """Returns the state at the end; stops after some rounds, and goes on."""
    rounds = []

    def stop():
      rounds.append(0)
      return len(rounds) in stop_after

    outcome = emulation.run(self.config, folder, stop=stop)
    while not outcome.finished:
      outcome = emulation.run(self.config, folder, stop=stop)
    return json.loads(outcome.state.protocol), outcome.state

  def test_proposals_are_checked(self):
    propose = proposals.run
    with self.assertRaisesRegex(config_lib.ConfigError, '^--workdir: expected'):
      propose(self.config, '', 3, EDITS)  # a new folder would be nobody's
    with self.assertRaisesRegex(config_lib.ConfigError, 'may not change'):
      propose(self.config, self.folder, 3, ['seed=2'])
    with self.assertRaisesRegex(amendments.AmendmentError, 'ends before it'):
      propose(self.config, self.folder, 9, ['optim.outer.learning_rate=0.5'])
    text = propose(self.config, self.folder, 3, EDITS)
    self.assertIn('from round 3 on', text)
    self.assertIn('rounds: 4 before, 6 now; the learning rate is as bef', text)
    self.assertEqual(
      propose(self.config, self.folder, 3, [], True), '1 withdrawn'
    )
    self.assertIn('no amendment', propose(self.config, self.folder, None, []))

  def test_the_schedule_of_a_longer_run_is_told(self):
    config = helpers.tiny('rounds=4')
    text = proposals.run(config, self.folder, 3, ['rounds=6'])
    self.assertIn('the learning rate falls over', text)
    self.assertIn('optim.inner.decay_steps', text)

  @pytest.mark.slow
  def test_resume_equals_uninterrupted(self):
    """Stops before the round of the amendment, and after it."""
    folder, there = self.folder / 'whole', self.folder / 'stopped'
    for each in folder, there:
      proposals.run(self.config, each, 3, EDITS)
    text, state = self.run_all(folder)
    other, again = self.run_all(there, 2, 4)
    self.assertEqual(state.counters.round, 6)
    self.assertEqual(other['root'], text['root'])
    self.assertEqual(again.counters, state.counters)
    self.assertEqual(
      proposals.run(self.config, there, None, []),
      proposals.run(self.config, folder, None, []),
    )
    (line,) = shown.lines(folder)
    self.assertIn('optim.outer.learning_rate = 0.5 (before: 1.0)', line)
    html = page.write(folder).read_text()
    self.assertIn('Fields that changed in the run', html)
    self.assertIn('optim.outer.learning_rate', html)

  @pytest.mark.slow
  def test_a_restart_between_a_rollback_and_its_adoption(self):
    """A publication is gone with the process that held it."""
    self.config = helpers.tiny(
      'rounds=7', 'validators=2', 'optim.inner.decay_steps=12',
      'checkpoint.publish=1',
    )  # fmt: skip
    found = []
    for name, stop_after in (('whole', ()), ('between', (4,))):
      folder = self.folder / name
      proposals.run(self.config, folder, 5, ['restore=2'])
      found.append(self.run_all(folder, *stop_after))
      self.assertLen(shown.lines(folder), 1)
      # After the round of the rollback nothing needs it.
      self.assertFalse((folder / 'rollback').exists())
    (text, state), (other, again) = found
    self.assertEqual(other['root'], text['root'])
    self.assertEqual(again.counters, state.counters)
    self.assertEqual(
      helpers.bits(again.shared.params), helpers.bits(state.shared.params)
    )


if __name__ == '__main__':
  absltest.main()
