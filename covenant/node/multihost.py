"""One miner as several processes, which do as one process would.

The devices of all its processes, called ranks, share the batch of an inner
step (covenant/train/local.py). Every rank runs the same program; rank 0 alone
talks to chain and store, and each answer, or the error that came instead,
is sent to all ranks before any acts on it. So all take the same turns, and
none waits for another that has raised.

  rank 0   ask -> chain or store -> answer or error -> tell -> act
  rank 1   ask -----------------------------------> hear -> act

The processes of an emulation (covenant/emulate/devices.py) are ranks as well;
each of them is asked what its own miners have made.

Who asks something else than rank 0 has drifted from it, and ends. When a rank
ends, the others do: at once when they next hear or tell, and within
`_HEARTBEAT_SECONDS` whatever they wait for.
"""

import hashlib
import multiprocessing
import multiprocessing.connection as connection_lib
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import msgpack

# Not public, but Flax and Orbax rely on it too: the store of the ranks' own
# coordinator, by which they find rank 0.
from jax._src import distributed

from covenant import config as config_lib
from covenant import errors
from covenant import proxy
from covenant.chain import interface as chain_lib
from covenant.models import sharding
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.train import local as local_lib

_Answer = TypeVar('_Answer')

_HEARTBEAT_SECONDS = 30  # without a sign of life from a rank: all end
_SHUTDOWN_SECONDS = 30  # that a rank which ends waits for the others
_CONNECT_SECONDS = 300  # until all ranks are there
_KEY = 'covenant/ranks'
_ENDED = 'ended'  # beside the names of errors

# What may be raised on every rank alike, by chain, store or training.
_ERRORS: Mapping[str, type[Exception]] = {
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
  """This rank cannot go on, because of another; the message says why."""


class ProcessGroup:
  """The processes of one miner, as seen by one of them.

  Args:
    index: of this one.
    links: of rank 0: to each other rank. Of another rank: to rank 0.
    mesh: of the devices of all ranks; None where one process is the miner.
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
  def alone(self) -> bool:
    """Whether there is no other."""
    return not self._links

  def ask(
    self, question: Any, answer: Callable[[], _Answer], rank: int = 0
  ) -> _Answer:
    """What `answer` returns or raises on one rank, on every rank.

    Args:
      question: what is asked, and of what: plain values, on all ranks equal.
      answer: called on the rank that is asked alone. Returns None, a bool, a
        number, text, bytes, or tuples and dicts of them; a named tuple comes
        as a tuple.
      rank: who is asked. Rank 0 passes the answer of another on.

    Raises:
      Exception: what `answer` raised, of `_ERRORS`.
      MultihostError: another rank has ended, or this one asks something else.
    """
    if not self._links:
      return answer()
    mark = hashlib.blake2b(_pack(question), digest_size=16).digest()
    if self.index == rank:
      try:
        message = _answered(mark, answer)
      except BaseException as e:
        why = f'rank {rank} has ended: {type(e).__name__}: {e}'
        self._tell(_pack((mark, _ENDED, why)))
        raise
      self._tell(message)
    else:
      message = self._hear(rank)
      if not self.index:
        self._tell(message, but=rank)
    theirs, error, content = _unpack(message)
    if error == _ENDED:
      raise MultihostError(content)
    if theirs != mark:
      raise MultihostError(
        f'rank {self.index} has drifted from rank {rank}, which is at '
        f'something else than {str(question)[:200]}. Start all ranks '
        'again, with one workdir that all can see'
      )
    if error:
      raise _ERRORS[error](content)
    return content

  def collect(self, rank: int, make: Callable[[], bytes]) -> bytes:
    """What `make` returns on another rank, on rank 0; elsewhere nothing."""
    if self.index == rank:
      self._tell(make())
    return b'' if self.index else self._hear(rank)

  def chain(self, connect: Callable[[], chain_lib.Chain]) -> chain_lib.Chain:
    """The chain to which `connect` leads rank 0; raises as that."""
    return _ranked_chain(self, connect) if self._links else connect()

  def objects(
    self, run: bytes, connect: Callable[[], run_storage_lib.RunStorage]
  ) -> run_storage_lib.RunStorage:
    """The objects of a run to which `connect` leads rank 0; raises as that."""
    return RankedStorage(self, run, connect) if self._links else connect()

  def __enter__(self) -> 'ProcessGroup':
    return self

  def __exit__(self, *_: object) -> None:
    """The others are not to wait for this one."""
    for link in self._links:
      link.close()

  def _hear(self, rank: int) -> bytes:
    """The next message of a rank; it comes from rank 0 but there."""
    near = 0 if self.index else rank
    try:
      return self._links[near - 1 if near else 0].recv_bytes()
    except (EOFError, OSError) as e:
      raise MultihostError(f'rank {near} has ended; its log says why') from e

  def _tell(self, message: bytes, but: int = 0) -> None:
    """Sends to all others, `but` one, from rank 0; else to rank 0."""
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
  """The ranks that `network` describes, once all are there.

  To be called before anything else of JAX.

  Args:
    network: of the config.
    devices: of the mesh of a miner; None where the ranks share none.

  Raises:
    ConfigError: they do not come together as described, or devices do not fit.
  """
  if not network.coordinator:
    return ProcessGroup(mesh=_mesh(devices))
  where: dict[str, Any] = {}
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
  """Of all processes, whose copies of the parameters each are of one."""
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
  """Connects rank 0 with each other one; as `ProcessGroup` takes them."""
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
  # Of all interfaces, as the coordinator itself; who knows no secret is out.
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


def _answered(mark: bytes, answer: Callable[[], Any]) -> bytes:
  """The message that says what `answer` came to."""
  try:
    return _pack((mark, '', answer()))
  except tuple(_ERRORS.values()) as e:
    return _pack((mark, *_to_plain(e)))


def _to_plain(error: Exception) -> tuple[str, str]:
  """An error as its class, or the next one that is known, and its text."""
  names = (kind.__name__ for kind in type(error).__mro__)
  return next(name for name in names if name in _ERRORS), str(error)


def _pack(plain: Any) -> bytes:
  packed = msgpack.packb(plain)
  assert packed is not None
  return packed


def _unpack(data: bytes) -> Any:
  return msgpack.unpackb(data, use_list=False, strict_map_key=False)


def _ranked_chain(
  process_group: ProcessGroup, connect: Callable[[], chain_lib.Chain]
) -> chain_lib.Chain:
  """Returns a chain that rank 0 asks."""
  chain: chain_lib.Chain | None = None  # of rank 0

  def first() -> tuple[str, float]:
    nonlocal chain
    chain = connect()
    return chain.hotkey, chain.block_seconds

  def call(method: str, *args: Any) -> Any:
    if method == 'set_weights':
      args = (dict(args[0]),)
    answer = process_group.ask(
      ('chain', method, args), lambda: getattr(chain, method)(*args)
    )
    match method:
      case 'peers':
        return tuple(chain_lib.Peer(*peer) for peer in answer)
      case 'commitments':
        return {uid: chain_lib.CommittedData(*c) for uid, c in answer.items()}
    return answer

  hotkey, block_seconds = process_group.ask('chain', first)
  return proxy.make(
    chain_lib.Chain, call, hotkey=hotkey, block_seconds=block_seconds
  )


def _ranked_bucket(
  process_group: ProcessGroup, connect: Callable[[], store_lib.Bucket | None]
) -> store_lib.Bucket:
  """Returns a bucket that rank 0 reads and writes.

  Its attribute `bucket` is a function that returns the bucket of rank 0.

  Raises:
    ValueError: `connect` finds none.
  """
  bucket: store_lib.Bucket | None = None  # of rank 0

  def first() -> str:
    nonlocal bucket
    bucket = connect()
    if bucket is None:
      raise ValueError('expected the location of a bucket that can be opened')
    return bucket.location

  location = process_group.ask('bucket', first)

  def call(method: str, *args: Any, **kwargs: Any) -> Any:
    answer = process_group.ask(
      (location, method, args, kwargs),
      lambda: getattr(bucket, method)(*args, **kwargs),
    )
    match method:
      case 'head':
        return store_lib.Info(*answer)
      case 'list':
        return [store_lib.Info(*info) for info in answer]
    return answer

  return proxy.make(
    store_lib.Bucket, call, location=location, bucket=lambda: bucket
  )


class RankedStorage(run_storage_lib.RunStorage):
  """Objects that rank 0 reads and writes."""

  def __init__(
    self,
    process_group: ProcessGroup,
    run: bytes,
    connect: Callable[[], run_storage_lib.RunStorage],
  ):
    self._process_group = process_group
    self._objects: run_storage_lib.RunStorage | None = None  # of rank 0

    def first() -> bytes:
      self._objects = connect()
      return self._objects.location

    location = process_group.ask('objects', first)
    super().__init__(
      run,
      _ranked_bucket(process_group, lambda: self._real.bucket),
      location,
      lambda data: _ranked_bucket(
        process_group, lambda: self._real.bucket_at(data)
      ),
    )

  @property
  def _real(self) -> run_storage_lib.RunStorage:
    assert self._objects is not None
    return self._objects

  def fetch(
    self,
    kind: str,
    round_index: int,
    refs: Sequence[run_storage_lib.ObjectRef],
    mirrors: Sequence[Any],
    limit: int,
  ) -> Mapping[bytes, bytes | store_lib.StoreError]:
    def answer() -> Mapping[bytes, Any]:
      buckets = [mirror.bucket() for mirror in mirrors]
      got = self._real.fetch(kind, round_index, refs, buckets, limit)
      return {
        digest: _to_plain(data) if isinstance(data, Exception) else data
        for digest, data in got.items()
      }

    question = ('fetch', kind, round_index, refs, limit)
    got: dict[bytes, Any] = {}
    for digest, data in self._process_group.ask(question, answer).items():
      is_error = isinstance(data, tuple)
      got[digest] = _ERRORS[data[0]](data[1]) if is_error else data
    return got

  def fetch_chunk(
    self, digest: bytes, sources: Sequence[Any], limit: int
  ) -> bytes:
    def answer() -> bytes:
      buckets = [source.bucket() for source in sources]
      return self._real.fetch_chunk(digest, buckets, limit)

    return self._process_group.ask(('fetch_chunk', digest, limit), answer)
