"""Published checkpoints: the shared state in a validator's bucket.

Orbax writes the state. Its files are cut into chunks that are named by their
digests, so unchanged chunks are stored once and any mirror can serve them. The
signed index is put last: a checkpoint that can be found is complete.
"""

import json
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from covenant import extras
from covenant import typing as ct
from covenant.models import sharding
from covenant.protocol import apply
from covenant.protocol import checkpoint as checkpoint_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import manifest as manifest_lib

with extras.needed('run'):
  from orbax.checkpoint import v1 as ocp

_CHUNK = 32 << 20  # bytes
_MAX_INDEX = 16 << 20  # bytes
_SIGNATURE_BYTES = 64


class Index(NamedTuple):
  """The signed description of a published checkpoint."""

  round: int
  root: str  # history root, hexadecimal
  fingerprint: str  # of the shared state
  past: list[list[str]]  # see `apply.Position`
  files: dict[str, list[str]]  # relative path -> digests of its chunks


def publish(
  storage: run_storage_lib.RunStorage,
  position: apply.Position,
  fingerprint: str,
  sign: ct.Sign,
) -> None:
  """Puts the shared state of a position into the own bucket.

  Raises:
    StoreError: it is not published; chunks already put are used next time.
  """
  files = {}
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder, 'checkpoint')
    try:
      tree = checkpoint_lib.writable(position.shared._asdict())
      context = checkpoint_lib.writing(tree)
      context.array.saving.use_compression = True  # it will be downloaded
      with context:
        ocp.save(str(root), tree)
    except Exception as e:  # any error of Orbax, such as about a full disk
      raise store_lib.StoreError(f'cannot write to {folder}: {e}') from e
    for path in sorted(p for p in root.rglob('*') if p.is_file()):
      digests = []
      with open(path, 'rb') as file:
        while chunk := file.read(_CHUNK):
          digest = run_storage_lib.digest(chunk)
          storage.put_once(storage.chunk_key(digest), chunk)
          digests.append(digest.hex())
      files[str(path.relative_to(root))] = digests
  past = apply.links_to_json(position.past)
  index = Index(position.round, position.root.hex(), fingerprint, past, files)
  body = json.dumps(index._asdict()).encode()
  storage.put_once(
    storage.key('checkpoints', position.round), body + sign(body)
  )


def published(
  storage: run_storage_lib.RunStorage, bucket: store_lib.Bucket
) -> list[int]:
  """Returns the rounds of the checkpoints in a bucket, in order."""
  return storage.rounds('checkpoints', bucket)


def read_index(
  storage: run_storage_lib.RunStorage,
  bucket: store_lib.Bucket,
  round_index: int,
  hotkey: str,
  verify: Callable[[str, bytes, bytes], bool],
) -> Index:
  """Reads an index and checks that `hotkey` signed it.

  Raises:
    StoreError: the index cannot be had.
    apply.OutOfSyncError: it is malformed, or not signed by `hotkey`.
  """
  key = storage.key('checkpoints', round_index)
  data = bucket.get(key, _MAX_INDEX)
  body, signature = data[:-_SIGNATURE_BYTES], data[-_SIGNATURE_BYTES:]
  if not verify(hotkey, body, signature):
    raise apply.OutOfSyncError(f'{key} is not signed by {hotkey}')
  try:
    index = Index(**json.loads(body))
    for path, digests in index.files.items():
      parts = pathlib.PurePosixPath(path).parts
      if not parts or '..' in parts or path.startswith('/'):
        raise ValueError(f'a file named {path!r}')
      if any(len(bytes.fromhex(digest)) != 32 for digest in digests):
        raise ValueError(f'a digest of {path!r}')
    if index.round != round_index or len(bytes.fromhex(index.root)) != 32:
      raise ValueError(f'of round {index.round}, with root {index.root!r}')
    _check_past(index)
  except (ValueError, TypeError, AttributeError) as e:
    raise apply.OutOfSyncError(f'{key}: {e}') from e
  return index


def load(
  storage: run_storage_lib.RunStorage,
  index: Index,
  sources: Sequence[store_lib.Bucket],
  shared_model: shared_state_lib.SharedModel,
) -> apply.Position:
  """Loads the position that an index describes onto the model's devices.

  Args:
    storage: the storage of the node that asks.
    index: the checkpoint to load.
    sources: buckets that may have the chunks.
    shared_model: the model of the run.

  Raises:
    StoreError: a chunk cannot be had.
    apply.OutOfSyncError: the checkpoint differs from its index.
  """
  abstract: ct.PyTree = _abstract(shared_model)
  # Orbax's own files are smaller than the arrays. A limit protects the disk.
  budget = (1 << 20) + 2 * sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract)
  )
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder, 'checkpoint')
    for name, digests in index.files.items():
      path = root / name
      path.parent.mkdir(parents=True, exist_ok=True)
      with open(path, 'wb') as file:
        for digest in digests:
          chunk = storage.fetch_chunk(bytes.fromhex(digest), sources, _CHUNK)
          budget -= len(chunk)
          if budget < 0:
            raise apply.OutOfSyncError(
              f'the checkpoint of round {index.round} is too large'
            )
          file.write(chunk)
    try:
      with checkpoint_lib.reading(abstract):
        tree: ct.PyTree = ocp.load(str(root), abstract._asdict())
    except Exception as e:  # any error of Orbax about untrusted files
      raise apply.OutOfSyncError(
        f'the checkpoint of round {index.round} cannot be read: '
        f'{checkpoint_lib.reason(e)}'
      ) from e
  shared = shared_state_lib.SharedState(**tree)
  found = shared_model.fingerprint(shared)
  if found != index.fingerprint:
    raise apply.OutOfSyncError(
      f'the checkpoint of round {index.round} has the fingerprint {found}, '
      f'not {index.fingerprint}'
    )
  past = apply.links_from_json(index.past)
  if len(past) != min(apply.kept_links(shared_model), index.round):
    raise apply.OutOfSyncError(
      f'the checkpoint of round {index.round} knows {len(past)} rounds before'
    )
  return apply.Position(index.round, bytes.fromhex(index.root), shared, past)


def _check_past(index: Index) -> None:
  """Raises ValueError unless the past rounds lead to the checked root."""
  root = bytes.fromhex(index.root)
  past = apply.links_from_json(index.past)
  for r, link in zip(range(index.round - 1, -1, -1), past, strict=False):
    if manifest_lib.extend(link.root, r, link.digest) != root:
      raise ValueError(f'round {r} of its past does not lead to {root.hex()}')
    root = link.root


def _abstract(
  shared_model: shared_state_lib.SharedModel,
) -> shared_state_lib.SharedState:
  """Returns the shapes and shardings of the shared state."""
  shapes = jax.eval_shape(shared_model.init)
  if shared_model.mesh is None:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: here, shapes)
  else:
    shardings = sharding.shardings(shapes, shared_model.mesh)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )


def prune(storage: run_storage_lib.RunStorage, keep: int) -> int:
  """Deletes own checkpoints but the newest ones, and unused chunks.

  Returns:
    The first round whose objects a joining node may need: the round of the
    oldest checkpoint left, or 0 while there are fewer than `keep`.
  """
  rounds = published(storage, storage.bucket)
  left = rounds[-keep:]
  if rounds[:-keep]:
    storage.bucket.delete(
      [storage.key('checkpoints', r) for r in rounds[:-keep]]
    )
    named = set()
    for r in left:
      key = storage.key('checkpoints', r)
      body = storage.bucket.get(key, _MAX_INDEX)[:-_SIGNATURE_BYTES]
      for digests in json.loads(body)['files'].values():
        named.update(digests)
    storage.delete_chunks_except(named)
  return left[0] if len(left) == keep else 0
