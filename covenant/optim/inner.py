"""The inner optimizer, AdamW or Muon, and its learning rate.

The rate is a function of the step of the run, not of this miner's number of
updates: a miner that joins late trains at the same rate as the others.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import optax

from covenant import config
from covenant import typing as ct

_P = ParamSpec('_P')
_T = TypeVar('_T')


def make(
  inner: config.Inner, norm: jax.Array | None = None
) -> optax.GradientTransformation:
  """Returns the inner optimizer; its updates need multiplying by the rate.

  Args:
    inner: its settings.
    norm: the norm of the whole gradient, of which `update` gets a part; None:
      it gets all.
  """
  return {'adamw': adamw, 'muon': muon}[inner.kind](inner, norm)


def _clip(
  inner: config.Inner, norm: jax.Array | None
) -> optax.GradientTransformation:
  """Returns `optax.clip_by_global_norm`, for a norm that is given or not."""
  clip = optax.clip_by_global_norm(inner.clip_norm)
  if norm is None:
    return clip

  def update(
    updates: ct.Grads, state: ct.OptState, params: ct.Params | None = None
  ) -> tuple[ct.Grads, ct.OptState]:
    del params
    is_small = norm < inner.clip_norm

    def scaled(g: jax.Array) -> jax.Array:
      return jax.lax.select(is_small, g, (g / norm) * inner.clip_norm)

    return jax.tree.map(scaled, updates), state

  return optax.GradientTransformation(clip.init, update)


def adamw(
  inner: config.Inner, norm: jax.Array | None = None
) -> optax.GradientTransformation:
  """Returns clipped AdamW; its updates need multiplying by the rate.

  Weight decay covers all parameters, norms too. See `make` for the arguments.
  """
  tx = optax.chain(
    _clip(inner, norm),
    optax.scale_by_adam(b1=inner.b1, b2=inner.b2, eps=inner.eps),
    optax.add_decayed_weights(inner.weight_decay),
    optax.scale(-1.0),
  )
  return optax.GradientTransformation(tx.init, _promoting(tx.update))


def muon(
  inner: config.Inner, norm: jax.Array | None = None
) -> optax.GradientTransformation:
  """Returns clipped Muon for matrices, and AdamW for embeddings and gains.

  Both have Nesterov momentum, as in optax. Muon's updates are scaled to the
  root mean square of AdamW's (arXiv 2502.16982), so that one rate serves both.
  Matrices in a stack of layers are orthogonalized one by one. See `make` for
  the arguments.
  """
  tx = optax.chain(
    _clip(inner, norm),
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


def _matrices(params: ct.Params) -> ct.PyTree:
  """Marks the leaves that are matrices [..., in, out] to Muon; None: others."""

  def of(
    path: jax.tree_util.KeyPath, x: jax.Array
  ) -> optax.contrib.MuonDimensionNumbers | None:
    name = jax.tree_util.keystr(path)
    if x.ndim < 2 or 'embedding' in name:
      return None
    kind = jax.typeof(x)
    axes = {*jax.tree.leaves(tuple(kind.sharding.spec))}
    if axes := axes | kind.manual_axis_type.varying:
      raise ValueError(
        f'optim.inner.kind: muon orthogonalizes whole matrices, and {name} is '
        f'sharded on {tuple(sorted(axes))}; use adamw'
      )
    return optax.contrib.MuonDimensionNumbers(-2, -1)

  return jax.tree_util.tree_map_with_path(of, params)


def schedule(inner: config.Inner, total_steps: int) -> optax.Schedule:
  """Returns the learning rate as a function of the inner step of the run.

  The rate warms up linearly, then follows a cosine that pauses for
  `flat_steps`; from `anneal_start` on it rises linearly, then falls to zero.
  The published run had all of these phases.

  Args:
    inner: `decay_steps` includes the warm-up, but not the pause; 0 means
      `total_steps`.
    total_steps: the number of inner steps of the whole run.

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
  """Returns `rate` with a pause of `steps` from `start` on."""
  return lambda step: rate(step - jnp.clip(step - start, 0, steps))


def rejoin_factor(
  inner: config.Inner, step: jax.Array, first: jax.Array
) -> jax.Array:
  """Returns the factor of the rate for a miner whose first step was `first`.

  Its moments start at zero while the rate of the run may be at its peak: it
  warms up over `rejoin_steps`. A miner that starts with the run follows the
  schedule alone.
  """
  warm = (step - first + 1).astype(jnp.float32) / max(inner.rejoin_steps, 1)
  return jnp.where(first > 0, jnp.minimum(warm, 1.0), 1.0)


def _promoting(function: Callable[_P, _T]) -> Callable[_P, _T]:
  """Allows optax to mix floats with int32 counts."""

  @functools.wraps(function)
  def promoting(*args: _P.args, **kwargs: _P.kwargs) -> _T:
    with jax.numpy_dtype_promotion('standard'):
      return function(*args, **kwargs)

  return promoting
