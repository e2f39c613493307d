import jax
import numpy as np
from absl.testing import absltest

from covenant.chain import keys
from covenant.optim import compression
from covenant.protocol import same_bits
from covenant.wire import payload
from tests.reference import protocol

TENSORS = [
  protocol.Tensor(s, same_bits.BLOCK, same_bits.K)
  for s in same_bits.SHAPES.values()
]


def by_reference():
  """Fingerprints of parameters and momentum after each step, by NumPy."""
  params = [
    protocol.initial(7, name, shape, 0.02).ravel()
    for name, shape in same_bits.SHAPES.items()
  ]
  traces = [np.zeros_like(x) for x in params]
  yield protocol.fingerprint(params + traces)
  key = keys.Key.from_seed(bytes(32))
  shapes = {
    n: jax.ShapeDtypeStruct(s, np.float32) for n, s in same_bits.SHAPES.items()
  }
  for r, (name, quantizer) in enumerate(same_bits.QUANTIZERS):
    spec = payload.make_spec(
      shapes, compression.TopK(same_bits.K, same_bits.BLOCK, quantizer)
    )
    header = payload.Header(bytes(16), r, 0, bytes(16), bytes(16), 1)
    data = [
      payload.encode(
        header, same_bits.message(r, p, quantizer), shapes, spec, key.sign
      )
      for p in range(same_bits.PEERS)
    ]
    protocol.outer_step(
      data, same_bits.WEIGHTS, params, traces, TENSORS, name,
      same_bits.RATE, same_bits.MOMENTUM,
    )  # fmt: skip
    yield protocol.fingerprint(params + traces)


def fingerprints(**kwargs):
  for step in same_bits.run(**kwargs):
    leaves = jax.device_get(jax.tree.leaves((step.params, step.traces)))
    yield protocol.fingerprint([x.ravel() for x in leaves])


class SameBitsTest(absltest.TestCase):
  def test_nodes_equal_the_reference(self):
    self.assertEqual(list(fingerprints()), list(by_reference()))


if __name__ == '__main__':
  absltest.main()
