"""Where a miner's state lies: at rest, and while its devices train.

At rest everything is on a miner's home: the first of the mesh's copies of the
parameters that this process owns. In training every copy has all of it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from covenant import config as config_lib
from covenant.models import sharding

_HOST = 'pinned_host'


def home(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
  """The first copy of the parameters that this process owns, as a mesh."""
  return jax.sharding.Mesh(
    _rows(mesh)[0][None], mesh.axis_names, mesh.axis_types
  )


def _rows(mesh: jax.sharding.Mesh) -> list[np.ndarray]:
  """This process's devices of each copy, [fsdp, tensor]."""
  mine = set(mesh.local_devices)
  return [row for row in mesh.devices if mine.issuperset(row.flat)]


class Parking:
  """Moves arrays between the memory of their devices and that of their host.

  Args:
    device: one of those that have them.
    used: whether to park at all; else nothing is moved.

  Raises:
    ConfigError: the devices cannot reach any host memory.
  """

  def __init__(self, device: jax.Device, used: bool):
    kinds = {memory.kind for memory in device.addressable_memories()}
    if used and _HOST not in kinds:
      raise config_lib.ConfigError(
        f'devices.offload: a {device.device_kind} has no {_HOST!r} memory, '
        f'only {sorted(kinds)}; leave it off'
      )
    self._used = used
    self._default = device.default_memory().kind

  def park(self, tree: Any) -> Any:
    """Out of the devices' memory until it is fetched; may keep its buffers."""
    return self._in_memory(tree, _HOST)

  def fetch(self, tree: Any) -> Any:
    """What was parked, on its devices again; may keep its buffers."""
    return self._in_memory(tree, self._default)

  def _in_memory(self, tree: Any, kind: str) -> Any:
    if not self._used:
      return tree
    return jax.tree.map(
      lambda x: jax.device_put(x, x.sharding.with_memory_kind(kind)), tree
    )


def is_parked(tree: Any) -> bool:
  leaves = jax.tree.leaves(tree)
  return bool(leaves) and leaves[0].sharding.memory_kind == _HOST


class Placement:
  """Moves trees of arrays, cut by `sharding.specs`.

  Args:
    mesh: of the miner. Of one device, it is as that device alone; None is any
      one device, and nothing is moved.
    offload: whether what a phase does not need waits in host memory.

  Raises:
    ConfigError: the devices cannot reach any.
  """

  def __init__(self, mesh: jax.sharding.Mesh | None, offload: bool = False):
    device = (jax.local_devices() if mesh is None else mesh.local_devices)[0]
    self.parking = Parking(device, offload)
    self.mesh = mesh if mesh is not None and mesh.size > 1 else None
    self._rows = [] if mesh is None else _rows(mesh)
    self._home = None if mesh is None else home(mesh)

  @property
  def home_mesh(self) -> jax.sharding.Mesh | None:
    """Of the devices that share what is at rest; None for one device."""
    shared = self._home is not None and self._home.size > 1
    return self._home if shared else None

  def home(self, tree: Any, fresh: bool = False) -> Any:
    """A tree from anywhere, at home; with `fresh`, in buffers of its own."""
    if self._home is not None and self._home.size > 1:
      tree = jax.device_put(tree, sharding.shardings(tree, self._home))
    elif self._home is not None:
      tree = self.whole(tree)
    return jax.tree.map(jnp.copy, tree) if fresh else tree

  def whole(self, tree: Any) -> Any:
    """A tree from anywhere, uncut on the first device of home."""
    if self._home is None:
      return tree
    device = self._home.devices.flat[0]

    def one(x: jax.Array) -> jax.Array:
      mesh = getattr(x.sharding, 'mesh', None)
      if mesh is not None:  # of which `device_put` alone would keep the type
        everywhere = jax.NamedSharding(mesh, jax.P())
        x = jax.device_put(x, everywhere).addressable_data(0)
      return jax.device_put(x, device)

    return jax.tree.map(one, tree)

  def spread(self, tree: Any, fresh: bool = False) -> Any:
    """A tree from anywhere, in every copy; otherwise as `home`."""
    tree = self.home(tree, fresh)
    if self.mesh is None or self.mesh == self._home:
      return tree

    def copied(x: jax.Array, where: jax.NamedSharding) -> jax.Array:
      at = {shard.device: shard.data for shard in x.addressable_shards}
      pieces = [
        jax.device_put(at[source], device)
        for row in self._rows
        for source, device in zip(self._rows[0].flat, row.flat, strict=True)
      ]
      return jax.make_array_from_single_device_arrays(x.shape, where, pieces)

    return jax.tree.map(copied, tree, sharding.shardings(tree, self.mesh))

  def share(self, tokens_BxL1: np.ndarray) -> Any:
    """A batch that all processes have, each device's own sequences there."""
    if self.mesh is None:
      return tokens_BxL1
    where = jax.NamedSharding(self.mesh, sharding.batch_spec(self.mesh))
    return jax.make_array_from_callback(
      tokens_BxL1.shape, where, lambda index: tokens_BxL1[index]
    )

  def settle(self, tree: Any) -> Any:
    """What `spread` led to, at home; keeps its buffers."""
    if self.mesh is None or self.mesh == self._home:
      return tree

    there = self._home
    assert there is not None

    def one(x: jax.Array, spec: jax.P) -> jax.Array:
      at = {shard.device: shard.data for shard in x.addressable_shards}
      pieces = [at[device] for device in self._rows[0].flat]
      if len(pieces) == 1:
        return pieces[0]
      where = jax.NamedSharding(there, spec)
      return jax.make_array_from_single_device_arrays(x.shape, where, pieces)

    return jax.tree.map(one, tree, sharding.specs(tree, self.mesh))
