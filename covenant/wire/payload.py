"""One peer's contribution to one round, as bytes.

  magic 'CVNT' | version u16 | uid u32 | round u64 | run 16 | spec 16   header
  per tensor, per region: packed indices and codes | scales            body
  blake2b-256 of all of the above                                      digest

All integers are little-endian. `spec` is a digest of every tensor's name,
shape, blocks, k, quantizer and codec: both sides derive these from the run's
config, and a payload made for another is refused before its body is read. The
length of a payload follows from the spec, so it is known before a byte is
fetched. One message has one encoding.
"""

import dataclasses
import enum
import hashlib
import json
import struct
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from covenant.optim import compression as compression_lib
from covenant.optim import quantize
from covenant.wire import codec as codec_lib
from covenant.wire import templar

_HEADER = struct.Struct('<4sHIQ16s16s')
_MAGIC = b'CVNT'
_VERSION = 1
_DIGEST_BYTES = 32
_CODECS = {'elias-fano': codec_lib, 'pack12': templar}
# Far above any delta a sane run makes, far below what overflows float32 sums.
_LARGEST = 1e6


class Reason(enum.Enum):
  """Why a payload was refused. A closed list; the value is for people."""

  LENGTH = 'wrong length'
  DIGEST = 'wrong digest'
  MAGIC = 'not a payload of this version'
  RUN = 'of another run'
  SPEC = 'of another model or compression'
  ROUND = 'of another round'
  UID = 'of another uid'
  INDICES = 'bad indices'
  VALUES = 'bad values'


class Refused(ValueError):
  """A payload that counts for nothing, whole. `reason` is one `Reason`."""

  def __init__(self, reason: Reason, detail: str):
    super().__init__(f'payload refused, {reason.value}: {detail}')
    self.reason = reason


class Header(NamedTuple):
  run: bytes  # 16 bytes, see `run_id`
  round: int
  uid: int


class Region(NamedTuple):
  """N blocks of L elements, k sent of each."""

  num_blocks: int
  block_size: int
  k: int


class Tensor(NamedTuple):
  name: str
  shape: tuple[int, ...]
  regions: tuple[Region, ...]  # empty where the tensor is sent dense


@dataclasses.dataclass(frozen=True)
class Spec:
  """The layout of a run's payloads. Equal on every node of the run."""

  tensors: tuple[Tensor, ...]
  compression: compression_lib.Compression
  codec: str = 'elias-fano'  # of the indices; or 'pack12', as deployed

  @property
  def quantizer(self) -> quantize.Quantizer:
    """Of tensors that are not sent dense."""
    assert isinstance(self.compression, compression_lib.TopK)
    return self.compression.quantizer

  @property
  def digest(self) -> bytes:
    text = json.dumps([self.tensors, repr(self.compression), self.codec])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()

  @property
  def payload_bytes(self) -> int:
    body = sum(_section_bytes(self, t) for t in self.tensors)
    return _HEADER.size + body + _DIGEST_BYTES

  @property
  def dense_bytes(self) -> int:
    """What float32 of every element would take: the ratio's numerator."""
    return 4 * sum(int(np.prod(t.shape)) for t in self.tensors)


def make_spec(
  like: Any,
  compression: compression_lib.Compression,
  codec: str = 'elias-fano',
) -> Spec:
  """The layout for parameters shaped like `like`, in leaf order.

  Args:
    like: the parameters or their shapes.
    compression: what makes the messages.
    codec: of the indices: 'elias-fano', or 'pack12' as deployed.

  Raises:
    ValueError: for an unknown codec, or blocks that it cannot carry.
  """
  if codec not in _CODECS:
    raise ValueError(f'codec: expected one of {[*_CODECS]}, got {codec!r}')

  def tensor(path: Any, leaf: Any) -> Tensor:
    layout = ()
    if isinstance(compression, compression_lib.TopK):
      layout = tuple(
        Region(r.num_blocks, r.block_size, compression.block_k(r.block_size))
        for r in compression.regions(leaf.shape)
      )
    name = jax.tree_util.keystr(path)
    for region in layout:
      try:
        _CODECS[codec].section_bytes(*region, 0)
      except codec_lib.CodecError as e:
        raise ValueError(f'{name} of shape {tuple(leaf.shape)}: {e}') from e
    return Tensor(name, tuple(leaf.shape), layout)

  leaves = jax.tree_util.tree_leaves_with_path(like)
  return Spec(tuple(tensor(*leaf) for leaf in leaves), compression, codec)


def run_id(text: str) -> bytes:
  """16 bytes that name a run: the digest of what defines it."""
  return hashlib.blake2b(text.encode(), digest_size=16).digest()


def encode(header: Header, message: Any, like: Any, spec: Spec) -> bytes:
  """The payload of a message.

  Args:
    header: who sends it, when, in which run.
    message: what `sparseloco.compress` returned; NumPy or JAX arrays.
    like: the parameters or their shapes.
    spec: `make_spec(like, compression)`.
  """
  parts = jax.tree.structure(like).flatten_up_to(message)
  chunks = [
    _HEADER.pack(
      _MAGIC, _VERSION, header.uid, header.round, header.run, spec.digest
    )
  ]
  for tensor, part in zip(spec.tensors, parts, strict=True):
    chunks.extend(_encode_tensor(tensor, part, spec))
  data = b''.join(chunks)
  return data + hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


def decode(data: bytes, expected: Header, like: Any, spec: Spec) -> Any:
  """The message of a payload from a peer that may be hostile.

  Args:
    data: the payload.
    expected: the run, the round and the uid it must be of.
    like: the parameters or their shapes.
    spec: `make_spec(like, compression)`.

  Returns:
    A message of NumPy arrays, structured for `like`.

  Raises:
    Refused: with one reason; nothing was allocated beyond the payload's size
      before the length, the digest and the header were found right.
  """
  if len(data) != spec.payload_bytes:
    raise Refused(
      Reason.LENGTH, f'expected {spec.payload_bytes} bytes, got {len(data)}'
    )
  body_end = len(data) - _DIGEST_BYTES
  body = memoryview(data)[:body_end]
  digest = hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest()
  if digest != data[body_end:]:
    raise Refused(Reason.DIGEST, 'the bytes are not those the sender digested')
  magic, version, uid, round_index, run, layout = _HEADER.unpack_from(data)
  for reason, want, got in (
    (Reason.MAGIC, (_MAGIC, _VERSION), (magic, version)),
    (Reason.RUN, expected.run, run),
    (Reason.SPEC, spec.digest, layout),
    (Reason.ROUND, expected.round, round_index),
    (Reason.UID, expected.uid, uid),
  ):
    if want != got:
      raise Refused(reason, f'expected {want!r}, got {got!r}')
  offset, parts = _HEADER.size, []
  for tensor in spec.tensors:
    size = _section_bytes(spec, tensor)
    section = memoryview(data)[offset : offset + size]
    parts.append(_decode_tensor(tensor, section, spec))
    offset += size
  return jax.tree.structure(like).unflatten(parts)


def _section_bytes(spec: Spec, tensor: Tensor) -> int:
  if not tensor.regions:
    return 4 * int(np.prod(tensor.shape))
  return sum(sum(_region_bytes(spec, r)) for r in tensor.regions)


def _region_bytes(spec: Spec, region: Region) -> tuple[int, int, int]:
  """Bytes of a region's packed indices and codes, raw values and scales."""
  quantizer = spec.quantizer
  n, k = region.num_blocks, region.k
  raw = quantizer.bits == 32
  codec = _CODECS[spec.codec]
  packed = codec.section_bytes(*region, 0 if raw else quantizer.bits)
  scales = int(np.prod(quantizer.scale_shape(n)))
  return packed, 4 * n * k * raw, scales * quantizer.scale_dtype.itemsize


def _encode_tensor(tensor: Tensor, part: Any, spec: Spec) -> list[bytes]:
  if not tensor.regions:
    return [np.asarray(part, '<f4').tobytes()]
  quantizer, codec = spec.quantizer, _CODECS[spec.codec]
  chunks = []
  for region, packet in zip(tensor.regions, part, strict=True):
    indices, codes = np.asarray(packet.indices), np.asarray(packet.codes)
    if quantizer.bits == 32:
      none = np.zeros_like(codes, np.uint8)
      chunks.append(codec.pack(indices, none, region.block_size, 0))
      chunks.append(codes.astype('<f4').tobytes())
    else:
      chunks.append(
        codec.pack(indices, codes, region.block_size, quantizer.bits)
      )
    scales = np.asarray(packet.scales)
    chunks.append(scales.astype(_little(quantizer.scale_dtype)).tobytes())
  return chunks


def _decode_tensor(tensor: Tensor, section: memoryview, spec: Spec) -> Any:
  if not tensor.regions:
    values = np.frombuffer(section, '<f4').reshape(tensor.shape)
    _check_values(values, tensor.name)
    return values
  quantizer, codec = spec.quantizer, _CODECS[spec.codec]
  packets = []
  for region in tensor.regions:
    sizes = _region_bytes(spec, region)
    packed, raw, scales = (
      section[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(3)
    )
    section = section[sum(sizes) :]
    n, k = region.num_blocks, region.k
    exact = quantizer.bits == 32
    try:
      indices, codes = codec.unpack(
        packed, *region, 0 if exact else quantizer.bits
      )
    except codec_lib.CodecError as e:
      raise Refused(Reason.INDICES, f'{tensor.name}: {e}') from e
    if exact:
      codes = np.frombuffer(raw, '<f4').reshape(n, k)
      _check_values(codes, tensor.name)
    scales = np.frombuffer(scales, _little(quantizer.scale_dtype))
    scales = scales.reshape(quantizer.scale_shape(n))
    _check_values(scales, tensor.name)
    packets.append(compression_lib.Packet(indices, codes, scales))
  return tuple(packets)


def _little(dtype: Any) -> np.dtype:
  dtype = np.dtype(dtype)
  return dtype if dtype == ml_dtypes.bfloat16 else dtype.newbyteorder('<')


def _check_values(values: np.ndarray, name: str) -> None:
  """Refuses a number that is not finite or absurd, in constant memory."""
  if values.dtype == ml_dtypes.bfloat16:
    values = values.astype(np.float32)
  if not values.size:
    return
  ends = np.array([values.min(), values.max()])  # a NaN is both
  if not np.isfinite(ends).all():
    raise Refused(Reason.VALUES, f'{name}: not finite')
  if np.abs(ends).max() > _LARGEST:
    raise Refused(Reason.VALUES, f'{name}: a magnitude above {_LARGEST:g}')
