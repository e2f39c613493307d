"""A stage as a process holds it: its state on disk, and its answers."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from covenant import files
from covenant import typing as ct
from covenant.optim import weight
from covenant.pool import messages
from covenant.pool import orders as orders_lib
from covenant.protocol import checksums
from covenant.protocol import run_storage as run_storage_lib
from covenant.train import pieces as pieces_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train.pipeline import stage as stage_lib
from covenant.train.pipeline import stage_bytes

# (order number, source) -> the sections of the stage's tensors.
FetchSections = Callable[[int, orders_lib.Source], list[bytes]]
# (digests of the pieces of each tensor, locations of buckets) -> their bytes.
LoadTensors = Callable[
  [Mapping[str, Sequence[str]], Sequence[str]], Mapping[str, bytes]
]
Answer = tuple[dict[str, ct.Json], bytes]


def begin_from(
  stage: stage_lib.Stage,
  pieces: Mapping[str, Sequence[str]],
  places: Sequence[str],
  load: LoadTensors,
) -> None:
  """Gives a stage the shared state of a checkpoint, or the run's first.

  Args:
    stage: the stage.
    pieces: the digests of the pieces of each tensor; none: the run's first.
    places: locations of buckets that have them, hexadecimal.
    load: returns the bytes of tensors.
  """
  if not pieces:
    stage.shared = stage.initial()
    return
  names = shared_state_lib.named_leaves(stage.shared)
  wanted = {name: [str(x) for x in pieces[name]] for name in names}
  stage.adopt(load(wanted, [str(x) for x in places]))


def load_tensors(
  objects: run_storage_lib.RunStorage,
  pieces: Mapping[str, Sequence[str]],
  places: Sequence[str],
) -> Mapping[str, bytes]:
  """Returns tensors of a published checkpoint; raises StoreError."""
  locations = [bytes.fromhex(x) for x in places]
  digests = [bytes.fromhex(x) for some in pieces.values() for x in some]
  got = objects.fetch_chunks(
    list(dict.fromkeys(digests)),
    objects.buckets_at(locations),
    pieces_lib.PIECE_BYTES,
  )
  return {
    name: b''.join(got[bytes.fromhex(x)] for x in some)
    for name, some in pieces.items()
  }


class StageKeeper:
  """One stage that a process holds: its state on disk, and its answers.

  Args:
    stage: the stage.
    path: the file of its state.
    genesis: the id of the state before the first order.
    fetch: returns sections of an order.
    load: returns the bytes of tensors of a checkpoint.
  """

  def __init__(
    self,
    stage: stage_lib.Stage,
    path: str | os.PathLike[str],
    genesis: str,
    fetch: FetchSections,
    load: LoadTensors,
  ):
    self._stage = stage
    self._path = path
    self._fetch, self._load = fetch, load
    self._index = stage.programs.index
    self._number, self._id, self._square = 0, genesis, 0.0
    self._done = 0  # microbatches of this inner step that have come back
    self._restore()

  def answer(
    self, text: dict[str, ct.Json], data: bytes
  ) -> tuple[dict[str, ct.Json], bytes] | None:
    """Does what a message says; returns the answer, if there is one.

    Raises:
      CovenantError: it cannot be done.
      KeyError, TypeError, ValueError, IndexError: it is malformed.
    """
    began = time.perf_counter()
    what = text['do']
    reply, sent = getattr(self, f'_do_{what}')(text, data) or (None, b'')
    if reply is None:
      return None
    reply['stage'] = self._index
    reply['seconds'] = time.perf_counter() - began
    return reply, sent

  def _do_take(self, text: dict[str, ct.Json], data: bytes):
    del text, data
    return self._at(), b''

  def _do_reset(self, text: dict[str, ct.Json], data: bytes):
    pieces = json.loads(data)
    begin_from(self._stage, pieces, text.get('places', ()), self._load)
    self._stage.private = self._stage.fresh()
    self._number, self._id = int(text['number']), str(text['id'])
    return self._at(), b''

  def _do_order(self, text: dict[str, ct.Json], data: bytes):
    order = orders_lib.decode(text, data)
    if (order.number, order.before) == (self._number, self._id):
      self._stage.follow(order.changes)
      sections = [self._fetch(order.number, s) for s in order.sources]
      update = stage_lib.StageUpdate(
        order.factors_RxP, order.parts_R, weight.totals(order.parts_R)
      )
      self._square = self._stage.apply(sections, update)
      self._number, self._id = order.number + 1, str(text['after'])
      self._save()
    return self._at(), b''

  def _do_begin(self, text: dict[str, ct.Json], data: bytes):
    self._stage.follow(text.get('changes', {}))
    tokens, rest = self._tokens(text, data)
    size = int(text['crossing'])
    crossing, rest, fits = rest[:size], rest[size:], {}
    for i, length in text['fits']:
      fits[int(i)], rest = rest[:length], rest[length:]
    crossed = int(text['crossed'])
    fit, sent = self._stage.begin(tokens, crossing, fits, crossed)
    self._done = 0
    return {'did': 'begun', 'fit': len(fit)}, fit + sent

  def _do_fit(self, text: dict[str, ct.Json], data: bytes) -> None:
    self._stage.add_fit(int(text['boundary']), data)

  def _do_look_up(self, text: dict[str, ct.Json], data: bytes):
    tokens, _ = self._tokens(text, data)
    return self._passed(text, 'looked_up'), self._stage.look_up(tokens)

  def _do_forward(self, text: dict[str, ct.Json], data: bytes):
    tokens, came = self._tokens(text, data)
    crossed = int(text['crossed'])
    sent = self._stage.forward(text['microbatch'], tokens, came, crossed)
    return self._passed(text, 'forward'), sent

  def _do_last(self, text: dict[str, ct.Json], data: bytes):
    tokens, came = self._tokens(text, data)
    crossed = int(text['crossed'])
    sent, nats = self._stage.last(
      text['microbatch'], tokens, came, crossed, text['divisor']
    )
    reply = self._passed(text, 'last') | {'nats': nats}
    if not self._stage.programs.has_ring:
      self._count(text, reply)
    return reply, sent

  def _do_backward(self, text: dict[str, ct.Json], data: bytes):
    sent = self._stage.backward(text['microbatch'], data)
    reply = self._passed(text, 'backward')
    self._count(text, reply)
    return reply, sent

  def _do_update(self, text: dict[str, ct.Json], data: bytes) -> None:
    del data
    self._done = 0
    self._stage.update(text['norm'], text['nats'], text['step'])

  def _do_abort(self, text: dict[str, ct.Json], data: bytes) -> None:
    del text, data
    self._done = 0
    self._stage.abort()

  def _do_seal(self, text: dict[str, ct.Json], data: bytes):
    del text, data
    sections, norm = self._stage.seal()
    sizes = [len(x) for x in sections]
    reply = {'did': 'sealed', 'sizes': sizes, 'norm': norm}
    return reply, b''.join(sections)

  def _at(self) -> dict[str, ct.Json]:
    return {
      'did': 'at',
      'number': self._number,
      'id': self._id,
      'digests': self._stage.digests(),
      'square': self._square,
    }

  def _passed(self, text: dict[str, ct.Json], what: str) -> dict[str, ct.Json]:
    return {
      'did': what,
      'microbatch': text['microbatch'],
      'attempt': text['attempt'],
    }

  def _count(self, text: dict[str, ct.Json], reply: dict[str, ct.Json]) -> None:
    """Adds the squares of the gradient after the last microbatch."""
    self._done += 1
    if self._done == text['count']:
      reply['squares'] = self._stage.squares()

  def _tokens(
    self, text: dict[str, ct.Json], data: bytes
  ) -> tuple[np.ndarray, bytes]:
    """Splits a message into tokens [b, L + 1] and what follows."""
    b = int(text['sequences'])
    width = self._stage.context + 1
    size = 4 * b * width
    tokens = np.frombuffer(data[:size], '<i4').astype(np.int32)
    return tokens.reshape(b, width), data[size:]

  def _restore(self) -> None:
    """Goes on from the file, if there is a whole one of this stage."""
    try:
      content = checksums.unseal(self._path)
    except FileNotFoundError:
      return
    except (OSError, checksums.ChecksumError) as e:
      print(f'{e}: the stage begins anew', file=sys.stderr, flush=True)
      return
    with contextlib.suppress(*messages.MALFORMED):
      text, data = messages.unpack(content)
      state = self._stage.shared, self._stage.private
      found = stage_bytes.from_bytes(data, state)
      self._stage.shared, self._stage.private = jax.tree.map(
        lambda x, old: (
          jax.numpy.asarray(x) if isinstance(old, jax.Array) else x
        ),
        found,
        state,
      )
      self._number, self._id = int(text['number']), str(text['id'])

  def _save(self) -> None:
    text = {'number': self._number, 'id': self._id}
    data = stage_bytes.to_bytes((self._stage.shared, self._stage.private))
    content = checksums.seal(messages.pack(text, data))
    files.write(self._path, content)
