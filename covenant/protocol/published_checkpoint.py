"""Published checkpoints: the shared state in a validator's bucket.

A checkpoint is the bytes of every tensor, cut into pieces that are named by
their digests, so unchanged pieces are stored once and any mirror can serve
them. The signed index is put last: a checkpoint that can be found is complete.

Indexes come from strangers. The model says which tensors an index lists, and
how many pieces of how many bytes each has, so there is nothing in it that a
reader has to trust or to make room for. The fingerprint of a state is a hash of
the same digests. So whoever knows the fingerprint of a round, from a manifest
that the chain vouches for, knows whether an index is right before it fetches a
byte of the state.
"""

import collections
import json
import math
import pathlib
import re
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent import futures
from typing import NamedTuple

import jax
import numpy as np

from covenant import typing as ct
from covenant.models import sharding
from covenant.protocol import apply
from covenant.protocol import piece_files
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.train import pieces as pieces_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import amendment as amendment_lib

MOST_ROUNDS = 4  # newest checkpoints of a stranger that are looked at
_SIGNATURE_BYTES = 64
_PUTS = 8  # pieces that are put at the same time
_MALFORMED = (
  ValueError, TypeError, KeyError, AttributeError, RecursionError,
)  # fmt: skip
_NAME = re.compile(r'[A-Za-z0-9_.]{1,200}')
_HEX_64 = re.compile(r'[0-9a-f]{64}')
_HEX_32 = re.compile(r'[0-9a-f]{32}')


class Index(NamedTuple):
  """The signed description of a published checkpoint."""

  round: int
  root: str  # history root, hexadecimal
  fingerprint: str  # of the shared state
  files: dict[str, list[str]]  # tensor -> digests of its pieces
  amendments: list[
    ct.Json
  ] = []  # adopted before, see amendment.py; not if none

  @property
  def adopted(self) -> tuple[amendment_lib.Amendment, ...]:
    """The amendments that were adopted before it."""
    return amendment_lib.list_from_json(self.amendments)


class Layout(NamedTuple):
  """The tensors of a run's checkpoints, by name."""

  tensors: dict[str, jax.ShapeDtypeStruct]

  def pieces(self, name: str) -> int:
    """Returns the number of pieces of a tensor."""
    return -(-self.size(name) // pieces_lib.PIECE_BYTES)

  def size(self, name: str) -> int:
    """Returns the bytes of a tensor."""
    x = self.tensors[name]
    return math.prod(x.shape) * x.dtype.itemsize

  @property
  def index_bytes(self) -> int:
    """The most bytes of an index."""
    pieces = sum(self.pieces(name) for name in self.tensors)
    names = sum(len(name) + 10 for name in self.tensors)
    most = 1024 + amendment_lib.MAX_ADOPTED_BYTES
    return most + names + 70 * pieces


def layout(shared_model: shared_state_lib.SharedModel) -> Layout:
  """Returns the layout of a model's checkpoints."""
  tensors: ct.PyTree = shared_state_lib.named_leaves(_abstract(shared_model))
  return Layout(tensors)


def publish(
  storage: run_storage_lib.RunStorage,
  position: apply.Position,
  shared_model: shared_state_lib.SharedModel,
  sign: ct.Sign,
  check: Callable[[], None] = lambda: None,
) -> None:
  """Puts the shared state of a position into the own bucket.

  Pieces go from the shards of each tensor to the store, several at a time:
  nothing is written to a disk, and memory for some pieces is all that it takes.
  The rounds may go on meanwhile.

  Args:
    storage: the storage of the node.
    position: what is published; its arrays must not be changed.
    shared_model: the model of the run.
    sign: signs the index.
    check: called before each piece; what it raises ends the publication.

  Raises:
    StoreError: it is not published; pieces already put are used next time.
  """
  files: dict[str, list[str]] = {}
  known: set[bytes] = set()
  lock = threading.Lock()

  def put(piece: np.ndarray) -> str:
    check()
    data = piece.tobytes()
    digest = run_storage_lib.digest(data)
    with lock:
      is_new = digest not in known
      known.add(digest)
    if is_new:
      storage.put_once(storage.chunk_key(digest), data)
    return digest.hex()

  workers = _PUTS if storage.in_threads else 1
  with futures.ThreadPoolExecutor(workers) as pool:
    waiting = collections.deque[tuple[str, futures.Future[str]]]()
    try:
      for name, leaf in shared_state_lib.named_leaves(position.shared).items():
        files[name] = []
        for piece in pieces_lib.pieces(shared_model.host.load(leaf)):
          waiting.append((name, pool.submit(put, piece)))
          while len(waiting) > workers:
            of, done = waiting.popleft()
            files[of].append(done.result())
      for of, done in waiting:
        files[of].append(done.result())
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise
  put_index(storage, position, files, sign)


def put_index(
  storage: run_storage_lib.RunStorage,
  position: apply.Position,
  files: dict[str, list[str]],
  sign: ct.Sign,
) -> None:
  """Puts the signed index of a checkpoint whose pieces are in the own bucket.

  Args:
    storage: the storage of the node.
    position: what is published.
    files: the digests of the pieces of each tensor.
    sign: signs the index.
  """
  fingerprint = fingerprint_of(files, position.amendments)
  amendments = amendment_lib.list_to_json(position.amendments)
  index = Index(
    position.round, position.root.hex(), fingerprint, files, amendments
  )
  body = encode(index)
  storage.put_once(
    storage.key('checkpoints', position.round), body + sign(body)
  )


def published(
  storage: run_storage_lib.RunStorage, bucket: store_lib.Bucket
) -> list[int]:
  """Returns the rounds of the checkpoints in a bucket, in order."""
  return storage.rounds('checkpoints', bucket)


def encode(index: Index) -> bytes:
  """Returns the one encoding of an index, without its signature."""
  raw = index._asdict()
  if not index.amendments:  # as before there were any
    del raw['amendments']
  return json.dumps(raw, separators=(',', ':')).encode()


def decode(
  data: bytes,
  layout: Layout,
  hotkey: str,
  verify: Callable[[str, bytes, bytes], bool],
) -> Index:
  """Decodes the index of an untrusted peer.

  Args:
    data: the bytes.
    layout: of the run's checkpoints.
    hotkey: of the owner of the bucket.
    verify: returns whether a hotkey signed bytes: (hotkey, data, signature).

  Raises:
    apply.OutOfSyncError: it is not signed by `hotkey`, not in canonical form,
      not of this layout, or it contradicts itself.
  """
  if not _SIGNATURE_BYTES < len(data) <= layout.index_bytes + _SIGNATURE_BYTES:
    raise apply.OutOfSyncError(
      f'index of a checkpoint: expected up to {layout.index_bytes} bytes and '
      f'a signature, got {len(data)} bytes'
    )
  body, signature = data[:-_SIGNATURE_BYTES], data[-_SIGNATURE_BYTES:]
  if not verify(hotkey, body, signature):
    raise apply.OutOfSyncError(f'index of a checkpoint: not signed by {hotkey}')
  try:
    index = Index(**json.loads(body))
    _check(index, layout)
    if encode(index) != body:
      raise ValueError('not in canonical form')
  except _MALFORMED as e:
    raise apply.OutOfSyncError(
      f'index of a checkpoint: {type(e).__name__}: {str(e)[:200]}'
    ) from None
  return index


def _check(index: Index, layout: Layout) -> None:
  """Raises ValueError or TypeError unless an index is of a layout."""
  if type(index.round) is not int or not 0 <= index.round < 10**8:
    raise ValueError(f'expected a round, got {str(index.round)[:50]}')
  _match(_HEX_64, index.root)
  _match(_HEX_32, index.fingerprint)
  if type(index.files) is not dict:
    raise ValueError('expected an object `files`')
  for name in index.files:
    _match(_NAME, name)
  if index.files.keys() != layout.tensors.keys():
    different = sorted(index.files.keys() ^ layout.tensors.keys())
    raise ValueError(f'of another model, which differs in {different[0]!r}')
  for name, digests in index.files.items():
    if type(digests) is not list or len(digests) != layout.pieces(name):
      raise ValueError(f'{name}: expected {layout.pieces(name)} digests')
    for digest in digests:
      _match(_HEX_64, digest)
  if fingerprint_of(index.files, index.adopted) != index.fingerprint:
    raise ValueError('the fingerprint is not that of its pieces')


def _match(pattern: re.Pattern[str], text: object) -> None:
  if type(text) is not str or not pattern.fullmatch(text):
    raise ValueError(f'expected {pattern.pattern}, got {str(text)[:80]!r}')


def fingerprint_of(
  files: dict[str, list[str]],
  amendments: Sequence[amendment_lib.Amendment] = (),
) -> str:
  """Returns the fingerprint of a state by the digests of its pieces."""
  return shared_state_lib.amended_fingerprint(
    shared_state_lib.state_fingerprint(
      {name: list(map(bytes.fromhex, some)) for name, some in files.items()}
    ),
    [amendment.digest for amendment in amendments],
  )


def load(
  storage: run_storage_lib.RunStorage,
  index: Index,
  sources: Sequence[store_lib.Bucket],
  shared_model: shared_state_lib.SharedModel,
) -> apply.Position:
  """Loads the position that an index describes onto the model's devices.

  Tensors pass through files (piece_files.py). Where the storage has a folder,
  an attempt that breaks off is resumed at the piece.

  Args:
    storage: the storage of the node that asks.
    index: a checkpoint of this model, see `decode`.
    sources: buckets that may have the pieces.
    shared_model: the model of the run.

  Raises:
    StoreError: a piece cannot be had, or not be stored.
    apply.OutOfSyncError: the state in memory is not that of the index.
  """
  found = layout(shared_model)
  try:
    _check(index, found)
  except (ValueError, TypeError, KeyError) as e:
    raise apply.OutOfSyncError(f'index of a checkpoint: {e}') from None
  try:
    with piece_files.folder(storage) as folder:

      def leaf(name: str) -> jax.Array:
        path = pathlib.Path(folder, f'{name}.tensor')
        digests, size = index.files[name], found.size(name)
        abstract = found.tensors[name]
        wanted = piece_files.pieces_of_shards(abstract)
        try:
          piece_files.fetch(storage, digests, size, sources, path, wanted)
        except ValueError as e:
          raise apply.OutOfSyncError(
            f'the checkpoint of round {index.round}: {e}'
          ) from None
        return storage.on_disk(lambda: piece_files.place(path, abstract))

      places = [place.hex() for place in storage.locations(sources)]
      shared = shared_model.adopt(index.round, index.files, places, leaf)
  except OSError as e:
    raise store_lib.StoreError(
      f'the checkpoint of round {index.round} cannot be stored: {e}'
    ) from e
  root, adopted = bytes.fromhex(index.root), index.adopted
  place = apply.Position(index.round, root, shared, adopted)
  here = apply.fingerprint(shared_model, place)
  if here != index.fingerprint:
    raise apply.OutOfSyncError(
      f'the checkpoint of round {index.round} has the fingerprint {here} here, '
      f'not {index.fingerprint}: check the memory and the disk of this machine'
    )
  return place


def _abstract(
  shared_model: shared_state_lib.SharedModel,
) -> shared_state_lib.SharedState:
  """Returns the shapes and shardings of the shared state."""
  shapes = shared_model.abstract()
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


def prune(
  storage: run_storage_lib.RunStorage,
  keep: int,
  needed: Collection[int] = (),
) -> int:
  """Deletes own checkpoints but the newest ones, and unused pieces.

  At least two are kept: a joining node starts from one that later manifests
  vouch for. So are those of the rounds in `needed`, to which a run returns.

  Returns:
    The first round whose objects a joining node may need: the round of the
    oldest checkpoint left, or 0 while there are fewer than are kept.
  """
  keep = max(keep, 2)
  rounds = published(storage, storage.bucket)
  left = rounds[-keep:]
  kept = [r for r in rounds if r in left or r in needed]
  if gone := [r for r in rounds if r not in kept]:
    storage.bucket.delete([storage.key('checkpoints', r) for r in gone])
    named = set()
    for r in kept:
      key = storage.key('checkpoints', r)
      body = storage.bucket.get(key, 1 << 30)[:-_SIGNATURE_BYTES]
      try:
        for digests in json.loads(body)['files'].values():
          named.update(digests)
      except (*_MALFORMED, KeyError):  # a store that forgot bits
        storage.bucket.delete([key])
    storage.delete_chunks_except(named)
  return left[0] if len(left) == keep else 0
