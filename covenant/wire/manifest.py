"""The manifest: the signed list of the contributors of a round.

A manifest names the payloads that move the parameters, by uid and digest, and
the state before them: the history root and a fingerprint of the parameters. It
may adopt an amendment (amendment.py).
Roots form a chain, so two nodes with one root have applied the same payloads in
every round since the first.

The bytes are canonical JSON and a signature, so that people can read them.
"""

import hashlib
import json
from collections.abc import Callable
from typing import NamedTuple

from covenant import errors
from covenant import typing as ct
from covenant.optim import weight
from covenant.wire import amendment as amendment_lib

MAX_ENTRIES = weight.MOST_PEERS  # the most that the sums of a round can count
MAX_BYTES = 1 << 20
_MOST_TEXT = 200  # characters of a hotkey or fingerprint
# Rounds from the manifest that adopts an amendment to the first one in which
# it holds: it is decided in the round after the manifest's.
NOTICE = 2
_PERSON = b'covenant.history'
_SIGNATURE_BYTES = 64


class ManifestError(errors.CovenantError):
  """The bytes are not a manifest signed by the hotkey that they name."""


class Entry(NamedTuple):
  """One payload that counts."""

  uid: int
  hotkey: str
  digest: bytes  # 32 bytes, of the payload's bytes


class Manifest(NamedTuple):
  """The decision of a validator on one round."""

  run: bytes  # 16 bytes
  round: int
  root: bytes  # 32 bytes: of the history before this round
  fingerprint: str  # of the state before this round
  hotkey: str  # of the validator that made it
  entries: tuple[Entry, ...]  # uids increase
  adoption: amendment_lib.Adoption | None = None


def genesis(run: bytes) -> bytes:
  """Returns the root before the first round of a run."""
  return _hash(b'genesis', run)


def extend(root: bytes, round_index: int, digest: bytes | None) -> bytes:
  """Returns the history root after a round, 32 bytes.

  Args:
    root: the root before the round.
    round_index: the round.
    digest: the digest of the manifest that was applied; None if none was.
  """
  number = round_index.to_bytes(8, 'little')
  if digest is None:
    return _hash(b'empty', root, number)
  return _hash(b'manifest', root, number, digest)


def encode(manifest: Manifest, sign: ct.Sign) -> bytes:
  """Returns the bytes of a manifest, signed by `sign` of its hotkey."""
  body = _body(manifest)
  return body + sign(_hash(b'body', body))


def decode(
  data: bytes, verify: Callable[[str, bytes, bytes], bool]
) -> Manifest:
  """Decodes a manifest from an untrusted peer.

  Args:
    data: the bytes.
    verify: returns whether a hotkey signed bytes: (hotkey, data, signature).

  Raises:
    ManifestError: not canonical, not signed by its hotkey, or too long.
  """
  if not _SIGNATURE_BYTES < len(data) <= MAX_BYTES:
    raise ManifestError(
      f'manifest: expected {_SIGNATURE_BYTES + 1} to {MAX_BYTES} bytes, '
      f'got {len(data)}'
    )
  body, signature = data[:-_SIGNATURE_BYTES], data[-_SIGNATURE_BYTES:]
  try:
    manifest = _parse(json.loads(body))
    canonical = _body(manifest) == body
  except (ValueError, TypeError, KeyError, RecursionError) as e:
    raise ManifestError(f'manifest: {type(e).__name__}: {e}') from None
  if not canonical:
    raise ManifestError('manifest: not in canonical form')
  if len(manifest.entries) > MAX_ENTRIES:
    raise ManifestError(
      f'manifest: expected at most {MAX_ENTRIES} entries, '
      f'got {len(manifest.entries)}'
    )
  uids = [entry.uid for entry in manifest.entries]
  if uids != sorted(set(uids)):
    raise ManifestError(f'manifest: expected increasing uids, got {uids[:10]}')
  if not verify(manifest.hotkey, _hash(b'body', body), signature):
    raise ManifestError(f'manifest: {manifest.hotkey} did not sign it')
  if manifest.adoption is not None:
    _check_adoption(manifest, manifest.adoption, verify)
  return manifest


def _check_adoption(
  manifest: Manifest,
  adoption: amendment_lib.Adoption,
  verify: amendment_lib.Verify,
) -> None:
  amendment = adoption.amendment
  if amendment.run != manifest.run:
    raise ManifestError('manifest: its amendment is of another run')
  if amendment.round < manifest.round + NOTICE:
    raise ManifestError(
      f'manifest of round {manifest.round}: expected an amendment from round '
      f'{manifest.round + NOTICE} on, got one from {amendment.round} on'
    )
  try:
    amendment_lib.check_signatures(adoption, verify)
  except amendment_lib.AmendmentError as e:
    raise ManifestError(f'manifest: {e}') from None


def _body(manifest: Manifest) -> bytes:
  raw = {
    'run': manifest.run.hex(),
    'round': manifest.round,
    'root': manifest.root.hex(),
    'fingerprint': manifest.fingerprint,
    'hotkey': manifest.hotkey,
    'entries': [[e.uid, e.hotkey, e.digest.hex()] for e in manifest.entries],
  }
  if manifest.adoption is not None:
    raw['amendment'] = amendment_lib.adoption_to_json(manifest.adoption)
  return json.dumps(raw, separators=(',', ':')).encode()


def _parse(raw: ct.Json) -> Manifest:
  entries = tuple(
    Entry(_uint(uid), _text(hotkey), _bytes(digest, 32))
    for uid, hotkey, digest in raw['entries']
  )
  adoption = raw.get('amendment')
  return Manifest(
    _bytes(raw['run'], 16),
    _uint(raw['round']),
    _bytes(raw['root'], 32),
    _text(raw['fingerprint']),
    _text(raw['hotkey']),
    entries,
    amendment_lib.adoption_from_json(adoption) if adoption else None,
  )


def _uint(value: object) -> int:
  if type(value) is not int or not 0 <= value < 2**63:
    raise ValueError(f'expected an integer from 0, got {value!r:.80}')
  return value


def _bytes(value: str, size: int) -> bytes:
  data = bytes.fromhex(value)
  if len(data) != size:
    raise ValueError(f'expected {size} bytes, got {len(data)}')
  return data


def _text(value: object) -> str:
  if type(value) is not str or len(value) > _MOST_TEXT:
    raise ValueError(
      f'expected a text of at most {_MOST_TEXT} characters, got {value!r:.80}'
    )
  return value


def _hash(kind: bytes, *parts: bytes) -> bytes:
  digest = hashlib.blake2b(kind + b'\0', digest_size=32, person=_PERSON)
  for part in parts:
    digest.update(part)
  return digest.digest()
