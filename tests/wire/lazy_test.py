"""Messages that stay packed are the messages."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import outer_step
from covenant.optim import quantize
from covenant.optim import reduce
from covenant.optim import sparseloco as sl
from covenant.optim import weight
from covenant.wire import lazy
from covenant.wire import payload

LIKE = {
  'matrix': jax.ShapeDtypeStruct((100, 70), jnp.float32),
  'norm': jax.ShapeDtypeStruct((70,), jnp.float32),
  'stack': jax.ShapeDtypeStruct((4, 64, 32), jnp.float32),
}
HEADER = payload.Header(b'r' * 16, 3, 7, b'h' * 16, b'c' * 16, 64)
QUANTIZERS = quantize.Sign(), quantize.SignMagnitude(), sl.Exact()


def make(compression, codec, seed=0):
  """Returns a message and its payload."""
  rng = np.random.default_rng(seed)
  delta = jax.tree.map(
    lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), LIKE
  )
  message = jax.device_get(sl.compress(delta, None, compression, 0.0)[0])
  spec = payload.make_spec(LIKE, compression, codec)
  data = payload.encode(HEADER, message, LIKE, spec, lambda digest: 2 * digest)
  return message, data, spec


class LazyTest(parameterized.TestCase):
  @parameterized.product(
    codec=('elias-fano', 'rice'), quantizer=QUANTIZERS, side=(8, 16)
  )
  @pytest.mark.rows(1)
  def test_is_the_message(self, codec, quantizer, side):
    compression = sl.TopK(8, (side, side), quantizer)
    message, data, spec = make(compression, codec)
    packed = lazy.reopen(data, LIKE, spec)
    whole = lazy.Messages({7: packed})
    self.assertEqual(list(whole), [7])
    jax.tree.map(np.testing.assert_array_equal, whole[7], message)

  @parameterized.parameters('elias-fano', 'rice')
  @pytest.mark.rows(1)
  def test_reads_any_runs_of_blocks(self, codec):
    compression = sl.TopK(3, (4, 4), quantize.Sign())  # no whole bytes
    message, data, spec = make(compression, codec)
    (packed,) = lazy.reopen(data, LIKE, spec)['stack']
    (expected,) = message['stack']
    for runs in [(0, 1)], [(5, 19), (100, 128)], [(127, 128)], [(3, 3)]:
      for rows, x in zip(packed[:2], expected[:2], strict=True):
        want = np.concatenate([x[start:stop] for start, stop in runs])
        np.testing.assert_array_equal(rows.read(runs), want)
        self.assertEqual((rows.shape, rows.dtype), (x.shape, x.dtype))

  @parameterized.product(
    codec=('elias-fano', 'rice'), quantizer=(quantize.Sign(), sl.Exact())
  )
  @pytest.mark.rows(1)
  def test_nothing_stays_unpacked(self, codec, quantizer):
    """Messages wait packed for the next round, whoever has looked at them."""
    message, data, spec = make(sl.TopK(32, (8, 8), quantizer), codec)
    size = sum(x.nbytes for x in jax.tree.leaves(message))
    packed = lazy.reopen(data, LIKE, spec)
    lazy.Messages({7: packed})[7]  # numpy's own memory is there now
    packed = lazy.reopen(data, LIKE, spec)
    tracemalloc.start()
    self.addCleanup(tracemalloc.stop)
    before = tracemalloc.get_traced_memory()[0]
    lazy.Messages({7: packed})[7]
    left = tracemalloc.get_traced_memory()[0] - before
    self.assertLess(left, size / 4)

  @parameterized.parameters(1 << 26, 32 * 8)
  @pytest.mark.slow
  def test_the_outer_step_gets_the_same_bits(self, budget):
    """With one slice per leaf, and with slices that are read one by one."""
    compression = sl.TopK(8, (8, 8), quantize.SignMagnitude())
    abstract = {'stack': LIKE['stack']}
    outer = reduce.nesterov(0.7, 0.3)
    step = outer_step.OuterStep(abstract, compression, outer, budget=budget)
    rng = np.random.default_rng(1)
    params = {'stack': jnp.asarray(rng.standard_normal((4, 64, 32)), 'f4')}
    made = [make(compression, 'elias-fano', seed) for seed in range(3)]
    messages = [{'stack': message['stack']} for message, _, _ in made]
    packed = [
      {'stack': lazy.reopen(data, LIKE, spec)['stack']}
      for _, data, spec in made
    ]
    norms = step.norms(messages)
    factors = reduce.clip_factors(norms)
    parts = np.ones(3, np.uint16)
    totals = weight.totals(parts)
    results = [
      step.apply_sum(params, outer.init(params), x, factors, parts, totals)
      for x in (messages, packed)
    ]
    jax.tree.map(
      np.testing.assert_array_equal, results[0].params, results[1].params
    )
    self.assertEqual(results[0].delta_norm, results[1].delta_norm)


if __name__ == '__main__':
  absltest.main()
