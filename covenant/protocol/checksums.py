"""Checksums of the files of a folder, against disks that forget bits.

A checkpoint is loaded only if every byte of it is as it was written. Readers of
tensors do not notice: of flipped bits in a checkpoint, most load as another
number.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from concurrent import futures

import jax
import numpy as np
from jax.experimental import multihost_utils

from covenant import errors
from covenant import files

_NAME = 'checksums.json'
_READ = 1 << 20  # bytes at a time
_DIGEST_BYTES = 32
_WORKERS = 8


class ChecksumError(errors.CovenantError):
  """A file differs from what was written. The message names it."""


def write(folder: str | os.PathLike[str]) -> None:
  """Writes the checksums of all files of a folder into it.

  Raises:
    OSError: a file cannot be read, or the disk is full.
  """
  folder = pathlib.Path(folder)
  files.write(folder / _NAME, json.dumps(_compute(folder)), durable=True)


def check(folder: str | os.PathLike[str]) -> bool:
  """Checks the files of a folder; returns False if it has no checksums.

  Raises:
    ChecksumError: a file is missing, unreadable, new or different.
  """
  folder = pathlib.Path(folder)
  try:
    raw = (folder / _NAME).read_bytes()
  except FileNotFoundError:
    return False
  except OSError as e:
    raise ChecksumError(f'{folder / _NAME}: {e}') from e
  try:
    expected = json.loads(raw)
    found = _compute(folder)
  except (ValueError, RecursionError, OSError) as e:
    raise ChecksumError(f'{folder}: {type(e).__name__}: {e}') from e
  if not isinstance(expected, dict):
    raise ChecksumError(f'{folder / _NAME}: expected an object of JSON')
  for name in sorted(expected.keys() | found.keys()):
    if name not in found:
      raise ChecksumError(f'{folder / name[:200]} is missing')
    if name not in expected:
      raise ChecksumError(f'{folder / name} was not there when it was written')
    if expected[name] != found[name]:
      raise ChecksumError(f'{folder / name} differs from what was written')
  return True


def seal(data: bytes) -> bytes:
  """Returns the content of a file of its own: bytes and their checksum."""
  return data + _digest(data)


def unseal(path: str | os.PathLike[str]) -> bytes:
  """Returns the bytes that were sealed and written to a file.

  Raises:
    ChecksumError: the file differs from what was written.
    OSError: it cannot be read.
  """
  content = pathlib.Path(path).read_bytes()
  data, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
  if _digest(data) != digest:
    raise ChecksumError(f'{path} differs from what was written')
  return data


def newest_sound(
  directory: str | os.PathLike[str], steps: Sequence[int]
) -> tuple[int | None, dict[int, str]]:
  """Returns the newest checkpoint whose files are as they were written.

  One without checksums counts as sound, see `says_unchecked`.

  Args:
    directory: the folder of the checkpoints.
    steps: their rounds.

  Returns:
    Its round, or None, and what is wrong with the newer ones, by round.
  """
  damaged: dict[int, str] = {}
  for step in sorted(steps, reverse=True):
    try:
      check(pathlib.Path(directory, str(step)))
      return step, damaged
    except ChecksumError as e:
      damaged[step] = str(e)
  return None, damaged


def says_unchecked(folder: str | os.PathLike[str]) -> str:
  """Returns a line about a checkpoint without checksums; '' if it has them."""
  if pathlib.Path(folder, _NAME).exists():
    return ''
  return (
    f'{folder} has no checksums, so its files are not checked: its process '
    'died right after it was written, or it is of an earlier release'
  )


def newest_agreed(
  directory: str, steps: Sequence[int]
) -> tuple[int | None, dict[int, str]]:
  """Returns what the first of all processes finds by `newest_sound`."""
  sound, damaged = None, {}
  if not jax.process_index():
    sound, damaged = newest_sound(directory, steps)
  if jax.process_count() > 1:
    found = np.array([-1 if sound is None else sound, len(damaged)])
    first, count = map(int, multihost_utils.broadcast_one_to_all(found))
    newer = sorted(steps, reverse=True)[:count]
    sound = None if first < 0 else first
    damaged = damaged or {step: f'{directory}/{step}' for step in newer}
  return sound, damaged


def on_first(check: Callable[[], None]) -> None:
  """Raises on all processes an OSError that `check` raises on the first."""
  error: OSError | None = None
  if not jax.process_index():
    try:
      check()
    except OSError as e:
      error = e
  failed = error is not None
  if jax.process_count() > 1:
    failed = bool(multihost_utils.broadcast_one_to_all(np.array(failed)))
  if failed:
    raise error or OSError('the first process has refused, and says why')


def wait_for_all() -> None:
  """Waits until all processes are here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('checkpoints')


def _compute(folder: pathlib.Path) -> dict[str, str]:
  """Returns the checksum of each file, by its path in the folder."""
  paths = [p for p in sorted(folder.rglob('*')) if p.is_file()]
  paths = [p for p in paths if p != folder / _NAME]
  with futures.ThreadPoolExecutor(_WORKERS) as pool:
    names = (str(path.relative_to(folder)) for path in paths)
    return dict(zip(names, pool.map(_of_file, paths), strict=True))


def _digest(data: bytes) -> bytes:
  return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


def _of_file(path: pathlib.Path) -> str:
  digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
  with open(path, 'rb') as file:
    while data := file.read(_READ):
      digest.update(data)
  return digest.hexdigest()
