"""Several processes that act as one miner, one validator or one sync.

The devices of all its processes, called ranks, share the batch of an inner
step, and may share the parameters. Every rank runs the same program; rank 0
alone talks to the chain and writes to the store (ranked.py), and each result,
or the error that came instead, is sent to all ranks before any acts on it. So
all take the same turns, and none waits for another that has raised.

  rank 0   broadcast -> chain or store -> result or error -> send -> act
  rank 1   broadcast ------------------------------------> receive -> act

The processes of an emulation (covenant/emulate/devices.py) are ranks as well;
each of them broadcasts the work of its own miners.

A rank that expects another broadcast than the sender has diverged from it, and
ends. When a rank ends, the others do: at once when they next send or receive,
and within `_HEARTBEAT_SECONDS` otherwise.
"""

import hashlib
import multiprocessing
import multiprocessing.connection as connection_lib
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

# Not public, but Flax and Orbax rely on it too: the store of the ranks' own
# coordinator, by which they find rank 0.
from jax._src import distributed
from jax.experimental import multihost_utils

from covenant import config as config_lib
from covenant import errors
from covenant import extras
from covenant import typing as ct
from covenant.chain import interface as chain_lib
from covenant.models import sharding
from covenant.store import interface as store_lib
from covenant.train import local as local_lib

with extras.needed('run'):
  import msgpack

_Result = TypeVar('_Result')

_HEARTBEAT_SECONDS = 30  # without a sign of life from a rank: all end
_SHUTDOWN_SECONDS = 30  # that a rank which ends waits for the others
_CONNECT_SECONDS = 300  # until all ranks are there
_NOTICE_SECONDS = 1.0  # until the link of a rank that has ended is closed
_KEY = 'covenant/ranks'
_PIECE = 1 << 24  # bytes of each rank that devices exchange at once
_ENDED = 'ended'  # beside the names of errors

# Errors of chain, store and training, by name, that every rank raises alike.
ERRORS: Mapping[str, type[Exception]] = {
  error.__name__: error
  for error in (
    chain_lib.ChainError,
    chain_lib.ChainRejectedError,
    chain_lib.ChainUnreachableError,
    config_lib.ConfigError,
    store_lib.AccessDeniedError,
    store_lib.ObjectExistsError,
    store_lib.MissingObjectError,
    store_lib.StoreError,
    store_lib.ObjectTooLargeError,
    store_lib.StoreUnavailableError,
    local_lib.DivergedError,
    ValueError,
  )
}


class MultihostError(errors.CovenantError):
  """This rank cannot continue because of another; the message says why."""


class ProcessGroup:
  """The processes of one node, as seen by one of them.

  Args:
    index: the rank of this process.
    links: the connections of rank 0 to each other rank, or of another rank to
      rank 0.
    mesh: the devices of all ranks; None if one process is the node.
    size: the number of ranks.
  """

  def __init__(
    self,
    index: int = 0,
    links: Sequence[connection_lib.Connection] = (),
    mesh: jax.sharding.Mesh | None = None,
    size: int = 1,
  ):
    self.index = index
    self.mesh = mesh
    self.size = max(size, len(links) + 1)
    self._links = links

  @property
  def is_single(self) -> bool:
    """True if there is no other process."""
    return not self._links

  def broadcast_from(
    self, rank: int, label: object, compute: Callable[[], _Result]
  ) -> _Result:
    """Returns on every rank what `compute` returns, or raises, on one.

    Args:
      rank: of the process that computes it. Rank 0 passes on the results of
        other ranks.
      label: plain values, equal on all ranks, that say what is computed.
      compute: is called on that rank alone. Returns None, a bool, a number,
        text, bytes, or tuples and dicts of them; a named tuple arrives as a
        tuple.

    Raises:
      Exception: what `compute` raised, one of `ERRORS`.
      MultihostError: another rank has ended, or this one is elsewhere.
    """
    if not self._links:
      return compute()
    mark = hashlib.blake2b(_pack(label), digest_size=16).digest()
    if self.index == rank:
      try:
        message = _answered(mark, compute)
      except BaseException as e:
        why = f'rank {rank} has ended: {type(e).__name__}: {e}'
        self._send(_pack((mark, _ENDED, why)))
        raise
      self._send(message)
    else:
      message = self._receive(rank)
      if not self.index:
        self._send(message, but=rank)
    theirs, error, content = _unpack(message)
    if error == _ENDED:
      raise MultihostError(content)
    if theirs != mark:
      raise MultihostError(
        f'rank {self.index} has diverged from rank {rank}, which is not at '
        f'{str(label)[:200]}. Start all ranks again, with one workdir that all '
        'can see'
      )
    if error:
      raise ERRORS[error](content)
    return content

  def gather(self, rank: int, make: Callable[[], bytes]) -> bytes:
    """Returns on rank 0 what `make` returns on another; b'' elsewhere."""
    if self.index == rank:
      self._send(make())
    return b'' if self.index else self._receive(rank)

  def exchange(self, data: bytes) -> list[bytes]:
    """Returns the bytes of every rank, which their devices exchange.

    All ranks call it alike. Nothing passes through the links of rank 0, and
    the devices hold a piece of each rank's bytes at a time.
    """
    if self.is_single:
      return [data]
    size = np.frombuffer(len(data).to_bytes(8, 'little'), np.uint8)
    sizes = [int(n.view('<u8')[0]) for n in _all_gather(size)]
    found, mine = [bytearray(n) for n in sizes], np.frombuffer(data, np.uint8)
    # Of few lengths, as each is a program.
    piece = min(_PIECE, 1 << max(max(sizes) - 1, 1).bit_length())
    for at in range(0, max(sizes), piece):
      some = mine[at : at + piece]
      pieces = _all_gather(np.pad(some, (0, piece - some.size)))
      for whole, of_rank in zip(found, pieces, strict=True):
        part = of_rank[: max(len(whole) - at, 0)]
        whole[at : at + part.size] = part.data
    return [bytes(whole) for whole in found]

  def __enter__(self) -> 'ProcessGroup':
    return self

  def __exit__(
    self, kind: object, error: BaseException | None, trace: object
  ) -> None:
    """Closes the links, so that no other rank waits for this one.

    Raises:
      MultihostError: another rank has ended, in place of what JAX says then.
    """
    is_of_jax = isinstance(error, jax.errors.JaxRuntimeError)
    ended = self._ended() if is_of_jax else []
    for link in self._links:
      link.close()
    if ended:
      raise MultihostError(
        f'rank {ended[0]} has ended; its log says why. Devices of this rank '
        f'waited for it: {str(error)[:200]}'
      ) from error

  def _ended(self) -> list[int]:
    """Returns the ranks whose links to this one are closed."""
    ended, first = [], 0 if self.index else 1
    connection_lib.wait(self._links, _NOTICE_SECONDS)
    for rank, link in enumerate(self._links, start=first):
      try:
        while link.poll():
          link.recv_bytes()
      except (EOFError, OSError):
        ended.append(rank)
    return ended

  def _receive(self, rank: int) -> bytes:
    """Returns the next message of a rank; rank 0 passes it on to the others."""
    near = 0 if self.index else rank
    try:
      return self._links[near - 1 if near else 0].recv_bytes()
    except (EOFError, OSError) as e:
      raise MultihostError(f'rank {near} has ended; its log says why') from e

  def _send(self, message: bytes, but: int = 0) -> None:
    """Sends to rank 0, or from there to all others but one."""
    first = 0 if self.index else 1
    for rank, link in enumerate(self._links, start=first):
      if self.index or rank != but:
        try:
          link.send_bytes(message)
        except OSError as e:
          raise MultihostError(
            f'rank {rank} has ended; its log says why'
          ) from e


def start(
  network: config_lib.Network, devices: config_lib.Devices | None = None
) -> ProcessGroup:
  """Returns the ranks that `network` describes, once all are there.

  Call it before anything else of JAX.

  Args:
    network: of the config.
    devices: of the mesh of a node; None where the ranks share none.

  Raises:
    ConfigError: they do not come together as described, or devices do not fit.
  """
  if not network.coordinator:
    return ProcessGroup(mesh=_mesh(devices))
  where: dict[str, ct.Json] = {}
  if network.coordinator != 'auto':
    where = {
      'coordinator_address': network.coordinator,
      'num_processes': network.processes,
      'process_id': network.process,
      'cluster_detection_method': 'deactivate',
    }
  try:
    jax.distributed.initialize(
      **where,
      initialization_timeout=_CONNECT_SECONDS,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
  except (RuntimeError, ValueError) as e:
    raise config_lib.ConfigError(f'network.coordinator: {e}') from e
  mesh, size = _mesh(devices), jax.process_count()
  return ProcessGroup(jax.process_index(), _links(), mesh, size)


def _mesh(devices: config_lib.Devices | None) -> jax.sharding.Mesh | None:
  """Returns the mesh of all processes.

  A copy of the parameters is on some devices of one process, or on all devices
  of several.
  """
  if devices is None:
    return None
  if devices.data == devices.fsdp == devices.tensor == jax.process_count() == 1:
    if devices.stage > 1:
      return sharding.mesh(devices, jax.devices())
    return None
  if devices.stage > 1:
    raise config_lib.ConfigError(
      'devices.stage: the stages of a miner are devices of one process; '
      f'expected 1 with {jax.process_count()} processes, got {devices.stage}'
    )
  available = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  copy = devices.fsdp * devices.tensor
  processes, local = jax.process_count(), jax.local_device_count()
  fits = len(available) % copy == 0 and (local % copy == 0 or copy % local == 0)
  if processes > 1 and not fits:
    raise config_lib.ConfigError(
      'devices.fsdp * devices.tensor: expected a divisor or a multiple of the '
      f'{local} devices of one process, and a divisor of all {len(available)}, '
      f'got {copy}'
    )
  if processes > 1 and devices.data not in (0, len(available) // copy):
    raise config_lib.ConfigError(
      f'devices.data: expected 0 (or {len(available) // copy}), for all '
      f'{len(available)} devices of {processes} processes to share the batch, '
      f'got {devices.data}'
    )
  return sharding.mesh(devices, available)


def _all_gather(x: np.ndarray) -> np.ndarray:
  """Returns an array with the `x` of each rank."""
  return np.asarray(multihost_utils.process_allgather(x))


def _links() -> list[connection_lib.Connection]:
  """Connects rank 0 with each other rank; returns this rank's links."""
  store: Any = distributed.global_state.client
  others = jax.process_count() - 1
  if jax.process_index():
    told = store.blocking_key_value_get_bytes(_KEY, 1000 * _CONNECT_SECONDS)
    port, secret = _unpack(told)
    address = str(distributed.global_state.coordinator_address)
    host = address.rpartition(':')[0]
    link = connection_lib.Client((host, port), authkey=secret)
    link.send_bytes(_pack(jax.process_index()))
    return [link]
  secret = secrets.token_bytes(32)
  # On all interfaces, as the coordinator; strangers do not know the secret.
  with connection_lib.Listener(
    ('', 0), backlog=max(others, 1), authkey=secret
  ) as listener:
    port = listener.address[1]
    store.key_value_set_bytes(_KEY, _pack((port, secret)))
    links = {}
    while len(links) < others:
      try:
        link = listener.accept()
        links[_unpack(link.recv_bytes())] = link
      except (multiprocessing.AuthenticationError, EOFError, OSError):
        continue
  return [links[rank] for rank in sorted(links)]


def _answered(mark: bytes, compute: Callable[[], object]) -> bytes:
  """Returns the message of a result or an error."""
  try:
    return _pack((mark, '', compute()))
  except tuple(ERRORS.values()) as e:
    return _pack((mark, *error_to_plain(e)))


def error_to_plain(error: Exception) -> tuple[str, str]:
  """Returns the name of an error's class, or of a known base, and its text."""
  names = (kind.__name__ for kind in type(error).__mro__)
  return next(name for name in names if name in ERRORS), str(error)


def _pack(plain: object) -> bytes:
  packed = msgpack.packb(plain)
  assert packed is not None
  return packed


def _unpack(data: bytes) -> ct.Json:
  return msgpack.unpackb(data, use_list=False, strict_map_key=False)
