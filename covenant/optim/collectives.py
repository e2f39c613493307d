"""The collectives across named mesh axes, in `jax.shard_map` and `jax.vmap`.

Two kinds of axes occur. Peers live along `axis_name`. A peer's tensors may be
sharded along other axes (FSDP, tensor parallelism), as their types say; a
function that `on_shards` runs sees one shard of each tensor.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from covenant import device_sums
from covenant import typing as ct


def names(axis_name: ct.AxisName) -> frozenset[str]:
  """Returns the axes that `axis_name` names."""
  if axis_name is None:
    return frozenset()
  return frozenset((axis_name,) if isinstance(axis_name, str) else axis_name)


def gather_words(words: jax.Array, axis_name: ct.AxisName) -> jax.Array:
  """Returns the words of all R peers, by one all-gather: [R, W]."""
  if axis_name is None:
    return words[None]
  # Typed as equal on all peers, which results may then be, too.
  manual = set(jax.sharding.get_abstract_mesh().manual_axes)
  if names(axis_name) <= manual:
    return jax.lax.all_gather(words, axis_name, to='invarying')
  shape = words.shape
  for name in (axis_name,) if isinstance(axis_name, str) else axis_name[::-1]:
    kind = 'invarying' if name in manual else 'varying'
    words = jax.lax.all_gather(words, name, to=kind)
  return words.reshape(-1, *shape)


def gather_shards(
  words: Sequence[jax.Array],
  axes: Sequence[tuple[str, ...]],
  axis_name: ct.AxisName,
) -> list[jax.Array]:
  """Returns the words of all R peers, [R, W], by at most two all-gathers.

  What is sharded along all axes stays on its shards. What some shards repeat
  crosses in slices, one from each of these, so that its type says again that
  it is the same on them.

  Args:
    words: arrays of uint32 of one shard of this peer.
    axes: the mesh axes along which each of them differs, sorted.
    axis_name: the axis of the peers.
  """
  if axis_name is None:
    return [x[None] for x in words]
  every = tuple(sorted(frozenset().union(*axes)))
  manual = set(jax.sharding.get_abstract_mesh().manual_axes)
  # Around an axis of `jax.vmap`, `on_shards` types nothing.
  is_whole = [own == every or not names(axis_name) <= manual for own in axes]
  whole = [x for x, is_one in zip(words, is_whole, strict=True) if is_one]
  found = iter(_split(gather_words(jnp.concatenate(whole), axis_name), whole))
  if all(is_whole):
    return list(found)
  repeated = [
    _slice(x, tuple(a for a in every if a not in own))
    for x, own, is_one in zip(words, axes, is_whole, strict=True)
    if not is_one
  ]
  peers = (axis_name,) if isinstance(axis_name, str) else axis_name
  flat = gather_words(jnp.concatenate(repeated), (*peers, *every))
  sizes = [jax.lax.axis_size(a) for a in every]
  slices = iter(
    _split(flat.reshape(-1, *sizes, sum(x.size for x in repeated)), repeated)
  )
  gathered = []
  for x, own, is_one in zip(words, axes, is_whole, strict=True):
    if is_one:
      gathered.append(next(found))
      continue
    part = next(slices)
    for i, axis in reversed(list(enumerate(every))):
      if axis in own:
        part = jax.lax.dynamic_index_in_dim(
          part, jax.lax.axis_index(axis), 1 + i, keepdims=False
        )
    gathered.append(part.reshape(part.shape[0], -1)[:, : x.size])
  return gathered


def _slice(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Returns this shard's part of an array that shards along `axes` repeat."""
  shards = jax.lax.axis_size(axes)
  parts = jnp.pad(x, (0, -x.size % shards)).reshape(shards, -1)
  return jax.lax.dynamic_index_in_dim(
    parts, jax.lax.axis_index(axes), keepdims=False
  )


def _split(flat: jax.Array, like: Sequence[jax.Array]) -> list[jax.Array]:
  """Returns the parts of the last axis, of the sizes of `like`."""
  ends = np.cumsum([x.size for x in like])
  return jnp.split(flat, ends[:-1], axis=-1)


def index(axis_name: ct.AxisName) -> ct.Scalar:
  """Returns the position of this peer along its axis."""
  return 0 if axis_name is None else jax.lax.axis_index(axis_name)


def sum_over(tree: ct.PyTree, axes: tuple[str, ...]) -> ct.PyTree:
  """Returns the sum of every leaf over the shards along mesh axes, if any."""
  return device_sums.psum(tree, axes) if axes else tree


def on_any_shard(flag: jax.Array, axis_name: ct.AxisName) -> jax.Array:
  """Returns whether a flag is set on any shard of this peer."""
  axes = shard_axes(flag, axis_name)
  return jax.lax.pmax(flag.astype(jnp.int32), axes) > 0 if axes else flag


def shard_axes(x: jax.Array, axis_name: ct.AxisName) -> tuple[str, ...]:
  """Returns the axes along which `x`, of one peer, is sharded, sorted.

  They follow from its type: the explicit axes of its sharding and, inside
  `jax.shard_map`, the axes along which it varies.
  """
  kind = jax.typeof(x)
  return tuple(
    sorted(_explicit(x) | kind.manual_axis_type.varying - names(axis_name))
  )


def on_shards(
  f: Callable[..., tuple[ct.PyTree, ...]],
  trees: tuple[ct.PyTree, ...],
  axis_name: ct.AxisName,
  whole: tuple[ct.PyTree, ...] = (),
) -> tuple[ct.PyTree, ...]:
  """Returns `f(*trees, *whole)`, where f sees one shard of every leaf.

  Args:
    f: returns `trees`, sharded as they came, then values that are the same on
      all shards. It may use `axis_name`, and the axes that its arguments are
      sharded on.
    trees: pytrees of arrays; those after the first are sharded like it. Without
      explicit sharding, f is just called.
    axis_name: the axis of the peers.
    whole: pytrees of arrays that are the same on all shards.
  """
  leaves = jax.tree.leaves(trees[0])
  axes = frozenset().union(*map(_explicit, leaves))
  if not axes:
    return f(*trees, *whole)
  mesh = next(jax.typeof(x).sharding.mesh for x in leaves if _explicit(x))
  first = jax.tree.map(lambda x: jax.typeof(x).sharding, trees[0])
  # Arrays that crossed the border of a program may have lost their sharding.
  trees = (
    trees[0],
    *(
      t if t is None else jax.tree.map(jax.reshard, t, first) for t in trees[1:]
    ),
  )
  specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, trees)
  manual = jax.sharding.get_abstract_mesh().manual_axes
  return jax.shard_map(
    f,
    mesh=mesh,
    in_specs=(*specs, *[jax.P()] * len(whole)),
    out_specs=(*specs, jax.P()),
    axis_names=axes,
    # JAX cannot type a collective along an axis of `jax.vmap` in here.
    check_vma=names(axis_name) <= set(manual),
  )(*trees, *whole)


def _explicit(x: jax.Array) -> frozenset[str]:
  """Returns the explicit mesh axes that `x` is sharded on."""
  axes = set()
  for entry in jax.typeof(x).sharding.spec:
    if entry is not None:
      axes.update((entry,) if isinstance(entry, str) else entry)
  return frozenset(axes)


def varying(tree: ct.PyTree, axis_name: ct.AxisName) -> ct.PyTree:
  """Types every leaf as varying over the peers, inside `jax.shard_map`.

  An exchanged value and a local one differ in type there, and the branches of
  `lax.cond` may not. `jax.vmap` types nothing.
  """
  manual = set(jax.sharding.get_abstract_mesh().manual_axes)
  axes = names(axis_name) & manual
  return jax.tree.map(lambda x: _cast(x, axes), tree) if axes else tree


def placed_like(state: ct.PyTree, params: ct.Params) -> ct.PyTree:
  """Returns `state`, where parts shaped like `params` lie where these lie.

  Zeros alone tell XLA nothing about the automatic axes of a mesh: the first
  state would lie elsewhere than the second, and a step would compile twice.
  """
  return _map_like(_placed, state, params)


def sharded_like(state: ct.PyTree, params: ct.Params) -> ct.PyTree:
  """Returns `state`, where parts shaped like `params` are sharded like these.

  Between two programs JAX drops the explicit sharding of arrays that come out
  of a `jax.shard_map` of some axes.
  """
  if not any(map(_explicit, jax.tree.leaves(params))):
    return state
  return _map_like(_sharded, state, params)


def _map_like(
  f: Callable[..., jax.Array], state: ct.PyTree, params: ct.Params
) -> ct.PyTree:
  """Maps f(x, param) over the subtrees of `state` structured like `params`."""
  wanted = jax.tree.structure(params)

  def is_like(x: ct.PyTree) -> bool:
    return jax.tree.structure(x) == wanted

  def part(x: ct.PyTree) -> ct.PyTree:
    return jax.tree.map(f, x, params) if is_like(x) else x

  return jax.tree.map(part, state, is_leaf=is_like)


def _sharded(x: jax.Array, like: jax.Array) -> jax.Array:
  wanted = jax.typeof(like).sharding
  if jnp.shape(x) != like.shape or jax.typeof(x).sharding == wanted:
    return x
  return jax.reshard(x, wanted)


def _placed(x: jax.Array, like: jax.Array) -> jax.Array:
  shapes = jnp.shape(x) == jnp.shape(like)
  if not shapes or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
    return x
  if not jnp.issubdtype(jnp.result_type(like), jnp.floating):
    return x
  return x + (0.0 * jnp.isnan(like).astype(jnp.float32)).astype(x.dtype)


def typed_like(tree: ct.PyTree, like: ct.PyTree) -> ct.PyTree:
  """Types every leaf as varying over the axes of any leaf of `like`."""
  axes = frozenset().union(*map(_varying, jax.tree.leaves(like)))
  return jax.tree.map(lambda x: _cast(x, axes), tree)


def typed_as(tree: ct.PyTree, like: ct.PyTree) -> ct.PyTree:
  """Types each leaf as varying over the axes of its counterpart, too."""
  return jax.tree.map(lambda x, y: _cast(x, _varying(y)), tree, like)


def _varying(x: jax.Array) -> frozenset[str]:
  return frozenset(jax.typeof(x).manual_axis_type.varying)


def _cast(x: jax.Array, axes: frozenset[str]) -> jax.Array:
  more = tuple(sorted(axes - _varying(x)))
  return jax.lax.pcast(x, more, to='varying') if more else x
