"""The texts that a pool and its workers sign, and the packing of replies.

A worker first asks for a token, which names it and the time of the pool. Its
requests are numbered under the token, so that the pool accepts each of them
once and no clock of a worker matters. The pool signs its replies with its
hotkey, each for one request.
"""

import hashlib
import json
from collections.abc import Mapping

from covenant import typing as ct

# Headers of requests.
WORKER, TOKEN, NUMBER = 'X-Worker', 'X-Token', 'X-Number'
DIGEST, SIGNATURE = 'X-Digest', 'X-Signature'
# Headers of replies: DIGEST and SIGNATURE.
# Errors of reading a field of the other side's JSON. A number may be infinite,
# or too large for a float.
MALFORMED = (
  AttributeError,
  IndexError,
  KeyError,
  OverflowError,
  TypeError,
  ValueError,
)


def digest(*parts: bytes) -> str:
  """Returns the digest of a body that is given in parts, in hexadecimal."""
  found = hashlib.blake2b(digest_size=32)
  for part in parts:
    found.update(part)
  return found.hexdigest()


def request_text(
  pool: str, token: str, method: str, path: str, number: int, body_digest: str
) -> bytes:
  """Returns the bytes of a request that its worker signs.

  Args:
    pool: ss58 address of the pool's hotkey.
    token: the pool's token for this worker.
    method: the HTTP method.
    path: the path with its query.
    number: above those of the worker's requests before, under this token.
    body_digest: the `digest` of the body.
  """
  parts = ('covenant.pool', pool, token, method, path, str(number), body_digest)
  return '\n'.join(parts).encode()


def reply_text(request: bytes, status: int, body_digest: str) -> bytes:
  """Returns the bytes of a reply that the pool signs.

  Args:
    request: the `request_text` of the request, or the nonce of a greeting.
    status: the HTTP status.
    body_digest: the `digest` of the reply's body.
  """
  of_request = hashlib.blake2b(request, digest_size=32).hexdigest()
  parts = 'covenant.pool.reply', of_request, str(status), body_digest
  return '\n'.join(parts).encode()


def pack(text: Mapping[str, ct.Json], data: bytes) -> bytes:
  """Returns a line of JSON followed by bytes."""
  return json.dumps(text).encode() + b'\n' + data


def unpack(data: bytes) -> tuple[dict[str, ct.Json], bytes]:
  """Splits a reply into JSON and bytes; raises ValueError if malformed."""
  line, _, rest = data.partition(b'\n')
  try:
    text = json.loads(line)
  except RecursionError:
    text = None
  if not isinstance(text, dict):
    raise ValueError('expected a JSON object')
  return text, rest
