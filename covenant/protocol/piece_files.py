"""Tensors of a published checkpoint on their way through a disk.

Pieces are written where they belong as they come, in any order. What is there
with the right digest is not fetched again: an attempt that breaks off, or that
finds flipped bits on the disk, goes on with the pieces that are missing.
"""

import contextlib
import functools
import math
import pathlib
import shutil
import tempfile
from collections.abc import Generator, Sequence
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
    storage.folder.mkdir(parents=True, exist_ok=True)
    yield storage.folder
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
) -> None:
  """Writes the bytes of a tensor to a file, except for pieces that are there.

  Args:
    storage: the storage of the node that asks.
    digests: the hexadecimal digests of the pieces.
    size: bytes of the tensor.
    sources: buckets that may have the pieces.
    path: the file.

  Raises:
    StoreError: a piece cannot be had; those that came are in the file.
    OSError: the disk does not take them.
    ValueError: a piece has another length than the tensor needs.
  """
  limit = pieces_lib.PIECE_BYTES
  places: dict[bytes, list[int]] = {}  # by digest, of what is missing
  with open(path, 'r+b' if path.exists() else 'w+b') as file:
    for at, text in enumerate(digests):
      digest, expected = bytes.fromhex(text), min(limit, size - at * limit)
      if digest == _zeros_digest(expected):
        _write(file, at * limit, bytes(expected))
      else:
        there = _read(file, at * limit, expected)
        if len(there) < expected or run_storage_lib.digest(there) != digest:
          places.setdefault(digest, []).append(at)

    def take(digest: bytes, data: bytes) -> None:
      for at in places.get(digest, ()):
        expected = min(limit, size - at * limit)
        if len(data) != expected:
          raise ValueError(
            f'piece {at} of {path.stem} has {len(data)} bytes, not {expected}'
          )
        _write(file, at * limit, data)

    missing = storage.missing_anywhere(list(places))
    for i in range(0, len(missing), _BATCH):
      storage.fetch_chunks(missing[i : i + _BATCH], sources, limit, take)
    file.truncate(size)


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
