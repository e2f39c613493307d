import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest

from covenant.optim import randomk
from covenant.optim import sparseloco as sl

P = jax.P


select = jax.jit(randomk.select, static_argnums=1)


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
      for c in (randomk.RandomK(k=32), sl.TopK(k=32))
    ]
    self.assertEqual(*messages)

  def test_sends_the_drawn_values_and_keeps_the_rest(self):
    x = normal(1, (64, 128))
    compression = randomk.RandomK(k=64, quantizer=sl.Exact())

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
    compression = randomk.RandomK(k=2, block=(2, 2), quantizer=sl.Exact())
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
      compression=randomk.RandomK(k=2, block=(2, 4), quantizer=sl.Exact()),
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


if __name__ == '__main__':
  absltest.main()
