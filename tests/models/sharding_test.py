"""Tests of the mesh, and of who holds what on it."""

import dataclasses
import functools

import jax
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.models import llama
from covenant.models import sharding

P = jax.P
_MODEL = config_lib.Model(
  vocab_size=512,
  width=256,
  layers=2,
  heads=8,
  kv_heads=4,
  ffn_width=384,
  tie_embeddings=False,
)


def devices(**changes) -> config_lib.Devices:
  return config_lib.Devices(**changes)


def abstract(**changes) -> jax.sharding.AbstractMesh:
  return sharding.abstract_mesh(devices(**changes))


@functools.cache
def params(model=_MODEL):
  return llama.abstract(model)


class MeshTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(), (1, 1, 1)),
    (dict(data=2, fsdp=2, tensor=2), (2, 2, 2)),
    (dict(data=0), (8, 1, 1)),
    (dict(data=0, fsdp=2, tensor=2), (2, 2, 2)),
    (dict(fsdp=3), (1, 3, 1)),
  )
  def test_takes_the_first_devices(self, changes, shape):
    mesh = sharding.mesh(devices(**changes), jax.devices())
    self.assertEqual(mesh.devices.shape, shape)
    self.assertEqual(list(mesh.devices.flat), jax.devices()[: mesh.size])
    explicit = jax.sharding.AxisType.Explicit
    self.assertEqual(mesh.axis_types, (explicit,) * 3)
    if changes.get('data'):
      self.assertEqual(mesh.shape, abstract(**changes).shape)

  @parameterized.parameters(
    (dict(fsdp=4), 3, r'devices\.fsdp: .* ask for 4 devices, there are 3'),
    (dict(data=9), 8, r'devices\.data: .* ask for 9 devices, there are 8'),
    (dict(tensor=3, fsdp=2), 5, r'devices\.tensor: .* 6 devices, .* 5'),
    (dict(data=0, fsdp=3), 8, r'devices\.data: 0 .* all 8 .* of the 3 '),
    (dict(data=0, fsdp=4), 3, r'devices\.data: 0 .* all 3 .* of the 4 '),
  )
  def test_refuses(self, changes, there, message):
    with self.assertRaisesRegex(config_lib.ConfigError, message):
      sharding.mesh(devices(**changes), jax.devices()[:there])

  @parameterized.parameters(
    (dict(), 8, (1, 1, 1)),
    (dict(peers=1), 1, (1, 1, 1)),
    (dict(peers=3, fsdp=2), 3, (1, 2, 1)),
    (dict(peers=0), 8, (1, 1, 1)),
    (dict(peers=0, data=2, tensor=2), 2, (2, 1, 2)),
    (dict(peers=2, data=0, fsdp=2), 2, (2, 2, 1)),
    (dict(fsdp=3), 2, (1, 3, 1)),
    (dict(data=0), 1, (8, 1, 1)),
  )
  def test_rows_are_apart(self, changes, peers, shape):
    rows = sharding.rows(devices(**changes), jax.devices())
    self.assertEqual([row.devices.shape for row in rows], [shape] * peers)
    found = [device for row in rows for device in row.devices.flat]
    self.assertEqual(found, jax.devices()[: len(found)])

  @parameterized.parameters(
    (dict(peers=3, data=0), r'devices\.peers: expected a divisor of the 8'),
    (dict(peers=5, fsdp=2), r'devices\.peers: .* 10 devices, there are 8'),
    (dict(fsdp=9), r'devices\.peers: .* 9 devices, there are 8'),
    (dict(data=0, fsdp=3), r'devices\.data: 0 .* all 8 .* of the 3 '),
  )
  def test_rows_refuse(self, changes, message):
    with self.assertRaisesRegex(config_lib.ConfigError, message):
      sharding.rows(devices(**changes), jax.devices())


class SpecsTest(parameterized.TestCase):
  def test_of_a_model(self):
    specs = sharding.specs(params(), abstract(data=2, fsdp=2, tensor=2))
    self.assertEqual(specs['embedding'], P(('fsdp', 'tensor'), None))
    self.assertEqual(specs['unembedding'], P(None, ('fsdp', 'tensor')))
    self.assertEqual(specs['final_norm']['gain'], P(None))
    layer = specs['layers_1']
    for name in ('query', 'key', 'value'):
      self.assertEqual(layer['attention'][name], P('fsdp', 'tensor'))
    self.assertEqual(layer['attention']['output'], P('tensor', 'fsdp'))
    for name in ('gate', 'up'):
      self.assertEqual(layer['ffn'][name], P('fsdp', 'tensor'))
    self.assertEqual(layer['ffn']['down'], P('tensor', 'fsdp'))

  def test_of_stacked_layers_and_of_axes_of_one_device(self):
    model = dataclasses.replace(_MODEL, scan_layers=True)
    specs = sharding.specs(params(model), abstract(data=4, tensor=2))
    self.assertEqual(specs['embedding'], P('tensor', None))
    self.assertEqual(specs['layers']['ffn']['down'], P(None, 'tensor', None))
    self.assertEqual(specs['layers']['ffn_norm']['gain'], P(None, None))

  def test_every_matrix_is_in_the_table(self):
    """Else it would be whole on every device, in silence."""
    specs = sharding.specs(params(), abstract(fsdp=2))
    for (path, x), spec in zip(
      jax.tree.leaves_with_path(params()), jax.tree.leaves(specs), strict=True
    ):
      self.assertEqual('fsdp' in str(spec), x.ndim == 2, path)


class CheckTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(fsdp=8), 'devices.fsdp: model.width = 256 .*whole blocks of 64 x 64 '
     r'\(optim.compression.block\); expected one of 1, 2, 4, got 8'),
    (dict(tensor=4), 'devices.tensor: model.kv_heads = 4 heads of 32 .*'
     'whole heads and whole blocks .*expected one of 1, 2, got 4'),
    (dict(fsdp=4, tensor=4), 'devices.tensor: model.kv_heads'),
  )  # fmt: skip
  def test_refuses(self, changes, message):
    with self.assertRaisesRegex(config_lib.ConfigError, message):
      sharding.check(_MODEL, (64, 64), abstract(**changes))

  @parameterized.parameters(
    (
      'vocab_size',
      96,
      r'devices.tensor: model.vocab_size = 96 .*got 4',
    ),
    ('ffn_width', 192, r'devices.tensor: model.ffn_width = 192 .*1, 3, got 2'),
  )
  def test_names_the_field(self, field, value, message):
    model = dataclasses.replace(_MODEL, **{field: value})
    with self.assertRaisesRegex(config_lib.ConfigError, message):
      sharding.check(model, (64, 64), abstract(fsdp=2, tensor=2))

  def test_accepts_what_divides(self):
    for changes in (dict(fsdp=4), dict(fsdp=4, tensor=2), dict(data=7)):
      sharding.check(_MODEL, (64, 64), abstract(**changes))


if __name__ == '__main__':
  absltest.main()
