"""The layout of payloads follows from the run's config alone."""

import jax
import jax.numpy as jnp
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import sparseloco as sl
from covenant.wire import layout
from covenant.wire import payload

LIKE = {
  'matrix': jax.ShapeDtypeStruct((128, 64), jnp.float32),
  'norm': jax.ShapeDtypeStruct((70,), jnp.float32),
}


class LayoutTest(parameterized.TestCase):
  def test_lists_tensors_and_their_blocks(self):
    spec = layout.make_spec(LIKE, sl.TopK(64, (64, 64), sl.Sign()))
    matrix, norm = spec.tensors
    self.assertEqual(matrix.name, "['matrix']")
    self.assertEqual(matrix.regions, (layout.PackedRegion(2, 4096, 64),))
    self.assertEqual([region.num_blocks for region in norm.regions], [1])
    self.assertEqual(spec.dense_bytes, 4 * (128 * 64 + 70))

  @parameterized.parameters('elias-fano', 'rice')
  def test_the_length_is_known_before(self, codec):
    spec = layout.make_spec(LIKE, sl.TopK(), codec)
    delta = jax.tree.map(
      lambda x: jnp.arange(x.size, dtype='f4').reshape(x.shape), LIKE
    )
    message = jax.device_get(sl.compress(delta, None, sl.TopK(), 0.0)[0])
    header = payload.Header(b'r' * 16, 0, 0, b'h' * 16, b'c' * 16, 1)
    data = payload.encode(header, message, LIKE, spec, lambda x: 2 * x)
    self.assertBetween(len(data), spec.least_bytes, spec.payload_bytes)
    self.assertEqual(
      spec.least_bytes == spec.payload_bytes, codec == 'elias-fano'
    )

  def test_every_part_of_it_is_in_the_digest(self):
    specs = [
      layout.make_spec(LIKE, sl.TopK()),
      layout.make_spec(LIKE, sl.TopK(), 'rice'),
      layout.make_spec(LIKE, sl.TopK(k=32)),
      layout.make_spec({'matrix': LIKE['matrix']}, sl.TopK()),
    ]
    self.assertLen({spec.digest for spec in specs}, len(specs))

  def test_an_unknown_codec_is_an_error(self):
    with self.assertRaisesRegex(ValueError, "codec: expected one of .*'zip'"):
      layout.make_spec(LIKE, sl.TopK(), 'zip')


if __name__ == '__main__':
  absltest.main()
