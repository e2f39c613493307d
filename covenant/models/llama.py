"""A Llama-style decoder: pure `init` and `apply` over a plain pytree.

Touvron et al, `LLaMA <https://arxiv.org/abs/2302.13971>`_, 2023: RMSNorm before
each residual branch, rotary positions, grouped-query attention, SwiGLU.

Parameters are nested dicts of float32 arrays. Every weight is a matrix
[in, out], heads merged, since the compressor divides matrices into blocks. With
`scan_layers` the leaves under 'layers' gain a leading axis of length `layers`;
without, there are 'layers_0', 'layers_1', ...

Inside `jax.shard_map` over a miner's mesh every device sees its own sequences
and shards, and asks for those of others (covenant/models/sharding.py).

Shapes: B batch, L length, D width, V vocabulary, H heads, N key and value
heads, G = H / N queries that share one, K = D / H head width, F ffn width; all
of the shard where an array is sharded.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from covenant import config
from covenant import extras
from covenant import typing as ct
from covenant.models import attention
from covenant.models import initial
from covenant.models import sharding

with extras.needed('run'):
  import flax.linen as nn

_STDDEV = 0.02  # as in GPT-2 and Hugging Face's LlamaConfig


def _linear(x_BxLxD: jax.Array, w_DxF: jax.Array, dtype=None) -> jax.Array:
  """Returns x @ w as a product of two matrices, in `dtype` if given.

  With flat matrices XLA's CPU backend computes the gradient of the weight
  without transposing that of the output first.
  """
  B, L, D = x_BxLxD.shape
  y_BLxF = jnp.matmul(
    x_BxLxD.reshape(B * L, D), w_DxF, preferred_element_type=dtype
  )
  return y_BLxF.reshape(B, L, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def product(
  x_BxLxD: jax.Array,
  w_DxF: jax.Array,
  gathered: tuple[str, ...] = (),
  axis: int = 0,
  dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
  """Returns x @ w and keeps only the shard of w for the backward pass.

  Args:
    x_BxLxD: activations in the compute dtype.
    w_DxF: a float32 shard. It is cast to the dtype of x, then gathered; its
      gradient is computed in float32, then scattered.
    gathered: the mesh axes over which w is sharded.
    axis: the side of w that is sharded.
    dtype: the dtype of the result; None is that of x.
  """
  w_DxF = sharding.gather(w_DxF.astype(x_BxLxD.dtype), gathered, axis)
  return _linear(x_BxLxD, w_DxF, dtype)


def _product_forward(x_BxLxD, w_DxF, gathered, axis, dtype):
  return product(x_BxLxD, w_DxF, gathered, axis, dtype), (x_BxLxD, w_DxF)


def _product_backward(gathered, axis, dtype, kept, dy_BxLxF):
  x_BxLxD, w_DxF = kept
  w_DxF = sharding.gather(w_DxF.astype(x_BxLxD.dtype), gathered, axis)
  dy_BxLxF = dy_BxLxF.astype(x_BxLxD.dtype)
  dw_DxF = jnp.matmul(
    x_BxLxD.reshape(-1, x_BxLxD.shape[-1]).T,
    dy_BxLxF.reshape(-1, dy_BxLxF.shape[-1]),
    preferred_element_type=jnp.float32,
  )
  return _linear(dy_BxLxF, w_DxF.T), sharding.scatter(dw_DxF, gathered, axis)


product.defvjp(_product_forward, _product_backward)


def _project(
  module: nn.Module,
  name: str,
  x_BxLxD: jax.Array,
  shape: tuple[int, int],
  stddev: float = _STDDEV,
) -> jax.Array:
  """Returns x @ w for the parameter of a name, given its unsharded shape."""
  w_DxF = _weight(module, name, shape, stddev)
  sides = sharding.MATRICES[name]
  if not sharding.is_cut(*sides):
    return _linear(x_BxLxD, w_DxF.astype(module.model.compute_dtype))
  return product(x_BxLxD, w_DxF, sharding.axes('width'), sides.index('width'))


def _weight(
  module: nn.Module, name: str, shape: tuple[int, int], stddev: float = _STDDEV
) -> jax.Array:
  """Returns a float32 parameter, or this device's shard of it."""
  sides = sharding.MATRICES[name]
  shard = tuple(
    n // sharding.size(side) for n, side in zip(shape, sides, strict=True)
  )
  return module.param(name, nn.initializers.normal(stddev), shard, jnp.float32)


def _branch_stddev(model: config.Model) -> float:
  """Returns the scale of residual outputs (GPT-2, 2019, section 2.3)."""
  return _STDDEV / math.sqrt(2 * model.layers)


class RMSNorm(nn.Module):
  """Root mean square normalization (Zhang & Sennrich, arXiv 1910.07467)."""

  model: config.Model

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
    gain_D = self.param(
      'gain', nn.initializers.ones, x_BxLxD.shape[-1:], jnp.float32
    )
    wide_BxLxD = x_BxLxD.astype(jnp.float32)
    mean_BxLx1 = jnp.mean(jnp.square(wide_BxLxD), axis=-1, keepdims=True)
    scale_BxLx1 = jax.lax.rsqrt(mean_BxLx1 + self.model.norm_eps)
    y_BxLxD = wide_BxLxD * scale_BxLx1 * gain_D[None, None]
    return y_BxLxD.astype(x_BxLxD.dtype)


class Attention(nn.Module):
  """Causal grouped-query attention (Ainslie et al, arXiv 2305.13245).

  Each group of heads / kv_heads query heads shares one key and value head.
  """

  model: config.Model

  @nn.compact
  def __call__(
    self, x_BxLxD: jax.Array, document_BxL: jax.Array | None = None
  ) -> jax.Array:
    m = self.model
    B, L, D = x_BxLxD.shape
    H, N, K = m.heads, m.kv_heads, m.width // m.heads
    # Once for all three, so that their gradients are summed together.
    x_BxLxD = sharding.vary(x_BxLxD, 'heads')

    def project(name, heads):
      y_BxLxHK = _project(self, name, x_BxLxD, (D, heads * K))
      return y_BxLxHK.reshape(B, L, -1, K).swapaxes(1, 2)

    turns_I = attention.frequencies(m)
    q_BxHxLxK = attention.rotate(project('query', H), turns_I)
    k_BxNxLxK = attention.rotate(project('key', N), turns_I)
    v_BxNxLxK = project('value', N)
    attend = attention.kernel(m)
    y_BxHxLxK = attend(q_BxHxLxK, k_BxNxLxK, v_BxNxLxK, document_BxL)

    y_BxLxHK = y_BxHxLxK.swapaxes(1, 2).reshape(B, L, -1)
    y_BxLxD = _project(self, 'output', y_BxLxHK, (H * K, D), _branch_stddev(m))
    return sharding.total(y_BxLxD, 'heads')


class SwiGLU(nn.Module):
  """The gated feed-forward network (Shazeer, arXiv 2002.05202)."""

  model: config.Model

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
    D, F = self.model.width, self.model.ffn_width
    x_BxLxD = sharding.vary(x_BxLxD, 'ffn')
    gate_BxLxF = _project(self, 'gate', x_BxLxD, (D, F))
    up_BxLxF = _project(self, 'up', x_BxLxD, (D, F))
    y_BxLxF = nn.silu(gate_BxLxF) * up_BxLxF
    y_BxLxD = _project(
      self, 'down', y_BxLxF, (F, D), _branch_stddev(self.model)
    )
    return sharding.total(y_BxLxD, 'ffn')


class Block(nn.Module):
  """One layer: attention, then the feed-forward network, each a residual."""

  model: config.Model

  @nn.compact
  def __call__(
    self, x_BxLxD: jax.Array, document_BxL: jax.Array | None = None
  ) -> jax.Array:
    m = self.model
    y_BxLxD = RMSNorm(m, name='attention_norm')(x_BxLxD)
    x_BxLxD += Attention(m, name='attention')(y_BxLxD, document_BxL)
    y_BxLxD = RMSNorm(m, name='ffn_norm')(x_BxLxD)
    return x_BxLxD + SwiGLU(m, name='ffn')(y_BxLxD)


def _look_up(
  table_VxD: jax.Array, tokens_BxL: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
  """Returns rows of a table that may be sharded by rows."""
  # Cast after the look-up: the table's gradient is summed in float32.
  if not sharding.is_cut('vocab'):
    return table_VxD[tokens_BxL].astype(dtype)
  # Each device looks up its rows for all sequences along 'fsdp'. The others
  # add zeros to them, which is exact in any dtype.
  along = sharding.axes('fsdp')
  tokens_BxL = sharding.gather(tokens_BxL, along, 0)
  row_BxL = tokens_BxL - sharding.index('vocab') * table_VxD.shape[0]
  here_BxL = (row_BxL >= 0) & (row_BxL < table_VxD.shape[0])
  x_BxLxD = table_VxD[jnp.where(here_BxL, row_BxL, 0)]
  x_BxLxD = jnp.where(here_BxL[..., None], x_BxLxD, 0).astype(dtype)
  return sharding.total(sharding.scatter(x_BxLxD, along, 0), 'tensor')


def ids(model: config.Model, tokens_BxL: jax.Array) -> jax.Array:
  """Returns the ids of tokens.

  Negative tokens are padding, read as 0. Of a packed model they are the
  complements of the ids that start documents (covenant/data/tokens.py).
  """
  if not model.packed:
    return jnp.maximum(tokens_BxL, 0)
  return jnp.where(tokens_BxL < 0, ~tokens_BxL, tokens_BxL)


def inputs(model: config.Model, tokens_BxL1: jax.Array) -> jax.Array:
  """Returns all tokens but the last, as `hidden` reads them."""
  tokens_BxL = tokens_BxL1[:, :-1]
  return tokens_BxL if model.packed else ids(model, tokens_BxL)


def documents(model: config.Model, tokens_BxL: jax.Array) -> jax.Array | None:
  """Returns the number of the document of each position; None if not packed."""
  if not model.packed:
    return None
  return jnp.cumsum(tokens_BxL < 0, axis=1, dtype=jnp.int32)


class Llama(nn.Module):
  """The decoder: tokens_BxL -> (x_BxLxD, w_DxV), with logits x @ w."""

  model: config.Model

  @nn.compact
  def __call__(self, tokens_BxL: jax.Array) -> tuple[jax.Array, jax.Array]:
    m = self.model
    table_VxD = _weight(self, 'embedding', (m.vocab_size, m.width))
    document_BxL = documents(m, tokens_BxL)
    if m.packed:
      tokens_BxL = ids(m, tokens_BxL)
    x_BxLxD = _look_up(table_VxD, tokens_BxL, m.compute_dtype)
    block = Block
    if m.remat != 'none':
      dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
      block = nn.remat(
        Block,
        prevent_cse=not m.scan_layers,
        policy=dots if m.remat == 'dots' else None,
      )
    if m.scan_layers:
      scan = nn.scan(
        lambda layer, x_BxLxD, document: (layer(x_BxLxD, document), None),
        variable_axes={'params': 0},
        split_rngs={'params': True},
        in_axes=nn.broadcast,
        length=m.layers,
      )
      x_BxLxD, _ = scan(block(m, name='layers'), x_BxLxD, document_BxL)
    else:
      for i in range(m.layers):
        x_BxLxD = block(m, name=f'layers_{i}')(x_BxLxD, document_BxL)
    x_BxLxD = RMSNorm(m, name='final_norm')(x_BxLxD)
    if m.tie_embeddings:
      return x_BxLxD, table_VxD.T
    return x_BxLxD, _weight(self, 'unembedding', (m.width, m.vocab_size))


def init(model: config.Model, seed_key: jax.Array) -> ct.Params:
  """Returns float32 parameters: normal(0.02) matrices, and gains of 1.

  Outputs of branches are smaller, see `_branch_stddev`. All machines compute
  the same bits (covenant/models/initial.py).
  """
  seed_2 = jax.random.key_data(seed_key)[:2]

  def leaf(path: ct.PyTree, x: jax.ShapeDtypeStruct) -> jax.Array:
    names = [entry.key for entry in path]
    if names[-1] == 'gain':
      return jnp.ones(x.shape, x.dtype)
    is_branch = names[-1] in ('output', 'down')
    deviation = _branch_stddev(model) if is_branch else _STDDEV
    return initial.normal(seed_2, '/'.join(names), x.shape, deviation)

  return jax.tree.map_with_path(leaf, abstract(model))


def hidden(
  model: config.Model, params: ct.Params, tokens_BxL: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the factors of the logits: x_BxLxD and float32 w_DxV.

  x is in the compute dtype, to which `logits` casts w. Inside `jax.shard_map`
  over a miner's mesh they are of this device's sequences and its shard of the
  vocabulary. Of a packed model tokens are as `ids` says.
  """
  product: ct.PyTree = Llama(model).apply({'params': params}, tokens_BxL)
  return product


def embed(
  model: config.Model, params: ct.Params, tokens_BxL: jax.Array
) -> jax.Array:
  """Returns the input of the first layer."""
  return _look_up(params['embedding'], tokens_BxL, model.compute_dtype)


def block(
  model: config.Model,
  layer: ct.Params,
  x_BxLxD: jax.Array,
  document_BxL: jax.Array | None = None,
) -> jax.Array:
  """Applies one layer with its own parameters."""
  y_BxLxD: ct.PyTree = Block(model).apply(
    {'params': layer}, x_BxLxD, document_BxL
  )
  return y_BxLxD


def normalize(
  model: config.Model, norm: ct.Params, x_BxLxD: jax.Array
) -> jax.Array:
  """Applies a normalization with its own parameters."""
  y_BxLxD: ct.PyTree = RMSNorm(model).apply({'params': norm}, x_BxLxD)
  return y_BxLxD


def feed_forward(
  model: config.Model, ffn: ct.Params, x_BxLxD: jax.Array
) -> jax.Array:
  """Applies a feed-forward network with its own parameters."""
  y_BxLxD: ct.PyTree = SwiGLU(model).apply({'params': ffn}, x_BxLxD)
  return y_BxLxD


def product_of(
  model: config.Model, params: ct.Params, x_BxLxD: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the factors of the logits, given the output of the last layer."""
  y_BxLxD = normalize(model, params['final_norm'], x_BxLxD)
  tied = model.tie_embeddings
  return y_BxLxD, params['embedding'].T if tied else params['unembedding']


def logits(
  model: config.Model, x_BxLxD: jax.Array, w_DxV: jax.Array
) -> jax.Array:
  """Multiplies the factors that `hidden` returns, on one device, in float32."""
  return _linear(x_BxLxD, w_DxV.astype(model.compute_dtype), jnp.float32)


def apply(
  model: config.Model, params: ct.Params, tokens_BxL: jax.Array
) -> jax.Array:
  """Returns float32 logits_BxLxV of the token after each position."""
  return logits(model, *hidden(model, params, tokens_BxL))


@functools.cache
def abstract(model: config.Model) -> ct.Params:
  """Returns the shapes of the parameters."""
  # Initialization must not require GPU kernels.
  portable = dataclasses.replace(model, attention='portable')

  def make(key: jax.Array) -> ct.PyTree:
    return Llama(portable).init(key, jnp.zeros((1, 1), jnp.int32))

  made: ct.PyTree = jax.eval_shape(lambda: make(jax.random.key(0)))
  return made['params']


def num_params(model: config.Model) -> int:
  """Returns the exact number of parameters without building the model."""
  m = model
  kv_width = m.width // m.heads * m.kv_heads
  layer = 2 * m.width * (m.width + kv_width) + 3 * m.width * m.ffn_width
  tables = (2 - m.tie_embeddings) * m.vocab_size * m.width
  return tables + m.layers * (layer + 2 * m.width) + m.width
