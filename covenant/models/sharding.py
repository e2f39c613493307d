"""How one miner's devices share its model: the mesh, and who holds what.

A miner's mesh has three axes, all explicit, so that the type of an array says
where its parts are:

  data    copies of the parameters that share the sequences of a batch
  fsdp    shards of the parameters, that share the sequences too
  tensor  shards of the heads and of the feed-forward network

That of a pipeline has the axis 'stage' before these, which then are all of one
device (covenant/train/pipeline/gpipe.py).

At rest every matrix is cut along 'fsdp' and 'tensor' (`specs`). The gradient is
computed inside `jax.shard_map`, where a device sees its own shards and the
functions from `axes` on say what crosses devices: each weight is cast to the
compute dtype and then gathered along 'fsdp' where it is used (Zhao et al,
`FSDP <https://arxiv.org/abs/2304.11277>`_, 2023), and its gradient is summed in
float32 as it is scattered. Along 'tensor' activations are summed, in the
compute dtype (Shoeybi et al, `Megatron-LM <https://arxiv.org/abs/1909.08053>`_,
2019). By hand, because who communicates what is the point of it, and the
compiled program is then the same for every backend. Without a mesh, or along
axes of one device, these functions do nothing.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from covenant import config as config_lib

ConfigError = config_lib.ConfigError
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh

MESH_AXES = ('data', 'fsdp', 'tensor')

# What may be cut, and along which axes of the mesh; or one axis by its name.
_AXES: dict[str | None, tuple[str, ...]] = {
  **{axis: (axis,) for axis in MESH_AXES},
  'batch': ('data', 'fsdp'),
  'width': ('fsdp',),  # of the matrices inside layers
  'heads': ('tensor',),
  'ffn': ('tensor',),
  'vocab': ('fsdp', 'tensor'),  # of the embedding and the unembedding
  None: (),
}

# Both sides of every matrix, by its name. What is not here is whole everywhere.
MATRICES: dict[str, tuple[str | None, str | None]] = {
  'embedding': ('vocab', None),
  'unembedding': (None, 'vocab'),
  'query': ('width', 'heads'),
  'key': ('width', 'heads'),
  'value': ('width', 'heads'),
  'output': ('heads', 'width'),
  'gate': ('width', 'ffn'),
  'up': ('width', 'ffn'),
  'down': ('ffn', 'width'),
}


def mesh(
  devices: config_lib.Devices, available: Sequence[jax.Device]
) -> jax.sharding.Mesh:
  """The mesh of one miner, on the first of the devices that there are.

  Raises:
    ConfigError: they are too few, or cannot be shared out.
  """
  data = devices.data or _fitting('data', devices, available)
  return _mesh(available[: data * _shards(devices)], data, devices)


def rows(
  devices: config_lib.Devices, available: Sequence[jax.Device]
) -> list[jax.sharding.Mesh]:
  """The meshes of miners side by side, each on its own devices.

  Raises:
    ConfigError: the devices are too few, or cannot be shared out.
  """
  if not devices.peers and not devices.data:
    raise ConfigError(
      'devices.data: expected a number with devices.peers=0: one of the two '
      'takes the devices that are left'
    )
  if not devices.data:
    each, rest = divmod(len(available), devices.peers)
    if rest or not each:
      raise ConfigError(
        f'devices.peers: expected a divisor of the {len(available)} devices '
        f'with devices.data=0, got {devices.peers}'
      )
  else:
    each = devices.data * _shards(devices)
  peers = devices.peers or _fitting('peers', devices, available)
  _require(peers * each, len(available), 'devices.peers')
  return [
    mesh(devices, available[i * each : (i + 1) * each]) for i in range(peers)
  ]


def _shards(devices: config_lib.Devices) -> int:
  return devices.fsdp * devices.tensor * devices.stage


def _fitting(
  field: str,
  devices: config_lib.Devices,
  available: Sequence[jax.Device],
) -> int:
  """The value of a field that is 0: as many as there are devices for."""
  each = _shards(devices) * (devices.data if field == 'peers' else 1)
  fitting, rest = divmod(len(available), each)
  if rest or not fitting:
    raise ConfigError(
      f'devices.{field}: 0 shares out all {len(available)} devices, which '
      f'must be a multiple of the {each} that each of them takes'
    )
  return fitting


def _require(needed: int, there: int, field: str) -> None:
  if needed > there:
    raise ConfigError(
      f'{field}: devices.* ask for {needed} devices, there are {there}'
    )


def _mesh(
  available: Sequence[jax.Device], data: int, devices: config_lib.Devices
) -> jax.sharding.Mesh:
  shape, axes = (data, devices.fsdp, devices.tensor), MESH_AXES
  if devices.stage > 1:
    shape, axes = (devices.stage, *shape), ('stage', *axes)
  field = 'devices.' + axes[max(range(len(axes)), key=lambda i: shape[i])]
  _require(math.prod(shape), len(available), field)
  grid = np.array(available).reshape(shape)
  return jax.sharding.Mesh(grid, axes, _explicit(len(axes)))


def abstract_mesh(devices: config_lib.Devices) -> jax.sharding.AbstractMesh:
  """The mesh of one miner without devices, to trace and lower for."""
  shape = (devices.data or 1, devices.fsdp, devices.tensor)
  return jax.sharding.AbstractMesh(shape, MESH_AXES, _explicit())


def _explicit(
  axes: int = len(MESH_AXES),
) -> tuple[jax.sharding.AxisType, ...]:
  return (jax.sharding.AxisType.Explicit,) * axes


def specs(like: Any, mesh: AnyMesh) -> Any:
  """How every leaf of a tree is cut: a tree of `jax.P`.

  Args:
    like: parameters of `llama.init`, their shapes, or a tree whose leaves have
      the names and ranks of these, as an optimizer's moments.
    mesh: of one miner. Its axes of one device are not named.
  """

  def spec(path: Any, x: Any) -> jax.P:
    sides = MATRICES.get(_name(path), ()) if x.ndim > 1 else ()
    # Of full length, as JAX itself writes them: a step is compiled but once.
    whole = (None,) * (x.ndim - len(sides))
    return jax.P(*whole, *(_entry(side, mesh) for side in sides))

  return jax.tree_util.tree_map_with_path(spec, like)


def batch_spec(mesh: AnyMesh) -> jax.P:
  """How the sequences of a batch [B, ...] are cut."""
  return jax.P(_entry('batch', mesh))


def shardings(like: Any, mesh: AnyMesh) -> Any:
  """`specs` as shardings on the mesh."""
  return jax.tree.map(
    lambda spec: jax.NamedSharding(mesh, spec),
    specs(like, mesh),
    is_leaf=lambda x: isinstance(x, jax.P),
  )


def split(logical: str, mesh: AnyMesh) -> tuple[str, ...]:
  """The mesh axes of several devices along which `logical` is cut."""
  return tuple(a for a in _AXES[logical] if mesh.shape.get(a, 1) > 1)


def _entry(side: str | None, mesh: AnyMesh) -> Any:
  found = split(side, mesh) if side else ()
  return found if len(found) > 1 else (found[0] if found else None)


def _name(path: Any) -> Any:
  return getattr(path[-1], 'key', None) if path else None


def check(
  model: config_lib.Model, block: tuple[int, int], mesh: AnyMesh
) -> None:
  """Every shard must be whole: in heads, and in blocks of the compressor.

  Args:
    model: to be cut.
    block: the sides of the blocks that matrices are compressed in.
    mesh: of one miner.

  Raises:
    ConfigError: naming the field that does not divide, and what would.
  """
  head_width = model.width // model.heads
  block_side = math.lcm(*block)
  head_side = math.lcm(block_side, head_width)
  for field, side, whole, unit in (
    ('model.width', 'width', model.width, block_side),
    ('model.heads', 'heads', model.heads * head_width, head_side),
    ('model.kv_heads', 'heads', model.kv_heads * head_width, head_side),
    ('model.ffn_width', 'ffn', model.ffn_width, block_side),
    ('model.vocab_size', 'vocab', model.vocab_size, block_side),
  ):
    found = split(side, mesh)
    shards = math.prod(mesh.shape[axis] for axis in found)
    if shards == 1 or whole % (shards * unit) == 0:
      continue
    knobs = ' * '.join(f'devices.{axis}' for axis in found)
    fit = {1, *(n for n in range(1, whole + 1) if whole % (n * unit) == 0)}
    heads = f' heads of {head_width}' if side == 'heads' else ''
    raise ConfigError(
      f'{knobs}: {field} = {whole // head_width if heads else whole}{heads} '
      f'must be cut into {"whole heads and " if heads else ""}whole blocks of '
      f'{block[0]} x {block[1]} (optim.compression.block); expected one of '
      f'{", ".join(map(str, sorted(fit)))}, got {shards}'
    )


# From here on: what one device does inside `jax.shard_map` over the mesh.


def axes(logical: str | None) -> tuple[str, ...]:
  """The mesh axes along which `logical` is cut here; none without a mesh."""
  here = jax.sharding.get_abstract_mesh()
  return tuple(
    a for a in _AXES[logical] if a in here.manual_axes and here.shape[a] > 1
  )


def is_cut(*logical: str | None) -> bool:
  """Whether this device has but a shard of what has such a side."""
  return any(axes(side) for side in logical)


def size(logical: str | None) -> int:
  """Into how many shards `logical` is cut here."""
  return math.prod(jax.lax.axis_size(a) for a in axes(logical))


def index(logical: str) -> jax.Array | int:
  """Which of these shards this device has."""
  found = axes(logical)
  return jax.lax.axis_index(found) if found else 0


def total(x: Any, *logical: str) -> Any:
  """The sum over the shards."""
  found = _union(logical)
  return jax.lax.psum(x, found) if found else x


def largest(x: jax.Array, *logical: str) -> jax.Array:
  """The maximum over the shards."""
  found = _union(logical)
  return jax.lax.pmax(x, found) if found else x


def gather(x: jax.Array, found: Sequence[str], axis: int) -> jax.Array:
  """All shards along the mesh axes, side by side; innermost first."""
  for name in reversed(found):
    x = jax.lax.all_gather(x, name, axis=axis, tiled=True)
  return x


def scatter(x: jax.Array, found: Sequence[str], axis: int) -> jax.Array:
  """The sum over the mesh axes, of which each device keeps its shard."""
  for name in found:
    x = jax.lax.psum_scatter(x, name, scatter_dimension=axis, tiled=True)
  return x


def own(x: jax.Array, found: Sequence[str], axis: int) -> jax.Array:
  """This device's part of what `gather` gave."""
  if not found:
    return x
  size = x.shape[axis] // math.prod(jax.lax.axis_size(a) for a in found)
  first = jax.lax.axis_index(tuple(found)) * size
  return jax.lax.dynamic_slice_in_dim(x, first, size, axis)


def vary(x: Any, *logical: str) -> Any:
  """Types `x` as each shard's own; its gradient is summed over them."""

  def cast(x: jax.Array) -> jax.Array:
    varying = jax.typeof(x).manual_axis_type.varying
    missing = tuple(a for a in _union(logical) if a not in varying)
    return jax.lax.pcast(x, missing, to='varying') if missing else x

  return jax.tree.map(cast, x)


def _union(logical: Sequence[str]) -> tuple[str, ...]:
  return tuple(dict.fromkeys(a for name in logical for a in axes(name)))
