"""The inner optimizer: AdamW, with its learning rate given from outside.

The rate is a function of the run's step, not of how many updates this miner
has made: a miner that joins late trains at the rate everybody else does.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from covenant import config


def adamw(inner: config.Inner) -> optax.GradientTransformation:
  """Clipped AdamW whose updates are still to be multiplied by the rate.

  Weight decay covers all parameters, norms too (reference/templar.md 6).
  """
  tx = optax.chain(
    optax.clip_by_global_norm(inner.clip_norm),
    optax.scale_by_adam(b1=inner.b1, b2=inner.b2, eps=inner.eps),
    optax.add_decayed_weights(inner.weight_decay),
    optax.scale(-1.0),
  )
  return optax.GradientTransformation(tx.init, _promoting(tx.update))


def schedule(inner: config.Inner, total_steps: int) -> optax.Schedule:
  """Inner step -> learning rate: linear warm-up, then cosine.

  Args:
    inner: `decay_steps` counts the warm-up in; 0 means `total_steps`.
    total_steps: inner steps of the whole run.
  """
  return _promoting(
    optax.warmup_cosine_decay_schedule(
      init_value=0.0,
      peak_value=inner.learning_rate,
      warmup_steps=inner.warmup_steps,
      decay_steps=inner.decay_steps or total_steps,
      end_value=inner.final_ratio * inner.learning_rate,
    )
  )


def _promoting(function: Callable[..., Any]) -> Callable[..., Any]:
  """Optax mixes floats with int32 counts, which strict promotion refuses."""

  @functools.wraps(function)
  def promoting(*args: Any) -> Any:
    with jax.numpy_dtype_promotion('standard'):
      return function(*args)

  return promoting
