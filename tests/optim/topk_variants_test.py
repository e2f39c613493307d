import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.fft
from absl.testing import absltest

from covenant.optim import blocks
from covenant.optim import reduce
from covenant.optim import sparseloco as sl
from covenant.optim import topk_variants

P = jax.P


select = jax.jit(topk_variants.random_select, static_argnums=1)


def normal(seed, shape):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


class SelectTest(absltest.TestCase):
  def test_draws_k_different_indices_of_each_block(self):
    for n, size, k in ((3, 16, 4), (1, 7, 7), (2, 4096, 64)):
      indices = np.asarray(select(normal(0, (n, size)), k))
      self.assertEqual(indices.shape, (n, k))
      self.assertEqual(indices.dtype, np.int32)
      self.assertTrue((np.diff(indices, axis=1) > 0).all())
      self.assertTrue(((indices >= 0) & (indices < size)).all())

  def test_all_positions_have_the_same_chance_whatever_their_values(self):
    # 4000 draws of 2 of 8. A position is drawn 1000 times, give or take
    # sqrt(4000 * 0.25 * 0.75) = 27. The first ones are the largest by far.
    x = normal(1, (4000, 8)) * np.float32(10) ** -np.arange(8, dtype=np.float32)
    counts = np.bincount(np.ravel(select(x, 2)), minlength=8)
    np.testing.assert_allclose(counts, 1000, atol=5 * 27)

  def test_one_changed_bit_changes_the_draw(self):
    x = np.tile(normal(2, (1, 512)), (512, 1))
    np.fill_diagonal(x, np.nextafter(np.diag(x), np.float32(np.inf)))
    self.assertEqual(len({tuple(r) for r in np.asarray(select(x, 8))}), 512)

  def test_values_rounded_to_bfloat16_draw_differently(self):
    x = normal(3, (512, 512)).astype(jnp.bfloat16).astype(np.float32)
    self.assertEqual(len({tuple(r) for r in np.asarray(select(x, 8))}), 512)


class RandomKTest(absltest.TestCase):
  def test_messages_look_like_those_of_topk(self):
    shapes = ((100, 70), (5000,), (2, 64, 64), ())
    tree = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    messages = [
      jax.eval_shape(lambda tree, c=c: jax.tree.map(c.compress, tree), tree)
      for c in (topk_variants.RandomK(k=32), sl.TopK(k=32))
    ]
    self.assertEqual(*messages)

  def test_sends_the_drawn_values_and_keeps_the_rest(self):
    x = normal(1, (64, 128))
    compression = topk_variants.RandomK(k=64, quantizer=sl.Exact())

    @jax.jit
    def send(x):
      message, error = sl.compress(x, jnp.zeros_like(x), compression, 0.9)
      return compression.decompress(message, x.shape), error

    sent, error = send(x)
    self.assertEqual(np.count_nonzero(sent), 2 * 64)
    np.testing.assert_array_equal(sent, np.where(sent != 0, x, 0))
    np.testing.assert_array_equal(error, np.where(sent != 0, 0, x))
    # The choice is blind: the share of the energy is about k / L, not more.
    share = np.sum(sent**2) / np.sum(x**2)
    self.assertBetween(share, 0.5 * 64 / 4096, 2 * 64 / 4096)

  def test_a_round_of_two_peers_by_hand(self):
    """Two of four each: where both send, their mean; where one does, its own.

    The draws are read off `select`; the arithmetic on them is the test's.
    """
    peers = np.array([[1, 2, 4, 8], [16, 32, 64, 128]], np.float32)
    compression = topk_variants.RandomK(k=2, block=(2, 2), quantizer=sl.Exact())
    got = jax.jit(
      lambda peers: sl.aggregate(
        [compression.compress(x) for x in peers],
        peers[0],
        compression,
        clip='none',
      )
    )(peers)
    drawn = [set(row) for row in np.asarray(select(peers, 2)).tolist()]
    want = [
      np.mean([peers[r, i] for r in range(2) if i in drawn[r]] or [0])
      for i in range(4)
    ]
    np.testing.assert_array_equal(got, want)

  @pytest.mark.slow
  def test_four_rounds_of_four_peers_follow_the_equations(self):
    # Small integers and powers of two: float32 is exact, and so are the draws.
    gradients = np.random.default_rng(0).integers(-8, 9, (4, 4, 8))
    gradients = gradients.astype(np.float32)
    tx = sl.sparseloco(
      optax.sgd(0.5),
      inner_steps=1,
      compression=topk_variants.RandomK(
        k=2, block=(2, 4), quantizer=sl.Exact()
      ),
      error_decay=0.5,
      axis_name='peers',
      mean_over='all',
      clip='none',
    )

    def run(gradients):
      params = jnp.zeros(8)
      state = tx.init(params)
      for g in gradients:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
      return params, state.error

    stacked = gradients.swapaxes(0, 1)
    by_vmap = jax.jit(jax.vmap(run, axis_name='peers'))(stacked)
    mesh = jax.make_mesh(
      (4,), ('peers',), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )

    def one_peer(gradients):
      return jax.tree.map(lambda x: x[None], run(gradients[0]))

    by_mesh = jax.jit(
      jax.shard_map(
        one_peer, mesh=mesh, in_specs=P('peers'), out_specs=P('peers')
      )
    )(stacked)
    theta, error = np.zeros(8), np.zeros((4, 8))
    for g in gradients:
      offered = 0.5 * error + 0.5 * g
      keep = np.asarray(select(offered.astype(np.float32), 2))
      sent = np.zeros_like(offered)
      np.put_along_axis(
        sent, keep, np.take_along_axis(offered, keep, axis=1), axis=1
      )
      error = offered - sent
      theta = theta - sent.mean(axis=0)
    for params, errors in (by_vmap, by_mesh):
      np.testing.assert_array_equal(params, [theta] * 4)
      np.testing.assert_array_equal(errors, error)


# Whole blocks, short edges both ways, stacks, runs of vectors, scalars.
LEAVES = (
  ((21, 13), (8, 8)),
  ((2, 3, 8, 12), (8, 4)),
  ((150,), (8, 8)),
  ((), (8, 8)),
)


def random_leaves(seed):
  rng = np.random.default_rng(seed)
  return [rng.standard_normal(shape, np.float32) for shape, _ in LEAVES]


def by_scipy(x, block, function):
  """Block by block in float64, with corners found by hand."""
  x = np.asarray(x, np.float64)
  rows = x.reshape(-1, *x.shape[-2:]) if x.ndim > 1 else x.reshape(1, 1, -1)
  height, width = block if x.ndim > 1 else (1, block[0] * block[1])
  out = np.zeros_like(rows)
  for s in range(rows.shape[0]):
    for i in range(0, rows.shape[1], height):
      for j in range(0, rows.shape[2], width):
        tile = rows[s, i : i + height, j : j + width]
        out[s, i : i + height, j : j + width] = function(
          tile, type=2, norm='ortho'
        )
  return out.reshape(x.shape)


class DctTest(absltest.TestCase):
  def test_a_block_by_hand(self):
    """[[1, 2], [3, 4]]: sums of rows, columns, all and the cross, halved.

    Of two points the basis is (1, 1) and (1, -1) over sqrt(2), so coefficients
    are (1+2+3+4)/2 = 5, (1-2+3-4)/2 = -1, (1+2-3-4)/2 = -2, (1-2-3+4)/2 = 0.
    """
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_allclose(
      topk_variants.dct(x, (2, 2)), [[5, -1], [-2, 0]], atol=1e-6
    )

  def test_agrees_with_scipy_keeps_norms_and_comes_back(self):
    def transforms(leaves):
      pairs = list(zip(leaves, LEAVES, strict=True))
      forth = [topk_variants.dct(x, block) for x, (_, block) in pairs]
      back = [topk_variants.idct(x, block) for x, (_, block) in pairs]
      round_trip = [
        topk_variants.idct(y, block)
        for y, (_, block) in zip(forth, LEAVES, strict=True)
      ]
      return forth, back, round_trip

    leaves = random_leaves(0)
    for x, (shape, block), forth, back, again in zip(
      leaves, LEAVES, *jax.jit(transforms)(leaves), strict=True
    ):
      with self.subTest(shape=shape, block=block):
        np.testing.assert_allclose(
          forth, by_scipy(x, block, scipy.fft.dctn), atol=3e-6
        )
        np.testing.assert_allclose(
          back, by_scipy(x, block, scipy.fft.idctn), atol=3e-6
        )
        np.testing.assert_allclose(again, x, atol=3e-6)
        np.testing.assert_allclose(np.sum(forth**2), np.sum(x**2), rtol=1e-5)

  def test_a_long_run_is_as_exact_as_a_short_one(self):
    x = np.random.default_rng(2).standard_normal(1500, np.float32)
    np.testing.assert_allclose(
      jax.jit(topk_variants.dct, static_argnums=1)(x, (64, 64)),
      by_scipy(x, (64, 64), scipy.fft.dctn),
      atol=1e-5,
    )

  def test_follows_the_layout_of_the_deployed_system(self):
    # 6 and 9 have the divisors 3 and 3 up to 4: six tiles of 3 x 3.
    x = np.random.default_rng(3).standard_normal((6, 9), np.float32)
    got = jax.jit(topk_variants.dct, static_argnums=(1, 2))(
      x, (4, 4), 'divisors'
    )
    np.testing.assert_allclose(
      got, by_scipy(x, (3, 3), scipy.fft.dctn), atol=3e-6
    )

  def test_refuses_a_run_whose_angles_overflow(self):
    with self.assertRaisesRegex(ValueError, 'block: .* 32767, got 32768'):
      topk_variants.basis(32768)


class DCTTopKTest(absltest.TestCase):
  def test_sends_the_largest_coefficients(self):
    """[4, 2] has coefficients 6 and 2 over sqrt(2); 6 alone gives [3, 3]."""
    compression = topk_variants.DCTTopK(k=1, block=(1, 2), quantizer=sl.Exact())
    message = compression.compress(jnp.array([4.0, 2.0]))
    np.testing.assert_array_equal(message[0].indices, [[0]])
    np.testing.assert_allclose(message[0].codes, [[6 / np.sqrt(2)]], rtol=1e-6)
    np.testing.assert_allclose(
      compression.decompress(message, (2,)), [3, 3], rtol=1e-6
    )

  @pytest.mark.slow
  def test_loses_what_it_did_not_send(self):
    k = 16
    compressors = [
      topk_variants.DCTTopK(k=k, block=block, quantizer=sl.Exact())
      for _, block in LEAVES
    ]

    def send(leaves):
      pairs = list(zip(leaves, compressors, strict=True))
      messages = [compressor.compress(x) for x, compressor in pairs]
      sent = [
        compressor.decompress(message, x.shape)
        for message, (x, compressor) in zip(messages, pairs, strict=True)
      ]
      norms = [
        reduce.norm(message, compressor)
        for message, (_, compressor) in zip(messages, pairs, strict=True)
      ]
      return sent, norms

    leaves = random_leaves(1)
    for x, (shape, block), sent, norm in zip(
      leaves, LEAVES, *jax.jit(send)(leaves), strict=True
    ):
      with self.subTest(shape=shape, block=block):
        coefficients = by_scipy(x, block, scipy.fft.dctn)
        energy = 0.0  # of the largest coefficients of each block
        for part in blocks.cut(coefficients, block):
          here = blocks.block_k(k, block, part.shape[1])
          energy += np.sum(np.sort(part**2, axis=1)[:, -here:])
        np.testing.assert_allclose(np.sum(sent**2), energy, rtol=1e-4)
        np.testing.assert_allclose(norm**2, energy, rtol=1e-4)
        # Orthonormal: what was sent and what was not are at right angles.
        np.testing.assert_allclose(
          np.sum((x - sent) ** 2), np.sum(x**2) - energy, rtol=1e-3, atol=1e-4
        )

  def test_peers_are_averaged_coefficient_by_coefficient(self):
    """Peer 0 sends c0 = 4 sqrt(2), peer 1 c1 = 2 sqrt(2), of two each.

    Each is alone at its frequency, so the mean over senders is (4, 2) sqrt(2)
    whose inverse is [4 + 2, 4 - 2]. Averaged as elements, [4, 4] and [2, -2]
    would give [3, 1].
    """
    compression = topk_variants.DCTTopK(k=1, block=(1, 2), quantizer=sl.Exact())
    peers = [jnp.array([4.5, 3.5]), jnp.array([2.5, -1.5])]
    mean = jax.jit(
      lambda peers: sl.aggregate(
        [compression.compress(x) for x in peers],
        peers[0],
        compression,
        'senders',
        'none',
      )
    )(peers)
    np.testing.assert_allclose(mean, [6, 2], rtol=1e-6)

  @pytest.mark.slow
  def test_is_the_same_on_the_devices_of_a_mesh(self):
    x = np.random.default_rng(4).standard_normal((4, 8, 8), np.float32)
    compression = topk_variants.DCTTopK(k=8, block=(8, 8), quantizer=sl.Exact())
    mesh = jax.make_mesh(
      (4,), ('peers',), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )

    def one_peer(x):
      message = jax.lax.all_gather(compression.compress(x[0]), 'peers')
      messages = [jax.tree.map(lambda a, r=r: a[r], message) for r in range(4)]
      return sl.aggregate(messages, x[0], compression)[None]

    by_mesh = jax.jit(
      jax.shard_map(
        one_peer, mesh=mesh, in_specs=P('peers'), out_specs=P('peers')
      )
    )(x)
    alone = jax.jit(
      lambda x: sl.aggregate(
        [compression.compress(row) for row in x], x[0], compression
      )
    )(x)
    np.testing.assert_allclose(by_mesh, [alone] * 4, atol=1e-5)


if __name__ == '__main__':
  absltest.main()
