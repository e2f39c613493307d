"""Stages on devices of their own, against the same on one device."""

import functools
import re

import jax
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.models import llama
from covenant.models import sharding
from covenant.train import island as island_lib
from covenant.train.pipeline import gpipe
from covenant.train.pipeline import subspace

RANK = 4


def model_of(**changes):
  return config_lib.Model(
    vocab_size=32,
    width=32,
    layers=4,
    heads=4,
    kv_heads=2,
    ffn_width=48,
    **changes,
  )


def collectives(text):
  """The shapes that cross devices in a compiled program, but for scalars."""
  pattern = re.compile(
    r'= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute'
    r'|reduce-scatter|collective-broadcast)(?:-start)?\('
  )
  return {
    shape
    for match in map(pattern.search, text.splitlines())
    if match
    for shape in re.findall(r'\w+\[([\d,]+)\]', match[1])
  }


def assert_close(got, want):
  """In L2, relative, of each leaf; as in subspace_test.py."""

  def leaf(path, x, y):
    gap = np.linalg.norm(np.subtract(x, y)) / np.linalg.norm(y)
    assert gap < 1e-5, f'{jax.tree_util.keystr(path)}: {gap}'

  jax.tree.map_with_path(leaf, jax.device_get(got), jax.device_get(want))


class PipelineTest(parameterized.TestCase):
  @parameterized.parameters(
    (2, model_of(), 4, {f'1,8,{RANK // 2}', '1,8,1'}),
    (2, config_lib.PackedModel(**vars(model_of())), 0, {f'1,8,{RANK}'}),
    (
      4,
      model_of(tie_embeddings=False, scan_layers=True, remat='dots'),
      8,
      {f'1,8,{RANK}', '1,8,1'},
    ),
    (2, model_of(), 0, {f'1,8,{RANK}'}),
  )
  @pytest.mark.rows(0, 3)
  def test_equals_the_emulated_and_only_coordinates_cross(
    self, stages, model, bits, crossing
  ):
    init = jax.jit(functools.partial(llama.init, model))
    params = jax.tree.map(lambda x: 2 * x, init(jax.random.key(0)))
    tokens_BxL1 = np.random.default_rng(0).integers(0, 32, (4, 9), np.int32)
    tokens_BxL1[0, 5:] = -1
    island = island_lib.Island(stages=stages, rank=RANK, bits=bits)
    fixed = subspace.fix(model, params, tokens_BxL1, island)
    want_loss, want = jax.jit(
      lambda params, tokens, fixed: subspace.next_token_gradient(
        model, params, tokens, island, fixed, 1
      )
    )(params, tokens_BxL1, fixed)

    devices = jax.devices()[:stages]
    mesh = sharding.mesh(config_lib.Devices(stage=stages), devices)
    parts = gpipe.split(model, params, mesh)
    again = gpipe.join(model, parts, devices[0])
    jax.tree.map(np.testing.assert_array_equal, again, params)
    everywhere = jax.NamedSharding(mesh, jax.P())
    tokens_BxL1, fixed = jax.device_put((tokens_BxL1, fixed), everywhere)
    gradient = jax.jit(
      functools.partial(
        gpipe.next_token_gradient,
        model,
        mesh=mesh,
        bits=bits,
        microbatch=1,
      )
    ).lower(parts, tokens_BxL1, fixed)
    compiled = gradient.compile()
    nats, grads = compiled(parts, tokens_BxL1, fixed)
    np.testing.assert_allclose(nats, want_loss.nats, rtol=1e-6)
    assert_close(gpipe.join(model, grads, devices[0]), want)
    # A microbatch of 1 x 8 positions, forward and back: k numbers of each.
    self.assertEqual(collectives(compiled.as_text()), crossing)

    # A stage's device has its own layers, and no other's.
    for x in jax.tree.leaves(parts['layers']):
      for s, device in enumerate(devices):
        (shard,) = (p for p in x.addressable_shards if p.device == device)
        self.assertEqual(shard.data.shape[0], model.layers // stages)
        self.assertEqual(shard.index[0].start or 0, s * shard.data.shape[0])


if __name__ == '__main__':
  absltest.main()
