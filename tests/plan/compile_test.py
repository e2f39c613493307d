import dataclasses

import jax
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.models import sharding
from covenant.plan import compile
from covenant.plan import memory
from covenant.train import step
from tests import helpers

NAMES = ('inner step', 'compress', 'subtract sent', 'add a message',
         'outer step', 'losses of sequences', 'try a message',
         'take it back')  # fmt: skip


def load(name, *overrides):
  return config_lib.load(str(helpers.CONFIGS / f'{name}.py'), overrides)


class LowerTest(parameterized.TestCase):
  @parameterized.parameters('150m', '72b', '1t', '512m', '1b', '8b')
  @pytest.mark.rows(1, 3)
  def test_inner_step_of_every_size_without_any_device(self, name):
    """All layers are one scan: a deeper model has no more products."""
    config = load(name)
    mesh = sharding.abstract_mesh(config.devices)
    with jax.sharding.use_abstract_mesh(mesh):
      traced = step.inner_step(config, mesh).trace(
        *step.arguments(config, mesh)
      )
      text = traced.lower(lowering_platforms=('cpu',)).as_text()
    self.assertLess(text.count('dot_general'), 60)

  @pytest.mark.slow
  def test_all_programs_of_a_round(self):
    config = load('72b')
    mesh = sharding.mesh(config.devices, jax.devices())
    found = [name for name, _ in compile.lower(config, mesh)]
    self.assertEqual(tuple(found), NAMES)
    found = [name for name, _ in compile.lower(load('tiny'), None)]
    self.assertEqual(tuple(found), NAMES)


class MeasureTest(parameterized.TestCase):
  @pytest.mark.slow  # .ci/run runs it; half a minute
  def test_72b_compiles_for_eight_devices(self):
    """In a process of its own. Promise 8: what crosses devices is scalars."""
    config = load('72b')
    found = {p.name: p for p in compile.measure(config)}
    self.assertEqual(tuple(found), NAMES)
    work = {
      p.name: p.device
      for p in memory.phases(config, memory.shards(config), offload=True)
    }['inner step']
    state = work['parameters of this round'] + work['AdamW moments']
    batch = 4 * 192 * 2049 / 8
    taken = found['inner step'].argument_bytes
    self.assertBetween(taken, state + batch, state + batch + 1024)
    moved = found['inner step'].collectives
    self.assertIn('all-gather', moved)
    self.assertIn('reduce-scatter', moved)
    taken = found['losses of sequences'].argument_bytes
    gains = 4 * (2 * 80 + 1) * 8192  # whole on each device
    parameters = (4 * 70_599_843_840 - gains) / 8 + gains
    batch = 4 * 2049 * config.gauntlet.sequences / 8
    self.assertBetween(taken, parameters + batch, parameters + batch + 1024)
    for name in {*NAMES[1:]} - {'losses of sequences'}:
      for count, elements in found[name].collectives.values():
        self.assertLessEqual(elements, 64, name)
        self.assertLessEqual(count, 8, name)
      self.assertGreater(found[name].argument_bytes, 0)

  @pytest.mark.slow
  def test_lowered_only(self):
    config = load('tiny', 'plan.compile=false')
    for program in compile.measure(config):
      self.assertEqual(program.platform, '')
      self.assertEqual(program.argument_bytes, 0)

  def test_a_tpu_compiler_that_is_not_here_is_one_line(self):
    with self.assertRaisesRegex(
      config_lib.ConfigError, r"^plan.tpu_topology: needs .* install '.*tpu\]'$"
    ):
      with absltest.mock.patch('importlib.util.find_spec', return_value=None):
        compile.measure(load('tiny', 'plan.tpu_topology=v5p:2x2x1'))

  @pytest.mark.slow
  def test_what_the_child_refuses_is_said_by_the_parent(self):
    config = load('8b')
    config = dataclasses.replace(
      config, devices=dataclasses.replace(config.devices, fsdp=3)
    )
    with self.assertRaisesRegex(config_lib.ConfigError, r'^devices.fsdp: '):
      compile.measure(config)


if __name__ == '__main__':
  absltest.main()
