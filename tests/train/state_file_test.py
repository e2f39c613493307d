"""Runs that go on with the state of another one, at its round."""

import dataclasses
import importlib.util
import pathlib
import tempfile

import jax
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant import metrics
from covenant.data import dataset
from covenant.emulate import emulation
from covenant.emulate import host as host_lib
from covenant.models import hf
from covenant.node import export
from covenant.protocol import amendments
from covenant.protocol import round as round_lib
from covenant.train import shared_state
from covenant.train import state_file
from experiments.chaos import faults
from experiments.chaos import network as network_lib
from tests import helpers

ROUND = 2
FIELDS = ('optim.inner.decay_steps=24', 'optim.outer.momentum=0.5')


@absltest.skipUnless(
  importlib.util.find_spec('safetensors'), 'needs the extra hf'
)
class StateFileTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path, 'hf')
    self.config = helpers.tiny('rounds=4', *FIELDS)

  def goes_on(self, *fields):
    where = f'pretrained={self.folder}', f'first_round={ROUND}'
    return config_lib.edit(self.config, [*where, *fields])

  def write(self, completed=ROUND):
    """Exports a state with momentum; returns it."""
    model = shared_state.SharedModel(self.config)
    key = jax.random.key(5)
    shared = jax.tree.map(
      lambda x: jax.random.normal(key, x.shape, x.dtype), model.init()
    )
    leaves = shared_state.named_leaves(shared)
    content = state_file.encode(completed, leaves, model.fingerprint(shared))
    hf.export(
      self.folder,
      self.config.model,
      shared.params,
      context=self.config.data.context,
      end_of_text=0,
      files={state_file.FILE: content},
    )
    return shared

  @pytest.mark.slow
  def test_a_run_begins_with_the_state(self):
    shared = self.write()
    model = shared_state.SharedModel(self.goes_on())
    self.assertEqual(helpers.bits(model.init()), helpers.bits(shared))
    schedule = amendments.schedule(model.genesis, ())
    self.assertEqual(schedule.start(ROUND), 0)
    self.assertEqual(schedule.round_at(0), ROUND)
    other = shared_state.SharedModel(self.config)
    self.assertNotEqual(model.run, other.run)

  @parameterized.parameters(
    ('first_round=3', 'first_round: expected 2, .* got 3'),
    ('optim.outer.momentum=0', 'optim.outer: .* another optimizer'),
    ('pretrained=/none', '/none'),
  )
  def test_another_state_is_refused(self, field, why):
    self.write()
    with self.assertRaisesRegex(config_lib.ConfigError, why):
      shared_state.SharedModel(self.goes_on(field)).init()

  def test_a_state_without_its_parameters_is_refused(self):
    self.write()
    (self.folder / state_file.FILE).rename(self.folder.parent / 'kept')
    with self.assertRaisesRegex(config_lib.ConfigError, 'export --state'):
      shared_state.SharedModel(self.goes_on()).init()
    for path in self.folder.iterdir():
      path.unlink()
    self.folder.rmdir()
    shared = self.write()
    params = jax.tree.map(lambda x: x + 1, shared.params)
    for path in self.folder.glob('*'):
      path.rename(self.folder.parent / path.name)
    self.folder.rmdir()
    content = (self.folder.parent / state_file.FILE).read_bytes()
    hf.export(
      self.folder,
      self.config.model,
      params,
      context=self.config.data.context,
      end_of_text=0,
      files={state_file.FILE: content},
    )
    with self.assertRaisesRegex(config_lib.ConfigError, 'fingerprint'):
      shared_state.SharedModel(self.goes_on()).init()

  @parameterized.parameters('first_round=4', 'first_round=2')
  def test_the_config_is_checked(self, field):
    """The round is one of the run, and the state is named."""
    with self.assertRaisesRegex(config_lib.ConfigError, 'first_round'):
      config_lib.edit(self.config, [field])


@pytest.mark.slow
class GoOnTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.folder = pathlib.Path(folder)
    cls.config = helpers.tiny(f'rounds={ROUND}', *FIELDS)
    emulation.run(cls.config, cls.folder / 'old')
    completed, shared = export.newest_state(cls.config, cls.folder / 'old')
    leaves = shared_state.named_leaves(shared)
    fingerprint = shared_state.SharedModel(cls.config).fingerprint(shared)
    exporter = export.Exporter(cls.config, cls.folder / 'old')
    content = state_file.encode(completed, leaves, fingerprint)
    exporter.add({state_file.FILE: content})
    cls.exported = exporter.write(completed, shared.params)
    cls.goes_on = dataclasses.replace(
      cls.config,
      pretrained=str(cls.exported),
      first_round=completed,
      rounds=completed + 2,
    )

  def test_loss_schedule_and_rounds_go_on(self):
    emulation.run(self.goes_on, self.folder / 'new')
    old, new = (
      metrics.read(self.folder / name / 'metrics.jsonl')
      for name in ('old', 'new')
    )
    before, after = metrics.evaluations(old)[-1], metrics.evaluations(new)[0]
    self.assertEqual((before.round, before.loss), (after.round, after.loss))
    self.assertEqual([r.round for r in metrics.rounds(new)], [3, 4])
    self.assertLess(
      metrics.rounds(new)[0].learning_rate,
      metrics.rounds(old)[-1].learning_rate,
    )

  def test_members_that_die_find_the_others(self):
    kills = [
      faults.Kill('1', ROUND, round_lib.Phase.TRAIN, faults.AFTER),
      faults.Kill('0', ROUND + 1, round_lib.Phase.COMMIT, faults.BEFORE),
    ]
    config = self.goes_on
    network = network_lib.Network(
      config,
      host_lib.Host(config, dataset.load(config)),
      faults.Faults(kills=kills),
    )
    network.run(config.rounds)
    self.assertEqual(network.restarts, 2)
    nodes = network.nodes.values()
    self.assertLen({(n.root, n.fingerprint()) for n in nodes}, 1)
    self.assertEqual({n.state.round for n in nodes}, {config.rounds})


if __name__ == '__main__':
  absltest.main()
