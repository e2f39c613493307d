"""The inner optimizer, AdamW or Muon, its learning rate given from outside.

The rate is a function of the run's step, not of how many updates this miner
has made: a miner that joins late trains at the rate everybody else does.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from covenant import config
from covenant.optim import collectives


def make(inner: config.Inner) -> optax.GradientTransformation:
  """Returns the inner optimizer; its updates need multiplying by the rate."""
  return {'adamw': adamw, 'muon': muon}[inner.kind](inner)


def adamw(inner: config.Inner) -> optax.GradientTransformation:
  """Clipped AdamW whose updates are still to be multiplied by the rate.

  Weight decay covers all parameters, norms too.
  """
  tx = optax.chain(
    optax.clip_by_global_norm(inner.clip_norm),
    optax.scale_by_adam(b1=inner.b1, b2=inner.b2, eps=inner.eps),
    optax.add_decayed_weights(inner.weight_decay),
    optax.scale(-1.0),
  )
  return optax.GradientTransformation(tx.init, _promoting(tx.update))


def muon(inner: config.Inner) -> optax.GradientTransformation:
  """Clipped Muon of matrices, and AdamW of embeddings and gains.

  Both with Nesterov momentum, as optax has it. Scaled to the root mean square
  of AdamW's updates (arXiv 2502.16982), so that one rate serves both. Of a
  stack of layers, every matrix is its own.
  """
  tx = optax.chain(
    optax.clip_by_global_norm(inner.clip_norm),
    optax.contrib.muon(
      1.0,
      eps=inner.eps,
      weight_decay=inner.weight_decay,
      adam_b1=inner.b1,
      adam_b2=inner.b2,
      adam_weight_decay=inner.weight_decay,
      muon_weight_dimension_numbers=_matrices,
      consistent_rms=0.2,
    ),
  )
  return optax.GradientTransformation(
    _promoting(tx.init), _promoting(tx.update)
  )


def _matrices(params: Any) -> Any:
  """Marks the leaves that are matrices [..., in, out] to Muon; None: others."""

  def of(path: Any, x: Any) -> Any:
    name = jax.tree_util.keystr(path)
    if x.ndim < 2 or 'embedding' in name:
      return None
    if axes := collectives.shard_axes(x, None):
      raise ValueError(
        f'optim.inner.kind: muon orthogonalizes whole matrices, and {name} is '
        f'sharded on {axes}; use adamw'
      )
    return optax.contrib.MuonDimensionNumbers(-2, -1)

  return jax.tree_util.tree_map_with_path(of, params)


def schedule(inner: config.Inner, total_steps: int) -> optax.Schedule:
  """Inner step -> learning rate.

  Linear warm-up, then cosine, which stands still for `flat_steps`; from
  `anneal_start` on, linear up and linear down to zero. The published run had
  all of it.

  Args:
    inner: `decay_steps` counts the warm-up in, but not the pause; 0 means
      `total_steps`.
    total_steps: inner steps of the whole run.

  >>> inner = config.Inner(
  ...   learning_rate=1.0,
  ...   decay_steps=4,
  ...   final_ratio=0.0,
  ...   flat_start=2,
  ...   flat_steps=2,
  ...   anneal_start=8,
  ...   anneal_warmup_steps=1,
  ...   anneal_decay_steps=2,
  ...   anneal_ratio=0.5,
  ... )
  >>> print([round(float(schedule(inner, 0)(i)), 2) for i in range(12)])
  [1.0, 0.85, 0.5, 0.5, 0.5, 0.15, 0.0, 0.0, 0.0, 0.5, 0.25, 0.0]
  """
  rate = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=inner.learning_rate,
    warmup_steps=inner.warmup_steps,
    decay_steps=inner.decay_steps or total_steps,
    end_value=inner.final_ratio * inner.learning_rate,
  )
  if inner.flat_steps:
    rate = _pausing(rate, inner.flat_start, inner.flat_steps)
  if inner.anneal_start:
    peak = inner.anneal_ratio * inner.learning_rate
    up, down = inner.anneal_warmup_steps, inner.anneal_decay_steps
    anneal = [
      optax.linear_schedule(0.0, peak, up),
      optax.linear_schedule(peak, 0.0, down),
    ]
    start = inner.anneal_start
    rate = optax.join_schedules([rate, *anneal], [start, start + up])
  return _promoting(rate)


def _pausing(rate: optax.Schedule, start: int, steps: int) -> optax.Schedule:
  """`rate`, that stands still for `steps` from `start` on."""
  return lambda step: rate(step - jnp.clip(step - start, 0, steps))


def rejoin_factor(
  inner: config.Inner, step: jax.Array, first: jax.Array
) -> jax.Array:
  """Returns the factor of the rate for a miner whose first step was `first`.

  Its moments start at zero while the rate of the run may be at its peak: it
  warms up over `rejoin_steps`. Who starts with the
  run follows the schedule alone.
  """
  warm = (step - first + 1).astype(jnp.float32) / max(inner.rejoin_steps, 1)
  return jnp.where(first > 0, jnp.minimum(warm, 1.0), 1.0)


def _promoting(function: Callable[..., Any]) -> Callable[..., Any]:
  """Optax mixes floats with int32 counts, which strict promotion refuses."""

  @functools.wraps(function)
  def promoting(*args: Any) -> Any:
    with jax.numpy_dtype_promotion('standard'):
      return function(*args)

  return promoting
