"""Tests of the decoder: what it computes, under every switch."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config
from covenant.models import attention
from covenant.models import llama
from covenant.models import loss

_TINY = config.Model(
  vocab_size=13, width=16, layers=2, heads=4, kv_heads=2, ffn_width=24
)
_72B = config.Model(
  vocab_size=262_144,
  width=8192,
  layers=80,
  heads=64,
  kv_heads=8,
  ffn_width=28_672,
  scan_layers=True,
)


def _with(**changes) -> config.Model:
  return dataclasses.replace(_TINY, **changes)


@functools.cache
def _init(model: config.Model):
  return jax.jit(functools.partial(llama.init, model))


@functools.cache
def _lively_params(model: config.Model):
  """Parameters large enough that every part of the model shows in a logit."""
  rng = np.random.default_rng(0)

  def draw(x):
    scale = 1 / math.sqrt(x.shape[-1])
    return jnp.asarray(rng.normal(x.ndim == 1, scale, x.shape), x.dtype)

  return jax.tree.map(draw, jax.eval_shape(_init(model), jax.random.key(0)))


def _tokens():
  return np.random.default_rng(1).integers(0, 13, (2, 9), np.int32)


@functools.cache
def _apply(model: config.Model):
  return jax.jit(functools.partial(llama.apply, model))


@functools.cache
def _gradient(model: config.Model):
  return jax.jit(functools.partial(loss.next_token_gradient, model))


def _dtypes(tree) -> set[str]:
  return {x.dtype.name for x in jax.tree.leaves(tree)}


def _stacked(params, layers):
  """Unrolled parameters as `scan_layers` lays them out."""
  rest = {k: v for k, v in params.items() if not k.startswith('layers_')}
  each = [params[f'layers_{i}'] for i in range(layers)]
  return rest | {'layers': jax.tree.map(lambda *x: np.stack(x), *each)}


def _reference_logits(model: config.Model, params, tokens_L):
  """The model in float64 NumPy, one sequence, one head at a time."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  L, K = len(tokens_L), model.width // model.heads

  def norm(x_LxD, gain_D):
    mean_square = np.mean(x_LxD**2, axis=-1, keepdims=True)
    return x_LxD / np.sqrt(mean_square + model.norm_eps) * gain_D

  def rotate(x_LxK):
    y_LxK = np.empty_like(x_LxK)
    for position in range(L):
      for i in range(K // 2):
        angle = position * model.rope_theta ** (-2 * i / K)
        z = complex(x_LxK[position, i], x_LxK[position, i + K // 2])
        z *= complex(math.cos(angle), math.sin(angle))
        y_LxK[position, i], y_LxK[position, i + K // 2] = z.real, z.imag
    return y_LxK

  def attention(x_LxD, w):
    heads = []
    for h in range(model.heads):
      n = h // (model.heads // model.kv_heads)
      q_LxK = rotate(x_LxD @ w['query'][:, h * K : (h + 1) * K])
      k_LxK = rotate(x_LxD @ w['key'][:, n * K : (n + 1) * K])
      v_LxK = x_LxD @ w['value'][:, n * K : (n + 1) * K]
      p_LxL = np.tril(
        np.exp(np.asarray(q_LxK) @ np.asarray(k_LxK).T / math.sqrt(K))
      )
      heads.append(p_LxL / p_LxL.sum(-1, keepdims=True) @ v_LxK)
    return np.concatenate(heads, axis=-1) @ w['output']

  def ffn(x_LxD, w):
    gate_LxF = x_LxD @ w['gate']
    silu_LxF = gate_LxF / (1 + np.exp(-gate_LxF))
    return (silu_LxF * (x_LxD @ w['up'])) @ w['down']

  x_LxD = p['embedding'][tokens_L]
  for i in range(model.layers):
    w = p[f'layers_{i}']
    x_LxD += attention(norm(x_LxD, w['attention_norm']['gain']), w['attention'])
    x_LxD += ffn(norm(x_LxD, w['ffn_norm']['gain']), w['ffn'])
  x_LxD = norm(x_LxD, p['final_norm']['gain'])
  return x_LxD @ p.get('unembedding', p['embedding'].T)


class LlamaTest(parameterized.TestCase):
  @parameterized.product(kv_heads=(1, 2, 4), tie_embeddings=(True, False))
  @pytest.mark.rows(1)
  def test_equals_numpy(self, kv_heads, tie_embeddings):
    model = _with(kv_heads=kv_heads, tie_embeddings=tie_embeddings)
    params, tokens_BxL = _lively_params(model), _tokens()
    logits_BxLxV = _apply(model)(params, tokens_BxL)
    for logits_LxV, tokens_L in zip(logits_BxLxV, tokens_BxL, strict=True):
      expected_LxV = _reference_logits(model, params, np.asarray(tokens_L))
      np.testing.assert_allclose(
        logits_LxV, expected_LxV, rtol=1e-4, atol=1e-5 * expected_LxV.std()
      )

  @pytest.mark.slow
  def test_causality(self):
    """A token changes no logit before it, and every one from it on."""
    params, tokens_BxL = _lively_params(_TINY), _tokens()
    logits_BxLxV = np.asarray(_apply(_TINY)(params, tokens_BxL))
    for t in range(tokens_BxL.shape[1]):
      other_BxL = tokens_BxL.copy()
      other_BxL[:, t] = (other_BxL[:, t] + 1) % 13
      other_BxLxV = np.asarray(_apply(_TINY)(params, other_BxL))
      np.testing.assert_array_equal(logits_BxLxV[:, :t], other_BxLxV[:, :t])
      moved_BxL = np.any(logits_BxLxV != other_BxLxV, axis=-1)
      self.assertTrue(moved_BxL[:, t:].all())

  @pytest.mark.slow
  def test_causality_of_gradients(self):
    """The row of a token that is read only at t has no gradient before t."""
    model = _with(tie_embeddings=False)
    tokens_BxL, t = np.arange(9)[None], 5
    params = _lively_params(model)

    @jax.jit
    @jax.grad
    def gradient_before(table_VxD):
      logits_BxLxV = _apply(model)(
        params | {'embedding': table_VxD}, tokens_BxL
      )
      return jnp.sum(jnp.square(logits_BxLxV[:, :t]))

    grad_VxD = np.asarray(gradient_before(params['embedding']))
    np.testing.assert_array_equal(grad_VxD[t:], 0)
    self.assertTrue(np.all(np.any(grad_VxD[:t] != 0, axis=-1)))

  @parameterized.parameters(1, 2)
  def test_grouped_query_equals_repeated_heads(self, kv_heads):
    grouped, full = _with(kv_heads=kv_heads), _with(kv_heads=4)
    params = _lively_params(grouped)
    K = grouped.width // grouped.heads

    def repeat(path, x):
      if path[-1].key not in ('key', 'value'):
        return x
      x_DxNxK = np.reshape(x, (-1, kv_heads, K))
      return np.repeat(x_DxNxK, 4 // kv_heads, axis=1).reshape(-1, 4 * K)

    np.testing.assert_allclose(
      _apply(grouped)(params, _tokens()),
      _apply(full)(jax.tree.map_with_path(repeat, params), _tokens()),
      rtol=1e-5,
      atol=1e-5,
    )

  @parameterized.parameters(
    dict(scan_layers=True),
    dict(remat='block'),
    dict(remat='dots'),
    dict(scan_layers=True, remat='block'),
  )
  @pytest.mark.slow
  def test_same_values_and_gradients_as_plain(self, **switches):
    model = _with(**switches)
    params = _lively_params(_TINY)
    expected, expected_grads = _gradient(_TINY)(params, _tokens())
    if model.scan_layers:
      params = _stacked(params, model.layers)
      expected_grads = _stacked(expected_grads, model.layers)
    actual, grads = _gradient(model)(params, _tokens())
    np.testing.assert_allclose(actual.total, expected.total, rtol=1e-6)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
      grads,
      expected_grads,
    )

  @parameterized.product(scan_layers=(True, False), remat=('none', 'block'))
  def test_layout(self, scan_layers, remat):
    model = _with(scan_layers=scan_layers, remat=remat)
    params = jax.eval_shape(_init(model), jax.random.key(0))
    expected = _lively_params(_TINY)
    if scan_layers:
      expected = _stacked(expected, model.layers)
    shape = functools.partial(jax.tree.map, lambda x: x.shape)
    self.assertEqual(shape(params), shape(expected))
    self.assertEqual(_dtypes(params), {'float32'})

  @pytest.mark.slow
  def test_bfloat16(self):
    model = _with(compute_dtype='bfloat16')
    params = _lively_params(_TINY)
    logits_BxLxV = _apply(model)(params, _tokens())
    self.assertEqual(logits_BxLxV.dtype, jnp.float32)
    expected_BxLxV = _apply(_TINY)(params, _tokens())
    error = np.std(np.subtract(logits_BxLxV, expected_BxLxV))
    self.assertBetween(error / np.std(expected_BxLxV), 1e-4, 3e-2)
    _, grads = _gradient(model)(params, _tokens())
    self.assertEqual(_dtypes(grads), {'float32'})

  def test_tied_embeddings_share(self):
    tied, untied = _TINY, _with(tie_embeddings=False)
    params = _lively_params(tied)
    self.assertNotIn('unembedding', params)
    np.testing.assert_array_equal(
      _apply(tied)(params, _tokens()),
      _apply(untied)(
        params | {'unembedding': params['embedding'].T}, _tokens()
      ),
    )


def _random_heads(length, dtype=np.float32):
  """Queries of 4 heads, keys and values of 2, 8 wide."""
  rng = np.random.default_rng(0)
  return [
    jnp.asarray(2 * rng.normal(size=(3, heads, length, 8)), dtype)
    for heads in (4, 2, 2)
  ]


def _both(function, qkv):
  """The values of an attention, and the gradients of their weighted sum."""

  @jax.jit
  def run(*qkv):
    y_BxHxLxK, transposed = jax.vjp(function, *qkv)
    return y_BxHxLxK, transposed(jnp.sin(qkv[0]))

  return run(*qkv)


class AttentionTest(parameterized.TestCase):
  def test_equals_jax(self):
    def reference(*qkv):
      by_position = (x.swapaxes(1, 2) for x in qkv)
      return jax.nn.dot_product_attention(
        *by_position, is_causal=True, implementation='xla'
      ).swapaxes(1, 2)

    qkv = _random_heads(length=7)
    got, want = _both(attention.attend, qkv), _both(reference, qkv)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
      got,
      want,
    )

  @pytest.mark.slow
  def test_fused_says_where_it_cannot_be(self):
    for model, needs in (
      (_with(attention='cudnn', compute_dtype='bfloat16'), 'an NVIDIA GPU'),
      (_with(attention='cudnn'), "model.compute_dtype='bfloat16'"),
    ):
      if needs == 'an NVIDIA GPU' and jax.default_backend() == 'gpu':
        continue
      params = _lively_params(model)  # which need no such kernel
      with self.assertRaisesRegex(
        config.ConfigError, rf"model.attention: 'cudnn' needs {needs}, .* use"
      ):
        llama.apply(model, params, _tokens())

  def test_fused_equals_portable(self):
    if jax.default_backend() != 'gpu':
      self.skipTest('cuDNN needs an NVIDIA GPU')
    qkv = _random_heads(length=128, dtype=jnp.bfloat16)
    got, want = _both(attention.attend_fused, qkv), _both(attention.attend, qkv)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(
        np.float32(x), np.float32(y), atol=3e-2
      ),
      got,
      want,
    )


@functools.partial(jax.jit, static_argnames='theta')
def _rotate(x_BxHxLxK, theta):
  model = config.Model(width=x_BxHxLxK.shape[3], heads=1, rope_theta=theta)
  return attention.rotate(x_BxHxLxK, attention.frequencies(model))


class RotateTest(absltest.TestCase):
  def test_scores_depend_on_distance_only(self):
    q_K, k_K = np.float32(np.random.default_rng(0).normal(size=(2, 8)))
    length = 12
    q_LxK, k_LxK = (
      _rotate(np.broadcast_to(x_K, (1, 1, length, 8)), 100.0)[0, 0]
      for x_K in (q_K, k_K)
    )
    score_LxL = np.asarray(q_LxK) @ np.asarray(k_LxK).T
    for distance in range(1 - length, length):
      diagonal = np.diagonal(score_LxL, distance)
      np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-5, atol=1e-5)
    self.assertGreater(np.std(score_LxL[0]), 0.1)

  def test_keeps_lengths_and_position_zero(self):
    x_BxHxLxK = np.float32(np.random.default_rng(0).normal(size=(2, 3, 5, 8)))
    y_BxHxLxK = _rotate(x_BxHxLxK, 10_000.0)
    np.testing.assert_array_equal(y_BxHxLxK[:, :, 0], x_BxHxLxK[:, :, 0])
    np.testing.assert_allclose(
      np.linalg.norm(y_BxHxLxK, axis=-1),
      np.linalg.norm(x_BxHxLxK, axis=-1),
      rtol=1e-5,
    )


class ParametersTest(parameterized.TestCase):
  @parameterized.product(
    kv_heads=(1, 4), tie_embeddings=(True, False), scan_layers=(True, False)
  )
  def test_num_params(self, **changes):
    model = _with(**changes)
    self.assertEqual(llama.num_params(model), _count(model))

  @parameterized.parameters((False, 72_747_327_488), (True, 70_599_843_840))
  def test_num_params_of_72b(self, tie_embeddings, expected):
    model = dataclasses.replace(_72B, tie_embeddings=tie_embeddings)
    self.assertEqual(llama.num_params(model), expected)
    self.assertEqual(_count(model), expected)

  def test_init(self):
    model = config.Model(width=128, layers=8, ffn_width=256, scan_layers=True)
    for seed in (0, 1):
      params = _init(model)(jax.random.key(seed))
      for path, x in jax.tree.leaves_with_path(params):
        name = path[-1].key
        if name == 'gain':
          np.testing.assert_array_equal(x, 1)
          continue
        stddev = 0.02 / 4 if name in ('output', 'down') else 0.02
        x = np.asarray(x)
        np.testing.assert_allclose(x.std(), stddev, rtol=0.03)
        self.assertLess(abs(x.mean()), 4 * stddev / math.sqrt(x.size))

  def test_init_follows_the_key(self):
    one, same, other = (
      _init(_TINY)(jax.random.key(seed)) for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, one, same)
    self.assertFalse(np.array_equal(one['embedding'], other['embedding']))
    first, second = one['layers_0']['ffn'], one['layers_1']['ffn']
    self.assertFalse(np.array_equal(first['gate'], first['up']))
    self.assertFalse(np.array_equal(first['gate'], second['gate']))


def _count(model: config.Model) -> int:
  shapes = jax.eval_shape(_init(model), jax.random.key(0))
  return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


if __name__ == '__main__':
  absltest.main()
