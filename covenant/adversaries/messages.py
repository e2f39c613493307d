"""Arithmetic on messages that adversaries share."""

import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np

from covenant import typing as ct
from covenant.node import miner as miner_lib
from covenant.optim import compression as compression_lib
from covenant.optim import reduce
from covenant.optim import sparseloco
from covenant.train import local as local_lib

Miner = miner_lib.Miner
Task = local_lib.Task


def dense(miner: Miner, message: ct.Message) -> ct.Delta:
  """Returns the delta that a message stands for: float32, NumPy."""
  compression = miner.shared_model.method.compression
  return jax.device_get(_dense(message, miner.shared.params, compression))


def sparse(miner: Miner, delta: ct.Delta) -> ct.Message:
  """Returns the message of a delta."""
  compression = miner.shared_model.method.compression
  return jax.device_get(_sparse(delta, compression))


def changed(
  miner: Miner,
  message: ct.Message,
  change: Callable[[np.ndarray], np.ndarray],
) -> ct.Message:
  """Returns a message with `change` applied to each tensor of its delta."""
  return sparse(miner, jax.tree.map(change, dense(miner, message)))


def generator(miner: Miner, task: Task, *key: int) -> np.random.Generator:
  """Returns the draws of a round; one miner's own unless a key is given."""
  key = key or (task.uid,)
  return np.random.default_rng([miner.config.seed, task.round, *key])


def noise(miner: Miner, task: Task) -> ct.Message:
  """Returns normal noise, each tensor of the norm that is usual."""
  draw = generator(miner, task)
  delta = jax.tree.map(
    lambda x: draw.normal(size=x.shape).astype(np.float32), miner.shared.params
  )
  return sparse(miner, fit(miner, delta, miner.messages))


def zeros(miner: Miner, task: Task) -> ct.Message:
  """Returns the message of a delta of zeros."""
  del task
  return sparse(miner, jax.tree.map(np.zeros_like, miner.shared.params))


def fit(
  miner: Miner, delta: ct.Delta, messages: Mapping[int, ct.Message]
) -> ct.Delta:
  """Returns `delta` with the median norm of `messages`, which is not clipped.

  Without messages, a hundredth of the parameters' norm.
  """
  leaves, treedef = jax.tree.flatten(delta)
  compression = miner.shared_model.method.compression

  def norms(message: ct.Message) -> np.ndarray:
    return np.asarray(_norms(message, miner.shared.params, compression))

  if messages:
    norms_RxP = np.stack([norms(message) for message in messages.values()])
    wanted_P = np.sort(norms_RxP, axis=0)[(len(norms_RxP) - 1) // 2]
  else:
    params = jax.tree.leaves(miner.shared.params)
    wanted_P = np.array([0.01 * np.linalg.norm(x) for x in params])
  # Makes up for what sparsification drops.
  factors_P = wanted_P / np.maximum(norms(sparse(miner, delta)), 1e-12)
  scaled = [
    (np.asarray(x) * f).astype(np.float32)
    for x, f in zip(leaves, factors_P, strict=True)
  ]
  return treedef.unflatten(scaled)


@functools.partial(jax.jit, static_argnames='compression')
def _dense(
  message: ct.Message,
  like: ct.Params,
  compression: compression_lib.Compression,
) -> ct.Delta:
  return sparseloco.decompress(message, like, compression)


@functools.partial(jax.jit, static_argnames='compression')
def _sparse(
  delta: ct.Delta, compression: compression_lib.Compression
) -> ct.Message:
  return sparseloco.compress(delta, None, compression, None)[0]


@functools.partial(jax.jit, static_argnames='compression')
def _norms(
  message: ct.Message,
  like: ct.Params,
  compression: compression_lib.Compression,
) -> jax.Array:
  return reduce.message_norms(message, like, compression)
