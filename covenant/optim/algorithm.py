"""The training algorithm that a config describes: the parts of its round.

All algorithms are one round with different parts:

  sparseloco  H AdamW steps, top-k with error feedback, outer SGD or Nesterov
  diloco      H AdamW steps, the dense delta, outer Nesterov
  demo        no local step: the gradient joins a momentum, of which the peaks
              of the cosine transform are sent; outer step by the sign
  ddp         no local step: the gradient itself, then AdamW as outer optimizer
              (plain synchronous data-parallel training)

AdamW may be Muon. Streaming DiLoCo and SPARTA exchange within a round and with
other parameters at every peer; they are transformations only
(diloco.py, baselines/sparta.py).
"""

from collections.abc import Callable
from typing import NamedTuple

import optax

from covenant import config as config_lib
from covenant import plugins
from covenant.optim import compression as compression_lib
from covenant.optim import inner as inner_lib
from covenant.optim import quantize
from covenant.optim import reduce
from covenant.optim import topk_variants
from covenant.optim.baselines import demo

_QUANTIZERS: dict[str, quantize.Quantizer] = {
  'none': quantize.Exact(),
  'sign': quantize.Sign(),
  'sign-tensor': quantize.Sign(per='tensor'),
  'sign-magnitude': quantize.SignMagnitude(),
  'statistical': quantize.Statistical(),
  'linear': quantize.Linear(),
}
_COMPRESSIONS: dict[str, type[compression_lib.TopK]] = {
  'topk': compression_lib.TopK,
  'randomk': topk_variants.RandomK,
  'dct': topk_variants.DCTTopK,
}
_OUTERS: dict[str, Callable[[float, float], optax.GradientTransformation]] = {
  'nesterov': reduce.nesterov,
}


class Algorithm(NamedTuple):
  """The parts of a round."""

  inner: optax.GradientTransformation | None  # None: send the gradient
  schedule: optax.Schedule  # inner step of the run -> learning rate
  compression: compression_lib.Compression
  error_decay: float | None  # None: no error feedback
  outer: optax.GradientTransformation
  mean_over: str
  clip: str
  weight: str = 'equal'  # see weight.py


def make(config: config_lib.Config) -> Algorithm:
  """Returns the algorithm that `config.optim` describes."""
  optim = config.optim
  schedule = inner_lib.schedule(
    optim.inner, total_steps=config.rounds * optim.inner_steps
  )
  inner = inner_lib.make(optim.inner)
  dense = compression_lib.Dense()
  if optim.method == 'ddp':
    outer = optax.chain(inner, optax.scale_by_schedule(schedule))
    return Algorithm(None, schedule, dense, None, outer, 'all', 'none')
  make_outer = plugins.choose('optim.outer.kind', _OUTERS, optim.outer.kind)
  outer = make_outer(optim.outer.learning_rate, optim.outer.momentum)
  if optim.method == 'diloco':
    return Algorithm(
      inner,
      schedule,
      dense,
      None,
      outer,
      'all',
      'none',
      weight=optim.aggregation.weight,
    )
  sparse = optim.compression
  quantizer = plugins.choose(
    'optim.compression.quantizer', _QUANTIZERS, sparse.quantizer
  )
  make_compression = plugins.choose(
    'optim.compression.kind', _COMPRESSIONS, sparse.kind
  )
  compression = make_compression(
    sparse.k, sparse.block, quantizer, sparse.layout
  )
  if optim.method == 'demo':
    outer = demo.signed(schedule, optim.inner.weight_decay)
    return Algorithm(
      None, schedule, compression, sparse.error_decay, outer, 'senders', 'none'
    )
  return Algorithm(
    inner,
    schedule,
    compression,
    sparse.error_decay,
    outer,
    optim.aggregation.mean,
    optim.aggregation.clip,
    optim.aggregation.weight,
  )
