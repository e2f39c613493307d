"""A subnet in memory, under the real SDK's own `RpcSubstrate`.

It stands where the SDK's connection to a node would (JSON-RPC and SCALE), and
takes and gives what that does: decoded values, and the transport's own errors.
Everything above is the SDK's: reads, snapshots, intents, signing, errors; and
so is the codec of commitments.
"""

import asyncio
import collections
import copy
import hashlib
import json
from typing import Any

import bittensor as bt
from bittensor._generated import errors as catalog
from bittensor._transport import contract
from bittensor._transport import errors

from tests.chain import scale

GENESIS = 1_700_000_000  # Unix seconds
BLOCK_SECONDS = 12
HANG = 'hang'
DROPPED = errors.MaxRetriesExceeded('could not connect: no route to host')
RAO = 10**9
_MODULE_ERRORS = {info.name: info for info in catalog.ERRORS.values()}


class Subtensor:
  """The chain: the state after every block, and what goes wrong next.

  Attributes:
    state: what the next block will hold; tests may write to it.
    lag: how many blocks are not final yet.
    oldest: blocks before it are pruned.
    down: whether no node can be reached.
    faults: for each call to a node to come: None, an error, `HANG`, or an
      event to wait for first.
    dials: connections opened so far.
  """

  def __init__(self, netuid: int = 1):
    self.netuid = netuid
    self.lag = 0
    self.oldest = 0
    self.down = False
    self.dials = 0
    self.faults: collections.deque[Any] = collections.deque()
    self.sent: list[tuple[str, dict[str, Any]]] = []  # what was included
    self.nonces: collections.Counter[str] = collections.Counter()
    self.state: dict[str, Any] = {
      'neurons': [],
      'commitments': {},
      'revealed': {},
      'space': {},
      'weights': {},
      'MaxSpace': 3100,  # bytes that one hotkey may commit in an epoch
      'CommitRevealWeightsEnabled': False,
      'WeightsSetRateLimit': 0,
      'MinAllowedWeights': 0,
      'MaxWeightsLimit': 65535,
      'SubnetEpochConsensus': 'Yuma',
      'Tempo': 360,
      'RevealPeriodEpochs': 1,
      'LastEpochBlock': 0,
      'PendingEpochAt': 0,
      'SubnetEpochIndex': 0,
      'BlocksSinceLastStep': 0,
    }
    self.blocks: list[dict[str, Any]] = []
    self.step()

  @property
  def head(self) -> int:
    return len(self.blocks) - 1

  def step(self, blocks: int = 1) -> None:
    for _ in range(blocks):
      self.blocks.append(copy.deepcopy(self.state))

  def register(
    self,
    hotkey: str,
    stake: float = 0,
    validator: bool = False,
    uid: int | None = None,
  ) -> int:
    """In a block of its own; at the uid of another, who is thrown out."""
    neurons = self.state['neurons']
    uid = len(neurons) if uid is None else uid
    neurons[uid : uid + 1] = [
      {
        'hotkey': hotkey,
        'stake': round(stake * RAO),
        'permit': validator,
        'registered': len(self.blocks),
        'updated': len(self.blocks),
        'emission': 0,
      }
    ]
    self.step()
    return uid

  def pay(self, emission: dict[int, float]) -> None:
    """In TAO, or what the subnet has instead."""
    for uid, neuron in enumerate(self.state['neurons']):
      neuron['emission'] = round(emission.get(uid, 0) * RAO)
    self.step()

  def dial(self) -> '_Substrate':
    self.dials += 1
    return _Substrate(self)

  def hash(self, block: int) -> str:
    name = str(block).encode()
    return '0x' + hashlib.blake2b(name, digest_size=32).hexdigest()

  def number(self, block_hash: str | None) -> int:
    if block_hash is None:
      return self.head
    for block in range(len(self.blocks)):
      if self.hash(block) == block_hash:
        if block < self.oldest:
          raise errors.StateDiscardedError(block_hash)
        return block
    raise errors.SubstrateRequestException(
      {'error': {'code': 4003, 'message': 'Client error', 'data': 'unknown'}}
    )

  def execute(self, address: str, module: str, name: str, args: dict) -> str:
    """Does a call in the next block. Gives the name of its error, or ''."""
    run = getattr(self, f'_{name}')
    failed = run(address, **args)
    if not failed:
      self.sent.append((f'{module}.{name}', args))
    self.step()
    return failed

  def _uid(self, hotkey: str) -> int | None:
    found = [n['hotkey'] for n in self.state['neurons']]
    return found.index(hotkey) if hotkey in found else None

  def _set_commitment(self, hotkey: str, netuid: int, info: str) -> str:
    if netuid != self.netuid or self._uid(hotkey) is None:
      return 'AccountNotAllowedCommit'
    decoded = scale.decode_info(bytes.fromhex(info))
    ((kind, _),) = decoded['fields'][0].items()
    epoch = len(self.blocks) // self.state['Tempo']
    since, used = self.state['space'].get(hotkey, (epoch, 0))
    used = (used if since == epoch else 0) + max(100, int(kind[3:]))
    if used > self.state['MaxSpace']:
      return 'SpaceLimitExceeded'
    self.state['space'][hotkey] = epoch, used
    self.state['commitments'][hotkey] = {
      'deposit': 0,
      'block': len(self.blocks),
      'info': decoded,
    }
    return ''

  def _set_mechanism_weights(
    self, hotkey: str, netuid, mecid, dests, weights, version_key
  ) -> str:
    del netuid, mecid, version_key
    uid = self._uid(hotkey)
    neuron = self.state['neurons'][uid]
    if not neuron['permit']:
      return 'NeuronNoValidatorPermit'
    if any(u >= len(self.state['neurons']) for u in dests):
      return 'UidVecContainInvalidOne'
    neuron['updated'] = len(self.blocks)
    self.state['weights'][uid] = dict(zip(dests, weights, strict=True))
    return ''

  def _commit_timelocked_mechanism_weights(self, hotkey: str, **_) -> str:
    self.state['neurons'][self._uid(hotkey)]['updated'] = len(self.blocks)
    return ''


class _Substrate(bt.RpcSubstrate):
  """The SDK's, but for the node it talks to."""

  def __init__(self, chain: Subtensor):
    super().__init__('ws://in.memory')
    self._chain = chain

  def _interface(self, endpoint: str, fallbacks: list[str]) -> Any:
    del endpoint, fallbacks
    return _Node(self._chain)


class _Node:
  """A `bittensor._transport.SubstrateConnection`, as far as it is used."""

  def __init__(self, chain: Subtensor):
    self._chain = chain
    self._closed = False
    self._nonces: dict[str, int] = {}

  async def _rpc(self) -> None:
    if self._closed:
      raise errors.SubstrateRequestException('RPC session closed')
    if self._chain.down:
      raise DROPPED
    fault = self._chain.faults.popleft() if self._chain.faults else None
    if fault == HANG:
      await asyncio.Event().wait()
    if isinstance(fault, asyncio.Event):
      await fault.wait()
    elif fault is not None:
      raise fault

  async def initialize(self) -> None:
    await self._rpc()

  async def close(self) -> None:
    self._closed = True

  async def get_block_number(self, block_hash: str | None) -> int:
    await self._rpc()
    return self._chain.number(block_hash)

  async def get_finalized_block_number(self) -> int:
    await self._rpc()
    return self._chain.head - self._chain.lag

  async def get_block_hash(self, block: int) -> str:
    await self._rpc()
    if block > self._chain.head:
      raise errors.BlockNotFound(f'no block at height {block}')
    return self._chain.hash(block)

  async def get_chain_head(self) -> str:
    return await self.get_block_hash(self._chain.head)

  async def get_constant(self, module: str, name: str) -> Any:
    await self._rpc()
    return {('Aura', 'SlotDuration'): 1000 * BLOCK_SECONDS}[module, name]

  async def query(
    self, module: str, item: str, params: list, block_hash: str | None
  ) -> Any:
    await self._rpc()
    chain = self._chain
    block = chain.number(block_hash)
    state = chain.blocks[block]
    if (module, item) == ('Timestamp', 'Now'):
      return 1000 * (GENESIS + BLOCK_SECONDS * block)
    assert module == 'SubtensorModule', module
    if item == 'NetworksAdded':
      return params == [chain.netuid]
    assert params[0] == chain.netuid, params
    if item == 'Uids':
      found = [n['hotkey'] for n in state['neurons']]
      return found.index(params[1]) if params[1] in found else None
    if item == 'LastUpdate':
      return [n['updated'] for n in state['neurons']]
    return state[item]

  async def query_map(
    self, module: str, item: str, params: list, block_hash: str | None
  ) -> Any:
    await self._rpc()
    chain = self._chain
    state = chain.blocks[chain.number(block_hash)]
    if item == 'TokenSymbol':
      return _pages({chain.netuid: '0x' + 'β'.encode().hex()})
    assert params == [chain.netuid], params
    return _pages(
      {
        'CommitmentOf': state['commitments'],
        'RevealedCommitments': state['revealed'],
        'Uids': {n['hotkey']: i for i, n in enumerate(state['neurons'])},
      }[item]
    )

  async def runtime_call(
    self, api: str, method: str, params: list, block_hash: str | None
  ) -> Any:
    await self._rpc()
    assert (api, method) == ('SubnetInfoRuntimeApi', 'get_metagraph')
    chain = self._chain
    block = chain.number(block_hash)
    neurons = chain.blocks[block]['neurons']
    if params != [chain.netuid]:
      return None
    return {
      'netuid': chain.netuid,
      'name': [*b'covenant'],
      'symbol': [*'β'.encode()],
      'block': block,
      'tempo': 360,
      'last_step': 0,
      'blocks_since_last_step': block,
      'owner_hotkey': hotkeys(1)[0],
      'owner_coldkey': hotkeys(1)[0],
      'network_registered_at': 0,
      'num_uids': len(neurons),
      'max_uids': 256,
      'tao_in': 0,
      'alpha_in': 0,
      'moving_price': {'bits': 0},
      'hotkeys': [n['hotkey'] for n in neurons],
      'coldkeys': [n['hotkey'] for n in neurons],
      'validator_permit': [n['permit'] for n in neurons],
      'block_at_registration': [n['registered'] for n in neurons],
      'last_update': [n['updated'] for n in neurons],
      'emission': [n['emission'] for n in neurons],
      'alpha_stake': [0 for _ in neurons],
      'tao_stake': [0 for _ in neurons],
      'total_stake': [n['stake'] for n in neurons],
    }

  async def compose_call(
    self, call_module: str, call_function: str, call_params: dict
  ) -> contract.CallBytes:
    await self._rpc()
    args = {
      k: v.hex() if isinstance(v, bytes) else v for k, v in call_params.items()
    }
    if 'info' in args:
      args['info'] = scale.encode_info(args['info']).hex()
    data = json.dumps([call_module, call_function, args]).encode()
    return contract.CallBytes(data, spec_version=1)

  async def get_payment_info(self, call: Any, keypair: Any) -> dict:
    del call, keypair
    await self._rpc()
    return {'partial_fee': 0}

  async def create_signed_extrinsic(
    self, call: contract.CallBytes, keypair: Any, *, nonce: int | None, era: Any
  ) -> contract.SignedExtrinsic:
    await self._rpc()
    assert nonce is None and era['period'] == 16, era
    address = keypair.ss58_address
    if address in self._nonces:
      self._nonces[address] += 1
    else:
      self._nonces[address] = self._chain.nonces[address]
    body = json.dumps([address, self._nonces[address], call.data.decode()])
    signature = keypair.sign(body.encode())
    return contract.SignedExtrinsic(signature + body.encode(), '0x00')

  def clear_nonce_cache_for_account(self, address: str) -> None:
    self._nonces.pop(address, None)

  async def submit_extrinsic(
    self, extrinsic: contract.SignedExtrinsic, **waits: bool
  ) -> contract.InclusionReport:
    await self._rpc()
    assert all(waits.values()), waits
    signature, body = extrinsic.data[:64], extrinsic.data[64:]
    address, nonce, call = json.loads(body)
    chain = self._chain
    if not bt.sp_core.verify(body, signature, address):
      raise invalid('Transaction has a bad signature')
    if nonce != chain.nonces[address]:
      raise invalid('Transaction is outdated')
    chain.nonces[address] += 1
    failed = chain.execute(address, *json.loads(call))
    chain.step(chain.lag)  # until the block is final
    info = _MODULE_ERRORS.get(failed)
    message = info and {'type': 'Module', 'name': failed, 'docs': [info.docs]}
    return contract.InclusionReport(
      '0x00', finalized=True, is_success=not failed, error_message=message
    )


async def _pages(found: dict[Any, Any]):
  for item in found.items():
    yield item


def invalid(reason: str) -> errors.SubstrateRequestException:
  return errors.SubstrateRequestException(
    {'error': {'code': 1010, 'message': 'Invalid Transaction', 'data': reason}}
  )


def hotkeys(count: int) -> list[str]:
  """Addresses nobody has the keys of."""
  return [bt.sp_core.ss58_encode(bytes([i]) * 32, 42) for i in range(count)]
