"""Checkpoints of strangers that ask a node for more than the model has.

Each case returns how much was tried and how much got through.
"""

import contextlib
import json
import pathlib
import tracemalloc
from typing import Any

from covenant import config as config_lib
from covenant.chain import keys
from covenant.protocol import apply
from covenant.protocol import published_checkpoint
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import bucket as bucket_lib
from covenant.store import interface as store_lib
from covenant.store import location as location_lib
from covenant.train import pieces
from covenant.train import shared_state

Config = config_lib.Config
_KEY = keys.Key.from_seed(bytes([1]) * 32)
_MOST_MEMORY = 1 << 20  # bytes that an index may take while it is refused


def hostile_indexes(config: Config, folder: pathlib.Path) -> tuple[int, int]:
  """Signs indexes of checkpoints that ask for more than the model has."""
  model = shared_state.SharedModel(config)
  layout = published_checkpoint.layout(model)
  names = list(layout.tensors)
  files_of = {name: ['00' * 32] * layout.pieces(name) for name in names}

  def encode(some: Any) -> bytes:
    index: Any = {'round': 4, 'root': '00' * 32, 'fingerprint': '00' * 16}
    with contextlib.suppress(AttributeError, TypeError, ValueError):
      index['fingerprint'] = published_checkpoint.fingerprint_of(some)
    return json.dumps(index | {'files': some}, separators=(',', ':')).encode()

  bodies = [
    *(
      encode(files_of | {name: ['00' * 32] * n})
      for name in names
      for n in (0, 2, 1000, 100_000)
    ),
    *(encode(files_of | {f'{names[0]}.{n}': []}) for n in range(3)),
    *(encode({'/'.join('a' * n): []}) for n in (2, 300, 1200)),
    encode(files_of | {names[0]: '00' * 32}),
    encode(files_of | {names[0]: ['00' * 31]}),
    encode({'a': {'b': [1 << 28]}}),
    b'[' * 100_000,
    b'{"files":' * 5000,
    b'[' + b'1,' * (1 << 20) + b'1]',
    b'9' * 5000,
  ]
  through = 0
  address, honest = _KEY.address, encode(files_of)
  data = honest + _KEY.sign(honest)
  published_checkpoint.decode(data, layout, address, keys.verify)
  for body in bodies:
    data = body + _KEY.sign(body)
    tracemalloc.start()
    try:
      published_checkpoint.decode(data, layout, address, keys.verify)
      through += 1
    except apply.OutOfSyncError:
      through += tracemalloc.get_traced_memory()[1] > _MOST_MEMORY
    finally:
      tracemalloc.stop()
  return len(bodies), through


def hostile_pieces(config: Config, folder: pathlib.Path) -> tuple[int, int]:
  """Publishes pieces that are longer or shorter than their tensors."""
  model = shared_state.SharedModel(config)
  layout = published_checkpoint.layout(model)
  place = apply.Position(1, bytes(32), model.init())
  storage = _storage(folder)
  published_checkpoint.publish(storage, place, model, _KEY.sign)
  data = storage.bucket.get(storage.key('checkpoints', 1), 1 << 24)
  address, sources = _KEY.address, [storage.bucket]
  index = published_checkpoint.decode(data, layout, address, keys.verify)
  published_checkpoint.load(storage, index, sources, model)  # the honest one
  tried = through = 0
  name = max(layout.tensors, key=layout.size)
  size = layout.size(name)
  for length in (1, size - 1, size + 1, 2 * size, pieces.PIECE_BYTES + 1):
    piece = b'x' * length
    digest = run_storage_lib.digest(piece)
    storage.put_once(storage.chunk_key(digest), piece)
    changed = index.files | {name: [digest.hex()]}
    fingerprint = published_checkpoint.fingerprint_of(changed)
    false = index._replace(files=changed, fingerprint=fingerprint)
    tried += 1
    with contextlib.suppress(apply.OutOfSyncError, store_lib.StoreError):
      published_checkpoint.load(storage, false, sources, model)
      through += 1
  return tried, through


def _storage(folder: pathlib.Path) -> run_storage_lib.RunStorage:
  location = location_lib.Location('file', str(folder / 'bucket'))
  bucket = bucket_lib.open_bucket(location)
  return run_storage_lib.RunStorage(b'r' * 16, bucket, b'', lambda data: bucket)
