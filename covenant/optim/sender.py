"""What a miner sends of a round, made where its parameters lie.

The maths is that of `sparseloco.compress`. A model of one device that is small
is compressed by one program; of any other each leaf has its own, so that leaves
of one shape share it, and works through its slices (slices.py).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from covenant.optim import compression as compression_lib
from covenant.optim import error_feedback
from covenant.optim import method as method_lib
from covenant.optim import sharded_leaf
from covenant.optim import sparseloco


class Sent(NamedTuple):
  message: Any  # of NumPy arrays, in the one form that has no mesh
  error: Any  # new error feedback, sharded as it was; None without
  error_norm: float  # its L2 norm


class Sender:
  """Compresses one miner's rounds; holds no state.

  Messages of a mesh are those of one device, up to how statistics of a whole
  tensor are rounded: a sum over shards has another order.

  Args:
    like: the parameters or their shapes.
    method: of the run.
    mesh: of the miner; None is one device.
    specs: how each leaf is sharded on it, a tree of `jax.P`.
    budget: see `slices.leaves`.

  Raises:
    ValueError: a shard is not of whole blocks; names the leaf.
  """

  def __init__(
    self,
    like: Any,
    method: method_lib.Method,
    mesh: Any = None,
    specs: Any = None,
    budget: int = sharded_leaf.BUDGET,
  ):
    self._like = like
    self._method = method
    self._leaves = sharded_leaf.leaves(
      like, method.compression, mesh, specs, budget
    )
    self._is_small = mesh is None and sharded_leaf.size(like) <= budget
    self._all = jax.jit(self._compress_all, donate_argnames=('error',))
    self._select = jax.jit(self._select_leaf, static_argnames=('leaf',))
    self._subtract = jax.jit(self._subtract_slice, static_argnames=('leaf',))

  def compress(self, start: Any, end: Any, error: Any) -> Sent:
    """The message of a round.

    Args:
      start: the parameters before the round.
      end: those after it; the gradient, where the method sends that.
      error: error feedback of the last round; consumed. None without.
    """
    if self._is_small:
      message, error, norm = self._all(start, end, error)
      return Sent(jax.device_get(message), error, float(norm))
    treedef = jax.tree.structure(self._like)
    trees = [
      [None] * len(self._leaves) if x is None else treedef.flatten_up_to(x)
      for x in (start, end, error)
    ]
    parts, left, squares = [], [], []
    for leaf, old, new, kept in zip(self._leaves, *trees, strict=True):
      part = self._select(old, new, kept, leaf=leaf)
      for x in jax.tree.leaves(part):
        x.copy_to_host_async()
      for index in map(np.int32, range(leaf.slices if kept is not None else 0)):
        rest, square = self._subtract(old, new, kept, part, index, leaf=leaf)
        kept = leaf.replace(kept, rest, index)
        squares.append(square)
      parts.append(part)
      left.append(kept)
    message = [_received(part) for part in parts]
    return Sent(
      treedef.unflatten(message),
      None if error is None else treedef.unflatten(left),
      float(np.sqrt(np.sum(jax.device_get(squares), dtype=np.float32))),
    )

  def lower(self) -> list[jax.stages.Lowered]:
    """The programs that work on the largest leaf, lowered without arrays."""
    feeds_back = self._method.error_decay is not None
    if self._is_small:
      error = self._like if feeds_back else None
      return [self._all.lower(self._like, self._like, error)]
    leaf = sharded_leaf.largest(self._leaves)
    x = leaf.abstract
    if not feeds_back:
      return [self._select.lower(x, x, None, leaf=leaf)]
    select = self._select.lower(x, x, x, leaf=leaf)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    part = jax.eval_shape(self._select, x, x, x, leaf=leaf)
    return [select, self._subtract.lower(x, x, x, part, index, leaf=leaf)]

  def _compress_all(
    self, start: Any, end: Any, error: Any
  ) -> tuple[Any, Any, jax.Array]:
    method = self._method
    message, error = sparseloco.compress(
      self._delta(start, end), error, method.compression, method.error_decay
    )
    norm = jnp.float32(0) if error is None else optax.tree.norm(error)
    return message, error, norm

  def _delta(self, start: Any, end: Any) -> Any:
    if self._method.inner is None:
      return end
    return sparseloco.pseudo_gradient(start, end)

  def _select_leaf(
    self, start: Any, end: Any, error: Any, leaf: sharded_leaf.Leaf
  ) -> Any:
    """A leaf's part of the message."""
    compression = self._method.compression

    def local(*given: Any) -> Any:
      if not isinstance(compression, compression_lib.TopK):
        return self._offered(given, 0, dataclasses.replace(leaf, slices=1))

      def select(index: Any, kept: Any) -> Any:
        offered = self._offered(given, index, leaf)
        return leaf.put_rows(kept, compression.keep(offered), index)

      kept = jax.tree.map(
        lambda x: jnp.zeros((leaf.slices * x.shape[0], x.shape[1]), x.dtype),
        jax.eval_shape(compression.keep, leaf.like),
      )
      kept = leaf.each(select, kept)
      sheets = (
        sharded_leaf.split(
          compression.encode(k, leaf.axes), compression.quantizer
        )
        for k in kept
      )
      return tuple(leaf.grid(sheet) for sheet in sheets)

    in_specs = (leaf.spec,) * 3
    return leaf.on_shards(local, in_specs, self._part_spec(leaf))(
      start, end, error
    )

  def _subtract_slice(
    self,
    start: Any,
    end: Any,
    error: Any,
    part: Any,
    index: Any,
    leaf: sharded_leaf.Leaf,
  ) -> tuple[jax.Array, jax.Array]:
    """A slice of the new error, and the sum of its squares."""
    compression = self._method.compression

    def local(part: Any, index: Any, *given: Any) -> Any:
      if isinstance(part, tuple):
        packets = tuple(
          sharded_leaf.join(leaf.take_sheet(s, index)) for s in part
        )
        sent = compression.decompress(packets, leaf.slice_shape)
      else:
        sent = leaf.take(part, index)
      offered = self._offered(given, index, leaf)
      remains = error_feedback.residual(offered, sent)
      squares = jnp.sum(remains * remains)
      if leaf.axes:
        squares = jax.lax.psum(squares, leaf.axes)
      return remains, squares

    in_specs = self._part_spec(leaf), jax.P(), *(leaf.spec,) * 3
    return leaf.on_shards(local, in_specs, (leaf.slice_spec, jax.P()))(
      part, index, start, end, error
    )

  def _offered(
    self, given: tuple[Any, Any, Any], index: Any, leaf: sharded_leaf.Leaf
  ) -> jax.Array:
    """What a slice, local, offers to the compressor: float32."""
    start, end, error = (x if x is None else leaf.take(x, index) for x in given)
    delta = self._delta(start, end)
    decay = self._method.error_decay
    if error is None or decay is None:
      return delta
    return error_feedback.accumulate(error, delta, decay)

  def _part_spec(self, leaf: sharded_leaf.Leaf) -> Any:
    compression = self._method.compression
    if not isinstance(compression, compression_lib.TopK):
      return leaf.spec
    regions = len(compression.regions(leaf.shape))
    return (sharded_leaf.Sheet(leaf.grid_spec, jax.P()),) * regions


def _received(part: Any) -> Any:
  """A leaf's part of a message, on the host."""
  part = jax.device_get(part)
  if not isinstance(part, tuple):
    return part
  sheets = (
    sheet._replace(rows=tuple(x.reshape(-1, x.shape[-1]) for x in sheet.rows))
    for sheet in part
  )
  return tuple(sharded_leaf.join(sheet, np.concatenate) for sheet in sheets)
