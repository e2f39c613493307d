"""Several processes that act as one miner.

The devices of all its processes, called ranks, share the batch of an inner
step. Every rank runs the same program; rank 0 alone talks to chain and store
(ranked.py), and each result, or the error that came instead, is sent to all
ranks before any acts on it. So all take the same turns, and none waits for
another that has raised.

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

# Not public, but Flax and Orbax rely on it too: the store of the ranks' own
# coordinator, by which they find rank 0.
from jax._src import distributed

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
_KEY = 'covenant/ranks'
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
  """The processes of one miner, as seen by one of them.

  Args:
    index: the rank of this process.
    links: the connections of rank 0 to each other rank, or of another rank to
      rank 0.
    mesh: the devices of all ranks; None if one process is the miner.
  """

  def __init__(
    self,
    index: int = 0,
    links: Sequence[connection_lib.Connection] = (),
    mesh: jax.sharding.Mesh | None = None,
  ):
    self.index = index
    self.mesh = mesh
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

  def __enter__(self) -> 'ProcessGroup':
    return self

  def __exit__(self, *_: object) -> None:
    """Closes the links, so that no other rank waits for this one."""
    for link in self._links:
      link.close()

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


def require_single(network: config_lib.Network, role: str) -> None:
  """Raises ConfigError if a role that is one process is to be several."""
  if network.coordinator:
    raise config_lib.ConfigError(
      'network.coordinator: expected nothing, because only a miner, or an '
      f'emulation, can be several processes; got {network.coordinator!r} for a '
      f'{role}'
    )


def start(
  network: config_lib.Network, devices: config_lib.Devices | None = None
) -> ProcessGroup:
  """Returns the ranks that `network` describes, once all are there.

  Call it before anything else of JAX.

  Args:
    network: of the config.
    devices: of the mesh of a miner; None where the ranks share none.

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
  return ProcessGroup(jax.process_index(), _links(), _mesh(devices))


def _mesh(devices: config_lib.Devices | None) -> jax.sharding.Mesh | None:
  """Returns the mesh of all processes; no copy of the parameters spans two."""
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
  if processes > 1 and local % copy:
    raise config_lib.ConfigError(
      f'devices.fsdp * devices.tensor: expected a divisor of the {local} '
      f'devices of one process, which alone can share parameters, got {copy}'
    )
  if processes > 1 and devices.data not in (0, len(available) // copy):
    raise config_lib.ConfigError(
      f'devices.data: expected 0 (or {len(available) // copy}), for all '
      f'{len(available)} devices of {processes} processes to share the batch, '
      f'got {devices.data}'
    )
  return sharding.mesh(devices, available)


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
