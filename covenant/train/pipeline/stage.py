"""The layers of one stage of a pipeline.

All stages have the same number of layers (covenant/train/island.py).
"""

import functools
from typing import Any

import jax

from covenant import config as config_lib
from covenant.models import llama


def layers(model: config_lib.Model, params: Any, first: int, count: int) -> Any:
  """The parameters of `count` layers from `first` on: stacked, or a tuple."""
  if model.scan_layers:
    return jax.tree.map(lambda x: x[first : first + count], params['layers'])
  return tuple(params[f'layers_{i}'] for i in range(first, first + count))


def apply(
  model: config_lib.Model, layers: Any, x_BxLxD: jax.Array
) -> jax.Array:
  """What the last of the layers gives, if the first takes x."""
  block = functools.partial(llama.block, model)
  if model.remat != 'none':
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    block = jax.checkpoint(
      block,
      prevent_cse=isinstance(layers, tuple),
      policy=dots if model.remat == 'dots' else None,
    )
  if isinstance(layers, tuple):
    for layer in layers:
      x_BxLxD = block(layer, x_BxLxD)
    return x_BxLxD
  x_BxLxD, _ = jax.lax.scan(
    lambda x, layer: (block(layer, x), None), x_BxLxD, layers
  )
  return x_BxLxD
