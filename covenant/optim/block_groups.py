"""Blocks of several sizes as the rows of one array.

A program has the operations of a compression once for each array. So blocks of
all sizes share one, if little padding makes them rows of one length (batch.py).
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from covenant.optim import blocks
from covenant.optim import compression as compression_lib
from covenant.optim import quantize
from covenant.optim import topk

Packet = compression_lib.Packet
Regions = compression_lib.Regions


class Group(NamedTuple):
  """Blocks of one size."""

  count: int
  size: int  # values of a block
  k: int  # values kept of a block


def per_row(groups: Sequence[Group], numbers: Sequence[int]) -> jax.Array:
  """Returns the number of the group of each row: int32 [N, 1]."""
  starts = list(itertools.accumulate(g.count for g in groups))
  row_Nx1 = jax.lax.broadcasted_iota(jnp.int32, (starts[-1], 1), 0)
  found_Nx1 = jnp.full_like(row_Nx1, numbers[0])
  for start, number in zip(starts[:-1], numbers[1:], strict=True):
    found_Nx1 = jnp.where(row_Nx1 < start, found_Nx1, number)
  return found_Nx1


def is_kept(groups: Sequence[Group], most: int) -> jax.Array:
  """Returns whether a row keeps that many values: bool [N, most]."""
  rank_1xK = jnp.arange(most, dtype=jnp.int32)[None]
  return rank_1xK < per_row(groups, [g.k for g in groups])


@dataclasses.dataclass(frozen=True)
class BlockGroups:
  """A compressor of the rows of an array [N, 1, L].

  The rows of each group follow each other, those of the longest blocks first;
  what follows a shorter block in its row is not sent. Packets are of K values
  a row, the most that a group keeps: in others L stands for no index, and the
  value is zero.

  Attributes:
    groups: at least one.
    quantizer: one that sees no more than a block at a time.
  """

  groups: tuple[Group, ...]
  quantizer: quantize.Quantizer

  @property
  def shape(self) -> tuple[int, int, int]:
    """The shape of the array."""
    count = sum(g.count for g in self.groups)
    return count, 1, max(g.size for g in self.groups)

  @property
  def most(self) -> int:
    """K, the values of a row of a packet."""
    return max(g.k for g in self.groups)

  @property
  def index_dtype(self) -> jnp.dtype:
    """The type of indices, of which the length of a row is one."""
    return jnp.dtype(blocks.index_dtype(self.shape[2] + 1))

  def rows(self) -> list[tuple[Group, slice]]:
    """Returns each group and its rows."""
    found, start = [], 0
    for g in self.groups:
      found.append((g, slice(start, start + g.count)))
      start += g.count
    return found

  def compress(self, x: jax.Array) -> tuple[Packet, ...]:
    return self.compress_and_keep(x)[0]

  def compress_and_keep(
    self, x: jax.Array
  ) -> tuple[tuple[Packet, ...], jax.Array]:
    """Returns the part of the message, and the values chosen: [N, K]."""
    x_NxL = x.reshape(self.shape[0], self.shape[2])
    indices_NxK = self._select(x_NxL)
    values_NxK = x_NxL.at[
      jnp.arange(x_NxL.shape[0])[:, None], indices_NxK
    ].get(mode='fill', fill_value=0)  # fmt: skip
    codes, scales = [], []
    for g, rows in self.rows():
      code, scale = self.quantizer.encode(values_NxK[rows, : g.k])
      codes.append(jnp.pad(code, ((0, 0), (0, self.most - g.k))))
      scales.append(scale)
    packet = Packet(
      indices_NxK.astype(self.index_dtype),
      jnp.concatenate(codes),
      jnp.concatenate(scales),
    )
    return (packet,), values_NxK

  def decompress(
    self, part: tuple[Packet, ...], shape: Sequence[int]
  ) -> jax.Array:
    (x_NxL,) = self.start(shape).total
    return self.scatter_add((x_NxL,), part, self.values(part))[0].reshape(shape)

  def values(self, part: tuple[Packet, ...]) -> list[jax.Array]:
    values_NxK = self.quantizer.decode(part[0].codes, part[0].scales)
    return [self._where_kept(values_NxK, jnp.float32(0))]

  @property
  def num_codes(self) -> int:
    bits = self.quantizer.bits
    return 2**bits if bits <= 8 else 0

  def code_counts(self, part: tuple[Packet, ...]) -> jax.Array:
    codes = jnp.arange(self.num_codes, dtype=jnp.int32)[:, None, None]
    if not self.num_codes:
      return jnp.zeros(0, jnp.int32)
    found_NxK = self._where_kept(part[0].codes.astype(jnp.int32), -1)
    return jnp.sum(found_NxK[None] == codes, axis=(1, 2), dtype=jnp.int32)

  def start(self, shape: Sequence[int]) -> compression_lib.Sums:
    n, _, size = shape
    zeros = jnp.zeros((n, size), jnp.float32)
    return compression_lib.Sums((zeros,), (jnp.zeros_like(zeros, jnp.uint16),))

  def scatter_add(
    self,
    total: Regions,
    part: tuple[Packet, ...],
    values: Sequence[jax.Array],
  ) -> Regions:
    rows_Nx1 = jnp.arange(total[0].shape[0])[:, None]
    return (total[0].at[rows_Nx1, part[0].indices].add(values[0], mode='drop'),)

  def count(
    self, senders: Regions, part: tuple[Packet, ...], weight: jax.Array | int
  ) -> Regions:
    weights = jnp.full(part[0].indices.shape, weight, jnp.uint16)
    return self.scatter_add(senders, part, [weights])

  def join(
    self, regions: Sequence[jax.Array], shape: Sequence[int]
  ) -> jax.Array:
    return regions[0].reshape(tuple(shape))

  def _select(self, x_NxL: jax.Array) -> jax.Array:
    """Returns the ascending indices to send of each row: int32 [N, K]."""
    first, size = self.groups[0], self.shape[2]
    if len(self.groups) == 1:
      return topk.select(x_NxL, first.k)
    if not topk.is_large(x_NxL[: first.count], first.k):
      return self._select_padded(self.groups, x_NxL)
    whole = topk.select(x_NxL[: first.count], first.k)
    whole = jnp.pad(
      whole, ((0, 0), (0, self.most - first.k)), constant_values=size
    )
    rest = self._select_padded(self.groups[1:], x_NxL[first.count :])
    return jnp.concatenate([whole, rest])

  def _select_padded(
    self, groups: Sequence[Group], x_NxL: jax.Array
  ) -> jax.Array:
    return topk.select_of_each(
      x_NxL,
      per_row(groups, [g.size for g in groups]),
      per_row(groups, [g.k for g in groups]),
      self.most,
    )

  def _where_kept(self, x_NxK: jax.Array, other: jax.Array | int) -> jax.Array:
    if len(self.groups) == 1:
      return x_NxK
    return jnp.where(is_kept(self.groups, self.most), x_NxK, other)
