"""Tensors of a published checkpoint on their way through a disk.

Pieces are written where they belong as they come, in any order. What is there
with the right digest is not fetched again: an attempt that breaks off, or that
finds flipped bits on the disk, goes on with the pieces that are missing. Of a
node of several processes each writes the pieces that its shards are in.
"""

import contextlib
import functools
import math
import pathlib
import shutil
import tempfile
from collections.abc import Collection, Generator, Sequence
from typing import BinaryIO

import jax
import numpy as np

from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.train import pieces as pieces_lib

_BATCH = 32  # pieces that are fetched and held at the same time


@contextlib.contextmanager
def folder(storage: run_storage_lib.RunStorage) -> Generator[pathlib.Path]:
  """Yields the folder of tensors under way, and deletes it at the end.

  After a failure the folder that the storage names is left for the next
  attempt, or until the node has caught up in another way (`clear`); it may grow
  to the size of the state.
  """
  if storage.folder is None:
    with tempfile.TemporaryDirectory() as path:
      yield pathlib.Path(path)
  else:
    own = storage.folder
    storage.on_disk(lambda: own.mkdir(parents=True, exist_ok=True))
    yield own
    clear(storage)


def clear(storage: run_storage_lib.RunStorage) -> None:
  """Deletes tensors that an attempt has left."""
  if storage.folder is not None:
    shutil.rmtree(storage.folder, ignore_errors=True)


def fetch(
  storage: run_storage_lib.RunStorage,
  digests: Sequence[str],
  size: int,
  sources: Sequence[store_lib.Bucket],
  path: pathlib.Path,
  wanted: Collection[int] | None = None,
) -> None:
  """Writes the bytes of a tensor to a file, except for pieces that are there.

  Args:
    storage: the storage of the node that asks.
    digests: the hexadecimal digests of the pieces.
    size: bytes of the tensor.
    sources: buckets that may have the pieces.
    path: the file, which gets that size.
    wanted: the numbers of the pieces to write; None: all.

  Raises:
    StoreError: a piece cannot be had; those that came are in the file.
    OSError: the disk of a process of this node does not take them.
    ValueError: a piece has another length than the tensor needs.
  """
  limit = pieces_lib.PIECE_BYTES
  names = list(map(bytes.fromhex, digests))
  numbers = range(len(names)) if wanted is None else sorted(wanted)
  lacking = storage.on_disk(lambda: _lacking(names, size, path, numbers))
  places: dict[bytes, list[int]] = {}
  for at, name in enumerate(names):
    places.setdefault(name, []).append(at)

  def take(name: bytes, data: bytes) -> None:
    for at in places[name]:
      # All processes check it, also those that do not want the piece.
      expected = min(limit, size - at * limit)
      if len(data) != expected:
        raise ValueError(
          f'piece {at} of {path.stem} has {len(data)} bytes, not {expected}'
        )
      if at in lacking:
        with open(path, 'r+b') as file:
          _write(file, at * limit, data)

  own = list(dict.fromkeys(names[at] for at in sorted(lacking)))
  missing = storage.missing_anywhere(own)
  for i in range(0, len(missing), _BATCH):
    storage.fetch_chunks(missing[i : i + _BATCH], sources, limit, take)


def _lacking(
  names: Sequence[bytes],
  size: int,
  path: pathlib.Path,
  numbers: Collection[int],
) -> set[int]:
  """Returns which of some pieces a file lacks; writes those of zeros.

  Args:
    names: the digests of all pieces.
    size: bytes of the tensor.
    path: the file, which is made when missing.
    numbers: the pieces.
  """
  limit, found = pieces_lib.PIECE_BYTES, set()
  with open(path, 'r+b' if path.exists() else 'w+b') as file:
    for at in numbers:
      expected = min(limit, size - at * limit)
      if names[at] == _zeros_digest(expected):
        _write(file, at * limit, bytes(expected))
      else:
        there = _read(file, at * limit, expected)
        if len(there) < expected or run_storage_lib.digest(there) != names[at]:
          found.add(at)
    file.truncate(size)
  return found


def pieces_of_shards(abstract: jax.ShapeDtypeStruct) -> set[int]:
  """Returns the numbers of the pieces that shards of this process are in."""
  shape, width = abstract.shape, np.dtype(abstract.dtype).itemsize
  count = -(-math.prod(shape) * width // pieces_lib.PIECE_BYTES)
  changes = np.zeros(count + 1, np.int64)  # of the number of runs, by piece
  where = abstract.sharding.addressable_devices_indices_map(shape)
  for index in where.values() if count else ():
    begins, ends = _runs(shape or (1,), index or (slice(None),))
    last = (ends * width - 1) // pieces_lib.PIECE_BYTES
    np.add.at(changes, begins * width // pieces_lib.PIECE_BYTES, 1)
    np.add.at(changes, last + 1, -1)
  return set(np.flatnonzero(np.cumsum(changes)).tolist())


def _runs(
  shape: Sequence[int], index: Sequence[slice]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns where runs of a shard's values in a tensor begin and end."""
  bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
  cut = len(shape) - 1  # the last dimension of which the shard has a part
  while cut > 0 and bounds[cut] == (0, shape[cut]):
    cut -= 1
  begins = np.zeros(1, np.int64)
  for n, (start, stop) in zip(shape[:cut], bounds, strict=False):
    begins = np.add.outer(begins * n, np.arange(start, stop)).reshape(-1)
  begins, (start, stop) = begins * shape[cut], bounds[cut]
  inner = math.prod(shape[cut + 1 :])
  return (begins + start) * inner, (begins + stop) * inner


@functools.cache
def _zeros_digest(size: int) -> bytes:
  """Returns the digest of zeros, such as those of momentum at the start."""
  return run_storage_lib.digest(bytes(size))


def _write(file: BinaryIO, at: int, data: bytes) -> None:
  file.seek(at)
  file.write(data)


def _read(file: BinaryIO, at: int, size: int) -> bytes:
  file.seek(at)
  return file.read(size)


def place(path: pathlib.Path, abstract: jax.ShapeDtypeStruct) -> jax.Array:
  """Returns the tensor in a file, where the model keeps it.

  One shard after another is copied, so that the host holds one of them.
  """
  dtype, shape = np.dtype(abstract.dtype), abstract.shape
  if math.prod(shape):
    whole = np.memmap(path, dtype, 'r', shape=shape or (1,)).reshape(shape)
  else:
    whole = np.empty(shape, dtype)
  where = abstract.sharding.addressable_devices_indices_map(shape)
  shards = []
  for device, index in where.items():
    shard = jax.device_put(np.array(whole[index], copy=True), device)
    shards.append(jax.block_until_ready(shard))
  return jax.make_array_from_single_device_arrays(
    shape, abstract.sharding, shards
  )
