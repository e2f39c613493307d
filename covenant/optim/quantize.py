"""Few bits a value: what stands for the selected values on the wire.

A quantizer turns the values of one region into `codes`, one small integer a
value, and `scales`, the few floats that give the codes their meaning. What is
decoded, not what was encoded, is what error feedback subtracts: the loss of
quantization is sent later, not lost. Scales are rounded to the type they
travel in before they are used, so sender and receiver decode the same bits.

Bits a value of k = 64 of 4096, with 8 for the index, and the relative squared
error of what is sent, Gaussian deltas with equal and with unequal blocks
(log-normal, sigma 1), from benchmarks/quantizers.py, which has more:

  Statistical()             10.0    0.012   0.39
  Sign('tensor')             9.0    0.012   0.65
  Sign('block')              9.25   0.012   0.011
  SignMagnitude('tensor')   10.0    0.004   0.32
  SignMagnitude('block')    10.25   0.004   0.004

At equal bytes, more values of one bit deliver more of a round's delta than
fewer of two: a second bit pays only where k is given.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from covenant import device_sums
from covenant.optim import exact

Axes = tuple[str, ...]  # of a mesh


def _constant(value: Any) -> Any:
  """A field that no caller sets, and that a spec's digest need not say."""
  return dataclasses.field(default=value, init=False, repr=False)


class Quantizer(Protocol):
  """A frozen, hashable value object."""

  @property
  def bits(self) -> int:
    """The number of bits per code; 32 stands for the float32 value itself."""
    ...

  @property
  def scale_dtype(self) -> jnp.dtype: ...

  def scale_shape(self, num_blocks: int) -> tuple[int, int]:
    """Shape of the scales of a region of `num_blocks` blocks."""
    ...

  def encode(
    self, values_NxK: jax.Array, axes: Axes = ()
  ) -> tuple[jax.Array, jax.Array]:
    """float32 [N, K] -> codes uint8 [N, K] and scales.

    Args:
      values_NxK: of a region, or in `jax.shard_map` of one of its shards, all
        of which have as many blocks.
      axes: the mesh axes of the shards. Statistics are of the whole region, and
        no more than these crosses the axes.
    """
    ...

  def decode(self, codes_NxK: jax.Array, scales: jax.Array) -> jax.Array:
    """Codes and scales -> float32 [N, K]."""
    ...


@dataclasses.dataclass(frozen=True)
class Exact:
  """No quantizer: the 'codes' are the float32 values themselves."""

  bits: int = _constant(32)
  scale_dtype: jnp.dtype = _constant(jnp.dtype(jnp.float32))
  is_blockwise = True

  def scale_shape(self, num_blocks: int) -> tuple[int, int]:
    del num_blocks
    return (0, 0)

  def encode(
    self, values_NxK: jax.Array, axes: Axes = ()
  ) -> tuple[jax.Array, jax.Array]:
    del axes
    return values_NxK, jnp.zeros((0, 0), jnp.float32)

  def decode(self, codes_NxK: jax.Array, scales: jax.Array) -> jax.Array:
    del scales
    return codes_NxK


@dataclasses.dataclass(frozen=True)
class Sign:
  """One bit a value and the mean magnitude, in bfloat16.

  After top-k the values of a block lie in two lobes, so a sign and one
  magnitude say nearly all that the deployed two bits do.

  Attributes:
    per: 'block' or 'tensor': what shares one magnitude.

  >>> quantizer = Sign()
  >>> codes, scales = quantizer.encode(jnp.array([[1.0, -3.0]]))
  >>> print(codes, quantizer.decode(codes, scales))
  [[1 0]] [[ 2. -2.]]
  """

  per: str = 'block'
  bits: int = _constant(1)
  scale_dtype: jnp.dtype = _constant(jnp.dtype(jnp.bfloat16))

  def __post_init__(self):
    _check_per(self.per)

  @property
  def is_blockwise(self) -> bool:
    """True if every block is quantized without regard to the others."""
    return self.per == 'block'

  def scale_shape(self, num_blocks: int) -> tuple[int, int]:
    return (num_blocks if self.per == 'block' else 1, 1)

  def encode(
    self, values_NxK: jax.Array, axes: Axes = ()
  ) -> tuple[jax.Array, jax.Array]:
    scales = _mean(jnp.abs(values_NxK), self.per, axes).astype(jnp.bfloat16)
    return (values_NxK >= 0).astype(jnp.uint8), scales

  def decode(self, codes_NxK: jax.Array, scales: jax.Array) -> jax.Array:
    magnitude = scales.astype(jnp.float32)
    return jnp.where(codes_NxK == 1, magnitude, -magnitude)


@dataclasses.dataclass(frozen=True)
class SignMagnitude:
  """Two bits a value: its sign, and which of two magnitudes.

  The two magnitudes are a tensor's Lloyd-Max codebook for |v| / scale, where
  the scale is the mean magnitude of the value's block (or of the tensor): of
  the sent values' energy a third of what `Sign` loses is lost. Each iteration
  costs two sums over the tensor; eight are within 1 % of the fixed point.

  Codes: bit 0 is set where the value is not negative, bit 1 where its
  magnitude is the larger. Scales, bfloat16: the two levels, then the scales.

  Attributes:
    per: 'block' or 'tensor': what shares one scale.
    iterations: of Lloyd's algorithm.

  >>> quantizer = SignMagnitude()
  >>> codes, scales = quantizer.encode(jnp.array([[3.0, -5.0, 3.0, -5.0]]))
  >>> print(codes, quantizer.decode(codes, scales))
  [[1 2 1 2]] [[ 3. -5.  3. -5.]]
  """

  per: str = 'block'
  iterations: int = 8
  bits: int = _constant(2)
  scale_dtype: jnp.dtype = _constant(jnp.dtype(jnp.bfloat16))

  def __post_init__(self):
    _check_per(self.per)
    if not _is_integer(self.iterations) or self.iterations < 0:
      raise ValueError(
        f'iterations: expected an integer, 0 or more, got {self.iterations!r}'
      )

  def scale_shape(self, num_blocks: int) -> tuple[int, int]:
    return (2 + (num_blocks if self.per == 'block' else 1), 1)

  def encode(
    self, values_NxK: jax.Array, axes: Axes = ()
  ) -> tuple[jax.Array, jax.Array]:
    magnitudes_NxK = jnp.abs(values_NxK)
    scales = _mean(magnitudes_NxK, self.per, axes).astype(jnp.bfloat16)
    scale = scales.astype(jnp.float32)
    ratios_NxK = magnitudes_NxK / jnp.where(scale > 0, scale, 1.0)
    # An error of a ratio counts by its block's scale, squared. Relative to the
    # largest, the squares neither overflow nor all vanish.
    largest = _over(jax.lax.pmax, jnp.max(scale), axes)
    weight = jnp.square(scale / jnp.where(largest > 0, largest, 1.0))
    low, high = jnp.float32(0.9), jnp.float32(1.2)
    for _ in range(self.iterations):
      above_NxK = ratios_NxK > (low + high) / 2
      low = _centre(ratios_NxK, jnp.where(above_NxK, 0.0, weight), low, axes)
      high = _centre(ratios_NxK, jnp.where(above_NxK, weight, 0.0), high, axes)
    levels = jnp.stack([low, high]).astype(jnp.bfloat16)
    middle = jnp.mean(levels.astype(jnp.float32))
    positive = (values_NxK >= 0).astype(jnp.uint8)
    above = (ratios_NxK > middle).astype(jnp.uint8)
    return positive + 2 * above, jnp.concatenate([levels[:, None], scales])

  def decode(self, codes_NxK: jax.Array, scales: jax.Array) -> jax.Array:
    scales = scales.astype(jnp.float32)
    level = jnp.where(codes_NxK >= 2, scales[1], scales[0])
    magnitude = level * scales[2:]
    return jnp.where(codes_NxK % 2 == 1, magnitude, -magnitude)


@dataclasses.dataclass(frozen=True)
class Linear:
  """A uniform grid of 2**bits levels around the mean of the tensor.

  The grid of `Statistical`, decoded to the grid itself. With two bits this
  loses a quarter of the energy sent: the codebook is what makes the deployed
  quantizer nearly free (SparseLoCo). Scales are the mean and the
  grid's width, in float32.
  """

  bits: int = 2
  span: float = 6.0
  scale_dtype: jnp.dtype = _constant(jnp.dtype(jnp.float32))

  def __post_init__(self):
    _check_grid(self.bits, self.span)

  def scale_shape(self, num_blocks: int) -> tuple[int, int]:
    del num_blocks
    return (1, 2)

  def encode(
    self, values_NxK: jax.Array, axes: Axes = ()
  ) -> tuple[jax.Array, jax.Array]:
    codes_NxK, shift, width = _grid(values_NxK, self.bits, self.span, axes)
    return codes_NxK, jnp.stack([shift, width])[None]

  def decode(self, codes_NxK: jax.Array, scales: jax.Array) -> jax.Array:
    steps_NxK = codes_NxK.astype(jnp.float32) - 2**self.bits // 2
    return exact.product(steps_NxK, scales[0, 1]) + scales[0, 0]


@dataclasses.dataclass(frozen=True)
class Statistical:
  """The deployed quantizer: a grid of 2**bits bins, decoded to bin means.

  The grid spans `span` standard deviations around the mean of all values of
  the tensor; each bin is decoded to the mean of what fell in it
  (the quantizer of Templar and SparseLoCo). Scales are the mean, then the
  2**bits bin means relative to it, in float32.
  """

  bits: int = 2
  span: float = 6.0
  scale_dtype: jnp.dtype = _constant(jnp.dtype(jnp.float32))

  def __post_init__(self):
    _check_grid(self.bits, self.span)

  def scale_shape(self, num_blocks: int) -> tuple[int, int]:
    del num_blocks
    return (1, 1 + 2**self.bits)

  def encode(
    self, values_NxK: jax.Array, axes: Axes = ()
  ) -> tuple[jax.Array, jax.Array]:
    codes_NxK, shift, _ = _grid(values_NxK, self.bits, self.span, axes)
    grid_B = jnp.arange(2**self.bits, dtype=jnp.uint8)[None, None]
    member = codes_NxK[..., None] == grid_B
    centred = values_NxK - shift
    total = jnp.sum(jnp.where(member, centred[..., None], 0.0), axis=(0, 1))
    sums = jnp.sum(member, axis=(0, 1)), total
    count, total = _over(device_sums.psum, sums, axes)
    means = total / jnp.maximum(count, 1).astype(jnp.float32)
    return codes_NxK, jnp.concatenate([shift[None], means])[None]

  def decode(self, codes_NxK: jax.Array, scales: jax.Array) -> jax.Array:
    shift, means = scales[0, 0], scales[0, 1:]
    return means[codes_NxK] + shift


def counted(
  quantizer: Quantizer, codes_NxK: jax.Array, scales: jax.Array
) -> jax.Array | exact.Counted:
  """Returns the values of codes, counted where a row has fewer codes."""
  n, k = codes_NxK.shape
  if not 2**quantizer.bits < k <= exact.ROW:
    return quantizer.decode(codes_NxK, scales)
  codes = jnp.arange(2**quantizer.bits, dtype=codes_NxK.dtype)
  counts = [jnp.sum(codes_NxK == x, axis=1, dtype=jnp.uint8) for x in codes]
  codes_NxC = jnp.broadcast_to(codes, (n, len(codes)))
  return exact.Counted(
    quantizer.decode(codes_NxC, scales), jnp.stack(counts, axis=1)
  )


def _check_grid(bits: Any, span: Any) -> None:
  if not _is_integer(bits) or not 1 <= bits <= 8:
    raise ValueError(
      f'bits: expected an integer from 1 to 8, since a code is one byte, '
      f'got {bits!r}'
    )
  if isinstance(span, bool | str) or not 0 < span < math.inf:
    raise ValueError(f'span: expected more than 0 deviations, got {span!r}')


def _is_integer(x: Any) -> bool:
  return isinstance(x, int) and not isinstance(x, bool)


def _check_per(per: str) -> None:
  if per not in ('block', 'tensor'):
    raise ValueError(f"per: expected 'block' or 'tensor', got {per!r}")


def _over(collective: Callable[..., Any], x: Any, axes: Axes) -> Any:
  """Applies a collective over the shards along `axes`, if there are any."""
  return collective(x, axes) if axes else x


def _mean(x_NxK: jax.Array, per: str, axes: Axes) -> jax.Array:
  """[N, 1] means of the blocks, or [1, 1], the mean of all."""
  if per == 'block':
    return jnp.mean(x_NxK, axis=1, keepdims=True)
  return _over(device_sums.pmean, jnp.mean(x_NxK, keepdims=True), axes)


def _centre(
  x_NxK: jax.Array, weight_NxK: jax.Array, otherwise: jax.Array, axes: Axes
) -> jax.Array:
  """The weighted mean; `otherwise` where nothing has weight."""
  sums = jnp.sum(x_NxK * weight_NxK), jnp.sum(weight_NxK)
  weighted, total = _over(device_sums.psum, sums, axes)
  mean = weighted / jnp.where(total > 0, total, 1.0)
  return jnp.where(total > 0, mean, otherwise)


def _grid(
  values_NxK: jax.Array, bits: int, span: float, axes: Axes
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Codes on a grid of `span` deviations (n - 1), its centre and its width.

  Rounds half to even. A width of zero, or of one value, is replaced by 1.
  """
  bins = 2**bits
  shift = _over(device_sums.pmean, jnp.mean(values_NxK), axes)
  centred = values_NxK - shift
  shards = jax.lax.axis_size(axes) if axes else 1
  degrees = max(shards * values_NxK.size - 1, 1)
  squares = _over(device_sums.psum, jnp.sum(centred * centred), axes)
  deviation = jnp.sqrt(squares / degrees)
  width = span * deviation / bins
  width = jnp.where((width > 0) & jnp.isfinite(width), width, 1.0)
  grid = jnp.round(centred / width + bins // 2)
  return jnp.clip(grid, 0, bins - 1).astype(jnp.uint8), shift, width
