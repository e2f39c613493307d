"""A training method from its config: what a round does, as one value.

All methods are one round with other parts in it:

  sparseloco  H AdamW steps, top-k with error feedback, outer SGD or Nesterov
  diloco      H AdamW steps, the dense delta, outer Nesterov
  ddp         no local step: the gradient itself, then AdamW as outer optimizer
              (plain synchronous data-parallel training)
"""

from typing import NamedTuple

import optax

from covenant import config as config_lib
from covenant.optim import compression as compression_lib
from covenant.optim import inner as inner_lib
from covenant.optim import outer as outer_lib
from covenant.optim import quantize

_QUANTIZERS: dict[str, quantize.Quantizer] = {
  'none': quantize.Exact(),
  'sign': quantize.Sign(),
  'statistical': quantize.Statistical(),
}


class Method(NamedTuple):
  inner: optax.GradientTransformation | None  # None: send the gradient
  schedule: optax.Schedule  # inner step of the run -> learning rate
  compression: compression_lib.Compression
  error_decay: float | None  # None: no error feedback
  outer: optax.GradientTransformation
  mean_over: str
  clip: str


def make(config: config_lib.Config) -> Method:
  """The method that `config.optim` describes."""
  optim = config.optim
  schedule = inner_lib.schedule(
    optim.inner, total_steps=config.rounds * optim.inner_steps
  )
  adamw = inner_lib.adamw(optim.inner)
  dense = compression_lib.Dense()
  if optim.method == 'ddp':
    outer = optax.chain(adamw, optax.scale_by_schedule(schedule))
    return Method(None, schedule, dense, None, outer, 'all', 'none')
  outer = outer_lib.nesterov(optim.outer.learning_rate, optim.outer.momentum)
  if optim.method == 'diloco':
    return Method(adamw, schedule, dense, None, outer, 'all', 'none')
  compression = compression_lib.TopK(
    k=optim.compression.k,
    block=optim.compression.block,
    quantizer=_QUANTIZERS[optim.compression.quantizer],
  )
  return Method(
    adamw,
    schedule,
    compression,
    optim.compression.error_decay,
    outer,
    optim.aggregation.mean,
    optim.aggregation.clip,
  )
