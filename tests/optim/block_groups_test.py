"""Tests for covenant.optim.block_groups."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import block_groups
from covenant.optim import compression
from covenant.optim import quantize
from covenant.optim import topk

GROUPS = tuple(
  block_groups.Group(*g) for g in [(3, 64, 4), (2, 20, 2), (4, 3, 1)]
)


def blocks_of(groups, seed=0):
  keys = jax.random.split(jax.random.key(seed), len(groups))
  # Many are equal, so that the lowest index decides.
  return [
    jnp.round(2 * jax.random.normal(k, (g.count, g.size)))
    for g, k in zip(groups, keys, strict=True)
  ]


def padded(one, blocks):
  # Numbers after a block are none of it.
  rows = [
    jnp.pad(x, ((0, 0), (0, one.shape[2] - x.shape[1])), constant_values=9.0)
    for x in blocks
  ]
  return jnp.concatenate(rows).reshape(one.shape)


class BlockGroupsTest(parameterized.TestCase):
  @parameterized.product(
    quantizer=[quantize.Sign(), quantize.Exact()], is_large=[False, True]
  )
  @pytest.mark.slow
  def test_each_group_is_compressed_as_if_alone(self, quantizer, is_large):
    one = block_groups.BlockGroups(GROUPS, quantizer)
    blocks = blocks_of(GROUPS)
    with mock.patch.object(topk, '_LARGE', 1 if is_large else 1 << 22):
      part = one.compress(padded(one, blocks))
    sent = one.decompress(part, one.shape)
    (values,) = one.values(part)
    counts = np.zeros(one.num_codes, int)
    for (g, rows), x in zip(one.rows(), blocks, strict=True):
      alone = compression.TopK(g.k, (1, g.size), quantizer)
      want = alone.compress(x[:, None])
      np.testing.assert_array_equal(
        part[0].indices[rows, : g.k], want[0].indices
      )
      np.testing.assert_array_equal(part[0].indices[rows, g.k :], 64)
      np.testing.assert_array_equal(values[rows, : g.k], alone.values(want)[0])
      np.testing.assert_array_equal(values[rows, g.k :], 0)
      np.testing.assert_array_equal(
        sent[rows, 0, : g.size], alone.decompress(want, x.shape)
      )
      np.testing.assert_array_equal(sent[rows, 0, g.size :], 0)
      counts += np.asarray(alone.code_counts(want))
    np.testing.assert_array_equal(one.code_counts(part), counts)

  @pytest.mark.slow
  def test_sums_are_those_of_each_group(self):
    one = block_groups.BlockGroups(GROUPS, quantize.Sign())
    sums = one.start(one.shape)
    want = [
      compression.TopK(g.k, (1, g.size)).start((g.count, 1, g.size))
      for g in GROUPS
    ]
    for seed in range(3):
      blocks = blocks_of(GROUPS, seed)
      part = one.compress(padded(one, blocks))
      total = one.scatter_add(sums.total, part, one.values(part))
      sums = compression.Sums(total, one.count(sums.senders, part, 7))
      for i, (g, x) in enumerate(zip(GROUPS, blocks, strict=True)):
        alone = compression.TopK(g.k, (1, g.size))
        own = alone.compress(x[:, None])
        total = alone.scatter_add(want[i].total, own, alone.values(own))
        senders = alone.count(want[i].senders, own, 7)
        want[i] = compression.Sums(total, senders)
    for (g, rows), x in zip(one.rows(), want, strict=True):
      np.testing.assert_array_equal(sums.total[0][rows, : g.size], x.total[0])
      np.testing.assert_array_equal(
        sums.senders[0][rows, : g.size], x.senders[0]
      )
      np.testing.assert_array_equal(sums.senders[0][rows, g.size :], 0)


if __name__ == '__main__':
  absltest.main()
