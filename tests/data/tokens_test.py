"""Tests for covenant.data.tokens."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import tensorstore as ts
from absl.testing import absltest
from absl.testing import parameterized

from covenant.data import tokens


def split(num_tokens: int, shard: int | None = None) -> tokens.Split:
  """The tokens 0, 1, 2, ..., in arrays of `shard` tokens."""
  line = np.arange(num_tokens, dtype=np.uint16)
  shard = shard or num_tokens
  arrays = [
    ts.array(line[start : start + shard])
    for start in range(0, num_tokens, shard)
  ]
  return tokens.Split(ts.cast(ts.concat(arrays, axis=0), ts.int32), 0)


class SplitTest(parameterized.TestCase):
  @hypothesis.settings(deadline=None)
  @hypothesis.given(
    num_tokens=st.integers(2, 300), shard=st.integers(7, 300), data=st.data()
  )
  def test_read(self, num_tokens, shard, data):
    context = data.draw(st.integers(1, num_tokens - 1))
    line = split(num_tokens, shard)
    limit = line.num_sequences(context)
    ids = data.draw(st.lists(st.integers(0, limit - 1), max_size=5))
    got = line.read(ids, context)
    self.assertEqual(got.dtype, np.int32)
    self.assertEqual(got.shape, (len(ids), context + 1))
    for i, sequence in zip(ids, got, strict=True):
      first = i * context
      np.testing.assert_array_equal(
        sequence, np.arange(first, first + context + 1)
      )

  def test_every_token_but_the_first_is_a_target_once(self):
    line = split(101)
    targets = line.read(np.arange(line.num_sequences(10)), 10)[:, 1:]
    np.testing.assert_array_equal(targets.ravel(), np.arange(1, 101))

  @parameterized.parameters((1, 4, 0), (4, 4, 0), (5, 4, 1), (9, 4, 2))
  def test_num_sequences(self, num_tokens, context, expected):
    self.assertEqual(split(num_tokens).num_sequences(context), expected)

  @parameterized.parameters(0, -1)
  def test_context_too_small(self, context):
    with self.assertRaisesRegex(
      ValueError, f'context: expected 1 or more, got {context}'
    ):
      split(9).num_sequences(context)

  @parameterized.parameters(([0, 2], 2), ([-1], -1), ([1, 7, 9], 7))
  def test_id_out_of_range(self, ids, wrong):
    with self.assertRaisesRegex(
      ValueError,
      rf'ids: expected 0 <= id < 2 \(9 tokens, context 4\), got {wrong}$',
    ):
      split(9).start(ids, 4)

  def test_large_unsigned_id(self):
    with self.assertRaisesRegex(ValueError, 'got 18446744073709551615$'):
      split(9).read(np.asarray([2**64 - 1], np.uint64), 4)

  @parameterized.parameters(
    (np.zeros([2, 2], int), r'got int64 of shape \[2, 2\]'),
    (np.zeros([2]), r'got float64 of shape \[2\]'),
    (1, r'got int64 of shape \[\]'),
  )
  def test_ids_of_another_form(self, ids, message):
    with self.assertRaisesRegex(
      ValueError, r'ids: expected integers of shape \[n\], ' + message
    ):
      split(9).read(ids, 4)

  def test_start(self):
    line = split(9)
    futures = [line.start([i], 4) for i in (1, 0)]
    got = [future.result().tolist() for future in futures]
    self.assertEqual(got, [[[4, 5, 6, 7, 8]], [[0, 1, 2, 3, 4]]])


class PrefetchTest(parameterized.TestCase):
  @parameterized.product(depth=(1, 2, 9), batches=(0, 1, 5))
  def test_order(self, depth, batches):
    line = split(100)
    ids = [np.asarray([i, 2 * i]) for i in range(batches)]
    got = list(tokens.prefetch(line, iter(ids), 4, depth))
    self.assertLen(got, batches)
    for i, batch in zip(ids, got, strict=True):
      np.testing.assert_array_equal(batch, line.read(i, 4))

  def test_depth_reads_are_ahead(self):
    drawn = []

    def batches():
      for i in range(6):
        drawn.append(i)
        yield [i]

    ahead = []
    for i, _ in enumerate(tokens.prefetch(split(100), batches(), 4, depth=2)):
      ahead.append(len(drawn) - i - 1)
    self.assertEqual(ahead, [2, 2, 2, 2, 1, 0])

  def test_depth_too_small(self):
    with self.assertRaisesRegex(ValueError, 'depth: expected 1 or more, got 0'):
      next(tokens.prefetch(split(9), [[0]], 4, depth=0))


if __name__ == '__main__':
  absltest.main()
