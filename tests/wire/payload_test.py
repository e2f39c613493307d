import hashlib
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.models import llama
from covenant.optim import preset
from covenant.optim import quantize
from covenant.optim import sparseloco as sl
from covenant.wire import payload

LIKE = {
  'matrix': jax.ShapeDtypeStruct((100, 70), jnp.float32),
  'norm': jax.ShapeDtypeStruct((70,), jnp.float32),
  'scalar': jax.ShapeDtypeStruct((), jnp.float32),
}
HEADER = payload.Header(payload.run_id('a run'), round=3, uid=7)
COMPRESSIONS = (
  sl.TopK(quantizer=sl.Sign()),
  sl.TopK(quantizer=sl.Statistical()),
  sl.TopK(quantizer=quantize.SignMagnitude()),
  sl.TopK(k=16, block=(16, 16), quantizer=sl.Exact()),
  sl.Dense(),
)


# configs/1b.py's model: 1,204,881,408 parameters.
_CONFIGS = pathlib.Path(__file__).parent.parent.parent / 'configs'
_BILLION = config_lib.load(str(_CONFIGS / '1b.py')).model


def make_message(compression, seed=0):
  rng = np.random.default_rng(seed)
  delta = jax.tree.map(
    lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), LIKE
  )
  message, _ = sl.compress(delta, None, compression, 0.0)
  return jax.device_get(message)


def make_payload(compression, seed=0):
  spec = payload.make_spec(LIKE, compression)
  return payload.encode(HEADER, make_message(compression, seed), LIKE, spec)


def with_digest(data):
  """`data` with its last 32 bytes made right again."""
  return data[:-32] + hashlib.blake2b(data[:-32], digest_size=32).digest()


class PayloadTest(parameterized.TestCase):
  @parameterized.parameters(*COMPRESSIONS)
  def test_round_trip_at_exactly_the_stated_size(self, compression):
    spec = payload.make_spec(LIKE, compression)
    message = make_message(compression)
    data = payload.encode(HEADER, message, LIKE, spec)
    self.assertLen(data, spec.payload_bytes)
    got = payload.decode(data, HEADER, LIKE, spec)
    jax.tree.map(np.testing.assert_array_equal, got, message)
    self.assertEqual(payload.encode(HEADER, got, LIKE, spec), data)

  def test_ten_bits_a_value_at_two_bits(self):
    like = {'w': jax.ShapeDtypeStruct((64, 64), jnp.float32)}
    two = sl.TopK(quantizer=sl.Statistical())
    header = len(payload.encode(HEADER, {}, {}, payload.make_spec({}, two)))
    spec = payload.make_spec(like, two)
    self.assertEqual(spec.payload_bytes - header, 640 // 8 + 5 * 4)

  @parameterized.parameters(
    (quantize.Statistical(), 10.05, 203),
    (quantize.SignMagnitude('tensor'), 10.05, 203),
    (quantize.SignMagnitude('block'), 10.26, 199),
    (quantize.Sign('block'), 9.26, 221),
    (quantize.Sign('tensor'), 9.01, 227),
  )
  def test_whole_payloads_of_a_billion_parameters(self, quantizer, bits, ratio):
    """Headers and digest counted. 12-bit pairs at two bits: 14 bits, 146x."""
    like = jax.eval_shape(lambda: llama.init(_BILLION, jax.random.key(0)))
    spec = payload.make_spec(like, sl.TopK(quantizer=quantizer))
    sent = sum(r.num_blocks * r.k for t in spec.tensors for r in t.regions)
    self.assertLessEqual(8 * spec.payload_bytes / sent, bits)
    self.assertGreaterEqual(spec.dense_bytes / spec.payload_bytes, ratio)

  def test_twelve_bit_pairs_are_a_codec(self):
    """The deployed layout; its codes packed, 14 bits a value at two bits."""
    like = {'w': jax.ShapeDtypeStruct((128, 192), jnp.float32),
            'norm': jax.ShapeDtypeStruct((192,), jnp.float32)}  # fmt: skip
    compression = preset.templar().compression
    rng = np.random.default_rng(0)
    message = jax.device_get(
      {
        name: jax.jit(compression.compress)(
          rng.standard_normal(x.shape, np.float32)
        )
        for name, x in like.items()
      }
    )
    spec = payload.make_spec(like, compression, codec='pack12')
    data = payload.encode(HEADER, message, like, spec)
    self.assertLen(data, spec.payload_bytes)
    values = 64 * (6 + 3)
    self.assertLen(data, 50 + values * 14 // 8 + 2 * 5 * 4 + 32)
    got = payload.decode(data, HEADER, like, spec)
    jax.tree.map(np.testing.assert_array_equal, got, message)
    other = payload.make_spec(like, compression)
    self.assertNotEqual(spec.digest, other.digest)

  def test_says_which_tensor_a_codec_cannot_carry(self):
    with self.assertRaisesRegex(ValueError, r"\['matrix'\] of shape \(100, 70"):
      payload.make_spec(LIKE, sl.TopK(block=(100, 70)), codec='pack12')
    with self.assertRaisesRegex(ValueError, "'pack12'.*, got 'zip'"):
      payload.make_spec(LIKE, sl.TopK(), codec='zip')

  @parameterized.parameters(
    (dict(run=payload.run_id('another')), payload.Reason.RUN),
    (dict(round=4), payload.Reason.ROUND),
    (dict(uid=8), payload.Reason.UID),
  )
  def test_refuses_what_was_meant_for_elsewhere(self, change, reason):
    compression = sl.TopK()
    spec = payload.make_spec(LIKE, compression)
    with self.assertRaises(payload.Refused) as caught:
      payload.decode(
        make_payload(compression), HEADER._replace(**change), LIKE, spec
      )
    self.assertEqual(caught.exception.reason, reason)

  def test_refuses_another_layout_of_the_same_length(self):
    transposed = {**LIKE, 'matrix': jax.ShapeDtypeStruct((70, 100), 'float32')}
    spec = payload.make_spec(transposed, sl.Dense())
    with self.assertRaises(payload.Refused) as caught:
      payload.decode(make_payload(sl.Dense()), HEADER, transposed, spec)
    self.assertEqual(caught.exception.reason, payload.Reason.SPEC)

  @parameterized.parameters(
    (b'', payload.Reason.LENGTH),
    (b'x' * 64, payload.Reason.LENGTH),
    (lambda d: d + b'\0', payload.Reason.LENGTH),
    (lambda d: d[:-1], payload.Reason.LENGTH),
    (lambda d: d[:-1] + bytes([d[-1] ^ 1]), payload.Reason.DIGEST),
    (lambda d: with_digest(b'PK' + d[2:]), payload.Reason.MAGIC),
    (lambda d: with_digest(d[:50] + b'\xff' * 64 + d[114:]),
     payload.Reason.INDICES),
    (lambda d: with_digest(d[:-34] + b'\xff\x7f' + d[-32:]),
     payload.Reason.VALUES),
  )  # fmt: skip
  def test_refuses_with_the_reason(self, change, reason):
    compression = sl.TopK()
    data = make_payload(compression)
    data = change(data) if callable(change) else change
    with self.assertRaises(payload.Refused) as caught:
      payload.decode(data, HEADER, LIKE, payload.make_spec(LIKE, compression))
    self.assertEqual(caught.exception.reason, reason)

  @parameterized.parameters(np.nan, np.inf, 1e7)
  def test_refuses_absurd_numbers(self, value):
    message = make_message(sl.Dense())
    message['norm'] = np.full_like(message['norm'], value)
    spec = payload.make_spec(LIKE, sl.Dense())
    data = payload.encode(HEADER, message, LIKE, spec)
    with self.assertRaisesRegex(payload.Refused, r"\['norm'\]"):
      payload.decode(data, HEADER, LIKE, spec)

  @hypothesis.given(st.data())
  @hypothesis.settings(deadline=None, max_examples=500)
  def test_mutations_are_refused_or_decode_to_what_they_encode(self, data):
    """The digest is made right again: a hostile peer can do that too."""
    compression = data.draw(st.sampled_from(COMPRESSIONS))
    spec = payload.make_spec(LIKE, compression)
    mutant = bytearray(_PAYLOADS[compression])
    for _ in range(data.draw(st.integers(1, 3))):
      at = data.draw(st.integers(0, len(mutant) - 1))
      mutant[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([0, 0, 0, 1, 33]))
    mutant = with_digest(bytes(mutant[: len(mutant) - cut]))
    try:
      got = payload.decode(mutant, HEADER, LIKE, spec)
    except payload.Refused as e:
      self.assertIsInstance(e.reason, payload.Reason)
      return
    self.assertEqual(payload.encode(HEADER, got, LIKE, spec), mutant)


_PAYLOADS = {c: make_payload(c) for c in COMPRESSIONS}


if __name__ == '__main__':
  absltest.main()
