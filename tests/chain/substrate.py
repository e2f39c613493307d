"""A subnet in memory, as a node of subtensor stores it.

The state of every block is SCALE under the storage keys of a real runtime
(runtime.py); calls arrive as signed extrinsics and obey the rules of subtensor
that nodes meet. node.py answers for it.
"""

import collections
import copy
import hashlib
from typing import Any, NamedTuple

import bittensor as bt

from tests.chain import runtime as runtime_lib

GENESIS = 1_700_000_000  # Unix seconds
BLOCK_SECONDS = 0.25  # of the node whose metadata this is
RAO = 10**9


class Block(NamedTuple):
  """A block and the state after it."""

  spec: int  # of the runtime that made it
  storage: dict[bytes, bytes]
  neurons: list[dict[str, Any]]
  extrinsics: list[bytes]


class InvalidTransactionError(Exception):
  """The pool does not take it."""


class Subtensor:
  """The chain: the state after every block.

  Attributes:
    state: what the next block will hold; tests may write to it.
    lag: how many blocks are not final yet.
    oldest: blocks before it are pruned.
    spec: the runtime of the blocks to come.
    sent: the calls that were included and succeeded.
  """

  def __init__(self, netuid: int = 1, spec: int = runtime_lib.LATER):
    self.netuid = netuid
    self.spec = spec
    self.lag = 0
    self.oldest = 0
    self.genesis: float = GENESIS
    self.sent: list[tuple[str, dict[str, Any]]] = []
    self.nonces: collections.Counter[str] = collections.Counter()
    self.state: dict[str, Any] = {
      'neurons': [],
      'commitments': {},
      'space': {},
      'weights': {},  # uid -> {uid: u16}
      'sealed': [],  # (uid, block), not revealed
      'owner': None,  # hotkey
      'MaxSpace': 3100,  # bytes that one hotkey may commit in an epoch
      'StakeThreshold': 0,
      # Of the subnet:
      'CommitRevealWeightsEnabled': False,
      'WeightsSetRateLimit': 0,
      'WeightsVersionKey': 0,
      'MinAllowedWeights': 0,
      'MaxWeightsLimit': 65535,
      'Tempo': 360,
      'RevealPeriodEpochs': 1,
      'LastEpochBlock': 0,
      'PendingEpochAt': 0,
      'SubnetEpochIndex': 0,
      'BlocksSinceLastStep': 0,
      'MechanismCountCurrent': 1,
      'MaxAllowedValidators': 64,
      'ImmunityPeriod': 4096,
      'SubnetworkN': 0,
    }
    self.blocks: list[Block] = []
    self.step()

  @property
  def head(self) -> int:
    return len(self.blocks) - 1

  @property
  def runtime(self) -> runtime_lib.Runtime:
    return runtime_lib.of(self.spec)

  def step(
    self,
    blocks: int = 1,
    extrinsics: list[bytes] | None = None,
    outcomes: list[dict[str, Any] | None] | None = None,
  ) -> None:
    for _ in range(blocks):
      storage = self._encoded(outcomes or [])
      neurons = copy.deepcopy(self.state['neurons'])
      self.blocks.append(Block(self.spec, storage, neurons, extrinsics or []))

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
    for neuron in neurons[uid : uid + 1]:
      self.state['commitments'].pop(neuron['hotkey'], None)
    self.state['weights'].pop(uid, None)
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

  def swap(self, old: str, new: str) -> None:
    """A hotkey swap: the uid and the registration stay, a commitment not."""
    uid = self._uid(old)
    self.state['neurons'][uid]['hotkey'] = new
    self.state['commitments'].pop(old, None)
    self.step()

  def pay(self, emission: dict[int, float]) -> None:
    """In TAO, or what the subnet has instead."""
    for uid, neuron in enumerate(self.state['neurons']):
      neuron['emission'] = round(emission.get(uid, 0) * RAO)
    self.step()

  def reveal(self, uid: int, weights: dict[int, int], version: int) -> str:
    """Reveals sealed weights at once; returns what the chain would log."""
    hotkey = self.state['neurons'][uid]['hotkey']
    failed = self._weights_error(hotkey, weights, version)
    if not failed:
      self.state['weights'][uid] = dict(weights)
    self.state['sealed'] = [s for s in self.state['sealed'] if s[0] != uid]
    self.step()
    return failed

  def hash(self, block: int) -> str:
    name = str(block).encode()
    return '0x' + hashlib.blake2b(name, digest_size=32).hexdigest()

  def number(self, block_hash: str | None) -> int | None:
    """The block of a hash; None if there is none."""
    if block_hash is None:
      return self.head
    found = (b for b in range(len(self.blocks)) if self.hash(b) == block_hash)
    return next(found, None)

  def metagraph(self, block: int) -> dict[str, Any]:
    neurons = self.blocks[block].neurons

    def column(name: str) -> list[Any]:
      return [n[name] for n in neurons]

    return {
      'netuid': self.netuid,
      'name': [*b'covenant'],
      'symbol': [*'β'.encode()],
      'owner_hotkey': hotkeys(1)[0],
      'owner_coldkey': hotkeys(1)[0],
      'block': block,
      'tempo': self.state['Tempo'],
      'num_uids': len(neurons),
      'max_uids': 256,
      'hotkeys': column('hotkey'),
      'coldkeys': column('hotkey'),
      'identities': [None for _ in neurons],
      'validator_permit': column('permit'),
      'block_at_registration': column('registered'),
      'last_update': column('updated'),
      'emission': column('emission'),
      'total_stake': column('stake'),
      'alpha_stake': column('stake'),
      'tao_stake': [0 for _ in neurons],
    }

  def submit(self, extrinsic: bytes) -> str:
    """Includes it in the next block, and makes that final; the block's hash.

    Raises:
      InvalidTransactionError: the pool does not take it.
    """
    found = self.runtime.codec.decode_extrinsic(extrinsic, True)
    address, nonce = found['address'], found['nonce']
    if nonce != self.nonces[address]:
      raise InvalidTransactionError('Transaction is outdated')
    self._verify(extrinsic, found)
    self.nonces[address] += 1
    call = found['call']
    module, name = call['call_module'], call['call_function']
    args = {arg['name']: arg['value'] for arg in call['call_args']}
    error = getattr(self, f'_{name}')(address, **args)
    if not error:
      self.sent.append((f'{module}.{name}', args))
    outcome = self.runtime.error(module, error) if error else None
    # The first extrinsic of a block is the time.
    self.step(extrinsics=[b'\0', extrinsic], outcomes=[None, outcome])
    included = self.head
    self.step(self.lag)
    return self.hash(included)

  def _verify(self, extrinsic: bytes, found: dict[str, Any]) -> None:
    """Checks the signature over the payload, as the runtime builds it."""
    start = {0: 1, 1: 2, 2: 4}[extrinsic[0] & 3]  # the length
    rest = extrinsic[start + 1 + 33 + 65 :]  # version, signer, signature
    era: Any = '00'
    birth = 0
    if rest[0]:
      word = int.from_bytes(rest[:2], 'little')
      period = 2 << (word % 16)
      phase = (word >> 4) * max(period >> 12, 1)
      era = {'period': period, 'phase': phase}
      birth = (max(self.head, phase) - phase) // period * period + phase
    fields = {
      'era': era,
      'nonce': found['nonce'],
      'tip': 0,
      'tip_asset_id': None,
      'genesis_hash': bytes.fromhex(self.hash(0)[2:]),
      'era_block_hash': bytes.fromhex(self.hash(birth)[2:]),
      'metadata_hash': None,
    }
    extra, _ = self.runtime.codec.signature_payload_parts(**fields)
    call = rest[len(extra) :]
    payload = bytes(self.runtime.codec.signature_payload(call, **fields))
    ((_, signature),) = found['signature'].items()
    signed = bytes.fromhex(signature.removeprefix('0x'))
    if not bt.sp_core.verify(payload, signed, found['address']):
      raise InvalidTransactionError('Transaction has a bad signature')

  def _encoded(self, outcomes: list[dict[str, Any] | None]) -> dict:
    state, subnet, codec = self.state, [self.netuid], self.runtime
    storage: dict[bytes, bytes] = {}

    def put(item, params, value, pallet='SubtensorModule'):
      key = codec.key(pallet, item, params)
      storage[key] = codec.value(pallet, item, value)

    block, neurons = len(self.blocks), state['neurons']
    put(
      'Now',
      [],
      round(1000 * (self.genesis + BLOCK_SECONDS * block)),
      'Timestamp',
    )
    put('NetworksAdded', subnet, True)
    put('TokenSymbol', subnet, [*'β'.encode()])
    for item, value in state.items():
      if item in ('MaxSpace', 'StakeThreshold'):
        pallet = 'Commitments' if item == 'MaxSpace' else 'SubtensorModule'
        put(item, [], value, pallet)
      elif item[0].isupper():
        put(item, subnet, value)
    for uid, neuron in enumerate(neurons):
      put('Uids', [*subnet, neuron['hotkey']], uid)
      put('Keys', [*subnet, uid], neuron['hotkey'])
    put('ValidatorPermit', subnet, [n['permit'] for n in neurons])
    put('LastUpdate', subnet, [n['updated'] for n in neurons])
    for uid, weights in state['weights'].items():
      put('Weights', [*subnet, uid], list(weights.items()))
    for hotkey, info in state['commitments'].items():
      put('CommitmentOf', [*subnet, hotkey], info, 'Commitments')
    if state['owner']:
      put('SubnetOwnerHotkey', subnet, state['owner'])
    if outcomes:
      key = codec.key('System', 'Events', [])
      storage[key] = codec.events(outcomes)
    return storage

  def _uid(self, hotkey: str) -> int | None:
    found = [n['hotkey'] for n in self.state['neurons']]
    return found.index(hotkey) if hotkey in found else None

  def _set_commitment(self, hotkey: str, netuid: int, info: Any) -> str:
    if netuid != self.netuid or self._uid(hotkey) is None:
      return 'AccountNotAllowedCommit'
    ((kind, _),) = info['fields'][0].items()
    epoch = len(self.blocks) // self.state['Tempo']
    since, used = self.state['space'].get(hotkey, (epoch, 0))
    used = (used if since == epoch else 0) + max(100, int(kind[3:]))
    if used > self.state['MaxSpace']:
      return 'SpaceLimitExceeded'
    self.state['space'][hotkey] = epoch, used
    self.state['commitments'][hotkey] = {
      'deposit': 0,
      'block': len(self.blocks),
      'info': info,
    }
    return ''

  def _weights_error(
    self, hotkey: str, weights: dict[int, int], version: int
  ) -> str:
    """The checks of weights, which a reveal makes as well."""
    state, uid = self.state, self._uid(hotkey)
    if uid is None:
      return 'HotKeyNotRegisteredInSubNet'
    neuron = state['neurons'][uid]
    if neuron['stake'] < state['StakeThreshold']:
      return 'NotEnoughStakeToSetWeights'
    if version < state['WeightsVersionKey']:
      return 'IncorrectWeightVersionKey'
    if not neuron['permit']:
      return 'NeuronNoValidatorPermit'
    if any(u >= len(state['neurons']) for u in weights):
      return 'UidVecContainInvalidOne'
    if len(weights) < state['MinAllowedWeights']:
      return 'WeightVecLengthIsLow'
    return ''

  def _set_mechanism_weights(
    self, hotkey: str, netuid, mecid, dests, weights, version_key
  ) -> str:
    del netuid
    if self.state['CommitRevealWeightsEnabled']:
      return 'CommitRevealEnabled'
    if mecid >= self.state['MechanismCountCurrent']:
      return 'MechanismDoesNotExist'
    row = dict(zip(dests, weights, strict=True))
    if failed := self._weights_error(hotkey, row, version_key):
      return failed
    uid = self._uid(hotkey)
    self.state['neurons'][uid]['updated'] = len(self.blocks)
    self.state['weights'][uid] = row
    return ''

  def _commit_timelocked_mechanism_weights(self, hotkey: str, **_) -> str:
    uid = self._uid(hotkey)
    neuron = self.state['neurons'][uid]
    if neuron['stake'] < self.state['StakeThreshold']:
      return 'NotEnoughStakeToSetWeights'
    neuron['updated'] = len(self.blocks)
    self.state['sealed'].append((uid, len(self.blocks)))
    return ''


def hotkeys(count: int) -> list[str]:
  """Addresses nobody has the keys of."""
  return [bt.sp_core.ss58_encode(bytes([i]) * 32, 42) for i in range(count)]
