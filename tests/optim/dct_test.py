import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft
from absl.testing import absltest

from covenant.optim import blocks
from covenant.optim import dct
from covenant.optim import reduce
from covenant.optim import sparseloco as sl

P = jax.P
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
      dct.dct(x, (2, 2)), [[5, -1], [-2, 0]], atol=1e-6
    )

  def test_agrees_with_scipy_keeps_norms_and_comes_back(self):
    def transforms(leaves):
      pairs = list(zip(leaves, LEAVES, strict=True))
      forth = [dct.dct(x, block) for x, (_, block) in pairs]
      back = [dct.idct(x, block) for x, (_, block) in pairs]
      round_trip = [
        dct.idct(y, block) for y, (_, block) in zip(forth, LEAVES, strict=True)
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
      jax.jit(dct.dct, static_argnums=1)(x, (64, 64)),
      by_scipy(x, (64, 64), scipy.fft.dctn),
      atol=1e-5,
    )

  def test_follows_the_layout_of_the_deployed_system(self):
    # 6 and 9 have the divisors 3 and 3 up to 4: six tiles of 3 x 3.
    x = np.random.default_rng(3).standard_normal((6, 9), np.float32)
    got = jax.jit(dct.dct, static_argnums=(1, 2))(x, (4, 4), 'divisors')
    np.testing.assert_allclose(
      got, by_scipy(x, (3, 3), scipy.fft.dctn), atol=3e-6
    )

  def test_refuses_a_run_whose_angles_overflow(self):
    with self.assertRaisesRegex(ValueError, 'block: .* 32767, got 32768'):
      dct.basis(32768)


class DCTTopKTest(absltest.TestCase):
  def test_sends_the_largest_coefficients(self):
    """[4, 2] has coefficients 6 and 2 over sqrt(2); 6 alone gives [3, 3]."""
    compression = dct.DCTTopK(k=1, block=(1, 2), quantizer=sl.Exact())
    message = compression.compress(jnp.array([4.0, 2.0]))
    np.testing.assert_array_equal(message[0].indices, [[0]])
    np.testing.assert_allclose(message[0].codes, [[6 / np.sqrt(2)]], rtol=1e-6)
    np.testing.assert_allclose(
      compression.decompress(message, (2,)), [3, 3], rtol=1e-6
    )

  def test_loses_what_it_did_not_send(self):
    k = 16
    compressors = [
      dct.DCTTopK(k=k, block=block, quantizer=sl.Exact()) for _, block in LEAVES
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
    compression = dct.DCTTopK(k=1, block=(1, 2), quantizer=sl.Exact())
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

  def test_is_the_same_on_the_devices_of_a_mesh(self):
    x = np.random.default_rng(4).standard_normal((4, 8, 8), np.float32)
    compression = dct.DCTTopK(k=8, block=(8, 8), quantizer=sl.Exact())
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
