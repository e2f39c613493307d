"""Runtimes of subtensor, from metadata that a real node gave.

`tests/golden/subtensor_461.json.xz` has the metadata of spec 461, with values,
calls and extrinsics as a node of it stored them; its field `source` says where
it is from. SDK 11.3 reads one storage item that this runtime does not have.
`LATER` is the same runtime with that item, under the next number, since later
ones have it.
"""

import functools
import json
import lzma
import pathlib
from typing import Any

import bittensor_core

RECORDED, LATER = 461, 462
_FILE = pathlib.Path(__file__).parents[1] / 'golden' / 'subtensor_461.json.xz'
_ADDED = 'SubnetEpochConsensus'  # of a subnet; 0 is Yuma
_NETUID, _U8 = 41, 2  # numbers of types
_DEFAULT, _MAP, _IDENTITY = 1, 1, 6  # of a storage item


@functools.cache
def recorded() -> dict[str, Any]:
  """Returns the recorded answers of the node."""
  return json.loads(lzma.decompress(_FILE.read_bytes()))


@functools.cache
def metadata(spec: int) -> bytes:
  """The answer of `Metadata_metadata_at_version`: Option<OpaqueMetadata>."""
  data = bytes.fromhex(recorded()['metadata_v15'].removeprefix('0x'))
  if spec == RECORDED:
    return data
  plain = _with_item(data[data.index(b'meta') :])
  return b'\1' + _compact(len(plain)) + plain


@functools.cache
def of(spec: int) -> 'Runtime':
  return Runtime(spec)


class Runtime:
  """Encodes and decodes as the runtime of one spec does."""

  def __init__(self, spec: int):
    self.spec = spec
    data = metadata(spec)
    self.codec: Any = bittensor_core.Runtime(
      data[data.index(b'meta') :], spec, 1, 42
    )
    self._types = {
      t['id']: t['type']
      for t in json.loads(self.codec.registry_json())['types']
    }
    self._pallets = {p['name']: p for p in self.codec.metadata_ir()['pallets']}

  def key(self, pallet: str, item: str, params: list[Any]) -> bytes:
    """Raises KeyError for an item that the runtime does not have."""
    return bytes(self.codec.storage_key(pallet, item, params))

  def value(self, pallet: str, item: str, value: Any) -> bytes:
    kind = self.codec.storage_entry(pallet, item).value_type
    return bytes(self.codec.encode(kind, value))

  def answer(self, api: str, method: str, value: Any) -> bytes:
    """A result of a runtime call; given fields of it, the others are zero."""
    kind = self.codec.runtime_api_map()[api][method]['output']
    if isinstance(value, dict):
      number = int(kind.partition('::')[2])
      zero = self._zero(self._inner(number))
      value = {**zero, **value} if isinstance(zero, dict) else value
    return bytes(self.codec.encode(kind, value))

  def error(self, pallet: str, name: str) -> dict[str, Any]:
    """A DispatchError of a pallet."""
    found = self._pallets[pallet]
    (index,) = (e['index'] for e in found['errors'] if e['name'] == name)
    code = bytes([index, 0, 0, 0]).hex()
    return {'Module': {'index': found['index'], 'error': '0x' + code}}

  def events(self, outcomes: list[dict[str, Any] | None]) -> bytes:
    """System.Events of a block: the error of each extrinsic, or None."""
    info = {
      'weight': {'ref_time': 1, 'proof_size': 1},
      'class': 'Normal',
      'pays_fee': 'No',  # as for commitments and weights in life
    }
    return self.value(
      'System',
      'Events',
      [
        {
          'phase': {'ApplyExtrinsic': i},
          'event': {
            'System': {'ExtrinsicSuccess': {'dispatch_info': info}}
            if error is None
            else {
              'ExtrinsicFailed': {
                'dispatch_error': error,
                'dispatch_info': info,
              }
            }
          },
          'topics': [],
        }
        for i, error in enumerate(outcomes)
      ],
    )

  def _inner(self, number: int) -> int:
    """The type within an Option."""
    kind = self._types[number]
    if kind.get('path', [])[-1:] != ['Option']:
      return number
    (some,) = (
      v for v in kind['def']['variant']['variants'] if v['name'] == 'Some'
    )
    return some['fields'][0]['type']

  def _zero(self, number: int) -> Any:
    """The smallest value of a type."""
    kind = self._types[number]
    path = kind.get('path', [])
    if path[-1:] == ['AccountId32']:
      return bittensor_core.ss58_encode(bytes(32), 42)
    ((shape, what),) = kind['def'].items()
    match shape:
      case 'composite':
        fields = what.get('fields') or []
        if fields and fields[0].get('name'):
          return {f['name']: self._zero(f['type']) for f in fields}
        return self._zero(fields[0]['type'])
      case 'primitive':
        return {'bool': False, 'str': ''}.get(what, 0)
      case 'sequence':
        return []
      case 'variant' if path[-1:] == ['Option']:
        return None
      case 'variant':
        return what['variants'][0]['name']
      case 'compact':
        return 0
    raise ValueError(f'no zero of {kind}')


def _with_item(data: bytes) -> bytes:
  """The metadata with one more storage item of the pallet."""
  name = _text('SubtensorModule')
  before = data.index(name + b'\1' + name) + len(name + b'\1' + name)
  assert data[before] & 3 == 1, 'expected a count of two bytes'
  count = int.from_bytes(data[before : before + 2], 'little') >> 2
  item = (
    _text(_ADDED)
    + bytes([_DEFAULT, _MAP])
    + _compact(1)
    + bytes([_IDENTITY])
    + _compact(_NETUID)
    + _compact(_U8)
    + _compact(1)  # byte of the default value
    + b'\0'
    + _compact(0)  # lines of documentation
  )
  return data[:before] + _compact(count + 1) + item + data[before + 2 :]


def _text(text: str) -> bytes:
  return _compact(len(text)) + text.encode()


def _compact(number: int) -> bytes:
  if number < 2**6:
    return bytes([number << 2])
  if number < 2**14:
    return (number << 2 | 1).to_bytes(2, 'little')
  return (number << 2 | 2).to_bytes(4, 'little')
