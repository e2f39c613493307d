"""The mesh of one miner's devices, and how they share its model.

A miner's mesh has three explicit axes, so that the type of an array tells how
it is sharded:

  data    copies of the parameters that share the sequences of a batch
  fsdp    shards of the parameters that share the sequences as well
  tensor  shards of the heads and of the feed-forward network

The mesh of a pipeline has the axis 'stage' before these, each of which then has
one device (covenant/train/pipeline/gpipe.py).

At rest every matrix is sharded over 'fsdp' and 'tensor' (`specs`). The gradient
is computed inside `jax.shard_map`, where a device sees its own shards and the
functions from `axes` on communicate: each weight is cast to the
compute dtype and then gathered along 'fsdp' where it is used (Zhao et al,
`FSDP <https://arxiv.org/abs/2304.11277>`_, 2023), and its gradient is summed in
float32 as it is scattered. Along 'tensor' activations are summed, in the
compute dtype (Shoeybi et al, `Megatron-LM <https://arxiv.org/abs/1909.08053>`_,
2019). The collectives are explicit, so that they can be read here and the
compiled program is the same for every backend. Without a mesh, or along axes of
one device, these functions do nothing.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np

from covenant import config as config_lib
from covenant import device_sums
from covenant import typing as ct

ConfigError = config_lib.ConfigError
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh

MESH_AXES = ('data', 'fsdp', 'tensor')
HOST = 'pinned_host'  # the kind of memory in which idle state waits

# The mesh axes over which each logical axis is sharded; mesh axes by name.
_AXES: dict[str | None, tuple[str, ...]] = {
  **{axis: (axis,) for axis in MESH_AXES},
  'batch': ('data', 'fsdp'),
  'width': ('fsdp',),  # of the matrices inside layers
  'heads': ('tensor',),
  'ffn': ('tensor',),
  'vocab': ('fsdp', 'tensor'),  # of the embedding and the unembedding
  None: (),
}

# The logical axes of both sides of every matrix, by its name. Other leaves are
# not sharded.
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
  """Makes the mesh of one miner, on the first of the available devices.

  Raises:
    ConfigError: the devices are too few, or cannot be divided so.
  """
  data = devices.data or _fitting_data(devices, available)
  return _mesh(available[: data * _shards(devices)], data, devices)


def rows(
  devices: config_lib.Devices, available: Sequence[jax.Device]
) -> list[jax.sharding.Mesh]:
  """Makes the meshes of several miners, each on its own devices.

  With `devices.peers` of 0 there are as many as fit, and devices may be left
  over; with `devices.data` of 0 as well, one miner has all devices.

  Raises:
    ConfigError: the devices are too few, or cannot be divided so.
  """
  peers = devices.peers
  if devices.data:
    each = devices.data * _shards(devices)
    peers = peers or max(len(available) // each, 1)
  else:
    peers = peers or 1
    each, rest = divmod(len(available), peers)
    if rest or not each:
      raise ConfigError(
        f'devices.peers: expected a divisor of the {len(available)} devices '
        f'with devices.data=0, got {peers}'
      )
  _require(peers * each, len(available), 'devices.peers')
  return [
    mesh(devices, available[i * each : (i + 1) * each]) for i in range(peers)
  ]


def _shards(devices: config_lib.Devices) -> int:
  return devices.fsdp * devices.tensor * devices.stage


def _fitting_data(
  devices: config_lib.Devices, available: Sequence[jax.Device]
) -> int:
  """Returns the number of replicas of one miner on all devices."""
  each = _shards(devices)
  fitting, rest = divmod(len(available), each)
  if rest or not fitting:
    raise ConfigError(
      f'devices.data: 0 shares out all {len(available)} devices, which '
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
  """Makes the mesh of one miner without devices, for tracing and lowering."""
  shape = (devices.data or 1, devices.fsdp, devices.tensor)
  return jax.sharding.AbstractMesh(shape, MESH_AXES, _explicit())


def _explicit(
  axes: int = len(MESH_AXES),
) -> tuple[jax.sharding.AxisType, ...]:
  return (jax.sharding.AxisType.Explicit,) * axes


def specs(like: ct.PyTree, mesh: AnyMesh) -> ct.PyTree:
  """Returns how every leaf of a tree is sharded: a tree of `jax.P`.

  Args:
    like: parameters of `llama.init`, their shapes, or a tree whose leaves have
      their names and ranks, such as an optimizer's moments.
    mesh: the mesh of one miner; its axes of one device are not named.
  """

  def spec(path: jax.tree_util.KeyPath, x: ct.Array) -> jax.P:
    sides = MATRICES.get(_name(path), ()) if x.ndim > 1 else ()
    # Full length, as JAX itself writes specs: a step is compiled only once.
    whole = (None,) * (x.ndim - len(sides))
    return jax.P(*whole, *(_entry(side, mesh) for side in sides))

  return jax.tree_util.tree_map_with_path(spec, like)


def batch_spec(mesh: AnyMesh) -> jax.P:
  """Returns how the sequences of a batch [B, ...] are sharded."""
  return jax.P(_entry('batch', mesh))


def shardings(like: ct.PyTree, mesh: AnyMesh) -> ct.PyTree:
  """Returns `specs` as shardings on the mesh."""
  return jax.tree.map(
    lambda spec: jax.NamedSharding(mesh, spec),
    specs(like, mesh),
    is_leaf=lambda x: isinstance(x, jax.P),
  )


def place(x: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
  """Puts an array of the host, equal on all processes, on their devices."""
  return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


def is_on_host(tree: ct.PyTree) -> bool:
  """Returns True if the arrays of a tree are in the memory of their host."""
  leaves = jax.tree.leaves(tree)
  where = getattr(leaves[0], 'sharding', None) if leaves else None
  return where is not None and where.memory_kind == HOST


def split(logical: str, mesh: AnyMesh) -> tuple[str, ...]:
  """Returns the mesh axes of several devices that shard a logical axis."""
  return tuple(a for a in _AXES[logical] if mesh.shape.get(a, 1) > 1)


def _entry(side: str | None, mesh: AnyMesh) -> str | tuple[str, ...] | None:
  found = split(side, mesh) if side else ()
  return found if len(found) > 1 else (found[0] if found else None)


def _name(path: jax.tree_util.KeyPath) -> str:
  return getattr(path[-1], 'key', '') if path else ''


def check(
  model: config_lib.Model, block: tuple[int, int], mesh: AnyMesh
) -> None:
  """Checks that every shard has whole heads and whole blocks.

  Args:
    model: the model to shard.
    block: the sides of the compressor's blocks.
    mesh: the mesh of one miner.

  Raises:
    ConfigError: a field does not divide; names it and the values that do.
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


# Functions of one device inside `jax.shard_map` over the mesh.


def axes(logical: str | None) -> tuple[str, ...]:
  """Returns the manual mesh axes that shard a logical axis here."""
  here = jax.sharding.get_abstract_mesh()
  return tuple(
    a for a in _AXES[logical] if a in here.manual_axes and here.shape[a] > 1
  )


def is_cut(*logical: str | None) -> bool:
  """Returns True if any of the logical axes is sharded here."""
  return any(axes(side) for side in logical)


def size(logical: str | None) -> int:
  """Returns the number of shards of a logical axis here."""
  return math.prod(jax.lax.axis_size(a) for a in axes(logical))


def index(logical: str) -> jax.Array | int:
  """Returns the index of this device's shard of a logical axis."""
  found = axes(logical)
  return jax.lax.axis_index(found) if found else 0


def total(x: ct.PyTree, *logical: str) -> ct.PyTree:
  """Sums over the shards."""
  found = _union(logical)
  return device_sums.psum(x, found) if found else x


def largest(x: jax.Array, *logical: str) -> jax.Array:
  """Returns the maximum over the shards."""
  found = _union(logical)
  return jax.lax.pmax(x, found) if found else x


def gather(x: jax.Array, found: Sequence[str], axis: int) -> jax.Array:
  """Concatenates all shards along the mesh axes, innermost first."""
  for name in reversed(found):
    x = device_sums.all_gather(x, name, axis)
  return x


def scatter(x: jax.Array, found: Sequence[str], axis: int) -> jax.Array:
  """Sums over the mesh axes; each device keeps its shard of the sum."""
  for name in found:
    x = device_sums.psum_scatter(x, name, axis)
  return x


def own(x: jax.Array, found: Sequence[str], axis: int) -> jax.Array:
  """Returns this device's part of what `gather` returned."""
  if not found:
    return x
  size = x.shape[axis] // math.prod(jax.lax.axis_size(a) for a in found)
  first = jax.lax.axis_index(tuple(found)) * size
  return jax.lax.dynamic_slice_in_dim(x, first, size, axis)


def vary(x: ct.PyTree, *logical: str) -> ct.PyTree:
  """Casts `x` to each shard's own; its gradient is summed over the shards."""

  def cast(x: jax.Array) -> jax.Array:
    varying = jax.typeof(x).manual_axis_type.varying
    missing = tuple(a for a in _union(logical) if a not in varying)
    return device_sums.vary(x, missing) if missing else x

  return jax.tree.map(cast, x)


def _union(logical: Sequence[str]) -> tuple[str, ...]:
  return tuple(dict.fromkeys(a for name in logical for a in axes(name)))
