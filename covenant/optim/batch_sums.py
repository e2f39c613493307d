"""The sums of peers' messages, batch by batch (batch.py, reduce.py)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from covenant import typing as ct
from covenant.optim import batch as batch_lib
from covenant.optim import collectives
from covenant.optim import reduce
from covenant.optim import weight as weight_lib


def means(
  batches: batch_lib.Batches,
  messages: list[ct.Message],
  values: list[list[jax.Array]],
  factors_RxP: jax.Array,
  parts_R: jax.Array,
  mean_over: str,
  step: Callable[[jax.Array], Any] | None = None,
) -> list[jax.Array]:
  """Returns the mean deltas of all batches: float32 [G, ...].

  Args:
    batches: those of a tree.
    messages: every peer's part of each batch, [G, R, ...].
    values: the values of these.
    factors_RxP: the factor of each peer's tensors.
    parts_R: the peers' weights.
    mean_over: see `reduce.finish`.
    step: a function of each element, applied to the means.
  """
  if len(parts_R) > weight_lib.MOST_PEERS:
    raise ValueError(
      f'axis_name: expected at most {weight_lib.MOST_PEERS} peers, whose '
      f'senders can be counted, got {len(parts_R)}'
    )
  size = len(parts_R) * weight_lib.WHOLE + 1
  totals = batch_lib.once(lambda x: weight_lib.totals(x, size), parts_R)
  factors = _factors(batches, factors_RxP)
  peers = (_by_peer(messages), _by_peer(values), factors, parts_R)

  def add(sums: list[Any], peer: Any) -> tuple[list[Any], None]:
    parts_of, values_of, factors_of, parts = peer
    return [
      batch_lib.mapped(
        lambda total, part, value, factor, b=b: reduce.add_values(
          total, part, value, factor, b.compression, parts
        ),
        (x, part, value, factor),
      )
      for b, x, part, value, factor in zip(
        batches, sums, parts_of, values_of, factors_of, strict=True
      )
    ], None

  # One loop over the peers for all batches.
  start = [
    collectives.typed_like(
      jax.tree.map(
        lambda x, b=b: jnp.broadcast_to(x, (b.elements, *x.shape)),
        b.compression.start(b.shape),
      ),
      (message, value, factors_RxP, parts_R),
    )
    for b, message, value in zip(batches, messages, values, strict=True)
  ]
  sums, _ = jax.lax.scan(add, start, peers)

  def finish(b: batch_lib.Batch, sums: Any, totals: weight_lib.Totals) -> Any:
    mean = reduce.finish(sums, totals, b.shape, b.compression, mean_over)
    return mean if step is None else step(mean)

  return [
    batch_lib.once(
      lambda x, totals, b=b: batch_lib.each(
        lambda one: finish(b, one, totals), (x,)
      ),
      x,
      totals,
    )
    for b, x in zip(batches, sums, strict=True)
  ]


def _factors(
  batches: batch_lib.Batches, factors_RxP: jax.Array
) -> list[jax.Array]:
  """Returns the factors of the elements of batches, or of blocks: [R, ...]."""
  owners = [np.zeros(0, np.int32), *(b.owners for b in batches)]
  ends = np.cumsum([len(x) for x in owners])
  found = factors_RxP.at[:, np.concatenate(owners)].get(
    mode='promise_in_bounds'
  )
  parts = [found[:, a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
  return [
    x[:, None, :, None] if b.of_blocks else x
    for b, x in zip(batches, parts, strict=True)
  ]


def _by_peer(tree: ct.PyTree) -> ct.PyTree:
  """Returns arrays [R, G, ...] of arrays [G, R, ...]."""
  return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)
