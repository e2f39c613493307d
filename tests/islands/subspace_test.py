"""Nothing is lost at a compressed boundary, if the writers lie in the span."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.islands import subspace
from covenant.models import llama
from covenant.models import loss as loss_lib

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
  """With padding."""
  tokens_BxL1 = np.random.default_rng(0).integers(
    0, model.vocab_size, (2, 9), np.int32
  )
  tokens_BxL1[0, 6:] = -1
  return tokens_BxL1


def untied(model, params):
  """The same function, of an embedding and an unembedding."""
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


def projected(model, grads, stages, u_DxK):
  """A gradient, its writers' in the span: by other means than the code."""
  grads = jax.tree.map(np.array, grads)
  for w_FxD in writers(model, grads, stages):
    w_FxD[...] = onto(w_FxD, u_DxK)
  return grads


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
    params, fixed = subspace.start(model, params_of(model), stages, u_DxK)
    loss, grads = jax.jit(
      functools.partial(
        subspace.next_token_gradient,
        model,
        tokens_BxL1=tokens_BxL1,
        stages=stages,
        microbatch=microbatch,
      )
    )(params, fixed=fixed)

    # The whole model on one device, its boundaries not even known.
    plain, whole = untied(model, params)
    want_loss, want = plain_gradient(plain)(whole, tokens_BxL1)
    want = projected(model, want, stages, u_DxK)
    want['embedding'] = onto(want['embedding'], u_DxK)
    if model.tie_embeddings:
      want['embedding'] += want.pop('unembedding').T
    assert_close(loss, want_loss, model.width)
    assert_close(grads, want, model.width)

  @parameterized.parameters((128, 0.875), (51, 0.95), (10, 0.99), (1, 0.999))
  def test_at_every_compression(self, rank, compression):
    self.assertAlmostEqual(1 - rank / WIDE.width, compression, places=3)
    self.check(WIDE, 2, rank)

  @parameterized.parameters(
    (4, {}, 1),
    (2, dict(tie_embeddings=False, scan_layers=True, remat='dots'), None),
  )
  def test_of_every_cut(self, stages, changes, microbatch):
    model = dataclasses.replace(DEEP, **changes)
    self.check(model, stages, 3, microbatch)

  def test_but_not_if_writers_leave_the_span(self):
    u_DxK = some_basis(3, DEEP.width, 3)
    params = params_of(DEEP)
    start, fixed = subspace.start(DEEP, params, 2, u_DxK)

    @jax.jit
    def gap(params):
      x_BxLxD, _ = subspace.hidden(DEEP, params, tokens_BxL, 2, fixed)
      want_BxLxD, _ = llama.hidden(DEEP, params, tokens_BxL)
      return jnp.max(jnp.abs(x_BxLxD - want_BxLxD))

    tokens_BxL = np.maximum(tokens_of(DEEP)[:, :-1], 0)
    self.assertLess(gap(start), 1e-5)
    self.assertGreater(gap(params), 1e-2)


class ProjectTest(parameterized.TestCase):
  @parameterized.parameters(
    dict(), dict(scan_layers=True), dict(tie_embeddings=False)
  )
  def test_confines_who_writes_before_the_last_stage(self, **changes):
    model = dataclasses.replace(DEEP, **changes)
    u_DxK = some_basis(0, model.width, 5)
    before = params_of(model)
    start, fixed = subspace.start(model, before, 2, u_DxK)
    moved = jax.tree.map(lambda x: x + 0.1, start)
    after = subspace.project(model, moved, 2, fixed)
    free = jax.tree.map(np.array, moved)
    for w_FxD in writers(model, free, 2):
      w_FxD[...] = onto(w_FxD, u_DxK)
    if not model.tie_embeddings:
      # What the token brings from outside the span stays.
      inside = onto(free['embedding'], u_DxK)
      outside = before['embedding'] - onto(before['embedding'], u_DxK)
      free['embedding'] = inside + outside
    assert_close(after, free, model.width)

  def test_tokens_take_up_what_others_pushed_out(self):
    """An embedding from outside the span is looked up as it is."""
    model = dataclasses.replace(DEEP, layers=1)
    params = params_of(model)
    start, fixed = subspace.start(
      model, params, 1, some_basis(0, model.width, 2)
    )
    x0_VxD, table_VxD = fixed.tokens_VxD, start['embedding']
    c_VxK = subspace.send(table_VxD, x0_VxD, fixed.basis_DxK)
    got_VxD = subspace.receive(c_VxK, x0_VxD, fixed.basis_DxK)
    assert_close(got_VxD, params['embedding'], model.width)


class BasisTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_is_where_the_confined_write_most(self, scan_layers):
    model = dataclasses.replace(DEEP, scan_layers=scan_layers)
    params = params_of(model)
    u_DxK = np.asarray(subspace.basis(model, params, 2, 5), np.float64)
    np.testing.assert_allclose(u_DxK.T @ u_DxK, np.eye(5), atol=1e-5)

    def kept(u_DxK):
      return sum(
        np.sum(onto(w.reshape(-1, model.width), u_DxK) ** 2)
        for w in writers(model, params, 2)
      )

    # The five directions that all of these matrices together have most of.
    stacked = np.concatenate(
      [np.reshape(w, (-1, model.width)) for w in writers(model, params, 2)]
    ).astype(np.float64)
    best = np.sum(np.linalg.svd(stacked, compute_uv=False)[:5] ** 2)
    np.testing.assert_allclose(kept(u_DxK), best, rtol=1e-4)
    for seed in range(3):
      self.assertLess(kept(some_basis(seed, model.width, 5)), best)


if __name__ == '__main__':
  absltest.main()
