"""The weight of a message beside the others of its round.

`optim.aggregation.weight` is one of two rules:

  equal   every message counts alike
  tokens  a message counts in proportion to the sequences it was trained on, as
          if every sequence had one vote (the p_i of FedAvg and FedNova)

A weight is a function of one payload's header, counted in parts of a whole, and
the same on every node. The sequences that a header declares are bounded by
those assigned to its peer. A peer that declares more than it trained on gets a
larger weight, up to that bound; but validators evaluate it on the sequences it
declares (covenant/gauntlet/scores.py), so its proof and its pay fall.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from covenant import typing as ct
from covenant.optim import arguments
from covenant.optim import exact

WHOLE = 64  # parts; sums of 1023 peers' fit the uint16 of `Sums.senders`
MOST_PEERS = (2**16 - 1) // WHOLE


class Weight(NamedTuple):
  """The weight of one message."""

  parts: int = WHOLE  # of a whole; 0 takes no part
  # Sequences it was trained on, where a longer delta is expected of more.
  size: int = 1


class Totals(NamedTuple):
  """The divisors of a round's sums, as factors; float32."""

  # 1 / max(n, average) of n parts of senders, in wholes, by n.
  of_senders: ct.Array
  of_all: ct.Scalar = np.float32(1)  # 1 / the weight of all messages


def parts_of(weight: ct.Scalar) -> jax.Array:
  """Returns a weight from 0 to 1 in parts of a whole, int32; None is a whole.

  Of a weight above zero it is at least one part.

  Raises:
    TypeError: not a number, or an array of several.
    ValueError: a number outside of 0 to 1, unless it is traced.
  """
  if weight is None:
    return jnp.full((), WHOLE, jnp.int32)
  if isinstance(weight, bool) or jnp.issubdtype(
    getattr(weight, 'dtype', float), jnp.bool_
  ):
    weight = jnp.asarray(weight, jnp.float32)
  arguments.check_number('weight', weight, 0, 1, 'for each peer')
  weight = jnp.clip(jnp.asarray(weight, jnp.float32), 0, 1)
  parts = jnp.round(weight * WHOLE).astype(jnp.int32)
  return jnp.where(weight > 0, jnp.maximum(parts, 1), 0)


def weigh(rule: str, sequences: int, assigned: int) -> Weight:
  """Returns the weight of a message.

  Args:
    rule: 'equal' or 'tokens'.
    sequences: the number that the message declares to be trained on.
    assigned: the largest number that it may declare.

  >>> weigh('tokens', sequences=20, assigned=80)
  Weight(parts=16, size=20)
  """
  if rule not in ('equal', 'tokens'):
    raise ValueError(f"weight: expected 'equal' or 'tokens', got {rule!r}")
  sequences = min(max(sequences, 1), assigned)
  by_tokens = rule == 'tokens'
  share = sequences / assigned if by_tokens else 1.0
  return Weight(max(round(WHOLE * share), 1), sequences if by_tokens else 1)


def columns(
  weights: Sequence[Weight | float] | None, messages: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the parts, uint16 [R], and the sizes, float32 [R], of R weights.

  Args:
    weights: those of R messages; a number from 0 to 1 is the weight that
      `parts_of` makes of it. None: all count alike.
    messages: R, if it is known.

  Raises:
    ValueError: more weights than the sums can count, or not R.
  """
  if weights is None:
    weights = [Weight()] * (messages or 0)
  if messages is not None and len(weights) != messages:
    raise ValueError(
      f'weights: expected one for each of {messages} messages, got '
      f'{len(weights)}'
    )
  if len(weights) > MOST_PEERS:
    raise ValueError(
      f'expected at most {MOST_PEERS} messages, got {len(weights)}'
    )
  known = [
    w if isinstance(w, Weight) else Weight(int(parts_of(w))) for w in weights
  ]
  for w in known:
    arguments.check_count('Weight.parts', w.parts, 0, WHOLE)
  parts_R = np.array([w.parts for w in known], np.uint16)
  return parts_R, np.array([w.size for w in known], np.float32)


def totals(parts_R: ct.Array, size: int = 2**16) -> Totals:
  """Returns the divisors of the sums of R messages; of none, those of one.

  Messages of weight 0 do not count. Of a NumPy array the divisors are computed
  in float64 on the host, since devices divide differently; of a JAX array in
  integers, with the same bits.

  Args:
    parts_R: the messages' weights, in parts.
    size: the number of divisors: more than the parts of all senders.
  """
  if not isinstance(parts_R, np.ndarray):
    parts_R = parts_R.astype(jnp.int32)
    count = jnp.maximum(jnp.sum(parts_R > 0, dtype=jnp.int32), 1)
    total = jnp.sum(parts_R, dtype=jnp.int32)
    total = jnp.where(total > 0, total, WHOLE)
    counts = jnp.stack([count, jnp.ones_like(count)])
    least, of_all = exact.ratio(WHOLE * counts, total)
    senders = np.arange(size, dtype=np.int32)
    # Constants where enough peers send: no division per entry in the program.
    alone = (WHOLE / np.maximum(senders, 1)).astype(np.float32)
    return Totals(jnp.where(senders * count >= total, alone, least), of_all)
  count = max(int(np.count_nonzero(parts_R)), 1)
  total = int(parts_R.sum(dtype=np.int64)) or WHOLE
  senders = np.maximum(np.arange(size, dtype=np.float64) * count, total)
  return Totals(
    (WHOLE * count / senders).astype(np.float32), np.float32(WHOLE / total)
  )


def wholes(parts_R: ct.Array) -> ct.Array:
  """Returns weights as factors: float32 [R]."""
  return parts_R.astype(np.float32) / np.float32(WHOLE)
