"""The SDK's own SCALE codec, for commitments.

It reads the types out of a runtime's metadata. No such file is here, so this
writes one that holds but the types of `pallet_commitments` (variants and their
numbers as in subtensor's pallets/commitments/src/types.rs), in the format of
metadata version 14.
"""

from typing import Any

import bittensor_core

_U8, _RAW = 3, 129  # number of the primitive; how many Raw variants there are


def _compact(number: int) -> bytes:
  if number < 64:
    return bytes([number << 2])
  return (number << 2 | 1).to_bytes(2, 'little')


def _text(text: str) -> bytes:
  return _compact(len(text)) + text.encode()


def _list(items: list[bytes]) -> bytes:
  return _compact(len(items)) + b''.join(items)


def _field(kind: int, name: str = '') -> bytes:
  return (
    (b'\1' + _text(name) if name else b'\0')
    + _compact(kind)
    + b'\0'  # no name of the type
    + _list([])  # nor documentation, here and below
  )


def _variant(name: str, index: int, fields: list[bytes]) -> bytes:
  return _text(name) + _list(fields) + bytes([index]) + _list([])


def _metadata() -> tuple[bytes, int]:
  """With the number of the type `CommitmentInfo`."""
  # 0 is u8, and 1 + N is [u8; N].
  definitions = [b'\5' + bytes([_U8])]
  for size in range(_RAW):
    definitions.append(b'\3' + size.to_bytes(4, 'little') + _compact(0))
  variants = [_variant('None', 0, [])]
  for size in range(_RAW):
    variants.append(_variant(f'Raw{size}', 1 + size, [_field(1 + size)]))
  data = len(definitions)
  definitions += [
    b'\1' + _list(variants),
    b'\2' + _compact(data),  # a vector of them
    b'\0' + _list([_field(data + 1, 'fields')]),
  ]
  types = [
    _compact(i) + _list([]) + _list([]) + definition + _list([])
    for i, definition in enumerate(definitions)
  ]
  extrinsic = _compact(0) + b'\4' + _list([])
  pallets = _list([])
  return (
    b'meta\x0e' + _list(types) + pallets + extrinsic + _compact(0),
    data + 2,
  )


_BYTES, _INFO = _metadata()
_RUNTIME = bittensor_core.Runtime(_BYTES, 1, 1, 42)


def encode_info(info: dict[str, Any]) -> bytes:
  return _RUNTIME.encode(f'scale_info::{_INFO}', info)


def decode_info(data: bytes) -> dict[str, Any]:
  return _RUNTIME.decode(f'scale_info::{_INFO}', data, True)
