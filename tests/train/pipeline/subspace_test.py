"""Tests for covenant.train.pipeline.subspace.

Nothing is lost at a compressed boundary if the writers lie in the span.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.models import llama
from covenant.models import loss as loss_lib
from covenant.train import island as island_lib
from covenant.train.pipeline import boundary_bytes
from covenant.train.pipeline import quantized
from covenant.train.pipeline import subspace

# Wide enough for one number of a thousand; else as small as can be.
WIDE = config_lib.Model(
  vocab_size=32, width=1024, layers=2, heads=8, kv_heads=1, ffn_width=16
)
DEEP = config_lib.Model(
  vocab_size=32, width=32, layers=4, heads=4, kv_heads=2, ffn_width=48
)


def setUpModule():
  """Compiling is what takes the time."""
  jax.config.update('jax_disable_most_optimizations', True)
  jax.clear_caches()


def tearDownModule():
  jax.config.update('jax_disable_most_optimizations', False)
  jax.clear_caches()


@functools.cache
def params_of(model):
  """Twice as large as at the start, so that attention is no plain mean."""
  init = jax.jit(functools.partial(llama.init, model))
  return jax.tree.map(lambda x: 2 * x, init(jax.random.key(0)))


def tokens_of(model):
  """Returns tokens with padding."""
  tokens_BxL1 = np.random.default_rng(0).integers(
    0, model.vocab_size, (2, 9), np.int32
  )
  tokens_BxL1[0, 6:] = -1
  return tokens_BxL1


def untied(model, params):
  """Returns the same function with an embedding and an unembedding."""
  if not model.tie_embeddings:
    return model, params
  model = dataclasses.replace(model, tie_embeddings=False)
  return model, {**params, 'unembedding': params['embedding'].T}


@functools.cache
def plain_gradient(model):
  return jax.jit(functools.partial(loss_lib.next_token_gradient, model))


def some_basis(seed, width, rank):
  """Orthonormal, of directions that nothing prefers."""
  draw = np.random.default_rng(seed)
  return np.linalg.qr(draw.normal(size=(width, rank)))[0].astype(np.float32)


def onto(x, u_DxK):
  return np.asarray(x, np.float64) @ u_DxK @ u_DxK.T


def writers(model, params, stages):
  """(layer, matrix [in, D]) of all stages but the last."""
  for i in range(model.layers - model.layers // stages):
    layer = (
      jax.tree.map(lambda x, i=i: x[i], params['layers'])
      if model.scan_layers
      else params[f'layers_{i}']
    )
    yield layer['attention']['output']
    yield layer['ffn']['down']


def confined(model, params, stages, u_DxK):
  """Parameters, or a gradient, the writers in the span."""
  params = jax.tree.map(np.array, params)
  for w_FxD in writers(model, params, stages):
    w_FxD[...] = onto(w_FxD, u_DxK)
  return params


def fixed_of(params, stages, u_DxK):
  """Returns constants whose X0 is a token's embedding alone."""
  return subspace.Fixed(
    jnp.stack([params['embedding']] * stages), jnp.stack([u_DxK] * stages)
  )


def assert_close(got, want, width):
  """In L2, relative, of each leaf.

  A float32 is rounded by up to 6e-8 of itself, a sum over the width by about
  the root of the width as much; some thirty such sums follow each other.
  """
  tolerance = 30 * 6e-8 * width**0.5

  def leaf(path, x, y):
    gap = np.linalg.norm(np.subtract(x, y)) / np.linalg.norm(y)
    assert gap < tolerance, f'{jax.tree_util.keystr(path)}: {gap}'

  jax.tree.map_with_path(leaf, jax.device_get(got), jax.device_get(want))


class LosslessTest(parameterized.TestCase):
  def check(self, model, stages, rank, microbatch=None):
    u_DxK = some_basis(3, model.width, rank)
    tokens_BxL1 = tokens_of(model)
    params = confined(model, params_of(model), stages, u_DxK)
    loss, grads = jax.jit(
      functools.partial(
        subspace.next_token_gradient,
        model,
        tokens_BxL1=tokens_BxL1,
        island=island_lib.Island(stages=stages, rank=rank),
        microbatch=microbatch,
      )
    )(params, fixed=fixed_of(params, stages, u_DxK))

    # The whole model on one device, its boundaries not even known.
    plain, whole = untied(model, params)
    want_loss, want = plain_gradient(plain)(whole, tokens_BxL1)
    grads, want = jax.device_get((grads, want))
    if model.tie_embeddings:
      want['embedding'] = onto(want['embedding'], u_DxK)
      want['embedding'] += want.pop('unembedding').T
    else:  # The first stage looks up for itself; what comes back is confined.
      for tree in grads, want:
        tree['embedding'] = onto(tree['embedding'], u_DxK)
    # Of a writer that a reader of its own stage follows, the gradient has a
    # part outside, which is like that of the whole but for what comes back.
    want = confined(model, want, stages, u_DxK)
    grads = confined(model, grads, stages, u_DxK)
    assert_close(loss, want_loss, model.width)
    assert_close(grads, want, model.width)

  @parameterized.parameters((128, 0.875), (51, 0.95), (10, 0.99), (1, 0.999))
  @pytest.mark.slow
  def test_at_every_compression(self, rank, compression):
    self.assertAlmostEqual(1 - rank / WIDE.width, compression, places=3)
    self.check(WIDE, 2, rank)

  @parameterized.parameters(
    (4, {}, 1),
    (2, dict(tie_embeddings=False, scan_layers=True, remat='dots'), None),
  )
  @pytest.mark.slow
  def test_of_every_cut(self, stages, changes, microbatch):
    model = dataclasses.replace(DEEP, **changes)
    self.check(model, stages, 3, microbatch)

  @pytest.mark.slow
  def test_but_not_if_writers_leave_the_span(self):
    u_DxK = some_basis(3, DEEP.width, 3)
    params = params_of(DEEP)
    island = island_lib.Island(stages=2, rank=3)

    @jax.jit
    def gap(params):
      fixed = fixed_of(params, 2, u_DxK)
      x_BxLxD, _ = subspace.hidden(DEEP, params, tokens_BxL, island, fixed)
      want_BxLxD, _ = llama.hidden(DEEP, params, tokens_BxL)
      return jnp.max(jnp.abs(x_BxLxD - want_BxLxD))

    tokens_BxL = np.maximum(tokens_of(DEEP)[:, :-1], 0)
    self.assertLess(gap(confined(DEEP, params, 2, u_DxK)), 1e-5)
    self.assertGreater(gap(params), 1e-2)

  @pytest.mark.slow
  def test_few_bits_lose_a_little_both_ways(self):
    island = island_lib.Island(stages=2, rank=8)
    params, tokens_BxL1 = params_of(DEEP), tokens_of(DEEP)
    fixed = subspace.fix(DEEP, params, tokens_BxL1, island)
    losses, grads = zip(
      *(
        jax.jit(
          functools.partial(
            subspace.next_token_gradient, DEEP, island=island, fixed=fixed
          )
        )(params, tokens_BxL1)
        for island in (
          island,
          dataclasses.replace(island, bits=8),
          dataclasses.replace(island, bits=4),
        )  # fmt: skip
      ),
      strict=True,
    )
    whole, *coarse = (np.asarray(loss.nats) for loss in losses)
    gaps = [abs(nats - whole) for nats in coarse]
    self.assertBetween(gaps[0], 1e-7, 1e-2)
    self.assertBetween(gaps[1], gaps[0], 1e-1)
    want = grads[0]['layers_0']['ffn']['down']
    gaps = [
      np.linalg.norm(g['layers_0']['ffn']['down'] - want) / np.linalg.norm(want)
      for g in grads[1:]
    ]
    self.assertBetween(gaps[0], 1e-5, 3e-2)
    self.assertBetween(gaps[1], gaps[0], 0.4)


class LearnedTest(parameterized.TestCase):
  @parameterized.parameters(dict(), dict(scan_layers=True))
  @pytest.mark.rows(1)
  def test_is_what_was_written_within_the_span(self, **changes):
    """Projects the writers of each stage onto the boundary that follows."""
    model = dataclasses.replace(DEEP, **changes)
    start, stages = params_of(model), 4
    bases = [some_basis(seed, model.width, 5) for seed in range(stages)]
    fixed = subspace.Fixed(jnp.zeros(()), jnp.stack(bases))
    end = jax.tree.map(lambda x: x + jnp.cos(x), start)
    island = island_lib.Island(stages=stages, rank=5)
    got = subspace.learned(model, start, end, island, fixed)
    want = jax.tree.map(np.array, end)
    matrices = zip(
      writers(model, start, stages),
      writers(model, want, stages),
      np.repeat(bases[1:], 2, 0),  # each layer has two
      strict=True,
    )
    for before, after, u_DxK in matrices:
      after[...] = before + onto(after - before, u_DxK)
    assert_close(got, want, model.width)


class FixTest(parameterized.TestCase):
  @parameterized.parameters(
    dict(), dict(scan_layers=True), dict(tie_embeddings=False)
  )
  @pytest.mark.rows(1)
  def test_is_a_linear_fit_and_what_it_leaves_most_of(self, **changes):
    """The reference is NumPy in float64, for the first boundary."""
    model = dataclasses.replace(DEEP, **changes)
    params, rank = params_of(model), 5
    tokens_BxL1 = np.random.default_rng(1).integers(0, 32, (8, 33), np.int32)
    island = island_lib.Island(stages=2, rank=rank)
    fixed = jax.jit(functools.partial(subspace.fix, model, island=island))(
      params, tokens_BxL1
    )
    table_VxD = np.asarray(params['embedding'], np.float64)
    np.testing.assert_array_equal(fixed.tokens_SxVxD[0], params['embedding'])
    ids_n = tokens_BxL1[:, :-1].reshape(-1)
    x_BxLxD = llama.embed(model, params, tokens_BxL1[:, :-1])
    layers = subspace.stage_layers(model, params, 0, 2)
    x_BxLxD = subspace.apply_layers(model, layers, x_BxLxD)
    x_nxD = np.asarray(x_BxLxD, np.float64).reshape(-1, model.width)

    features_VxE = np.pad(table_VxD, ((0, 0), (0, 1)), constant_values=1)
    f_nxE = features_VxE[ids_n]
    gram_ExE = f_nxE.T @ f_nxE
    gram_ExE += 0.01 * np.diag(np.diag(gram_ExE))
    added_nxD = x_nxD - table_VxD[ids_n]
    map_ExD = np.linalg.solve(gram_ExE, f_nxE.T @ added_nxD)
    want_VxD = table_VxD + features_VxE @ map_ExD
    got_VxD = np.asarray(fixed.tokens_SxVxD[1], np.float64)
    gap = np.linalg.norm(got_VxD - want_VxD)
    # Its numbers are sent in eight bits.
    self.assertLess(gap / np.linalg.norm(want_VxD - table_VxD), 2**-6)
    left_nxD = x_nxD - got_VxD[ids_n]
    self.assertLess(np.sum(left_nxD**2), 0.8 * np.sum(added_nxD**2))

    u_DxK = np.asarray(fixed.basis_SxDxK[1], np.float64)
    # It is sent in bfloat16.
    np.testing.assert_allclose(u_DxK.T @ u_DxK, np.eye(rank), atol=2**-7)
    best = np.linalg.svd(left_nxD, compute_uv=False)[:rank]
    kept = np.sum(onto(left_nxD, u_DxK) ** 2)
    np.testing.assert_allclose(kept, np.sum(best**2), rtol=2**-7)

  @pytest.mark.slow
  def test_padding_tells_it_nothing(self):
    tokens_BxL1 = np.random.default_rng(1).integers(0, 32, (8, 33), np.int32)
    island = island_lib.Island(stages=4, rank=5)
    padded_BxL1 = tokens_BxL1.copy()
    padded_BxL1[:, 17:] = -1
    one, two = (
      subspace.fix(DEEP, params_of(DEEP), tokens_bxl1, island)
      for tokens_bxl1 in (tokens_BxL1[:, :17], padded_BxL1)
    )
    # Sums of other shapes may be rounded to the next of eight bits.
    gap = np.linalg.norm(one.tokens_SxVxD - two.tokens_SxVxD)
    self.assertLess(gap / np.linalg.norm(one.tokens_SxVxD), 2**-6)


def coordinates(dtype='float32'):
  draw = np.random.default_rng(0)
  scale = 10.0 ** draw.integers(-6, 6, (3, 5, 1))
  return jnp.asarray(draw.normal(size=(3, 5, 6)) * scale, dtype)


class QuantizedTest(parameterized.TestCase):
  @parameterized.product(bits=(4, 8), dtype=('float32', 'bfloat16'))
  def test_is_small_and_near(self, bits, dtype):
    c = coordinates(dtype)
    packed = quantized.pack(c, bits)
    self.assertEqual(
      sum(x.nbytes for x in packed),
      c.shape[0]
      * c.shape[1]
      * boundary_bytes.position_bytes(c.shape[2], bits, dtype),
    )
    got = np.asarray(quantized.unpack(packed, dtype), np.float64)
    self.assertEqual(quantized.unpack(packed, dtype).dtype, dtype)
    # Half a step, and what the step and, in bfloat16, the result are rounded
    # by: 2^-8 of the largest.
    most = np.max(np.abs(np.asarray(c, np.float64)), -1, keepdims=True)
    bound = most * (0.5 / (2 ** (bits - 1) - 1) + 2**-7)
    gap = np.abs(got - np.asarray(c, np.float64))
    self.assertTrue(np.all(gap <= bound), gap / bound)

  @parameterized.parameters(4, 8)
  def test_every_code_is_told_apart(self, bits):
    most = 2 ** (bits - 1) - 1
    c = jnp.arange(-most, most + 1, dtype=jnp.float32) / 8
    c = jnp.concatenate([c, c[:1]])  # an even number
    got = quantized.unpack(quantized.pack(c, bits), c.dtype)
    np.testing.assert_array_equal(got, c)

  @parameterized.parameters(4, 8)
  @pytest.mark.rows(1)
  def test_nothing_is_nothing(self, bits):
    zeros = jnp.zeros((2, 4))
    np.testing.assert_array_equal(
      quantized.unpack(quantized.pack(zeros, bits), zeros.dtype),
      zeros,
    )

  @parameterized.parameters(0, 4, 8)
  def test_the_gradient_comes_back_as_it_went(self, bits):
    c, g = coordinates(), coordinates()[::-1]
    got, back = jax.vjp(lambda c: quantized.passed(c, bits), c)
    for x, sent in ((got, c), (back(g)[0], g)):
      want = (
        quantized.unpack(quantized.pack(sent, bits), sent.dtype)
        if bits
        else sent
      )
      np.testing.assert_array_equal(x, want)


if __name__ == '__main__':
  absltest.main()
