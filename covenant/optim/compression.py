"""The compressors of a tensor: frozen objects.

A compressor turns one leaf into its part of a message and back, and knows how
to add such parts up without ever holding more than one peer's dense values.
`sparseloco.py` maps it over a pytree.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from covenant import typing as ct
from covenant.optim import blocks
from covenant.optim import quantize
from covenant.optim import topk


class Packet(NamedTuple):
  """The message of one region of a leaf: K values of each of N blocks.

  Its fields are JAX arrays where it is computed, NumPy arrays where received.
  """

  indices: Any  # [N, K], increasing in each block, `blocks.index_dtype`
  codes: Any  # uint8 [N, K], or float32 where nothing is quantized
  scales: Any  # of the quantizer


class Kept(NamedTuple):
  """The values to send of one region, before they are quantized."""

  indices: jax.Array  # as of a packet
  values: jax.Array  # float32 [N, K]


# An array per region, in the compressor's own layout.
Regions: TypeAlias = tuple[jax.Array, ...]


class Sums(NamedTuple):
  """The sums of one leaf over the peers added so far (reduce.py)."""

  total: Regions  # float32
  senders: Regions  # uint16: weights of the peers that sent each element


class Compression(Protocol):
  """A frozen, hashable value object; every method can be jitted."""

  def compress(self, x: jax.Array) -> ct.Message:
    """Returns the part of the message of a float32 leaf."""
    ...

  def decompress(self, part: ct.Message, shape: Sequence[int]) -> jax.Array:
    """Returns the float32 leaf that a part of a message stands for."""
    ...

  def values(self, part: ct.Message) -> list[jax.Array]:
    """Returns the float32 values in `part`, region by region.

    Their L2 norm is that of the leaf that `part` stands for.
    """
    ...

  @property
  def num_codes(self) -> int:
    """The number of codes of a value; 0 if values are not coded."""
    ...

  def code_counts(self, part: ct.Message) -> jax.Array:
    """Returns how often each code is in `part`: int32 [num_codes]."""
    ...

  def start(self, shape: Sequence[int]) -> Sums:
    """Returns the sums of no peers for a leaf of `shape`."""
    ...

  def scatter_add(
    self, total: Regions, part: ct.Message, values: Sequence[jax.Array]
  ) -> Regions:
    """Returns `total` plus one value for each value in `part`."""
    ...

  def count(
    self, senders: Regions, part: ct.Message, weight: ct.Scalar
  ) -> Regions:
    """Returns `senders` with a weight added at each element that was sent."""
    ...

  def join(
    self, regions: Sequence[jax.Array], shape: Sequence[int]
  ) -> jax.Array:
    """Returns the leaf whose values `regions` holds in the layout of `Sums`."""
    ...


@dataclasses.dataclass(frozen=True)
class TopK:
  """The k largest values of every block, quantized (arXiv 2508.15706).

  Attributes:
    k: the number of values kept of a full block.
    block: the height and width of the blocks of a matrix.
    quantizer: the quantizer of the kept values.
    layout: 'tiles' cuts vectors in runs of height * width and keeps the same
      density in short blocks; 'divisors' cuts as the deployed system does and
      sends vectors dense. See `blocks.py`.

  Raises:
    ValueError: for an unknown layout; later, for a leaf it cannot cut.
  """

  k: int = 64
  block: tuple[int, int] = (64, 64)
  quantizer: quantize.Quantizer = quantize.Sign()
  layout: str = 'tiles'

  def __post_init__(self):
    height, width = _check_block(self.block)
    if not _is_count(self.k) or self.k > height * width:
      raise ValueError(
        f'k: expected an integer from 1 to {height * width}, the values of a '
        f'block of {height} x {width}, got {self.k!r}'
      )
    if isinstance(self.quantizer, type) or not hasattr(
      self.quantizer, 'scale_shape'
    ):
      raise TypeError(
        'quantizer: expected one such as Sign() or Statistical(bits=2), '
        f'got {self.quantizer!r}'
      )
    if self.layout not in blocks.LAYOUTS:
      raise ValueError(
        f'layout: expected one of {blocks.LAYOUTS}, got {self.layout!r}'
      )

  def regions(self, shape: Sequence[int]) -> tuple[blocks.Region, ...]:
    """Returns the regions of a leaf, each of which becomes one packet."""
    return blocks.regions(shape, self.block, self.layout)

  def block_k(self, block_size: int) -> int:
    """Returns the number of values kept of a block of `block_size`."""
    return blocks.block_k(self.k, self.block, block_size, self.layout)

  @property
  def is_blockwise(self) -> bool:
    """True if every block is compressed without regard to the others."""
    return type(self) is TopK and getattr(self.quantizer, 'is_blockwise', False)

  def compress(self, x: jax.Array) -> tuple[Packet, ...]:
    return tuple(self.encode(kept) for kept in self.keep(x))

  def keep(self, x: jax.Array) -> tuple[Kept, ...]:
    """Selects the values of each region: the first half of `compress`.

    Blocks are independent of each other.
    """
    kept = []
    for blocks_NxL in blocks.cut(x, self.block, self.layout):
      size = blocks_NxL.shape[1]
      indices_NxK = self.select(blocks_NxL, self.block_k(size))
      values_NxK = jnp.take_along_axis(blocks_NxL, indices_NxK, axis=1)
      indices_NxK = indices_NxK.astype(blocks.index_dtype(size))
      kept.append(Kept(indices_NxK, values_NxK))
    return tuple(kept)

  def encode(self, kept: Kept, axes: quantize.Axes = ()) -> Packet:
    """Quantizes a region, or one of its shards: the other half of `compress`.

    Args:
      kept: of a whole region, or in `jax.shard_map` of one of its shards.
      axes: the mesh axes of the shards, see `quantize.Quantizer`.
    """
    return Packet(kept.indices, *self.quantizer.encode(kept.values, axes))

  def decompress(
    self, part: tuple[Packet, ...], shape: Sequence[int]
  ) -> jax.Array:
    # Straight into the leaf: by way of blocks the whole leaf would move again.
    regions = self.regions(shape)
    if not regions:
      return jnp.zeros(tuple(shape), jnp.float32)
    corner = regions[-1]
    x_SxRxC = jnp.zeros(
      (corner.stack, corner.rows[1], corner.columns[1]), jnp.float32
    )
    for r, p, v in zip(regions, part, self.values(part), strict=True):
      x_SxRxC = x_SxRxC.at[locate(r, p.indices)].add(v)
    return x_SxRxC.reshape(tuple(shape))

  def values(self, part: tuple[Packet, ...]) -> list[jax.Array]:
    return [self.quantizer.decode(p.codes, p.scales) for p in part]

  @property
  def num_codes(self) -> int:
    bits = self.quantizer.bits
    return 2**bits if bits <= 8 else 0

  def code_counts(self, part: tuple[Packet, ...]) -> jax.Array:
    codes = jnp.arange(self.num_codes, dtype=jnp.uint8)[:, None, None]
    return sum(
      (
        jnp.sum(p.codes[None] == codes, axis=(1, 2), dtype=jnp.int32)
        for p in part
        if self.num_codes
      ),
      jnp.zeros(self.num_codes, jnp.int32),
    )

  def start(self, shape: Sequence[int]) -> Sums:
    zeros = tuple(
      jnp.zeros((r.num_blocks, r.block_size), jnp.float32)
      for r in self.regions(shape)
    )
    senders = tuple(jnp.zeros_like(z, jnp.uint16) for z in zeros)
    return Sums(zeros, senders)

  def scatter_add(
    self,
    total: Regions,
    part: tuple[Packet, ...],
    values: Sequence[jax.Array],
  ) -> Regions:
    # XLA is promised neither order nor uniqueness: parsed messages have both,
    # but a message built by hand (the deployed system counts duplicates) must
    # not be undefined behavior.
    return tuple(
      x.at[jnp.arange(x.shape[0])[:, None], p.indices].add(v)
      for x, p, v in zip(total, part, values, strict=True)
    )

  def count(
    self,
    senders: Regions,
    part: tuple[Packet, ...],
    weight: ct.Scalar,
  ) -> Regions:
    weights = [jnp.full(p.indices.shape, weight, jnp.uint16) for p in part]
    return self.scatter_add(senders, part, weights)

  def join(
    self, regions: Sequence[jax.Array], shape: Sequence[int]
  ) -> jax.Array:
    return blocks.join(regions, shape, self.block, self.layout)

  def select(self, blocks_NxL: jax.Array, k: int) -> jax.Array:
    """Returns the ascending indices to send of each block: int32 [N, k]."""
    return topk.select(blocks_NxL, k)


@dataclasses.dataclass(frozen=True)
class Dense:
  """The whole leaf in float32, as DiLoCo and data-parallel training send it."""

  def compress(self, x: jax.Array) -> jax.Array:
    return x

  def decompress(self, part: jax.Array, shape: Sequence[int]) -> jax.Array:
    del shape
    return part

  def values(self, part: jax.Array) -> list[jax.Array]:
    return [part]

  @property
  def num_codes(self) -> int:
    return 0

  def code_counts(self, part: jax.Array) -> jax.Array:
    del part
    return jnp.zeros(0, jnp.int32)

  def start(self, shape: Sequence[int]) -> Sums:
    zeros = jnp.zeros(tuple(shape), jnp.float32)
    return Sums((zeros,), (jnp.zeros((), jnp.uint16),))

  def scatter_add(
    self, total: Regions, part: jax.Array, values: Sequence[jax.Array]
  ) -> Regions:
    del part
    return (total[0] + values[0],)

  def count(
    self, senders: Regions, part: jax.Array, weight: ct.Scalar
  ) -> Regions:
    del part
    return (senders[0] + jnp.asarray(weight, jnp.uint16),)

  def join(
    self, regions: Sequence[jax.Array], shape: Sequence[int]
  ) -> jax.Array:
    del shape
    return regions[0]


# A compressor for all leaves; a pytree of compressors, like the parameters or a
# prefix of them; or a function of a leaf's path and value. None is `TopK()`.
Compressions: TypeAlias = Any
_OR_TREE = ', a pytree of compressors, or a function (path, leaf) -> compressor'


def check(compression: Compressions) -> None:
  """Raises TypeError unless each leaf may find its compressor in it."""
  if compression is None or _is_function(compression):
    return
  for one in jax.tree.leaves(compression, is_leaf=_is_none) or [compression]:
    check_one(one, more=_OR_TREE)


def each_leaf(
  compression: Compressions, params: ct.Params
) -> list[Compression]:
  """Returns the compressor of each leaf of `params`, in order.

  Raises:
    TypeError: a leaf has none.
    ValueError: a tree of compressors is no prefix of `params`.
  """
  if compression is None:
    compression = TopK()
  paths = jax.tree.leaves_with_path(params)
  if _is_function(compression):
    found = [compression(path, x) for path, x in paths]
  else:
    try:
      found = jax.tree.broadcast(compression, params)
    except ValueError:
      raise ValueError(
        'compression: expected a tree like that of params, '
        f'{jax.tree.structure(params)}, or a prefix of it, got '
        f'{jax.tree.structure(compression)}'
      ) from None
    found = jax.tree.leaves(found)
  for one, (path, _) in zip(found, paths, strict=True):
    check_one(one, f' of params{jax.tree_util.keystr(path)}', _OR_TREE)
  return found


def _is_function(compression: Compressions) -> bool:
  return callable(compression) and not isinstance(compression, type)


def _is_none(x: Any) -> bool:
  return x is None


def check_one(one: Any, leaf: str = '', more: str = '') -> None:
  """Raises TypeError unless `one` is a compressor."""
  if isinstance(one, type) or not hasattr(one, 'scatter_add'):
    raise TypeError(
      f'compression{leaf}: expected a compressor such as TopK() or Dense()'
      f'{more}, got {one!r}'
    )


def _check_block(block: Any) -> tuple[int, int]:
  if (
    not isinstance(block, tuple)
    or len(block) != 2
    or not all(map(_is_count, block))
  ):
    raise ValueError(
      'block: expected a tuple of two integers, height and width, each at '
      f'least 1, got {block!r}'
    )
  return block


def _is_count(x: Any) -> bool:
  return isinstance(x, int) and not isinstance(x, bool) and x >= 1


def locate(
  r: blocks.Region, indices_NxK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns matrix, row and column of the elements of a region's blocks."""
  indices_NxK = indices_NxK.astype(jnp.int32)
  across = (r.columns[1] - r.columns[0]) // r.width
  block_Nx1 = jnp.arange(r.num_blocks, dtype=jnp.int32)[:, None]
  down = (r.rows[1] - r.rows[0]) // r.height
  top_Nx1 = r.rows[0] + block_Nx1 // across % down * r.height
  left_Nx1 = r.columns[0] + block_Nx1 % across * r.width
  return (
    block_Nx1 // (down * across),
    top_Nx1 + indices_NxK // r.width,
    left_Nx1 + indices_NxK % r.width,
  )
