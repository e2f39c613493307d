"""The payload: one peer's contribution to one round, as bytes.

  magic 'CVNT' | version u16 | uid u32 | round u32 | 0 u32 | run 16
    | spec 16 | root 16 | receipt 16 | sequences u32                   header
  per tensor, per region: packed indices and codes | scales            body
  blake2b-256 of all of the above                                      digest
  64 bytes of the sender's hotkey over the digest                      signature

All integers are little-endian. `spec` is a digest of every tensor's name,
shape, blocks, k, quantizer and codec: both sides derive these from the run's
config, and a payload made for another is refused before its body is read. The
length of a payload follows from the spec (with the codec 'rice' its bounds
do), so it is known before a byte is fetched. One message has one encoding, up
to the signature: ed25519 has one, sr25519 draws a new one each time.

A payload of a round is a delta against the parameters at its beginning; `root`
is that of their history.
"""

import enum
import hashlib
import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np

from covenant import errors
from covenant import typing as ct
from covenant.optim import compression as compression_lib
from covenant.wire import codec as codec_lib
from covenant.wire import layout as layout_lib

_HEADER = struct.Struct('<4sHIII16s16s16s16sI')
_MAGIC = b'CVNT'
_VERSION = 3
_DIGEST_BYTES = 32
_SIGNATURE_BYTES = 64
_PERSON = b'covenant.payload'  # no other signed text has this digest
# Far above any delta a sane run makes, far below what overflows float32 sums.
_LARGEST = 1e6

Verify = Callable[[bytes, bytes], bool]  # data, signature


class Reason(enum.Enum):
  """The reasons to refuse a payload: a closed list, with texts for people."""

  LENGTH = 'wrong length'
  DIGEST = 'wrong digest'
  MAGIC = 'not a payload of this version'
  RUN = 'of another run'
  SPEC = 'of another model or compression'
  ROUND = 'of another round'
  UID = 'of another uid'
  ROOT = 'trained from other parameters'
  SIGNATURE = 'not signed by the hotkey of its uid'
  INDICES = 'bad indices'
  VALUES = 'bad values'


class PayloadError(errors.CovenantError):
  """A payload of which nothing counts, for one `Reason`."""

  def __init__(self, reason: Reason, detail: str):
    super().__init__(f'payload refused, {reason.value}: {detail}')
    self.reason = reason


class Header(NamedTuple):
  """The signed declarations of a payload."""

  run: bytes  # 16 bytes, see `run_id`
  round: int
  uid: int
  root: bytes  # 16 bytes, of the history of the start parameters
  receipt: bytes  # 16 bytes, see `assignment.Receipt`
  sequences: int  # number trained on


class Payload(NamedTuple):
  """A decoded payload."""

  header: Header
  message: ct.Message  # of NumPy arrays


class Measured(NamedTuple):
  """A decoded payload and the norms of its tensors."""

  header: Header
  message: ct.Message  # of NumPy arrays, or packed (lazy.py)
  norms: np.ndarray  # float32 [P]


Decoded = Payload | Measured

PackedRegion = layout_lib.PackedRegion
Tensor = layout_lib.Tensor
Spec = layout_lib.Spec
make_spec = layout_lib.make_spec


def run_id(text: str) -> bytes:
  """Returns the 16 bytes that name a run: a digest of its definition."""
  return hashlib.blake2b(text.encode(), digest_size=16).digest()


def encode(
  header: Header,
  message: ct.Message,
  abstract_params: ct.Params,
  spec: Spec,
  sign: ct.Sign,
) -> bytes:
  """Returns the payload of a message.

  Args:
    header: the sender's declarations.
    message: a result of `sparseloco.compress`, of NumPy or JAX arrays.
    abstract_params: the parameters or their shapes.
    spec: `make_spec(abstract_params, compression)`.
    sign: returns the sender's signature of bytes, 64 bytes.
  """
  parts = jax.tree.structure(abstract_params).flatten_up_to(message)
  sections = (
    encode_tensor(tensor, part, spec)
    for tensor, part in zip(spec.tensors, parts, strict=True)
  )
  return assemble(header, sections, spec, sign)


def assemble(
  header: Header, sections: Iterable[bytes], spec: Spec, sign: ct.Sign
) -> bytes:
  """Returns the payload of the sections of all tensors, in leaf order."""
  sender = header.uid, header.round, 0, header.run
  work = header.root, header.receipt, header.sequences
  head = _HEADER.pack(_MAGIC, _VERSION, *sender, spec.digest, *work)
  data = b''.join([head, *sections])
  digest = _digest(data)
  return data + digest + sign(digest)


def section_ends(data: bytes, spec: Spec) -> list[int]:
  """Returns where the sections of an accepted payload begin, and the last end.

  Offsets are from the beginning of the payload, one per tensor and one more.
  """
  ends, body = [_HEADER.size], body_of(data)
  for tensor in spec.tensors:
    least, most = layout_lib.section_bytes(spec, tensor)
    if least != most:  # only its contents tell
      size = len(body) - len(decode_tensor(tensor, body, spec)[1])
    else:
      size = most
    ends.append(ends[-1] + size)
    body = body[size:]
  return ends


def decode(
  data: bytes,
  expected: Header,
  abstract_params: ct.Params,
  spec: Spec,
  verify: Verify,
) -> Payload:
  """Returns the content of a payload from a peer that may be hostile.

  Args:
    data: the payload.
    expected: the run, the round, the uid and the root that it must name. The
      caller checks what it declares about its data.
    abstract_params: the parameters or their shapes.
    spec: `make_spec(abstract_params, compression)`.
    verify: returns whether the hotkey of `expected.uid` signed some bytes.

  Returns:
    A header that equals `expected` in run, round, uid and root, and a message
    of NumPy arrays, structured like the parameters.

  Raises:
    PayloadError: with one reason. No memory beyond the payload's size is
      allocated before length, digest, header and signature are verified.
  """
  least, most = spec.least_bytes, spec.payload_bytes
  if not least <= len(data) <= most:
    expected_ = f'{most}' if least == most else f'{least} to {most}'
    raise PayloadError(
      Reason.LENGTH, f'expected {expected_} bytes, got {len(data)}'
    )
  body_end = len(data) - _DIGEST_BYTES - _SIGNATURE_BYTES
  digest = _digest(memoryview(data)[:body_end])
  if digest != data[body_end : body_end + _DIGEST_BYTES]:
    raise PayloadError(
      Reason.DIGEST, 'the bytes are not those the sender digested'
    )
  header = _read_header(data, expected, spec)
  if not verify(digest, data[-_SIGNATURE_BYTES:]):
    raise PayloadError(
      Reason.SIGNATURE, f'uid {header.uid} did not sign these bytes'
    )
  body, parts = body_of(data), []
  for tensor in spec.tensors:
    part, body = decode_tensor(tensor, body, spec)
    parts.append(part)
  if body:
    raise PayloadError(Reason.LENGTH, f'{len(body)} bytes after all tensors')
  return Payload(header, jax.tree.structure(abstract_params).unflatten(parts))


def round_of(data: bytes) -> int:
  """Returns the round that an accepted payload names."""
  return _HEADER.unpack_from(data)[3]


def body_of(data: bytes) -> memoryview:
  """Returns the bytes of a payload between its header and its digest."""
  return memoryview(data)[_HEADER.size : -_DIGEST_BYTES - _SIGNATURE_BYTES]


def _read_header(data: bytes, expected: Header, spec: Spec) -> Header:
  """Returns the header of a payload; raises PayloadError for another."""
  magic, version, uid, number, zero, *rest = _HEADER.unpack_from(data)
  run, layout, root, receipt, sequences = rest
  for reason, want, got in (
    (Reason.MAGIC, (_MAGIC, _VERSION, 0), (magic, version, zero)),
    (Reason.RUN, expected.run, run),
    (Reason.SPEC, spec.digest, layout),
    (Reason.ROUND, expected.round, number),
    (Reason.UID, expected.uid, uid),
    (Reason.ROOT, expected.root, root),
  ):
    if want != got:
      raise PayloadError(reason, f'expected {_shown(want)}, got {_shown(got)}')
  return Header(run, number, uid, root, receipt, sequences)


def _digest(data: bytes | memoryview) -> bytes:
  return hashlib.blake2b(
    data, digest_size=_DIGEST_BYTES, person=_PERSON
  ).digest()


def _shown(value: object) -> str:
  return value.hex() if isinstance(value, bytes) else str(value)


def encode_tensor(tensor: Tensor, part: ct.Message, spec: Spec) -> bytes:
  """Returns the section of a tensor."""
  if not tensor.regions:
    return np.asarray(part, '<f4').tobytes()
  quantizer, codec = spec.quantizer, layout_lib.CODECS[spec.codec]
  bits, chunks = spec.packed_bits, []
  for region, packet in zip(tensor.regions, part, strict=True):
    indices, codes = np.asarray(packet.indices), np.asarray(packet.codes)
    packed = codes if bits else np.zeros_like(codes, np.uint8)
    chunks.append(codec.pack(indices, packed, region.block_size, bits))
    if not bits:
      chunks.append(codes.astype('<f4').tobytes())
    scales = np.asarray(packet.scales)
    chunks.append(scales.astype(_little(quantizer.scale_dtype)).tobytes())
  return b''.join(chunks)


def decode_tensor(
  tensor: Tensor, body: memoryview, spec: Spec
) -> tuple[ct.Message, memoryview]:
  """Returns the message of a tensor, and the rest of the body after it.

  Raises:
    PayloadError: the body ends early, or has no message of this tensor.
  """
  if not tensor.regions:
    size, _ = layout_lib.section_bytes(spec, tensor)
    if len(body) < size:
      raise PayloadError(Reason.LENGTH, f'{tensor.name}: the body ends early')
    values = np.frombuffer(body[:size], '<f4').reshape(tensor.shape)
    _check_values(values, tensor.name)
    return values, body[size:]
  codec, bits, packets = layout_lib.CODECS[spec.codec], spec.packed_bits, []
  for region in tensor.regions:
    try:
      packed = codec.length(body, *region, bits)
      indices, codes = codec.unpack(body[:packed], *region, bits)
    except codec_lib.CodecError as e:
      raise PayloadError(Reason.INDICES, f'{tensor.name}: {e}') from e
    body = body[packed:]
    values, scales, body = other_values(tensor, region, body, spec)
    codes = codes if values is None else values
    packets.append(compression_lib.Packet(indices, codes, scales))
  return tuple(packets), body


def other_values(
  tensor: Tensor, region: PackedRegion, body: memoryview, spec: Spec
) -> tuple[np.ndarray | None, np.ndarray, memoryview]:
  """Returns what follows a packed section: values, scales, the rest of a body.

  The values are None unless the quantizer sends float32.

  Raises:
    PayloadError: too few bytes, or a number that is not finite or absurd.
  """
  quantizer, n = spec.quantizer, region.num_blocks
  raw, scale_bytes = layout_lib.other_bytes(spec, region)
  if len(body) < raw + scale_bytes:
    raise PayloadError(Reason.LENGTH, f'{tensor.name}: the body ends early')
  values = None
  if not spec.packed_bits:
    values = np.frombuffer(body[:raw], '<f4').reshape(n, region.k)
    _check_values(values, tensor.name)
  body = body[raw:]
  scales = np.frombuffer(body[:scale_bytes], _little(quantizer.scale_dtype))
  scales = scales.reshape(quantizer.scale_shape(n))
  _check_values(scales, tensor.name)
  return values, scales, body[scale_bytes:]


def _little(dtype: np.dtype) -> np.dtype:
  return dtype if dtype == ml_dtypes.bfloat16 else dtype.newbyteorder('<')


def _check_values(values: np.ndarray, name: str) -> None:
  """Refuses a number that is not finite or absurd, in constant memory."""
  if values.dtype == ml_dtypes.bfloat16:
    values = values.astype(np.float32)
  if not values.size:
    return
  ends = np.array([values.min(), values.max()])  # a NaN is both
  if not np.isfinite(ends).all():
    raise PayloadError(Reason.VALUES, f'{name}: not finite')
  if np.abs(ends).max() > _LARGEST:
    raise PayloadError(Reason.VALUES, f'{name}: a magnitude above {_LARGEST:g}')
