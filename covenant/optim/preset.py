"""SparseLoCo as deployed and as published, each in one call.

                       templar()                    paper()
  blocks of a matrix   largest divisors <= 64       64 x 64, smaller rests
  k of a block         64, all of a shorter one,    64 of 4096, one density
                       even, at least 2
  vectors              runs of <= 64, sent whole    runs of 4096, 1 of 64 sent
  quantizer            statistical, per tensor      the same, per region
  error decay          0.95, before the addition    0.95
  mean over            who sent the element         all peers
  norm clip            to the lower median of the   none
                       peers, a tensor at a time
  outer step           SGD, 0.4; a tensor that is   SGD, alpha = 1
                       not finite stays
  inner steps          30                           30

The fields are the arguments of `sparseloco`:

  tx = sparseloco(optax.adamw(1.2e-4), **preset.templar()._asdict())

or of its pieces, for a pytree of any number of tensors:

>>> from covenant.optim import sparseloco as sl
>>> t = templar()
>>> params = {'w': jnp.ones((64, 128)), 'norm': jnp.ones(128)}
>>> deltas = [jax.tree.map(lambda x, r=r: r * x, params) for r in (1.0, 3.0)]
>>> messages = []
>>> for delta in deltas:  # one peer each: compress, with error feedback
...   message, error = sl.compress(
...     delta, sl.init_error(params), t.compression, t.error_decay
...   )
...   messages.append(message)
>>> [packet] = message['w']  # one packet a tensor: two blocks, 64 of each
>>> packet.indices.shape, packet.codes.shape, packet.scales.shape
((2, 64), (2, 64), (1, 5))
>>> mean = sl.aggregate(messages, params, t.compression, t.mean_over, t.clip)
>>> state = t.outer.init(params)
>>> params, state = sl.outer_update(t.outer, mean, state, params)
>>> print(params['norm'][:2])  # 1 - 0.4 * mean(1, 3 clipped to 1)
[0.6 0.6]

`packet.scales` of the statistical quantizer are the shift, then the codebook.
For one tensor outside a pytree, `t.compression.compress(x)` gives its packets
and `t.compression.decompress(packets, x.shape)` what they stand for. Values
from elsewhere aggregate with `dataclasses.replace(t.compression,
quantizer=sl.Exact())` and `sl.TopK`'s packets of indices and float32 values,
in any order. A round that trains nothing sends nothing and ends with
`error = sl.init_error(params)`. A stack of layers, which the
reference has not, is one tensor: its matrices share the quantizer's scales
and the clip; where that matters, keep `scan_layers=False`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from covenant import typing as ct
from covenant.optim import compression as compression_lib
from covenant.optim import quantize
from covenant.optim import reduce


class Preset(NamedTuple):
  """Arguments of `sparseloco.sparseloco`."""

  compression: compression_lib.TopK
  error_decay: float
  outer: optax.GradientTransformation
  mean_over: str
  clip: str
  inner_steps: int


def templar() -> Preset:
  """Returns the deployed system, Templar, number for number."""
  return Preset(
    compression=compression_lib.TopK(
      k=64,
      block=(64, 64),
      quantizer=quantize.Statistical(bits=2),
      layout='divisors',
    ),
    error_decay=0.95,
    outer=optax.chain(_skip_nonfinite(), reduce.nesterov(0.4)),
    mean_over='senders',
    clip='median',
    inner_steps=30,
  )


def paper() -> Preset:
  """Returns Covenant-72B (arXiv 2603.08163), section 2.1, eqs. 1 and 2."""
  return Preset(
    compression=compression_lib.TopK(
      k=64, block=(64, 64), quantizer=quantize.Statistical(bits=2)
    ),
    error_decay=0.95,
    outer=reduce.nesterov(1.0),
    mean_over='all',
    clip='none',
    inner_steps=30,
  )


def _skip_nonfinite() -> optax.GradientTransformation:
  """Leaves alone each tensor whose delta is not finite everywhere."""

  def finite(delta: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(delta).all(), delta, jnp.zeros_like(delta))

  def update(updates: ct.Delta, params: ct.Params) -> ct.Delta:
    del params
    return jax.tree.map(finite, updates)

  return optax.stateless(update)
