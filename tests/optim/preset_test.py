"""The presets against numbers measured from the deployed system.

The vectors were recorded from its code. Indices are compared as sets; a sum
whose terms cancel, to 1e-6 of the largest.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import blocks
from covenant.optim import compression as compression_lib
from covenant.optim import preset
from covenant.optim import reduce
from covenant.optim import sparseloco
from tests import helpers

TEMPLAR = preset.templar()
# One program a shape: op by op, these tests would mostly compile.
COMPRESS = jax.jit(
  lambda delta, error: sparseloco.compress(
    delta, error, TEMPLAR.compression, TEMPLAR.error_decay
  )
)
DECOMPRESS = jax.jit(
  lambda message, like: sparseloco.decompress(
    message, like, TEMPLAR.compression
  )
)
SHAPES = ('w128x192', 'w64x64', 'w50x30', 'norm8192', 'b100', 'emb')


def golden(name):
  with np.load(helpers.GOLDEN / name) as file:
    return dict(file)


def assert_close(got, want):
  want = np.asarray(want)
  atol = 1e-6 * np.abs(want).max(initial=0)
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=atol)


class TemplarTest(parameterized.TestCase):
  @parameterized.parameters(*SHAPES)
  @pytest.mark.rows(3)
  def test_compresses_one_tensor(self, name):
    z = golden('compress.npz')
    x = z[f'{name}_x']
    (packet,) = jax.jit(TEMPLAR.compression.compress)(x)
    want = z[f'{name}_idx_sorted']
    np.testing.assert_array_equal(
      packet.indices, want.reshape(-1, want.shape[-1])
    )
    np.testing.assert_array_equal(
      np.ravel(packet.codes), np.ravel(z[f'{name}_q_sorted'])
    )
    values = np.take_along_axis(
      blocks.cut(x, (64, 64), 'divisors')[0], packet.indices, 1
    )
    # The shift is a mean that cancels: 1e-6 of the largest value.
    np.testing.assert_allclose(
      packet.scales[0, 0], z[f'{name}_shift'], atol=1e-6 * np.abs(values).max()
    )
    assert_close(packet.scales[0, 1:], z[f'{name}_lookup'])
    assert_close(DECOMPRESS((packet,), x), z[f'{name}_transmit'])

  def test_cuts_every_side_as_measured(self):
    text = (helpers.GOLDEN / 'pack12_errors_and_split_table.json').read_text()
    for target in (64, 12):
      for size, split in json.loads(text)[
        f'smaller_split_target{target}'
      ].items():
        # Beside a side of two, a side of one block is no error.
        (region,) = blocks.regions((2, int(size)), (64, target), 'divisors')
        self.assertEqual(region.width, split, f'{size} by {target}')

  @pytest.mark.slow
  def test_error_feedback_over_rounds(self):
    """Round 3 trains nothing: it sends nothing, and forgets."""
    z = golden('error_feedback.npz')
    like = {name: jnp.asarray(z[f'r0_{name}_delta']) for name in 'bw'}
    error = sparseloco.init_error(like)
    for r in range(5):
      delta = {name: jnp.asarray(z[f'r{r}_{name}_delta']) for name in 'bw'}
      if z[f'r{r}_null']:
        error, sent = (sparseloco.init_error(like),) * 2
      else:
        message, error = COMPRESS(delta, error)
        sent = DECOMPRESS(message, like)
      for name in 'bw':
        assert_close(sent[name], z[f'r{r}_{name}_transmit'])
        # A residual is a difference: 1e-6 of what it is the difference of.
        np.testing.assert_allclose(
          error[name],
          z[f'r{r}_{name}_ef_after'],
          atol=1e-6 * np.abs(z[f'r{r}_{name}_delta']).max(),
        )

  @parameterized.parameters(1, 2, 3, 4, 5)
  @pytest.mark.rows(1)
  def test_aggregates_peers_and_steps(self, peers):
    z = golden('aggregate_outer_step.npz')
    like = {n: jnp.asarray(z[f'n{peers}_{n}_before']) for n in 'bw'}
    exact = dataclasses.replace(
      TEMPLAR.compression, quantizer=sparseloco.Exact()
    )
    messages = []
    for r in range(peers):
      # Unsorted, as the reference's top-k left them.
      index, value = (
        {n: z[f'n{peers}_{n}_peer{r}_{part}'].reshape(-1, 64) for n in 'bw'}
        for part in ('idx', 'val')
      )
      none = jnp.zeros((0, 0))
      messages.append(
        {
          n: (
            compression_lib.Packet(
              jnp.asarray(index[n]), jnp.asarray(value[n]), none
            ),
          )
          for n in 'bw'
        }
      )
    norms = [reduce.message_norms(m, like, exact) for m in messages]
    for p, n in enumerate('bw'):
      assert_close([x[p] for x in norms], z[f'n{peers}_{n}_norms'])
    delta = jax.jit(
      lambda messages: sparseloco.aggregate(
        messages, like, exact, TEMPLAR.mean_over, TEMPLAR.clip
      )
    )(messages)
    after, _ = sparseloco.outer_update(
      TEMPLAR.outer, delta, TEMPLAR.outer.init(like), like
    )
    for n in 'bw':
      assert_close(delta[n], z[f'n{peers}_{n}_agg'])
      assert_close(after[n], z[f'n{peers}_{n}_after'])

  @pytest.mark.slow
  def test_rounds_end_to_end_as_numpy_does_them(self):
    """Three peers, four rounds, from the text of templar.md 3.1 to 3.10."""
    rng = np.random.default_rng(0)
    shapes = {'m': (96, 130), 'o': (39, 7), 'v': (100,)}
    theta = {n: rng.standard_normal(s).astype('f4') for n, s in shapes.items()}
    params = jax.tree.map(jnp.asarray, theta)
    efs = [{n: np.zeros(s, 'f4') for n, s in shapes.items()} for _ in range(3)]
    errors = [sparseloco.init_error(params) for _ in range(3)]
    outer_state = TEMPLAR.outer.init(params)

    @jax.jit
    def finish(messages, outer_state, params):
      delta = sparseloco.aggregate(
        messages, params, TEMPLAR.compression, TEMPLAR.mean_over, TEMPLAR.clip
      )
      return delta, *sparseloco.outer_update(
        TEMPLAR.outer, delta, outer_state, params
      )

    for _ in range(4):
      messages, sent = [], []
      for r in range(3):
        delta = {
          n: (10.0**-r * rng.standard_normal(s)).astype('f4')
          for n, s in shapes.items()
        }
        message, errors[r] = COMPRESS(delta, errors[r])
        messages.append(message)
        sent.append({})
        for n in shapes:
          ef = np.float32(0.95) * efs[r][n] + delta[n]
          sent[r][n] = _reference_compress(ef)
          efs[r][n] = ef - np.nan_to_num(sent[r][n])
          np.testing.assert_allclose(errors[r][n], efs[r][n], atol=3e-6)
      got, params, outer_state = finish(messages, outer_state, params)
      for n in shapes:
        peers = np.stack([s[n].ravel() for s in sent])
        norms = np.sqrt(np.nansum(peers * peers, axis=1))
        factors = np.minimum(1, np.sort(norms)[1] / (norms + 1e-8))
        peers = peers * factors[:, None].astype('f4')
        count = np.maximum(np.sum(~np.isnan(peers), axis=0), 1)
        mean = (np.nansum(peers, axis=0) / count).reshape(shapes[n])
        assert_close(got[n], mean)
        theta[n] = theta[n] - np.float32(0.4) * mean.astype('f4')
        assert_close(params[n], theta[n])

  def test_an_index_sent_twice_counts_twice(self):
    exact = dataclasses.replace(
      TEMPLAR.compression, quantizer=sparseloco.Exact()
    )
    message = (
      compression_lib.Packet(
        jnp.array([[3, 3]]), jnp.array([[1.0, 2.0]]), jnp.zeros((0, 0))
      ),
    )
    other = (message[0]._replace(indices=jnp.array([[3, 1]])),)
    got = sparseloco.aggregate(
      [message, other], jnp.zeros(4), exact, TEMPLAR.mean_over, 'none'
    )
    np.testing.assert_allclose(got, [0, 2, 0, 4 / 3], rtol=1e-6)

  def test_a_tensor_that_is_not_finite_stays(self):
    params = {'a': jnp.ones(2), 'b': jnp.ones(2)}
    delta = {'a': jnp.array([1.0, jnp.nan]), 'b': jnp.ones(2)}
    after, _ = sparseloco.outer_update(
      TEMPLAR.outer, delta, TEMPLAR.outer.init(params), params
    )
    np.testing.assert_array_equal(after['a'], [1.0, 1.0])
    np.testing.assert_allclose(after['b'], [0.6, 0.6], rtol=1e-6)

  @parameterized.parameters((1,), (127,), ((67, 127),), ((),))
  def test_says_which_leaf_it_cannot_cut(self, shape):
    x = jnp.zeros(shape)
    with self.assertRaisesRegex(
      ValueError, str(x.shape).replace('(', r'\(').replace(')', r'\)')
    ):
      TEMPLAR.compression.compress(x)


class PaperTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_the_equations_by_hand(self):
    """Two peers, blocks of four, one value each; then all peers' mean."""
    paper = preset.paper()
    compression = dataclasses.replace(paper.compression, k=1, block=(2, 2))
    params = jnp.zeros(4)
    deltas = [jnp.array([4.0, 1.0, 0.0, 0.0]), jnp.array([0.0, 1.0, 0.0, -6.0])]
    errors = [jnp.array([0.0, 1.0, 0.0, 0.0]), jnp.zeros(4)]
    messages = []
    for r in range(2):
      message, errors[r] = sparseloco.compress(
        deltas[r], errors[r], compression, paper.error_decay
      )
      messages.append(message)
    np.testing.assert_allclose(errors[0], [0, 1.95, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(errors[1], [0, 1, 0, 0], rtol=1e-6)
    delta = sparseloco.aggregate(
      messages, params, compression, paper.mean_over, paper.clip
    )
    after, _ = sparseloco.outer_update(
      paper.outer, delta, paper.outer.init(params), params
    )
    np.testing.assert_allclose(after, [-2, 0, 0, 3], rtol=1e-6)

  @parameterized.parameters(preset.templar, preset.paper)
  def test_is_what_sparseloco_takes(self, make):
    tx = sparseloco.sparseloco(optax.sgd(0.1), **make()._asdict())
    params = {'w': jnp.ones((8, 8))}
    state = jax.eval_shape(tx.init, params)
    self.assertEqual(state.error['w'].shape, (8, 8))


def _reference_compress(x):
  """Returns the sent values of `x` in its shape, NaN where nothing is sent."""
  split = [max(d for d in range(1, 65) if s % d == 0) for s in x.shape]
  if x.ndim == 2:
    (h, w), (rows, columns) = split, x.shape
    chunks = x.reshape(rows // h, h, columns // w, w).transpose(0, 2, 1, 3)
    chunks = chunks.reshape(-1, h * w)
  else:
    chunks = x.reshape(-1, split[0])
  k = max(2, min(64, chunks.shape[1])) // 2 * 2
  index = np.argsort(-np.abs(chunks), axis=1, kind='stable')[:, :k]
  values = np.take_along_axis(chunks, index, 1)
  shift = values.mean(dtype='f4')
  centred = values - shift
  with np.errstate(all='ignore'):
    scale = 1.5 * np.linalg.norm(centred) / np.sqrt(np.float32(values.size - 1))
  scale = scale if np.isfinite(scale) and scale > 0 else 1.0
  codes = np.clip(np.round(centred / np.float32(scale) + 2), 0, 3)
  for code in range(4):
    if (codes == code).any():
      values[codes == code] = centred[codes == code].mean() + shift
  sent = np.full_like(chunks, np.nan)
  np.put_along_axis(sent, index, values, 1)
  if x.ndim == 2:
    sent = sent.reshape(rows // h, columns // w, h, w).transpose(0, 2, 1, 3)
  return sent.reshape(x.shape)


if __name__ == '__main__':
  absltest.main()
