"""Tests of the loss, against the formula written out, and of its gradient."""

import contextlib
import dataclasses
import functools
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config
from covenant.models import llama
from covenant.models import loss

_TINY = config.Model(
  vocab_size=13,
  width=16,
  layers=1,
  heads=2,
  kv_heads=2,
  ffn_width=24,
  z_loss=1e-2,
)


# Compiled whole: eager, every operation would be compiled alone.
_cross_entropy = jax.jit(loss.cross_entropy, static_argnames='z_loss')


@functools.cache
def _gradient(microbatch=None):
  return jax.jit(
    functools.partial(loss.next_token_gradient, _TINY, microbatch=microbatch)
  )


def _batch():
  rng = np.random.default_rng(0)
  logits_BxLxV = rng.normal(0, 3, (2, 5, 7)).astype(np.float32)
  return logits_BxLxV, rng.integers(0, 7, (2, 5), np.int32)


def _reference(logits_BxLxV, targets_BxL, z_loss):
  """(total, nats, tokens) in float64, one target at a time."""
  nats, squares = [], []
  for logits_LxV, targets_L in zip(logits_BxLxV, targets_BxL, strict=True):
    for logits_V, target in zip(logits_LxV, targets_L, strict=True):
      if target >= 0:
        log_z = np.log(np.sum(np.exp(np.asarray(logits_V, np.float64))))
        nats.append(log_z - logits_V[target])
        squares.append(log_z**2)
  return np.mean(nats) + z_loss * np.mean(squares), np.mean(nats), len(nats)


def _packed(model: config.Model) -> config.Model:
  return config.PackedModel(**vars(model))


def _documents():
  """Three documents, packed in one row, and each in a row of its own."""
  rng = np.random.default_rng(2)
  parts = [rng.integers(0, 13, n, np.int32) for n in (4, 3, 6)]
  row = np.concatenate(
    [parts[0], *(np.append(~p[:1], p[1:]) for p in parts[1:])]
  )
  rows = np.full((3, 7), -1, np.int32)
  for i, part in enumerate(parts):
    rows[i, : len(part)] = part
  return np.asarray(row, np.int32)[None], rows


class PackedTest(parameterized.TestCase):
  @parameterized.parameters(
    {},
    {'scan_layers': True, 'remat': 'block', 'layers': 2},  # layer by layer
    {'scan_layers': True, 'remat': 'dots', 'layers': 2},
    {'loss_chunk': 5, 'kv_heads': 1},
    {'attention': 'cudnn', 'compute_dtype': 'bfloat16', 'kv_heads': 1},
  )
  @pytest.mark.slow
  def test_equals_separate_sequences(self, **changes):
    """Documents in one row have the loss and the gradient that they have alone.

    Of the kernel for GPUs all but the kernel itself is tested.
    """
    model = dataclasses.replace(_TINY, **changes)
    packed_1xL1, rows_BxL1 = _documents()
    plain = dataclasses.replace(model, attention='portable')
    params = jax.jit(functools.partial(llama.init, plain))(jax.random.key(0))
    params = jax.tree.map(lambda x: x * (3 if x.ndim > 1 else 1), params)

    def gradient(model, tokens_BxL1):
      return jax.jit(
        functools.partial(loss.next_token_gradient, model, microbatch=1)
      )(params, tokens_BxL1)

    attend = jax.nn.dot_product_attention

    def on_any_device(*args, implementation, **kwargs):
      self.assertEqual(implementation, 'cudnn')
      return attend(*args, implementation='xla', **kwargs)

    gpu = types.SimpleNamespace(device_kind='NVIDIA')
    with contextlib.ExitStack() as stack:
      if model.attention == 'cudnn':
        patch = mock.patch.object
        stack.enter_context(jax.numpy_dtype_promotion('standard'))
        stack.enter_context(
          patch(jax.nn, 'dot_product_attention', on_any_device)
        )
        stack.enter_context(patch(llama.jax, 'devices', lambda: [gpu]))
      got, got_grads = gradient(_packed(model), packed_1xL1)
      # Rows are padded: one at a time, so that nothing follows a document.
      want, want_grads = gradient(plain, rows_BxL1)
      other, _ = gradient(
        plain, np.where(packed_1xL1 < 0, ~packed_1xL1, packed_1xL1)
      )
    close = {'rtol': 1e-4, 'atol': 1e-6}
    if model.compute_dtype == 'bfloat16':
      close = {'rtol': 0.1, 'atol': 0.01}
    self.assertEqual(int(got.tokens), 3 + 2 + 5)
    np.testing.assert_allclose(got.total, want.total, rtol=close['rtol'])
    self.assertNotAlmostEqual(float(other.total), float(got.total), places=2)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, **close),
      got_grads,
      want_grads,
    )

  def test_padding_of_a_model_that_is_not_packed(self):
    tokens_1xL1, _ = _documents()
    ids_1xL = llama.ids(_TINY, tokens_1xL1)
    np.testing.assert_array_equal(ids_1xL, np.maximum(tokens_1xL1, 0))
    self.assertIsNone(llama.documents(_TINY, tokens_1xL1))


class CrossEntropyTest(parameterized.TestCase):
  @parameterized.product(z_loss=(0.0, 0.1), masked=(False, True))
  def test_equals_numpy(self, z_loss, masked):
    logits_BxLxV, targets_BxL = _batch()
    if masked:
      targets_BxL[0, 2:], targets_BxL[1, 0] = -1, -100
    actual = _cross_entropy(logits_BxLxV, targets_BxL, z_loss)
    total, nats, tokens = _reference(logits_BxLxV, targets_BxL, z_loss)
    self.assertEqual(actual.tokens, tokens)
    np.testing.assert_allclose(actual.total, total, rtol=1e-5)
    np.testing.assert_allclose(actual.nats, nats, rtol=1e-5)

  def test_uniform_logits_cost_log_of_vocabulary(self):
    actual = _cross_entropy(
      np.zeros((1, 3, 8), np.float32), np.zeros((1, 3), np.int32)
    )
    np.testing.assert_allclose(actual.nats, np.log(8), rtol=1e-6)

  def test_large_logits_stay_finite(self):
    logits_BxLxV, targets_BxL = _batch()
    actual = _cross_entropy(1e4 * logits_BxLxV, targets_BxL)
    self.assertTrue(np.isfinite(actual.total))

  def test_ignored_targets_have_no_gradient(self):
    logits_BxLxV, targets_BxL = _batch()
    targets_BxL[0, 2] = -1
    grad_BxLxV = jax.grad(lambda x: _cross_entropy(x, targets_BxL, 0.1).total)(
      logits_BxLxV
    )
    moved_BxL = np.any(np.asarray(grad_BxLxV) != 0, axis=-1)
    np.testing.assert_array_equal(moved_BxL, targets_BxL >= 0)

  def test_no_target_is_zero_not_nan(self):
    logits_BxLxV, targets_BxL = _batch()
    targets_BxL[:] = -1
    value, grad_BxLxV = jax.value_and_grad(
      lambda x: _cross_entropy(x, targets_BxL, 0.1).total
    )(logits_BxLxV)
    self.assertEqual(value, 0)
    np.testing.assert_array_equal(grad_BxLxV, 0)
    self.assertEqual(_cross_entropy(logits_BxLxV, targets_BxL).tokens, 0)

  def test_is_float32(self):
    logits_BxLxV, targets_BxL = _batch()
    actual = _cross_entropy(
      jnp.asarray(logits_BxLxV, jnp.bfloat16), targets_BxL, 0.1
    )
    self.assertEqual(actual.total.dtype, jnp.float32)
    self.assertEqual(actual.nats.dtype, jnp.float32)
    self.assertEqual(actual.tokens.dtype, jnp.int32)


@functools.cache
def _params():
  return jax.jit(functools.partial(llama.init, _TINY))(jax.random.key(0))


class NextTokenTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.params = _params()
    rng = np.random.default_rng(0)
    self.tokens_BxL1 = rng.integers(0, 13, (6, 9), np.int32)
    # Padding, in unequal amounts, so that a mean of means would show.
    self.tokens_BxL1[0, 3:] = self.tokens_BxL1[4, 7:] = -1

  @pytest.mark.slow
  def test_shifts_by_one(self):
    @jax.jit
    def expected(params, tokens_BxL1):
      logits_BxLxV = llama.apply(_TINY, params, jnp.maximum(tokens_BxL1, 0))
      return loss.cross_entropy(
        logits_BxLxV[:, :-1], tokens_BxL1[:, 1:], _TINY.z_loss
      )

    actual = jax.jit(functools.partial(loss.next_token_loss, _TINY))(
      self.params, self.tokens_BxL1
    )
    np.testing.assert_allclose(
      actual, expected(self.params, self.tokens_BxL1), rtol=1e-6
    )
    self.assertEqual(actual.tokens, 6 * 8 - 6 - 2)
    self.assertGreater(actual.total, actual.nats)

  @parameterized.parameters(None, 1, 2)
  @pytest.mark.rows(1)
  def test_gradient(self, microbatch):
    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def expected(params):
      value = loss.next_token_loss(_TINY, params, self.tokens_BxL1)
      return value.total, value

    (_, expected_value), expected_grads = expected(self.params)
    value, grads = _gradient(microbatch)(self.params, self.tokens_BxL1)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7),
      grads,
      expected_grads,
    )

  @parameterized.parameters(1, 3, 8, 9)
  @pytest.mark.slow
  def test_chunks_of_positions(self, chunk):
    """Equal up to rounding to the loss of all at once, for any remainder."""
    want, want_grads = _gradient(2)(self.params, self.tokens_BxL1)
    model = dataclasses.replace(_TINY, loss_chunk=chunk)
    value, grads = jax.jit(
      functools.partial(loss.next_token_gradient, model, microbatch=2)
    )(self.params, self.tokens_BxL1)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7),
      grads,
      want_grads,
    )

  @parameterized.parameters(True, False)
  @pytest.mark.slow
  def test_a_layer_at_a_time(self, tie_embeddings):
    """The gradient of layers that are all computed again, as by jax.grad."""
    model = dataclasses.replace(
      _TINY, layers=3, scan_layers=True, tie_embeddings=tie_embeddings
    )
    params = jax.jit(functools.partial(llama.init, model))(jax.random.key(0))
    (want, want_grads), (value, grads) = (
      jax.jit(
        functools.partial(
          loss.next_token_gradient,
          dataclasses.replace(model, remat=remat),
          microbatch=2,
        )
      )(params, self.tokens_BxL1)
      for remat in ('none', 'block')
    )
    np.testing.assert_allclose(value, want, rtol=1e-6)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
      grads,
      want_grads,
    )

  def test_no_more_logits_than_of_a_chunk(self):
    model = dataclasses.replace(_TINY, loss_chunk=2)
    text = (
      jax.jit(functools.partial(loss.next_token_gradient, model))
      .lower(self.params, self.tokens_BxL1)
      .as_text()
    )
    self.assertIn('tensor<6x2x13xf32>', text)
    self.assertNotIn('tensor<6x8x13xf32>', text)

  @pytest.mark.slow
  def test_gradient_under_a_named_axis(self):
    """Each peer its own parameters and data, as SparseLoCo's inner step."""
    mesh = jax.make_mesh(
      (1,), ('peers',), axis_types=(jax.sharding.AxisType.Auto,)
    )
    expected, _ = _gradient()(self.params, self.tokens_BxL1)

    @jax.jit
    @functools.partial(
      jax.shard_map,
      mesh=mesh,
      in_specs=jax.P('peers'),
      out_specs=jax.P('peers'),
    )
    def each(params, tokens_1xBxL1):
      params = jax.tree.map(lambda x: x[0], params)
      result = loss.next_token_gradient(_TINY, params, tokens_1xBxL1[0], 2)
      return jax.tree.map(lambda x: x[None], result)

    actual, _ = each(
      jax.tree.map(lambda x: x[None], self.params), self.tokens_BxL1[None]
    )
    np.testing.assert_allclose(actual.total[0], expected.total, rtol=1e-6)

  @pytest.mark.slow
  def test_gradient_of_an_empty_batch_is_zero(self):
    tokens_BxL1 = np.full_like(self.tokens_BxL1, -1)
    for microbatch in (None, 1):
      value, grads = _gradient(microbatch)(self.params, tokens_BxL1)
      self.assertEqual(value.total, 0)
      for grad in jax.tree.leaves(grads):
        np.testing.assert_array_equal(grad, 0)

  def test_microbatch_must_divide(self):
    with self.assertRaisesRegex(ValueError, 'divide the batch of 6 .* got 4'):
      loss.next_token_gradient(_TINY, self.params, self.tokens_BxL1, 4)


if __name__ == '__main__':
  absltest.main()
