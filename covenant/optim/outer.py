"""The outer optimizer: the aggregated delta is the gradient it descends."""

from typing import Any

import jax
import optax


def nesterov(
  learning_rate: float, momentum: float = 0.0
) -> optax.GradientTransformation:
  """SGD with Nesterov momentum; `momentum=0` is plain SGD, without state.

  m <- momentum * m + delta;  theta <- theta - lr * (delta + momentum * m)

  DiLoCo uses (0.7, 0.9); SparseLoCo as published is (1.0, 0).
  """
  return optax.sgd(learning_rate, momentum=momentum or None, nesterov=True)


def outer_update(
  outer: optax.GradientTransformation,
  delta: Any,
  state: optax.OptState,
  params: Any,
) -> tuple[Any, optax.OptState]:
  """`params` moved by one outer step along the aggregated `delta`.

  Args:
    outer: an optax transformation, such as `nesterov`.
    delta: aggregated pseudo-gradient (start minus end), a pytree like params.
    state: the state of `outer`.
    params: the parameters at which the round started.

  Returns:
    The new parameters, in their own dtypes, and the new state.
  """
  delta = jax.tree.map(lambda d, p: d.astype(p.dtype), delta, params)
  updates, state = outer.update(delta, state, params)
  return optax.apply_updates(params, updates), state
