"""The placement of a miner's state: at rest, and while its devices train.

At rest everything is on a miner's home: the first of the mesh's copies of the
parameters that this process owns; the whole mesh where no process owns a copy.
In training every copy has all of it, or, in a pipeline, every stage has its own
layers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from covenant import config as config_lib
from covenant import typing as ct
from covenant.models import sharding
from covenant.train.pipeline import gpipe

_HOST = sharding.HOST


def home(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
  """The first copy of the parameters that this process owns, as a mesh.

  It is the whole mesh if each copy spans several processes.
  """
  rows = _rows(mesh)
  if not rows:
    return mesh
  return jax.sharding.Mesh(rows[0][None], mesh.axis_names, mesh.axis_types)


def _rows(mesh: jax.sharding.Mesh) -> list[np.ndarray]:
  """This process's devices of each copy of the parameters, [fsdp, tensor]."""
  mine = set(mesh.local_devices)
  return [row for row in mesh.devices if mine.issuperset(row.flat)]


class HostOffload:
  """Moves arrays between the memory of their devices and that of their host.

  Args:
    device: one of the devices of the arrays.
    enabled: False leaves every array where it is.

  Raises:
    ConfigError: the device has no memory of its host.
  """

  def __init__(self, device: jax.Device, enabled: bool):
    kinds = {memory.kind for memory in device.addressable_memories()}
    if enabled and _HOST not in kinds:
      raise config_lib.ConfigError(
        f'devices.offload: expected devices with {_HOST!r} memory, got a '
        f'{device.device_kind} with {sorted(kinds)} only; turn it off'
      )
    self._enabled = enabled
    self._default = device.default_memory().kind

  def offload(self, tree: ct.PyTree) -> ct.PyTree:
    """Moves a tree to host memory; the result may share its buffers."""
    return self._in_memory(tree, _HOST)

  def load(self, tree: ct.PyTree) -> ct.PyTree:
    """Moves a tree back to its devices; the result may share its buffers."""
    return self._in_memory(tree, self._default)

  def _in_memory(self, tree: ct.PyTree, kind: str) -> ct.PyTree:
    if not self._enabled:
      return tree
    return jax.tree.map(
      lambda x: jax.device_put(x, x.sharding.with_memory_kind(kind)), tree
    )


def is_offloaded(tree: ct.PyTree) -> bool:
  """Returns True if the arrays of a tree are in host memory."""
  return sharding.is_on_host(tree)


class Placement:
  """Moves trees of arrays that `sharding.specs` shards over a mesh.

  Args:
    mesh: the mesh of the miner. A mesh of one device is treated as that device
      alone. With None there is one device, whichever, and nothing moves.
    offload: True keeps what a phase does not need in host memory.

  Raises:
    ConfigError: the devices have no memory of their host.
  """

  def __init__(self, mesh: jax.sharding.Mesh | None, offload: bool = False):
    device = (jax.local_devices() if mesh is None else mesh.local_devices)[0]
    self.host = HostOffload(device, offload)
    self.mesh = mesh if mesh is not None and mesh.size > 1 else None
    self._rows = [] if mesh is None else _rows(mesh)
    self._home = None if mesh is None else home(mesh)

  @property
  def home_mesh(self) -> jax.sharding.Mesh | None:
    """The devices that share the state at rest; None for one device."""
    shared = self._home is not None and self._home.size > 1
    return self._home if shared else None

  def to_home(self, tree: ct.PyTree, fresh: bool = False) -> ct.PyTree:
    """Moves a tree from anywhere to the home of the miner.

    Args:
      tree: arrays on any devices.
      fresh: True copies them, so that the result has buffers of its own.
    """
    if self._home is not None and self._home.size > 1:
      tree = jax.tree.map(_put, tree, sharding.shardings(tree, self._home))
    elif self._home is not None:
      tree = self.unshard(tree)
    return jax.tree.map(jnp.copy, tree) if fresh else tree

  def unshard(self, tree: ct.PyTree) -> ct.PyTree:
    """Moves a tree from anywhere to the first device of the home, unsharded."""
    if self._home is None:
      return tree
    device = self._home.devices.flat[0]

    def one(x: jax.Array) -> jax.Array:
      mesh = getattr(x.sharding, 'mesh', None)
      if mesh is not None:  # `device_put` alone would keep the type of the mesh
        everywhere = jax.NamedSharding(mesh, jax.P())
        x = jax.device_put(x, everywhere).addressable_data(0)
      return jax.device_put(x, device)

    return jax.tree.map(one, tree)

  def replicate(self, tree: ct.PyTree, fresh: bool = False) -> ct.PyTree:
    """Copies a tree from anywhere to every copy of the parameters.

    Args:
      tree: arrays on any devices.
      fresh: as in `to_home`.
    """
    tree = self.to_home(tree, fresh)
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

  def shard_batch(self, tokens_BxL1: np.ndarray) -> ct.Tokens:
    """Gives each device its sequences of a batch that all processes have."""
    if self.mesh is None:
      return tokens_BxL1
    where = jax.NamedSharding(self.mesh, sharding.batch_spec(self.mesh))
    return sharding.place(tokens_BxL1, where)

  def gather(self, tree: ct.PyTree) -> ct.PyTree:
    """Returns what `replicate` led to at home; keeps its buffers."""
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


def _put(x: jax.Array, where: jax.NamedSharding) -> jax.Array:
  """Moves an array; one of this process alone is equal on all."""
  if x.is_fully_addressable and not where.is_fully_addressable:
    return sharding.place(np.asarray(x), where)
  return jax.device_put(x, where)


class PipelinePlacement:
  """Moves trees of arrays between a miner's home and the stages of a pipeline.

  At rest all of a miner's state is on the first device, as if it trained alone
  there, so that it can continue with other stages or with none.

  Args:
    model: the model whose layers the stages share.
    mesh: one device of this process per stage.
  """

  def __init__(self, model: config_lib.Model, mesh: jax.sharding.Mesh):
    self._model = model
    self.mesh = mesh
    self._everywhere = jax.NamedSharding(mesh, jax.P())

  def replicate(self, tree: ct.PyTree, fresh: bool = True) -> ct.PyTree:
    """Gives each stage its layers of a tree that is on one device.

    Subtrees that are not like the parameters are copied to every stage.

    Args:
      tree: arrays on one device.
      fresh: ignored: the result always has buffers of its own.
    """
    del fresh
    return _map_params(
      tree,
      lambda params: gpipe.split(self._model, params, self.mesh),
      self.shard_batch,
    )

  def shard_batch(self, x: ct.PyTree) -> ct.PyTree:
    """Copies arrays, such as a batch, to every stage."""
    return jax.device_put(x, self._everywhere)

  def gather(self, tree: ct.PyTree) -> ct.PyTree:
    """Returns what `replicate` led to on the first device."""
    device = self.mesh.devices.flat[0]
    return _map_params(
      tree,
      lambda parts: gpipe.join(self._model, parts, device),
      lambda x: x.addressable_data(0),
    )


def _map_params(
  tree: ct.PyTree,
  of_params: Callable[[ct.Params], ct.Params],
  of_leaf: Callable[[jax.Array], jax.Array],
) -> ct.PyTree:
  """Maps subtrees that are like the parameters as a whole, and other leaves."""

  def is_params(x: object) -> bool:
    return isinstance(x, dict) and 'embedding' in x

  return jax.tree.map(
    lambda x: of_params(x) if is_params(x) else of_leaf(x),
    tree,
    is_leaf=is_params,
  )
