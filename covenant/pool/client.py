"""The connection of a worker to its pool: signed requests, verified replies."""

import functools
import http.client
import importlib.util
import secrets
import urllib.error
import urllib.request
from typing import Any, NamedTuple

from covenant import config as config_lib
from covenant import errors
from covenant import typing as ct
from covenant.chain import keys
from covenant.pool import messages
from covenant.store import traffic

_SECONDS = 60.0  # timeout without progress
_GREETING = 10_000  # bytes of a reply, beside its data


class PoolUnreachableError(errors.CovenantError):
  """The pool did not answer or refused; a retry may succeed."""


class _Answer(NamedTuple):
  status: int
  body: bytes
  signature: bytes  # empty if there is none


class Client:
  """An authenticated connection of one worker to a pool.

  Args:
    url: the pool's URL.
    key: the worker's key.
    run: the id of the run.
    hotkey: ss58 address of the pool's hotkey; empty believes the first reply.
  """

  def __init__(self, url: str, key: keys.Key, run: bytes, hotkey: str = ''):
    self._url = url.rstrip('/')
    self._key = key
    self._run = run
    self._hotkey = hotkey
    self._token = ''
    self._number = 0

  def ask(
    self, method: str, path: str, body: bytes = b'', longest: int = 1 << 20
  ) -> tuple[dict[str, ct.Json], bytes]:
    """Sends a signed request; returns the reply's JSON and bytes.

    Args:
      method: the HTTP method.
      path: the path with its query.
      body: the request body.
      longest: the limit of the reply, bytes.

    Raises:
      PoolUnreachableError: the pool did not answer, refused, or did not sign
        its reply; says why.
      ConfigError: the pool belongs to another run, or has another hotkey.
    """
    text, headers = self.sign_request(method, path, body)
    answer = self._send(method, path, body, headers, longest)
    if answer.status != 200:
      if answer.status in (401, 409):  # the pool was started again
        self._token = ''
      why = answer.body[:1000].decode(errors='replace')
      raise PoolUnreachableError(
        f'{path}: the pool says {answer.status}: {why}'
      )
    return self._unpack(path, text, answer)

  def sign_request(
    self, method: str, path: str, body: bytes = b''
  ) -> tuple[bytes, dict[str, str]]:
    """Returns the signed text of the next request, and its headers.

    Raises:
      PoolUnreachableError, ConfigError: as `ask`.
    """
    if not self._token:
      self._greet()
    self._number += 1
    digest = messages.digest(body)
    text = messages.request_text(
      self._hotkey, self._token, method, path, self._number, digest
    )
    return text, {
      messages.WORKER: self._key.address,
      messages.TOKEN: self._token,
      messages.NUMBER: str(self._number),
      messages.DIGEST: digest,
      messages.SIGNATURE: self._key.sign(text).hex(),
    }

  def is_pool(self, data: bytes, signature: bytes) -> bool:
    """Returns whether the pool signed some bytes."""
    return verify(self._hotkey, data, signature)

  def forget(self) -> None:
    """Forgets the token, as after the pool was started again."""
    self._token = ''

  def _greet(self) -> None:
    """Asks for a token, and for the run and the hotkey of the pool."""
    nonce = secrets.token_hex(16)
    path = f'/hello?nonce={nonce}'
    headers = {messages.WORKER: self._key.address}
    answer = self._send('GET', path, b'', headers, 0)
    try:
      text, _ = messages.unpack(answer.body)
    except ValueError as e:
      raise PoolUnreachableError(f'{self._url}/hello: {e}') from None
    hotkey, digest = str(text.get('pool')), messages.digest(answer.body)
    signed = messages.reply_text(nonce.encode(), answer.status, digest)
    if not verify(hotkey, signed, answer.signature):
      raise PoolUnreachableError(
        f'/hello: the reply is not signed by the pool, {hotkey}'
      )
    if text.get('run') != self._run.hex():
      raise config_lib.ConfigError(
        f'pool.url: the pool at {self._url} is of run {text.get("run")}, this '
        f'config of {self._run.hex()}; start the worker with the config of '
        'the pool'
      )
    if self._hotkey and hotkey != self._hotkey:
      raise config_lib.ConfigError(
        f'pool.hotkey: the pool at {self._url} says that it is {hotkey}, '
        f'expected {self._hotkey}; somebody may stand between'
      )
    self._hotkey = hotkey
    self._unpack('/hello', nonce.encode(), answer)
    self._token, self._number = str(text.get('token')), 0

  def _unpack(
    self, path: str, request: bytes, answer: _Answer
  ) -> tuple[dict[str, ct.Json], bytes]:
    """Returns the contents of a reply that the pool has signed."""
    digest = messages.digest(answer.body)
    text = messages.reply_text(request, answer.status, digest)
    if not verify(self._hotkey, text, answer.signature):
      raise PoolUnreachableError(
        f'{path}: the reply is not signed by the pool, {self._hotkey}'
      )
    try:
      return messages.unpack(answer.body)
    except ValueError as e:
      raise PoolUnreachableError(f'{path}: malformed reply: {e}') from None

  def _send(
    self,
    method: str,
    path: str,
    body: bytes,
    headers: dict[str, str],
    longest: int,
  ) -> _Answer:
    request = urllib.request.Request(
      self._url + path, body or None, headers, method=method
    )
    try:
      try:
        response = _opener().open(request, timeout=_SECONDS)
      except urllib.error.HTTPError as e:
        response = e
      with response:
        data = response.read(longest + _GREETING)
        signature = response.headers.get(messages.SIGNATURE, '')
        status = response.status or 0
        traffic.POOLS.add('write', len(body), 0.0, 1)
        traffic.POOLS.add('read', len(data), 0.0, 1)
        return _Answer(status, data, bytes.fromhex(signature))
    # A bad URL is a ValueError.
    except (OSError, ValueError, http.client.HTTPException) as e:
      self._token = ''
      raise PoolUnreachableError(f'{self._url}{path}: {e}') from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
  """Leaves a redirect as the answer: a pool is where its URL says."""

  def redirect_request(
    self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any
  ) -> None:
    """Follows none."""


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
  return urllib.request.build_opener(_NoRedirects)


def verify(hotkey: str, data: bytes, signature: bytes) -> bool:
  """Returns whether a pool's hotkey signed `data`.

  Hotkeys are ed25519 on the embedded chain and sr25519 on Bittensor, which
  needs the extra `network`.
  """
  if keys.verify(hotkey, data, signature):
    return True
  if not importlib.util.find_spec('bittensor'):
    return False
  from bittensor import sp_core

  try:
    return keys.is_address(hotkey) and sp_core.verify(data, signature, hotkey)
  except Exception:  # of malformed input: no signature
    return False
