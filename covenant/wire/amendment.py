"""An amendment: from a round on, fields of a run have other values.

Validators support an amendment by a signature of its bytes. The manifest of a
round adopts one that validators with more than half of the stake support, and
has their signatures in it (manifest.py).

  support    {"run", "round", "changes": {path: value}}, signature
  supports   a list of them in a validator's bucket
  adopted    the list of all that a run has adopted, signed by a validator

All are canonical JSON: a parsed value has one encoding.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from covenant import errors
from covenant import typing as ct

MAX_BYTES = 1 << 16  # of an amendment
MAX_CHANGES = 64
MAX_VALIDATORS = 256  # validators whose supports a manifest has
MAX_SUPPORTS = 8  # amendments that a validator supports at a time
MAX_SUPPORT_BYTES = MAX_SUPPORTS * (MAX_BYTES + 256)
MAX_ADOPTED = 256  # amendments of a run
MAX_ADOPTED_BYTES = 1 << 18  # of all that a run has adopted
_SIGNATURE_BYTES = 64
_PERSON = b'covenant.amend'
_PATH = re.compile(r'[a-z0-9_.]{1,100}')
_MALFORMED = (ValueError, TypeError, KeyError, RecursionError, AttributeError)

Verify = Callable[[str, bytes, bytes], bool]  # (hotkey, data, signature)


class AmendmentError(errors.CovenantError):
  """An amendment is malformed, not signed, or not allowed."""


class Amendment(NamedTuple):
  """A change of a run."""

  run: bytes  # 16 bytes
  round: int  # the first one with the new values
  changes: tuple[tuple[str, str], ...]  # path, value as JSON; paths increase

  @property
  def values(self) -> dict[str, ct.Json]:
    """The values by path."""
    return {path: json.loads(text) for path, text in self.changes}

  @property
  def digest(self) -> bytes:
    """The digest that validators sign, 32 bytes."""
    return _hash(b'amendment', _dump(to_json(self)))


class Support(NamedTuple):
  """The signature of a validator under an amendment."""

  hotkey: str
  signature: bytes  # 64 bytes


class Adoption(NamedTuple):
  """An amendment in a manifest, with those that support it."""

  amendment: Amendment
  supports: tuple[Support, ...]  # hotkeys increase


def make(
  run: bytes, round_index: int, values: Mapping[str, ct.Json]
) -> Amendment:
  """Returns an amendment; raises AmendmentError if it is too large."""
  changes = tuple(
    (path, _dump(values[path]).decode()) for path in sorted(values)
  )
  made = Amendment(run, round_index, changes)
  try:
    return from_json(json.loads(_dump(to_json(made))))
  except _MALFORMED as e:
    raise AmendmentError(f'amendment: {e}') from None


def to_json(amendment: Amendment) -> dict[str, ct.Json]:
  """Returns an amendment as JSON."""
  return {
    'run': amendment.run.hex(),
    'round': amendment.round,
    'changes': amendment.values,
  }


def from_json(raw: ct.Json) -> Amendment:
  """Returns the amendment of `to_json`.

  Raises:
    ValueError, TypeError, KeyError, RecursionError: it is malformed. Whether
      the JSON was canonical only a comparison of its bytes tells.
  """
  if len(_dump(raw)) > MAX_BYTES:
    raise ValueError(f'expected at most {MAX_BYTES} bytes')
  number, changes = raw['round'], raw['changes']
  if type(number) is not int or not 0 < number < 10**8:
    raise ValueError(f'expected a round from 1, got {str(number)[:50]}')
  if type(changes) is not dict or not 0 < len(changes) <= MAX_CHANGES:
    raise ValueError(f'expected 1 to {MAX_CHANGES} changes')
  if list(changes) != sorted(changes):
    raise ValueError('expected changes in the order of their paths')
  for path in changes:
    if not _PATH.fullmatch(path):
      raise ValueError(f'expected the path of a field, got {path[:100]!r}')
  run = bytes.fromhex(raw['run'])
  if len(run) != 16:
    raise ValueError(f'expected a run of 16 bytes, got {len(run)}')
  texts = ((path, _dump(value).decode()) for path, value in changes.items())
  return Amendment(run, number, tuple(texts))


def sign(amendment: Amendment, hotkey: str, sign: ct.Sign) -> Support:
  """Returns the support of a hotkey, by its function `sign`."""
  return Support(hotkey, sign(amendment.digest))


def adoption_to_json(adoption: Adoption) -> list[ct.Json]:
  """Returns the part of a manifest that adopts an amendment."""
  supports = [[hotkey, text.hex()] for hotkey, text in adoption.supports]
  return [to_json(adoption.amendment), supports]


def adoption_from_json(raw: ct.Json) -> Adoption:
  """Returns the adoption of `adoption_to_json`; raises as `from_json`."""
  body, rows = raw
  if type(rows) is not list or len(rows) > MAX_VALIDATORS:
    raise ValueError(f'expected a list of at most {MAX_VALIDATORS} supports')
  supports = tuple(_support(*row) for row in rows)
  hotkeys = [support.hotkey for support in supports]
  if hotkeys != sorted(set(hotkeys)):
    raise ValueError('expected each hotkey once, in order')
  return Adoption(from_json(body), supports)


def check_signatures(adoption: Adoption, verify: Verify) -> None:
  """Raises AmendmentError unless all supports are signed by their hotkeys."""
  digest = adoption.amendment.digest
  for hotkey, signature in adoption.supports:
    if not verify(hotkey, digest, signature):
      raise AmendmentError(f'amendment: {hotkey} did not sign its support')


def encode_supports(supported: Mapping[Amendment, bytes]) -> bytes:
  """Returns what a validator has in its bucket: amendments and signatures."""
  rows = [[to_json(a), signature.hex()] for a, signature in supported.items()]
  return _dump(rows)


def decode_supports(
  data: bytes, run: bytes, hotkey: str, verify: Verify
) -> dict[Amendment, bytes]:
  """Decodes the supports of an untrusted validator, by amendment.

  Raises:
    AmendmentError: malformed, not canonical, of another run or not signed.
  """
  if len(data) > MAX_SUPPORT_BYTES:
    raise AmendmentError(
      f'supports: expected at most {MAX_SUPPORT_BYTES} bytes'
    )
  found: dict[Amendment, bytes] = {}
  try:
    rows = json.loads(data)
    if type(rows) is not list or len(rows) > MAX_SUPPORTS:
      raise ValueError(f'expected a list of at most {MAX_SUPPORTS}')
    for body, text in rows:
      found[from_json(body)] = _support(hotkey, text).signature
    canonical = encode_supports(found) == data
  except _MALFORMED as e:
    raise AmendmentError(f'supports: {type(e).__name__}: {e}') from None
  if not canonical:
    raise AmendmentError('supports: not in canonical form')
  for amendment, signature in found.items():
    if amendment.run != run:
      raise AmendmentError('supports: of another run')
    check_signatures(Adoption(amendment, (Support(hotkey, signature),)), verify)
  return found


def list_to_json(adopted: Sequence[Amendment]) -> list[ct.Json]:
  """Returns amendments as JSON."""
  return [to_json(amendment) for amendment in adopted]


def list_from_json(raw: ct.Json) -> tuple[Amendment, ...]:
  """Returns the amendments of `list_to_json`; raises as `from_json`."""
  if type(raw) is not list or len(_dump(raw)) > MAX_ADOPTED_BYTES:
    raise ValueError(f'expected a list of at most {MAX_ADOPTED_BYTES} bytes')
  if len(raw) > MAX_ADOPTED:
    raise ValueError(f'expected at most {MAX_ADOPTED} amendments')
  return tuple(map(from_json, raw))


def encode_adopted(
  adopted: Sequence[Amendment], run: bytes, sign: ct.Sign
) -> bytes:
  """Returns the signed list of the amendments that a run has adopted."""
  body = _dump(list_to_json(adopted))
  return body + sign(_hash(b'adopted', run, body))


def decode_adopted(
  data: bytes, run: bytes, hotkey: str, verify: Verify
) -> tuple[Amendment, ...]:
  """Decodes the list of an untrusted validator; raises AmendmentError."""
  if not _SIGNATURE_BYTES < len(data) <= MAX_ADOPTED_BYTES + _SIGNATURE_BYTES:
    raise AmendmentError(f'adopted amendments: got {len(data)} bytes')
  body, signature = data[:-_SIGNATURE_BYTES], data[-_SIGNATURE_BYTES:]
  if not verify(hotkey, _hash(b'adopted', run, body), signature):
    raise AmendmentError(f'adopted amendments: not signed by {hotkey}')
  try:
    adopted = list_from_json(json.loads(body))
    canonical = _dump(list_to_json(adopted)) == body
  except _MALFORMED as e:
    raise AmendmentError(
      f'adopted amendments: {type(e).__name__}: {e}'
    ) from None
  if not canonical or any(amendment.run != run for amendment in adopted):
    raise AmendmentError('adopted amendments: not canonical, or another run')
  return adopted


def _support(hotkey: str, text: str) -> Support:
  if type(hotkey) is not str or len(hotkey) > 100 or type(text) is not str:
    raise ValueError('expected a hotkey and its signature')
  signature = bytes.fromhex(text)
  if len(signature) != _SIGNATURE_BYTES:
    raise ValueError(f'expected {_SIGNATURE_BYTES} bytes of a signature')
  return Support(hotkey, signature)


def _dump(value: ct.Json) -> bytes:
  return json.dumps(value, separators=(',', ':'), allow_nan=False).encode()


def _hash(kind: bytes, *parts: bytes) -> bytes:
  digest = hashlib.blake2b(kind + b'\0', digest_size=32, person=_PERSON)
  for part in parts:
    digest.update(part)
  return digest.digest()
