"""Stages that exchange their own tensors with peers, against whole models."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from absl.testing import absltest

from covenant import config as config_lib
from covenant.models import llama
from covenant.optim import algorithm as algorithm_lib
from covenant.optim import compressor as compressor_lib
from covenant.optim import outer_step as outer_step_lib

CONFIG = config_lib.Config(
  model=config_lib.Model(
    vocab_size=32, width=32, layers=2, heads=2, kv_heads=1, ffn_width=48
  ),
)
STAGES = (
  frozenset({'layers_0'}),
  frozenset({'layers_1', 'embedding', 'final_norm'}),
)


def own(tree, stage):
  """Returns the part of a tree that a stage has, on its device."""
  part = {name: tree[name] for name in STAGES[stage]}
  return jax.device_put(part, jax.devices()[2 + stage])


@pytest.mark.slow
class StagewiseTest(absltest.TestCase):
  def test_equals_the_exchange_of_whole_models(self):
    """Equal bit for bit, even with statistics per tensor."""
    optim = config_lib.Optim(
      outer=config_lib.Outer(momentum=0.5),
      compression=config_lib.Compression(
        k=8, block=(16, 16), quantizer='statistical'
      ),
    )
    method = algorithm_lib.make(dataclasses.replace(CONFIG, optim=optim))
    params = jax.jit(functools.partial(llama.init, CONFIG.model))(
      jax.random.key(0)
    )

    def random_like(seed, scale):
      rng = np.random.default_rng(seed)
      return jax.tree.map(
        lambda x: np.float32(scale) * rng.standard_normal(x.shape, np.float32),
        params,
      )

    def exchange(part):
      """Returns messages, error feedback and new parameters of three peers."""
      like = part(params)
      compressor = compressor_lib.Compressor(
        like, method.compression, method.error_decay
      )
      sent = [
        compressor.compress(
          like,
          jax.tree.map(np.add, like, part(random_like(peer, 2.0**peer))),
          part(random_like(9 + peer, 0.1)),
        )
        for peer in range(3)
      ]
      outer_step = outer_step_lib.OuterStep(
        like,
        method.compression,
        method.outer,
        method.mean_over,
        method.clip,
      )
      moved = outer_step.apply(
        like, method.outer.init(like), [s.message for s in sent]
      )
      for x in jax.tree.leaves((moved.params, [s.error for s in sent])):
        self.assertEqual(x.devices(), jax.tree.leaves(like)[0].devices())
      return [s.message for s in sent], [s.error for s in sent], moved.params

    want = exchange(lambda tree: jax.device_put(tree, jax.devices()[0]))
    for stage, names in enumerate(STAGES):
      got = exchange(functools.partial(own, stage=stage))
      jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(got),
        jax.tree.map(
          lambda tree, names=names: {name: tree[name] for name in names},
          jax.device_get(want),
          is_leaf=lambda x: isinstance(x, dict) and 'embedding' in x,
        ),
      )


if __name__ == '__main__':
  absltest.main()
