"""Messages that stay packed: blocks are unpacked where they are needed.

An unpacked message takes 2.4 times the memory of its payload. The messages of a
large model are therefore verified one after another (payload.py), and then
opened again here, so that the sum of many unpacks the blocks of one slice of
one message at a time. Unpacked again they are the same arrays.
"""

from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from covenant import typing as ct
from covenant.optim import blocks
from covenant.optim import compression as compression_lib
from covenant.wire import codec as codec_lib
from covenant.wire import payload as payload_lib
from covenant.wire import rice

Run = tuple[int, int]  # the first block, and the one after the last


class Section:
  """The packed indices and codes of a region that were verified before.

  Args:
    data: the bytes of the section, at its start.
    region: its size.
    codec: the name of the codec.
    bits: of a code.
  """

  def __init__(
    self,
    data: memoryview,
    region: payload_lib.PackedRegion,
    codec: str,
    bits: int,
  ):
    self.region = region
    self._layout = *region[1:], bits
    self._codec = rice if codec == 'rice' else codec_lib
    n = region.num_blocks
    # Eight blocks end with a byte, whatever the bits of one. Their offsets are
    # computed, as a list of them would take 6 % of the payload.
    self._step, self._offsets = 8, None
    if codec == 'rice':
      self._step, self._offsets = rice.offsets(data, n, *self._layout)
    self._data = data[: self._offset(-(-n // self._step))]
    # The codes that were unpacked with the indices asked for last, until they
    # are asked for too. Nothing else is kept.
    self._left: tuple[tuple[Run, ...], int, np.ndarray] | None = None
    self._has_codes = bool(bits)

  @property
  def size(self) -> int:
    """Its bytes."""
    return len(self._data)

  def read(self, runs: Sequence[Run], which: int) -> np.ndarray:
    """Returns rows of runs of blocks, in their order.

    Args:
      runs: the runs.
      which: 0: the indices, 1: the codes.
    """
    key, left = tuple(runs), self._left
    self._left = None  # frees it
    if left is not None and left[:2] == (key, which):
      return left[2]
    del left
    parts = [self._read(*run) for run in runs]
    found = [np.concatenate(x) for x in zip(*parts, strict=True)]
    if self._has_codes and not which:
      self._left = key, 1, found[1]
    return found[which]

  def _offset(self, index: int) -> int:
    """Returns where the blocks from `index` steps on begin, or the end."""
    if self._offsets is not None:
      return self._offsets[index]
    n = min(index * self._step, self.region.num_blocks)
    return codec_lib.section_bytes(n, *self._layout)

  def _read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    first, last = start // self._step, -(-stop // self._step)
    begin = first * self._step
    end = min(last * self._step, self.region.num_blocks)
    data = self._data[self._offset(first) : self._offset(last)]
    arrays = self._codec.unpack(data, end - begin, *self._layout)
    indices, codes = (x[start - begin : stop - begin] for x in arrays)
    return indices, codes


class Rows:
  """The indices or the codes of a region: an array that is not there yet."""

  def __init__(self, section: Section, which: int):
    self._section = section
    self._which = which
    k, n = section.region.k, section.region.num_blocks
    dtype = blocks.index_dtype(section.region.block_size)
    self.shape = n, k
    self.dtype = np.dtype(np.uint8 if which else dtype)

  def read(self, runs: Sequence[Run]) -> np.ndarray:
    """Returns the rows of runs of blocks, one run after another."""
    return self._section.read(runs, self._which)

  def __array__(
    self, dtype: np.dtype | None = None, copy: bool | None = None
  ) -> np.ndarray:
    del copy
    whole = self.read([(0, self.shape[0])])
    return whole if dtype is None else whole.astype(dtype)


def reopen(
  data: bytes, abstract_params: ct.Params, spec: payload_lib.Spec
) -> ct.Message:
  """Returns the message of a payload that `payload.decode` has accepted.

  Indices and codes are `Rows`; all other arrays are views of the payload.
  """
  body = payload_lib.body_of(data)
  parts = []
  for tensor in spec.tensors:
    part, body = _reopen_tensor(tensor, body, spec)
    parts.append(part)
  return jax.tree.structure(abstract_params).unflatten(parts)


def _reopen_tensor(
  tensor: payload_lib.Tensor, body: memoryview, spec: payload_lib.Spec
) -> tuple[ct.Message, memoryview]:
  if not tensor.regions:
    return payload_lib.decode_tensor(tensor, body, spec)
  packets = []
  for region in tensor.regions:
    section = Section(body, region, spec.codec, spec.packed_bits)
    codes, scales, body = payload_lib.other_values(
      tensor, region, body[section.size :], spec
    )
    indices = Rows(section, 0)
    packed = Rows(section, 1) if codes is None else codes
    packets.append(compression_lib.Packet(indices, packed, scales))
  return tuple(packets), body


def unpacked(message: ct.Message) -> ct.Message:
  """Returns a message of arrays; one that has no `Rows` as it is."""
  return jax.tree.map(
    lambda x: np.asarray(x) if isinstance(x, Rows) else x, message
  )


class Messages(Mapping[int, ct.Message]):
  """Messages by uid, unpacked when they are asked for.

  Args:
    messages: messages by uid, some of which may have `Rows`.
  """

  def __init__(self, messages: Mapping[int, ct.Message]):
    self.packed = messages

  def __getitem__(self, uid: int) -> ct.Message:
    return unpacked(self.packed[uid])

  def __iter__(self) -> Iterator[int]:
    return iter(self.packed)

  def __len__(self) -> int:
    return len(self.packed)
