"""Contexts in which Orbax writes and reads a tree in bounded memory."""

import math
from collections.abc import Callable

import jax

from covenant import extras
from covenant import typing as ct
from covenant.telemetry import machine

with extras.needed('run'):
  from orbax.checkpoint import v1 as ocp

  # v1 has an option of this type, but not the type.
  from orbax.checkpoint._src.serialization import types as orbax_types

# Bytes that are read or written at the same time, beside the arrays in memory;
# more if a single tensor (when reading) or shard (when writing) is larger.
IN_FLIGHT = 2 << 30
# Bytes per chunk, the unit of reading: small, as other meshes cut differently.
_CHUNK = 64 << 20
_HOST = 'pinned_host'


def writing(tree: ct.PyTree) -> ocp.Context:
  """Returns the Orbax context that writes a tree in bounded memory."""
  context = ocp.Context()
  # Compression hardly shrinks parameters, and takes most of the time.
  context.array.saving.use_compression = False
  context.array.saving.storage_options.chunk_byte_size = _CHUNK
  memory = context.memory
  memory.deepcopy_host_arrays = False
  if total(tree) > IN_FLIGHT:
    shards = [shard_bytes(x) for x in _arrays(tree)]
    memory.write_concurrent_bytes = max(IN_FLIGHT, 1 + max(shards))
  if not fits(tree):
    memory.transfer_concurrent_bytes = IN_FLIGHT
    memory.serialization_status_callback = _InTurn()
  return context


def reading(
  abstract: ct.PyTree, unit: Callable[[ct.AbstractArray], int] | None = None
) -> ocp.Context:
  """Returns the Orbax context that reads a tree in bounded extra memory.

  Args:
    abstract: the tree to read.
    unit: the bytes that are read at once for a tensor, at least. None: all, as
      a shard may lie across all chunks of its tensor.
  """
  context = ocp.Context()
  if total(abstract) > IN_FLIGHT:
    largest = max(map(unit or _bytes, _arrays(abstract)))
    context.memory.read_concurrent_bytes = max(IN_FLIGHT, 1 + largest)
  return context


class _InTurn(orbax_types.DefaultSerializationStatusCallback):
  """Moves each array to the host once those before it are written."""

  def key_priority(self, _: object) -> orbax_types.TransferPriority:
    return orbax_types.TransferPriority.ASYNCHRONOUS_DEPRIORITIZED


def fits(tree: ct.PyTree) -> bool:
  """Returns whether the host has twice the memory of the arrays not on it."""
  staged = [_bytes(x) for x in _arrays(tree) if not _on_host(x)]
  return 2 * sum(staged) <= machine.free_bytes()


def _on_host(x: ct.AbstractArray) -> bool:
  if not isinstance(x, jax.Array) or x.sharding.memory_kind == _HOST:
    return True
  return all(device.platform == 'cpu' for device in x.devices())


def _arrays(tree: ct.PyTree) -> list[ct.AbstractArray]:
  return [x for x in jax.tree.leaves(tree) if hasattr(x, 'shape')]


def _bytes(x: ct.AbstractArray) -> int:
  return x.size * x.dtype.itemsize


def shard_bytes(x: ct.AbstractArray) -> int:
  """Returns the bytes of a shard of an array."""
  sharding = getattr(x, 'sharding', None)
  if sharding is None:
    return _bytes(x)
  return math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize


def total(tree: ct.PyTree) -> int:
  """Returns the bytes of all arrays of a tree."""
  return sum(map(_bytes, _arrays(tree)))
