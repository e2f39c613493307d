"""Checkpoints for strangers: the shared state in a validator's bucket.

Orbax writes it; its files are cut into chunks that are named by their digest,
so what did not change is not stored twice, and any mirror can serve it. The
signed index is put last: a checkpoint that can be found is complete.
"""

import json
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from covenant.models import sharding
from covenant.protocol import apply
from covenant.protocol import checkpoint as checkpoint_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import manifest as manifest_lib

_CHUNK = 32 << 20  # bytes
_MAX_INDEX = 16 << 20  # bytes
_SIGNATURE_BYTES = 64


class Index(NamedTuple):
  """What a published checkpoint says of itself; its bytes are signed."""

  round: int
  root: str  # hexadecimal
  fingerprint: str
  past: list[list[str]]  # see `agreement.Place`
  files: dict[str, list[str]]  # relative path -> digests of its chunks


def publish(
  objects: run_storage_lib.Objects,
  place: apply.Place,
  fingerprint: str,
  sign: Callable[[bytes], bytes],
) -> None:
  """Puts the state of a place into the own bucket.

  Raises:
    StoreError: it is not published; what was put is found again next time.
  """
  files = {}
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder, 'checkpoint')
    try:
      tree = checkpoint_lib.writable(place.shared._asdict())
      context = checkpoint_lib.writing(tree)
      context.array.saving.use_compression = True  # for whoever downloads it
      with context:
        ocp.save(str(root), tree)
    except Exception as e:  # whatever Orbax makes of a full disk
      raise store_lib.StoreError(f'cannot write to {folder}: {e}') from e
    for path in sorted(p for p in root.rglob('*') if p.is_file()):
      digests = []
      with open(path, 'rb') as file:
        while chunk := file.read(_CHUNK):
          digest = run_storage_lib.digest(chunk)
          objects.keep(objects.chunk_key(digest), chunk)
          digests.append(digest.hex())
      files[str(path.relative_to(root))] = digests
  past = apply.links_to_json(place.past)
  index = Index(place.round, place.root.hex(), fingerprint, past, files)
  body = json.dumps(index._asdict()).encode()
  objects.keep(objects.key('checkpoints', place.round), body + sign(body))


def published(
  objects: run_storage_lib.Objects, bucket: store_lib.Bucket
) -> list[int]:
  """The rounds of the checkpoints in a bucket, rising."""
  return objects.rounds('checkpoints', bucket)


def read_index(
  objects: run_storage_lib.Objects,
  bucket: store_lib.Bucket,
  round_index: int,
  hotkey: str,
  verify: Callable[[str, bytes, bytes], bool],
) -> Index:
  """An index that `hotkey` signed.

  Raises:
    StoreError: it cannot be had.
    agreement.OutOfSyncError: it is malformed, or not signed by `hotkey`.
  """
  key = objects.key('checkpoints', round_index)
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
  objects: run_storage_lib.Objects,
  index: Index,
  sources: Sequence[store_lib.Bucket],
  shared_model: shared_state_lib.SharedModel,
) -> apply.Place:
  """The place that an index describes, on the devices of the replica.

  Args:
    objects: of the node that asks.
    index: what to load.
    sources: buckets that may have the chunks.
    shared_model: of this run.

  Raises:
    StoreError: a chunk cannot be had.
    agreement.OutOfSyncError: it holds something else than the index says.
  """
  like: Any = _abstract(shared_model)
  # Orbax adds some, but not as much again: a liar fills no disk.
  budget = (1 << 20) + 2 * sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(like)
  )
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder, 'checkpoint')
    for name, digests in index.files.items():
      path = root / name
      path.parent.mkdir(parents=True, exist_ok=True)
      with open(path, 'wb') as file:
        for digest in digests:
          chunk = objects.fetch_chunk(bytes.fromhex(digest), sources, _CHUNK)
          budget -= len(chunk)
          if budget < 0:
            raise apply.OutOfSyncError(
              f'the checkpoint of round {index.round} is too large'
            )
          file.write(chunk)
    try:
      with checkpoint_lib.reading(like):
        tree: Any = ocp.load(str(root), like._asdict())
    except Exception as e:  # whatever Orbax makes of a stranger's files
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
  return apply.Place(index.round, bytes.fromhex(index.root), shared, past)


def _check_past(index: Index) -> None:
  """Raises ValueError unless the past leads to the root, which is checked."""
  root = bytes.fromhex(index.root)
  past = apply.links_from_json(index.past)
  for r, link in zip(range(index.round - 1, -1, -1), past, strict=False):
    if manifest_lib.extend(link.root, r, link.digest) != root:
      raise ValueError(f'round {r} of its past does not lead to {root.hex()}')
    root = link.root


def _abstract(
  shared_model: shared_state_lib.SharedModel,
) -> shared_state_lib.SharedState:
  """The shared state's shapes and shardings."""
  like = jax.eval_shape(shared_model.init)
  if shared_model.mesh is None:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    where = jax.tree.map(lambda _: here, like)
  else:
    where = sharding.shardings(like, shared_model.mesh)
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    like,
    where,
  )


def prune(objects: run_storage_lib.Objects, keep: int) -> int:
  """Deletes own checkpoints but the newest ones; chunks nobody names, too.

  Returns:
    The first round whose objects who joins may need: that of the oldest that
    is left, 0 while the run's beginning is nearer than `keep` checkpoints.
  """
  rounds = published(objects, objects.bucket)
  left = rounds[-keep:]
  if rounds[:-keep]:
    objects.bucket.delete(
      [objects.key('checkpoints', r) for r in rounds[:-keep]]
    )
    named = set()
    for r in left:
      key = objects.key('checkpoints', r)
      body = objects.bucket.get(key, _MAX_INDEX)[:-_SIGNATURE_BYTES]
      for digests in json.loads(body)['files'].values():
        named.update(digests)
    objects.forget_chunks(named)
  return left[0] if len(left) == keep else 0
