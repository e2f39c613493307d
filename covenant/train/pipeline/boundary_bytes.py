"""The bytes that pass the boundaries between stages."""

import jax
import jax.numpy as jnp

from covenant import config as config_lib
from covenant.train.pipeline import fit as fit_lib
from covenant.train.pipeline import subspace


def round_bytes(
  model: config_lib.Model,
  island: config_lib.Island,
  sequences: int,
  context: int,
) -> int:
  """Returns the bytes that pass between the stages of an island per round.

  They are activations forward and gradients back over all boundaries, of which
  tied embeddings add one, from the last stage to the first. With a rank, they
  include the constants of the round (`subspace.fix`) and, on all boundaries but
  the last, the activations of the tokens that these are fitted to. Stages know
  the tokens and the embedding, so that neither is sent.

  Args:
    model: the architecture.
    island: the island.
    sequences: the sequences it trained on.
    context: positions per sequence.

  >>> model = config_lib.Model(width=64)
  >>> round_bytes(model, config_lib.Island(stages=2), 45, 64)
  2949120
  >>> round_bytes(model, config_lib.Island(stages=2, rank=20, bits=4), 45, 64)
  145090
  """
  stages = island.stages
  if stages == 1:
    return 0
  boundaries = stages - (not model.tie_embeddings)
  one_way = position_bytes(
    island.rank or model.width, island.bits, model.compute_dtype
  )
  total = sequences * context * 2 * boundaries * one_way
  if island.rank:
    passing = min(subspace.FITTED, sequences) * context * one_way
    total += (stages - 1) * fit_bytes(model.width, island.rank)
    total += (stages - 2) * passing
  return total


def fit_bytes(width: int, rank: int) -> int:
  """Returns the bytes of the constants of a boundary, sent once per round."""
  row = position_bytes(width, fit_lib.BITS, jnp.float32)
  return (width + 1) * row + width * rank * 2


def position_bytes(rank: int, bits: int, dtype: jax.typing.DTypeLike) -> int:
  """Returns the bytes per position that pass a boundary one way.

  >>> position_bytes(20, 4, 'float32'), position_bytes(20, 0, 'float32')
  (12, 80)
  """
  if not bits:
    return rank * jnp.dtype(dtype).itemsize
  return rank * bits // 8 + 2
