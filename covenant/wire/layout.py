"""The layout of payloads: which bytes each tensor of a run takes."""

import dataclasses
import hashlib
import json
from typing import NamedTuple

import jax
import numpy as np

from covenant import typing as ct
from covenant.optim import compression as compression_lib
from covenant.optim import quantize
from covenant.wire import codec as codec_lib
from covenant.wire import rice

CODECS = {'elias-fano': codec_lib, 'rice': rice}
OTHER_BYTES = 86 + 32 + 64  # header, digest and signature: all but the body


class PackedRegion(NamedTuple):
  """The size of a region: N blocks of L elements, k of each are sent."""

  num_blocks: int
  block_size: int
  k: int


class Tensor(NamedTuple):
  """The layout of one tensor."""

  name: str
  shape: tuple[int, ...]
  regions: tuple[PackedRegion, ...]  # empty where the tensor is sent dense


@dataclasses.dataclass(frozen=True)
class Spec:
  """The layout of a run's payloads. Equal on every node of the run."""

  tensors: tuple[Tensor, ...]
  compression: compression_lib.Compression
  codec: str = 'elias-fano'  # of the indices; or 'rice'

  @property
  def quantizer(self) -> quantize.Quantizer:
    """The quantizer of tensors that are not sent dense."""
    assert isinstance(self.compression, compression_lib.TopK)
    return self.compression.quantizer

  @property
  def packed_bits(self) -> int:
    """The bits of a packed code; 0 for float32 values, which stay apart."""
    bits = self.quantizer.bits
    return 0 if bits == 32 else bits

  @property
  def digest(self) -> bytes:
    """The digest that the header has."""
    text = json.dumps([self.tensors, repr(self.compression), self.codec])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()

  @property
  def payload_bytes(self) -> int:
    """The length of a payload; with the codec 'rice', of the longest."""
    return OTHER_BYTES + sum(section_bytes(self, t)[1] for t in self.tensors)

  @property
  def least_bytes(self) -> int:
    """The length of the shortest payload; differs only with 'rice'."""
    return OTHER_BYTES + sum(section_bytes(self, t)[0] for t in self.tensors)

  @property
  def dense_bytes(self) -> int:
    """The bytes of all elements in float32: the numerator of the ratio."""
    return 4 * sum(int(np.prod(t.shape)) for t in self.tensors)


def make_spec(
  abstract_params: ct.Params,
  compression: compression_lib.Compression,
  codec: str = 'elias-fano',
) -> Spec:
  """Returns the layout of the payloads of a model, in leaf order.

  Args:
    abstract_params: the parameters or their shapes.
    compression: the compression of the messages.
    codec: of the indices: 'elias-fano', or 'rice', which is smaller but of no
      fixed length.

  Raises:
    ValueError: for an unknown codec.
  """
  if codec not in CODECS:
    raise ValueError(f'codec: expected one of {[*CODECS]}, got {codec!r}')

  def tensor(path: jax.tree_util.KeyPath, leaf: ct.AbstractArray) -> Tensor:
    layout = ()
    if isinstance(compression, compression_lib.TopK):
      layout = tuple(
        PackedRegion(
          r.num_blocks, r.block_size, compression.block_k(r.block_size)
        )
        for r in compression.regions(leaf.shape)
      )
    name = jax.tree_util.keystr(path)
    return Tensor(name, tuple(leaf.shape), layout)

  leaves = jax.tree_util.tree_leaves_with_path(abstract_params)
  return Spec(tuple(tensor(*leaf) for leaf in leaves), compression, codec)


def section_bytes(spec: Spec, tensor: Tensor) -> tuple[int, int]:
  """Returns the fewest and the most bytes of a tensor."""
  if not tensor.regions:
    dense = 4 * int(np.prod(tensor.shape))
    return dense, dense
  codec, bits = CODECS[spec.codec], spec.packed_bits
  others = sum(sum(other_bytes(spec, r)) for r in tensor.regions)
  least = sum(codec.least_bytes(*r, bits) for r in tensor.regions)
  most = sum(codec.section_bytes(*r, bits) for r in tensor.regions)
  return least + others, most + others


def other_bytes(spec: Spec, region: PackedRegion) -> tuple[int, int]:
  """Returns the bytes of a region's float32 values and of its scales."""
  quantizer = spec.quantizer
  n, k = region.num_blocks, region.k
  scales = int(np.prod(quantizer.scale_shape(n)))
  raw = 4 * n * k if quantizer.bits == 32 else 0
  return raw, scales * quantizer.scale_dtype.itemsize
