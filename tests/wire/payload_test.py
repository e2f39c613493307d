import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.chain import keys
from covenant.models import llama
from covenant.optim import quantize
from covenant.optim import sparseloco as sl
from covenant.wire import payload
from tests import helpers

LIKE = {
  'matrix': jax.ShapeDtypeStruct((100, 70), jnp.float32),
  'norm': jax.ShapeDtypeStruct((70,), jnp.float32),
  'scalar': jax.ShapeDtypeStruct((), jnp.float32),
}
HEADER = payload.Header(
  payload.run_id('a run'),
  round=3,
  uid=7,
  root=b'h' * 16,
  receipt=b'c' * 16,
  sequences=64,
)
# What the receiver knows; it learns the rest.
EXPECTED = HEADER._replace(receipt=b'', sequences=0)
KEY = keys.Key.from_seed(b'm' * 32)
OTHER = keys.Key.from_seed(b'o' * 32)
TAIL = 32 + 64  # bytes: the digest, the signature
HEAD = 86  # bytes: the header
COMPRESSIONS = (
  sl.TopK(quantizer=sl.Sign()),
  sl.TopK(quantizer=sl.Statistical()),
  sl.TopK(quantizer=quantize.SignMagnitude()),
  sl.TopK(k=16, block=(16, 16), quantizer=sl.Exact()),
  sl.Dense(),
)


# configs/1b.py's model: 1,204,881,408 parameters.
_BILLION = config_lib.load(str(helpers.CONFIGS / '1b.py')).model


_compress = jax.jit(sl.compress, static_argnums=2)


@functools.cache
def make_message(compression, seed=0):
  rng = np.random.default_rng(seed)
  delta = jax.tree.map(
    lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), LIKE
  )
  message, _ = _compress(delta, None, compression, 0.0)
  return jax.device_get(message)


@functools.cache
def make_payload(compression, seed=0):
  spec = payload.make_spec(LIKE, compression)
  message = make_message(compression, seed)
  return payload.encode(HEADER, message, LIKE, spec, KEY.sign)


def verify(data, signature):
  """Returns True if uid 7 signed it."""
  return keys.verify(KEY.address, data, signature)


def flipped(data, at):
  """`data` with one bit of one byte changed."""
  mutant = bytearray(data)
  mutant[at] ^= 1 << at % 8
  return bytes(mutant)


def places(data):
  """All of both ends, and some between."""
  return sorted(
    {
      *range(HEAD),
      *range(0, len(data), 97),
      *range(len(data) - TAIL, len(data)),
    }
  )


def resigned(data, key=KEY):
  """`data` with its digest and signature made right again."""
  digest = payload._digest(data[:-TAIL])
  return data[:-TAIL] + digest + key.sign(digest)


class PayloadTest(parameterized.TestCase):
  @parameterized.parameters(*COMPRESSIONS)
  def test_round_trip_at_exactly_the_stated_size(self, compression):
    spec = payload.make_spec(LIKE, compression)
    message = make_message(compression)
    data = payload.encode(HEADER, message, LIKE, spec, KEY.sign)
    self.assertLen(data, spec.payload_bytes)
    header, got = payload.decode(data, EXPECTED, LIKE, spec, verify)
    self.assertEqual(header, HEADER)
    jax.tree.map(np.testing.assert_array_equal, got, message)
    again = payload.encode(header, got, LIKE, spec, KEY.sign)
    self.assertEqual(again, data)

  @parameterized.parameters(*COMPRESSIONS)
  def test_a_section_that_ends_early_names_its_tensor(self, compression):
    spec = payload.make_spec(LIKE, compression)
    tensor = spec.tensors[0]
    part = make_message(compression)['matrix']
    data = payload.encode_tensor(tensor, part, spec)
    for size in 0, 3, 4, len(data) // 2, len(data) - 1:
      with self.assertRaisesRegex(payload.PayloadError, 'matrix'):
        payload.decode_tensor(tensor, memoryview(data[:size]), spec)

  def test_ten_bits_a_value_at_two_bits(self):
    like = {'w': jax.ShapeDtypeStruct((64, 64), jnp.float32)}
    two = sl.TopK(quantizer=sl.Statistical())
    header = payload.make_spec({}, two).payload_bytes
    self.assertEqual(header, HEAD + TAIL)
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
    like = llama.abstract(_BILLION)
    spec = payload.make_spec(like, sl.TopK(quantizer=quantizer))
    sent = sum(r.num_blocks * r.k for t in spec.tensors for r in t.regions)
    self.assertLessEqual(8 * spec.payload_bytes / sent, bits)
    self.assertGreaterEqual(spec.dense_bytes / spec.payload_bytes, ratio)

  def test_names_the_codecs_that_exist(self):
    with self.assertRaisesRegex(ValueError, "'elias-fano'.*, got 'zip'"):
      payload.make_spec(LIKE, sl.TopK(), codec='zip')

  def refused(self, data, expected, like, spec, reason):
    with self.assertRaises(payload.PayloadError) as caught:
      payload.decode(data, expected, like, spec, verify)
    self.assertEqual(caught.exception.reason, reason)

  @parameterized.parameters(
    (dict(run=payload.run_id('another')), payload.Reason.RUN),
    (dict(round=4), payload.Reason.ROUND),
    (dict(uid=8), payload.Reason.UID),
    (dict(root=b'i' * 16), payload.Reason.ROOT),
  )
  def test_refuses_what_was_meant_for_elsewhere(self, change, reason):
    compression = sl.TopK()
    spec = payload.make_spec(LIKE, compression)
    data = make_payload(compression)
    self.refused(data, EXPECTED._replace(**change), LIKE, spec, reason)

  def test_what_it_says_of_its_data_is_for_the_receiver_to_judge(self):
    compression = sl.TopK()
    spec = payload.make_spec(LIKE, compression)
    said = HEADER._replace(receipt=b'x' * 16, sequences=2**32 - 1)
    message = make_message(compression)
    data = payload.encode(said, message, LIKE, spec, KEY.sign)
    got, _ = payload.decode(data, EXPECTED, LIKE, spec, verify)
    self.assertEqual(got, said)

  def test_refuses_another_layout_of_the_same_length(self):
    transposed = {**LIKE, 'matrix': jax.ShapeDtypeStruct((70, 100), 'float32')}
    spec = payload.make_spec(transposed, sl.Dense())
    data = make_payload(sl.Dense())
    self.refused(data, EXPECTED, transposed, spec, payload.Reason.SPEC)

  @parameterized.parameters(*COMPRESSIONS)
  def test_no_byte_of_an_accepted_payload_can_be_changed(self, compression):
    spec, data = payload.make_spec(LIKE, compression), make_payload(compression)
    for at in places(data):
      signed = at < len(data) - 64
      reason = payload.Reason.DIGEST if signed else payload.Reason.SIGNATURE
      self.refused(flipped(data, at), EXPECTED, LIKE, spec, reason)

  @parameterized.parameters(*COMPRESSIONS)
  @pytest.mark.rows(1)
  def test_a_right_digest_is_of_no_use_to_who_cannot_sign(self, compression):
    spec, data = payload.make_spec(LIKE, compression), make_payload(compression)
    for at in places(data[:-TAIL]):
      mutant = resigned(flipped(data, at))
      for forged in (
        mutant[:-64] + data[-64:],  # with what was signed before
        resigned(mutant, OTHER),
        mutant[:-64] + bytes(64),
      ):
        with self.assertRaises(payload.PayloadError) as caught:
          payload.decode(forged, EXPECTED, LIKE, spec, verify)
        if at >= HEAD:  # else it is of another run, round ...
          reason = caught.exception.reason
          self.assertEqual(reason, payload.Reason.SIGNATURE)

  def test_refuses_what_another_key_signed(self):
    compression = sl.TopK()
    spec, message = (
      payload.make_spec(LIKE, compression),
      make_message(compression),
    )
    data = payload.encode(HEADER, message, LIKE, spec, OTHER.sign)
    self.refused(data, EXPECTED, LIKE, spec, payload.Reason.SIGNATURE)

  def test_refuses_a_second_form_of_a_signature(self):
    """Ed25519 has one where S is below the order of the group, as it must."""
    order = 2**252 + 27742317777372353535851937790883648493
    spec, data = payload.make_spec(LIKE, sl.TopK()), make_payload(sl.TopK())
    s = int.from_bytes(data[-32:], 'little') + order
    other = data[:-32] + s.to_bytes(32, 'little')
    self.refused(other, EXPECTED, LIKE, spec, payload.Reason.SIGNATURE)

  @parameterized.parameters(
    (b'', payload.Reason.LENGTH),
    (b'x' * 64, payload.Reason.LENGTH),
    (lambda d: d + b'\0', payload.Reason.LENGTH),
    (lambda d: d[:-1], payload.Reason.LENGTH),
    (lambda d: flipped(d, -65), payload.Reason.DIGEST),
    (lambda d: flipped(d, -1), payload.Reason.SIGNATURE),
    (lambda d: resigned(b'PK' + d[2:]), payload.Reason.MAGIC),
    (lambda d: resigned(d[:4] + b'\1' + d[5:]), payload.Reason.MAGIC),
    (lambda d: resigned(d[:HEAD] + b'\xff' * 64 + d[HEAD + 64 :]),
     payload.Reason.INDICES),
    (lambda d: resigned(d[: -TAIL - 2] + b'\xff\x7f' + d[-TAIL:]),
     payload.Reason.VALUES),
  )  # fmt: skip
  def test_refuses_with_the_reason(self, change, reason):
    compression = sl.TopK()
    data = make_payload(compression)
    data = change(data) if callable(change) else change
    spec = payload.make_spec(LIKE, compression)
    self.refused(data, EXPECTED, LIKE, spec, reason)

  @parameterized.parameters(np.nan, np.inf, 1e7)
  def test_refuses_absurd_numbers(self, value):
    message = dict(make_message(sl.Dense()))
    message['norm'] = np.full_like(message['norm'], value)
    spec = payload.make_spec(LIKE, sl.Dense())
    data = payload.encode(HEADER, message, LIKE, spec, KEY.sign)
    with self.assertRaisesRegex(payload.PayloadError, r"\['norm'\]"):
      payload.decode(data, EXPECTED, LIKE, spec, verify)

  @hypothesis.given(st.data())
  @hypothesis.settings(max_examples=500)
  @pytest.mark.slow
  def test_mutations_are_refused_or_decode_to_what_they_encode(self, data):
    """Signed again: a hostile peer is one who has a key."""
    compression = data.draw(st.sampled_from(COMPRESSIONS))
    spec = payload.make_spec(LIKE, compression)
    mutant = bytearray(make_payload(compression))
    for _ in range(data.draw(st.integers(1, 3))):
      at = data.draw(st.integers(0, len(mutant) - TAIL - 1))
      mutant[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([0, 0, 0, 1, 33]))
    mutant = resigned(bytes(mutant[: len(mutant) - cut]))
    try:
      header, got = payload.decode(mutant, EXPECTED, LIKE, spec, verify)
    except payload.PayloadError as e:
      self.assertIsInstance(e.reason, payload.Reason)
      return
    again = payload.encode(header, got, LIKE, spec, KEY.sign)
    self.assertEqual(again, mutant)


if __name__ == '__main__':
  absltest.main()
