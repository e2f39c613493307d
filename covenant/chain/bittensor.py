"""A subnet of Bittensor, through SDK 11, as one hotkey of a wallet sees it.

Only final blocks count: `head` is the newest final one (some 30 seconds behind
the newest of all), and a write is final once the call returns. So no answer is
ever taken back.

Stake and pay are in the subnet's own token, alpha; on the root subnet in TAO.
Commitments and weights cost no fee.
"""

import functools
import math
import secrets
from collections.abc import Awaitable, Mapping
from typing import TYPE_CHECKING, Any

from covenant import extras
from covenant import typing as ct
from covenant.chain import connection
from covenant.chain import interface
from covenant.chain import keys
from covenant.chain import session as session_lib
from covenant.chain import subnet as subnet_lib
from covenant.chain import yuma

# `bittensor` is slow to import, so only functions that talk to a chain do.
if TYPE_CHECKING:
  import bittensor as bt

_FULL = 'SpaceLimitExceeded'  # by commitments of one hotkey in one epoch
_KEPT = 32  # past blocks whose answers are kept, since they never change


class BittensorChain:
  """The `interface.Chain` of one subnet. Thread-safe; ends with `close`.

  Args:
    netuid: the subnet.
    network: a name the SDK knows (finney, test, local, ...) or the ws:// or
      wss:// address of a node.
    wallet_name: folder of the wallet.
    hotkey_name: file of its hotkey; sr25519, not encrypted.
    wallet_path: folder of all wallets.
    mechanism: the incentive mechanism of the subnet that weights are for.
    patience: deadlines.
    dial: opens a connection, a `bittensor.Substrate`. By default to the
      network, and to its public fallbacks and archives if it has any.

  Raises:
    ChainRejectedError: no such key, network or subnet; one line says which.
    ChainUnreachableError: the network does not answer.
  """

  def __init__(
    self,
    netuid: int,
    network: str,
    wallet_name: str,
    hotkey_name: str,
    wallet_path: str = '~/.bittensor/wallets',
    mechanism: int = 0,
    patience: connection.Patience | None = None,
    dial: connection.Dial | None = None,
  ):
    self._netuid = netuid
    self._mechanism = mechanism
    self._full_until = -1  # block until which commitments are refused
    self._keypair = (
      _read_hotkey(wallet_name, hotkey_name, wallet_path)
      if wallet_name
      else _new_hotkey()
    )
    self.hotkey: str = self._keypair.ss58_address
    self._final = -1  # newest block known to be final
    self._neurons = functools.lru_cache(_KEPT)(self._read_neurons)
    self._commitments = functools.lru_cache(_KEPT)(self._read_commitments)
    self._connection = connection.Connection(network, patience, dial)
    try:
      self.block_seconds: float = self._connection.read(
        f'subnet {netuid}', self._open
      )
    except BaseException:
      self.close()
      raise

  def close(self) -> None:
    """Closes the connection for good."""
    self._connection.close()

  def head(self) -> int:
    async def ask(session: session_lib.Session) -> int:
      self._final = max(self._final, await session_lib.finalized(session))
      return self._final

    return self._connection.read('head', ask)

  def block_hash(self, block: int) -> bytes:
    async def ask(session: session_lib.Session) -> bytes:
      await self._require(session, block)
      text = await session.substrate.block_hash(block)
      return bytes.fromhex(text.removeprefix('0x'))

    return self._connection.read(f'hash of block {block}', ask)

  def timestamp(self, block: int) -> float:
    async def ask(session: session_lib.Session) -> float:
      await self._require(session, block)
      return (await session.client.timestamp(block=block)).timestamp()

    return self._connection.read(f'time of block {block}', ask)

  def peers(self, block: int) -> tuple[interface.Peer, ...]:
    return tuple(neuron.peer for neuron in self._neurons(block))

  def commitments(self, block: int) -> dict[int, interface.CommittedData]:
    """See the interface; leaves out those that are not one plain field."""
    return dict(self._commitments(block))

  def _read_commitments(
    self, block: int
  ) -> tuple[tuple[int, interface.CommittedData], ...]:
    async def ask(
      session: session_lib.Session,
    ) -> tuple[tuple[int, interface.CommittedData], ...]:
      view = await self._view(session, block)
      # The SDK's own reader also reads what was sealed and revealed.
      committed = await view.query_map(
        ('Commitments', 'CommitmentOf'), [self._netuid]
      )
      uids = await view.query_map(('SubtensorModule', 'Uids'), [self._netuid])
      found, uid_of = {}, {str(hotkey): int(uid) for hotkey, uid in uids}
      for hotkey, record in committed:
        data = _plain(record)
        if str(hotkey) in uid_of and data is not None:
          found[uid_of[str(hotkey)]] = data
      return tuple(sorted(found.items()))

    return self._connection.read(f'commitments at block {block}', ask)

  def commit(self, data: bytes) -> None:
    """See the interface. The commitment is final: about a minute."""
    import bittensor as bt

    if len(data) > interface.MAX_COMMITMENT:
      raise interface.ChainRejectedError(
        f'commitment: expected at most {interface.MAX_COMMITMENT} bytes, '
        f'got {len(data)}; nothing was sent'
      )
    info: ct.Json = {'fields': [{f'Raw{len(data)}': '0x' + data.hex()}]}
    call = bt.calls.Commitments.set_commitment(netuid=self._netuid, info=info)

    def send(session: session_lib.Session) -> 'Awaitable[bt.ExtrinsicResult]':
      return session.client.submit_call(
        call, self._keypair, period=connection.VALID_BLOCKS
      )

    self.uid()  # names the problem if there is one, and reconnects
    head = self.head()
    if head < self._full_until:
      raise self._full(head)
    try:
      self._connection.write('commitment', send)
    except interface.ChainRejectedError as e:
      if getattr(e.__cause__, 'name', '') != _FULL:
        raise
      self._full_until = self._next_epoch() or head + 1
      raise self._full(head) from e

  def _full(self, head: int) -> interface.ChainRejectedError:
    wait = self._full_until - head
    return interface.ChainRejectedError(
      f'commitment: refused by {self._connection.where}: this hotkey has used '
      'up the space of this epoch (Space Limit Exceeded); the next epoch '
      f'begins in {wait} blocks, and the commitment is tried again then. '
      'Lower the tempo of the subnet or raise phases.round_blocks: see '
      '--role=doctor'
    )

  def _next_epoch(self) -> int | None:
    """Returns the first block of the next epoch; None if nobody says."""
    call = ('SubnetInfoRuntimeApi', 'get_next_epoch_start_block')

    async def ask(session: session_lib.Session) -> int | None:
      return await session.client.runtime(call, [self._netuid])

    try:
      return self._connection.read('next epoch', ask)
    except interface.ChainError:
      return None

  def set_weights(self, weights: Mapping[int, float]) -> None:
    """See the interface; sealed first if the subnet requires that."""
    import bittensor as bt

    for uid, weight in weights.items():
      if not (math.isfinite(weight) and weight >= 0):
        raise interface.ChainRejectedError(
          f'weights: expected finite numbers from 0, got {weight} for uid {uid}'
        )
      if not 0 <= uid <= yuma.U16:
        raise interface.ChainRejectedError(
          f'weights: expected uids from 0 to {yuma.U16}, got {uid}'
        )

    async def send(session: session_lib.Session) -> 'bt.ExtrinsicResult':
      version = await subnet_lib.version_key(session, self._netuid)
      intent = bt.SetWeights(
        netuid=self._netuid,
        weights=dict(weights),
        mechid=self._mechanism,
        version_key=version,
      )
      return await session.client.execute(
        intent, self._keypair, period=connection.VALID_BLOCKS
      )

    self.uid()  # as above
    self._connection.write('weights', send)

  def check_weights(
    self, weights: Mapping[int, float], sent: int
  ) -> str | None:
    head, uid = self.head(), self.uid()
    stake = {peer.uid: peer.stake for peer in self.peers(head)}.get(uid, 0.0)
    mine = subnet_lib.Sent(dict(weights), sent, uid, stake)
    return self._connection.read(
      'weights',
      lambda session: subnet_lib.check_weights(
        session, self._netuid, self._mechanism, mine, head
      ),
    )

  def subnet(self, age: int = 0) -> interface.Subnet | None:
    head = self.head()
    rules = self._connection.read(
      'rules of the subnet',
      lambda session: subnet_lib.read(
        session, self._netuid, self._keypair, head, self._mechanism
      ),
    )
    if not age:
      return rules
    try:
      self.peers(max(head - age, 0))
    except interface.ChainRejectedError:
      return rules
    return rules._replace(oldest=max(head - age, 0))

  def earned(self, block: int) -> dict[int, float]:
    """Returns the pay of the last epoch, in alpha."""
    return {n.peer.uid: n.pay for n in self._neurons(block)}

  def sign(self, data: bytes) -> bytes:
    """Signs with sr25519; 64 bytes that differ every time."""
    return self._keypair.sign(bytes(data))

  def verify(self, hotkey: str, data: bytes, signature: bytes) -> bool:
    """See the interface; accepts b'<Bytes>' + data + b'</Bytes>' as well."""
    from bittensor import sp_core

    try:
      return keys.is_address(hotkey) and sp_core.verify(data, signature, hotkey)
    except Exception:  # of malformed input: no signature
      return False

  def uid(self) -> int:
    """Returns the own uid at the newest block.

    Raises:
      ChainRejectedError: the hotkey is not registered on the subnet.
    """

    async def ask(session: session_lib.Session) -> int:
      uid = await session.client.query(
        ('SubtensorModule', 'Uids'), [self._netuid, self.hotkey]
      )
      if uid is None:
        raise interface.ChainRejectedError(
          f'hotkey {self.hotkey} is not registered on subnet {self._netuid} '
          f'of {self._connection.where}; register it: '
          f'btcli subnets register --netuid {self._netuid}'
        )
      return int(uid)

    return self._connection.read('registration', ask)

  def _read_neurons(self, block: int) -> tuple[subnet_lib.Neuron, ...]:
    async def ask(
      session: session_lib.Session,
    ) -> tuple[subnet_lib.Neuron, ...]:
      view = await self._view(session, block)
      graph = await view.subnets.metagraph(self._netuid, commitments=False)
      if graph is None:
        raise self._no_subnet(f' at block {block}')
      return tuple(map(subnet_lib.neuron, graph.neurons))

    return self._connection.read(f'peers at block {block}', ask)

  async def _open(self, session: session_lib.Session) -> float:
    """Returns the seconds per block; checks that the subnet exists."""
    item = ('SubtensorModule', 'NetworksAdded')
    if not await session.client.query(item, [self._netuid]):
      raise self._no_subnet('')
    return await session.client.block_time()

  def _no_subnet(self, when: str) -> interface.ChainRejectedError:
    return interface.ChainRejectedError(
      f'netuid: {self._connection.where} has no subnet {self._netuid}{when}; '
      'see btcli subnets list'
    )

  async def _view(self, session: session_lib.Session, block: int) -> Any:
    """Returns the SDK's view of a final block."""
    await self._require(session, block)
    return await session.client.at(block)

  async def _require(self, session: session_lib.Session, block: int) -> None:
    """Raises ChainRejectedError unless the block is final."""
    if block > self._final:
      self._final = max(self._final, await session_lib.finalized(session))
    if not 0 <= block <= self._final:
      raise interface.ChainRejectedError(
        f'block {block} of {self._connection.where} is not there yet; '
        f'the newest final one is {self._final}'
      )


def _new_hotkey() -> Any:
  """Returns a key that nobody has registered, of a node that only reads."""
  with extras.needed('network'):
    from bittensor import sp_core

  return sp_core.Keypair.create_from_seed(secrets.token_bytes(32))


def _read_hotkey(wallet: str, hotkey: str, path: str) -> Any:
  """Reads the key of a file; no error quotes its content."""
  with extras.needed('network'):
    import bittensor as bt

  for name in (wallet, hotkey):
    if not name or '/' in name:
      raise interface.ChainRejectedError(
        f'hotkey: expected the names of a wallet and a hotkey, got {name!r}'
      )
  file = bt.Wallet(wallet, hotkey, path).hotkey_file
  try:
    if file.is_encrypted():  # the SDK would ask for the password, and wait
      raise interface.ChainRejectedError(
        f'hotkey: {file.path} is encrypted, and a node cannot ask for the '
        'password; use a hotkey that is not'
      )
    keypair = file.get_keypair()
    keypair.sign(b'')
  except FileNotFoundError:
    raise interface.ChainRejectedError(
      f'hotkey: no file {file.path}; check the names of wallet and hotkey, '
      'or make one: btcli wallet new-hotkey'
    ) from None
  except OSError as e:
    raise interface.ChainRejectedError(
      f'hotkey: cannot read {file.path}: {e.strerror}'
    ) from None
  except interface.ChainRejectedError:
    raise
  except Exception:  # whatever the SDK finds in the file
    raise interface.ChainRejectedError(
      f'hotkey: {file.path} does not hold a secret key'
    ) from None
  if keypair.crypto_type != bt.CRYPTO_SR25519:
    raise interface.ChainRejectedError(
      f'hotkey: {file.path} is not an sr25519 key; make one: '
      'btcli wallet new-hotkey'
    )
  return keypair


def _plain(record: Any) -> interface.CommittedData | None:
  """Returns a commitment with one `Raw` field; None for any other.

  Strangers choose what a record holds, and the SDK how it is shown.
  """
  try:
    (field,) = record['info']['fields']
    ((kind, value),) = field.items()
    if kind == 'Raw0':  # which the SDK decodes as an empty list
      data = b''
    elif kind.startswith('Raw') and kind[3:].isdecimal():
      data = bytes.fromhex(value.removeprefix('0x'))
    else:
      return None
    return interface.CommittedData(int(record['block']), data)
  except (AttributeError, LookupError, TypeError, ValueError):
    return None
