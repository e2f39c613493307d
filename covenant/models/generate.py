"""Text from a model: a token at a time, with a cache of keys and values.

On one device. Shapes: C consecutive positions, T the length of the cache, D
width, V vocabulary, H heads, N key and value heads, G = H / N, K = D / H.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from covenant import config as config_lib
from covenant import typing as ct
from covenant.models import attention
from covenant.models import llama

# Keys and values of each layer: two arrays [N, T, K].
Cache = list[tuple[jax.Array, jax.Array]]


class Sampling(NamedTuple):
  """The draw of a token from its logits."""

  temperature: float = 1.0  # 0: always the likeliest
  top_k: int = 0  # only so many of the likeliest; 0: all
  top_p: float = 1.0  # only the likeliest that have this probability together
  seed: int = 0

  def check(self) -> None:
    """Raises ConfigError, which names the flag."""
    for name, good, allowed in (
      ('temperature', self.temperature >= 0, '0 or more'),
      ('top_k', self.top_k >= 0, '0 or more'),
      ('top_p', 0 < self.top_p <= 1, 'above 0 and at most 1'),
    ):
      if not good:
        raise config_lib.ConfigError(
          f'--{name}: expected {allowed}, got {getattr(self, name)}'
        )


def generate(
  model: config_lib.Model,
  params: ct.Params,
  prompt: Sequence[int] | np.ndarray,
  count: int,
  sampling: Sampling | None = None,
  stop: int | None = None,
) -> Iterator[int]:
  """Yields the tokens that follow a prompt, as they are drawn.

  Args:
    model: the architecture.
    params: parameters of `llama.init`, on one device or the host.
    prompt: ids, one or more.
    count: the most tokens to draw.
    sampling: how they are drawn; None: from the model's probabilities.
    stop: the id after which nothing follows, which is not yielded.

  Raises:
    ConfigError: the prompt is empty or has ids that the model lacks, or
      `sampling` is invalid.
  """
  sampling = sampling or Sampling()
  sampling.check()
  ids = np.asarray(prompt, np.int32)
  if not ids.size or ids.min() < 0 or ids.max() >= model.vocab_size:
    raise config_lib.ConfigError(
      f'--prompt: expected one token or more below {model.vocab_size}, got '
      f'{ids.size} from {ids.min(initial=0)} to {ids.max(initial=0)}'
    )
  # Powers of two, so that few lengths are compiled.
  length = 1 << int(ids.size + count - 1).bit_length()
  padded = np.pad(ids, (0, (1 << int(ids.size - 1).bit_length()) - ids.size))
  cache = empty_cache(model, length)
  last = np.int32(ids.size - 1)
  logits_V, cache = _step(model, params, cache, padded, np.int32(0), last)
  key = jax.random.key(sampling.seed)
  for n in range(count):
    draw = jax.random.fold_in(key, n)
    token = int(_draw(draw, logits_V, sampling._replace(seed=0)))
    if token == stop:
      return
    yield token
    if n + 1 < count:
      logits_V, cache = _step(
        model,
        params,
        cache,
        np.array([token], np.int32),
        np.int32(ids.size + n),
        np.int32(0),
      )


def empty_cache(model: config_lib.Model, length: int) -> Cache:
  """Returns a cache of so many positions."""
  m = model
  shape = (m.kv_heads, length, m.width // m.heads)
  zeros_NxTxK = jnp.zeros(shape, m.compute_dtype)
  return [(zeros_NxTxK, zeros_NxTxK) for _ in range(m.layers)]


@functools.partial(jax.jit, static_argnums=0)
def _step(
  model: config_lib.Model,
  params: ct.Params,
  cache: Cache,
  ids_C: jax.Array,
  first: jax.Array,
  last: jax.Array,
) -> tuple[jax.Array, Cache]:
  """Reads consecutive tokens.

  Args:
    model: the architecture.
    params: its parameters.
    cache: of the positions before.
    ids_C: the tokens; those after `last` are padding, whose keys and values
      later ones replace.
    first: the position of the first token.
    last: the token, of `ids_C`, after which logits are returned.

  Returns:
    float32 logits_V, and the cache with these positions.
  """
  x_1xCxD = llama.embed(model, params, ids_C[None])
  turns_I = attention.frequencies(model)
  tables = attention.turns(cache[0][0].shape[1], turns_I)
  C = ids_C.shape[0]
  cos_CxI, sin_CxI = (
    jax.lax.dynamic_slice_in_dim(jnp.asarray(x), first, C) for x in tables
  )
  new: Cache = []
  for i, (keys_NxTxK, values_NxTxK) in enumerate(cache):
    layer = (
      jax.tree.map(lambda x, i=i: x[i], params['layers'])
      if model.scan_layers
      else params[f'layers_{i}']
    )
    y_1xCxD = llama.normalize(model, layer['attention_norm'], x_1xCxD)

    def project(
      name: str,
      heads: int,
      y_1xCxD: jax.Array = y_1xCxD,
      layer: ct.Params = layer,
    ) -> jax.Array:
      weight = layer['attention'][name].astype(model.compute_dtype)
      y_CxHK = y_1xCxD[0] @ weight
      return y_CxHK.reshape(C, heads, -1).swapaxes(0, 1)

    q_HxCxK = attention.turn(project('query', model.heads), cos_CxI, sin_CxI)
    k_NxCxK = attention.turn(project('key', model.kv_heads), cos_CxI, sin_CxI)
    v_NxCxK = project('value', model.kv_heads)
    keys_NxTxK, values_NxTxK = (
      jax.lax.dynamic_update_slice_in_dim(old, x, first, 1)
      for old, x in ((keys_NxTxK, k_NxCxK), (values_NxTxK, v_NxCxK))
    )
    new.append((keys_NxTxK, values_NxTxK))
    y_CxHK = _attend(q_HxCxK, keys_NxTxK, values_NxTxK, first)
    output = layer['attention']['output'].astype(model.compute_dtype)
    x_1xCxD = x_1xCxD + (y_CxHK @ output)[None]
    y_1xCxD = llama.normalize(model, layer['ffn_norm'], x_1xCxD)
    x_1xCxD = x_1xCxD + llama.feed_forward(model, layer['ffn'], y_1xCxD)
  x_1x1xD = jax.lax.dynamic_slice_in_dim(x_1xCxD, last, 1, axis=1)
  product = llama.product_of(model, params, x_1x1xD)
  return llama.logits(model, *product)[0, 0], new


def _attend(
  q_HxCxK: jax.Array,
  keys_NxTxK: jax.Array,
  values_NxTxK: jax.Array,
  first: jax.Array,
) -> jax.Array:
  """Attends to the positions up to each token's own; returns [C, H * K]."""
  H, C, K = q_HxCxK.shape
  N, T, _ = keys_NxTxK.shape
  q_NxGxCxK = q_HxCxK.reshape(N, H // N, C, K) * (K**-0.5)
  score_NxGxCxT = jnp.einsum(
    'ngck,ntk->ngct',
    q_NxGxCxK,
    keys_NxTxK,
    preferred_element_type=jnp.float32,
  )
  seen_CxT = first + jnp.arange(C)[:, None] >= jnp.arange(T)[None]
  score_NxGxCxT = jnp.where(seen_CxT[None, None], score_NxGxCxT, -1e30)
  p_NxGxCxT = jax.nn.softmax(score_NxGxCxT, axis=-1)
  y_CxNxGxK = jnp.einsum(
    'ngct,ntk->cngk', p_NxGxCxT.astype(values_NxTxK.dtype), values_NxTxK
  )
  return y_CxNxGxK.reshape(C, H * K)


@functools.partial(jax.jit, static_argnums=2)
def _draw(key: jax.Array, logits_V: jax.Array, sampling: Sampling) -> jax.Array:
  """Draws a token."""
  if sampling.temperature == 0:
    return jnp.argmax(logits_V)
  order_V = jnp.argsort(-logits_V)
  sorted_V = logits_V[order_V] / sampling.temperature
  rank_V = jnp.arange(logits_V.size)
  p_V = jax.nn.softmax(sorted_V)
  before_V = jnp.cumsum(p_V) - p_V
  kept_V = (before_V < sampling.top_p) | (rank_V == 0)
  if sampling.top_k:
    kept_V &= rank_V < sampling.top_k
  chosen = jax.random.categorical(key, jnp.where(kept_V, sorted_V, -jnp.inf))
  return order_V[chosen]
