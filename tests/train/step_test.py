"""Tests for covenant.train.step: the step on several devices and on one."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.models import llama
from covenant.models import sharding
from covenant.optim import algorithm as algorithm_lib
from covenant.train import step as step_lib
from tests import helpers

_CONFIG = config_lib.Config(
  model=config_lib.Model(
    vocab_size=128,
    width=64,
    layers=2,
    heads=4,
    kv_heads=2,
    ffn_width=96,
    scan_layers=True,
    loss_chunk=5,
    z_loss=1e-3,
  ),
  data=config_lib.Data(context=12),
  optim=config_lib.Optim(
    inner=config_lib.Inner(batch_size=8, microbatch_size=1, warmup_steps=0),
    compression=config_lib.Compression(k=8, block=(16, 16)),
  ),
)
_UNTIED = dict(tie_embeddings=False, scan_layers=False, loss_chunk=0)


def config_of(microbatch=1, **model) -> config_lib.Config:
  optim = _CONFIG.optim
  inner = dataclasses.replace(optim.inner, microbatch_size=microbatch)
  return dataclasses.replace(
    _CONFIG,
    model=dataclasses.replace(_CONFIG.model, **model),
    optim=dataclasses.replace(optim, inner=inner),
  )


@functools.cache
def random_params(model: config_lib.Model):
  """Returns large parameters, so that attention is no plain mean.

  With key 0 one gradient is zero but for rounding, which Adam scales to a full
  step.
  """
  init = jax.jit(functools.partial(llama.init, model))
  return jax.tree.map(lambda x: np.asarray(2 * x), init(jax.random.key(2)))


def random_tokens():
  """Returns tokens with padding that differs from device to device."""
  rng = np.random.default_rng(0)
  tokens_BxL1 = rng.integers(0, 128, (8, 13), np.int32)
  tokens_BxL1[0, 5:] = tokens_BxL1[3, 9:] = -1
  return tokens_BxL1


def mesh_of(**sizes) -> jax.sharding.Mesh:
  return sharding.mesh(config_lib.Devices(**sizes), jax.devices())


def put(tree, mesh):
  if mesh is None:
    return jax.tree.map(jnp.array, tree)
  return jax.tree.map(
    jnp.copy, jax.device_put(tree, sharding.shardings(tree, mesh))
  )


def put_tokens(tokens_BxL1, mesh):
  if mesh is None:
    return tokens_BxL1
  where = jax.NamedSharding(mesh, sharding.batch_spec(mesh))
  return jax.device_put(tokens_BxL1, where)


def gradient(config, mesh=None):
  return jax.device_get(
    step_lib.gradient(config, mesh)(
      put(random_params(config.model), mesh), put_tokens(random_tokens(), mesh)
    )
  )


@functools.cache
def whole_gradient(config):
  return gradient(config)


def assert_close(one, two, tolerance=1e-5):
  """Compares leaves relative to their largest element."""

  def leaf(path, x, y):
    gap = np.max(np.abs(np.subtract(x, y))) / np.max(np.abs(x))
    assert gap < tolerance, f'{jax.tree_util.keystr(path)}: {gap}'

  jax.tree.map_with_path(leaf, jax.device_get(one), jax.device_get(two))


def distance(one, two) -> float:
  gaps = jax.tree.map(np.subtract, jax.device_get(one), jax.device_get(two))
  return math.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(gaps)))


def collectives(text):
  """Returns (operation, shape) of each collective in a compiled program."""
  pattern = re.compile(
    r'= (.*?) (all-gather|all-reduce|all-to-all|collective-permute'
    r'|reduce-scatter)(?:-start)?\('
  )
  return [
    (match[2], tuple(int(n) for n in shape.split(',') if n))
    for match in map(pattern.search, text.splitlines())
    if match
    for shape in re.findall(r'\w+\[([\d,]*)\]', match[1])
  ]


class GradientTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(fsdp=4), dict(remat='block')),
    (dict(data=2, fsdp=2, tensor=2), dict(remat='dots')),
    (dict(fsdp=2, tensor=2), _UNTIED),
    (dict(data=2, fsdp=2), _UNTIED),
    (dict(data=4), {}),
  )
  @pytest.mark.rows(0, 3)
  def test_equals_one_devices(self, sizes, model):
    want_nats, want = whole_gradient(config_of(**(model | {'remat': 'none'})))
    nats, grads = gradient(config_of(**model), mesh_of(**sizes))
    np.testing.assert_allclose(nats, want_nats, rtol=1e-6)
    assert_close(want, grads)

  def test_weights_cross_in_bfloat16_and_their_gradients_in_float32(self):
    config = config_of(compute_dtype='bfloat16', remat='block')
    mesh = sharding.abstract_mesh(config_lib.Devices(data=2, fsdp=2))
    with jax.sharding.use_abstract_mesh(mesh):
      params, _, tokens, *_ = step_lib.arguments(config, mesh)
      traced = step_lib.gradient(config, mesh).trace(params, tokens)
      text = traced.lower(lowering_platforms=('cpu',)).as_text()
    gathered = re.findall(r'all_gather".* -> tensor<(\d+x\d+x[bf]\w+)>', text)
    self.assertIn('64x96xbf16', gathered)  # of [width, ffn]
    self.assertFalse([kind for kind in gathered if kind == '64x96xf32'])
    scattered = re.findall(
      r'reduce_scatter"(?:(?!reduce_scatter).)*?\}\) : \(tensor<(\w+)>',
      text,
      re.S,
    )
    self.assertIn('64x96xf32', scattered)
    self.assertNotIn('64x96xbf16', scattered)


class InnerStepTest(parameterized.TestCase):
  @parameterized.parameters(dict(fsdp=2, tensor=2), dict(data=2, fsdp=2))
  @pytest.mark.rows(0, 1)
  def test_equals_one_devices_and_keeps_its_types(self, **sizes):
    config, mesh = config_of(), mesh_of(**sizes)
    method = algorithm_lib.make(config)
    ends = []
    for where in (None, mesh):
      params = put(random_params(config.model), where)
      state = put(method.inner.init(params), where)
      types = jax.tree.map(jax.typeof, (params, state))
      tokens = put_tokens(random_tokens(), where)
      step = step_lib.inner_step(config, where)
      for i in range(3):
        before = params
        params, state, (nats, _) = step(
          params, state, tokens, np.int32(i), np.int32(0)
        )
        self.assertTrue(all(x.is_deleted() for x in jax.tree.leaves(before)))
        self.assertEqual(jax.tree.map(jax.typeof, (params, state)), types)
      self.assertEqual(step._cache_size(), 1)
      specs = sharding.specs((params, state), mesh)
      if where is not None:
        for x, spec in zip(
          jax.tree.leaves((params, state)), jax.tree.leaves(specs), strict=True
        ):
          self.assertTrue(
            x.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), x.ndim)
          )
      ends.append((params, nats))
    (want, want_nats), (got, nats) = ends
    np.testing.assert_allclose(nats, want_nats, rtol=1e-5)
    # In L2: Adam's first steps make of any tiny gradient a whole step.
    moved = distance(want, random_params(config.model))
    self.assertLess(distance(want, got) / moved, 1e-4)

  @pytest.mark.slow
  def test_neither_the_table_nor_the_logits_exist_whole(self):
    """Only the vocabulary is 1,280 here, and only the width is 64."""
    config = config_of(vocab_size=1280, microbatch=0)
    mesh = mesh_of(fsdp=4)
    compiled = (
      step_lib.inner_step(config, mesh)
      .lower(*step_lib.arguments(config, mesh))
      .compile()
    )
    text = compiled.as_text()
    self.assertNotIn('1280', re.sub(r'metadata=\{[^}]*\}', '', text))
    # 5 positions of 8 sequences, and of each a quarter of the vocabulary.
    self.assertIn('f32[8,5,320]', text)
    self.assertNotRegex(text, r'f32\[8,1[0-9],320\]')
    kinds = {kind for kind, _ in collectives(text)}
    self.assertEqual(kinds, {'all-gather', 'all-reduce', 'reduce-scatter'})

  @pytest.mark.slow
  def test_bfloat16_learns_as_float32(self):
    """Trains on sequences that count up; the curves are of one seed."""
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 128, (40, 8, 1))
    tokens = ((starts + np.arange(13)) % 128).astype(np.int32)
    curves = []
    for dtype in ('float32', 'bfloat16'):
      config = config_of(compute_dtype=dtype, microbatch=0)
      method, mesh = algorithm_lib.make(config), mesh_of(fsdp=2)
      params = put(random_params(config.model), mesh)
      state = put(method.inner.init(params), mesh)
      step, losses = step_lib.inner_step(config, mesh), []
      for i, batch in enumerate(tokens):
        params, state, (nats, _) = step(
          params, state, put_tokens(batch, mesh), np.int32(i), np.int32(0)
        )
        losses.append(float(nats))
      curves.append(losses)
    float32, bfloat16 = curves
    self.assertLess(float32[-1], 0.1)  # from 5 nats
    np.testing.assert_allclose(bfloat16, float32, atol=2e-2)
    self.assertNotEqual(bfloat16, float32)

  @parameterized.parameters(
    (dict(fsdp=8), 'devices.fsdp: model.width = 64 '),
    (dict(data=3), 'batch_size: expected a multiple of 3, .* got 8'),
  )
  def test_refuses_what_cannot_be_cut(self, sizes, message):
    config = config_of()
    with self.assertRaisesRegex(config_lib.ConfigError, message):
      step_lib.inner_step(config, mesh_of(**sizes))


class Whole72BTest(absltest.TestCase):
  """The step of configs/72b.py, compiled for eight devices."""

  @pytest.mark.slow
  def test_lowers_without_devices_and_compiles_for_eight(self):
    config = config_lib.load(
      f'{helpers.CONFIGS}/72b.py',
      ['devices.fsdp=8', 'model.attention=portable'],
    )
    model = config.model
    mesh = sharding.abstract_mesh(config.devices)
    with jax.sharding.use_abstract_mesh(mesh):
      traced = step_lib.inner_step(config, mesh).trace(
        *step_lib.arguments(config, mesh)
      )
    traced.lower(lowering_platforms=('cpu',))

    mesh = mesh_of(fsdp=8)
    compiled = (
      step_lib.inner_step(config, mesh)
      .lower(*step_lib.arguments(config, mesh))
      .compile()
    )
    # Parameters and two moments in float32, of which gains are not cut; 24
    # sequences, three counters.
    gains = (2 * model.layers + 1) * model.width
    cut = (llama.num_params(model) - gains) // 8
    tokens = 24 * (config.data.context + 1)
    self.assertEqual(
      compiled.memory_analysis().argument_size_in_bytes,
      12 * (cut + gains) + 4 * (tokens + 3),
    )
    largest = max(
      math.prod(shape) for _, shape in collectives(compiled.as_text())
    )
    # A matrix of one layer, or what is looked up for a microbatch of all.
    in_flight = 8 * config.optim.inner.microbatch_size * config.data.context
    self.assertEqual(largest, model.width * max(model.ffn_width, in_flight))


if __name__ == '__main__':
  absltest.main()
