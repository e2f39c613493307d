"""A connection to a Bittensor network that reconnects when it breaks.

Every call has a deadline. Reads are repeated on new connections until then,
writes are sent once. Whatever the SDK raises becomes one line of an error of
`interface`: nothing from a chain ends a process.

A chain's runtime and the SDK are released apart. What one knows and the other
does not shows as a ValueError, KeyError and the like; these are answers, which
another connection would not change.
"""

import asyncio
import concurrent.futures
import json
import sys
import threading
import urllib.parse
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from covenant import extras
from covenant.chain import interface
from covenant.chain import session as session_lib

# `bittensor` is slow to import, so only functions that talk to a chain do.
if TYPE_CHECKING:
  import bittensor as bt

_T = TypeVar('_T')
Dial: TypeAlias = Callable[[], Any]  # opens a bittensor.Substrate

# A transaction is valid for so many blocks. After them it cannot be included,
# so a caller without an answer knows when to look.
VALID_BLOCKS = 16
# Lost on a fork or in the pool, or two processes sign with one hotkey.
_PASSING = {
  'AlreadyImported',
  'AncientBirthBlock',
  'Dropped',
  'ExhaustsResources',
  'FinalityTimeout',
  'Future',
  'PriorityTooLow',
  'Retracted',
  'Stale',
  'Usurped',
}


# Raised where the runtime and the SDK do not know the same things.
_UNKNOWN = (
  ValueError,  # among them the SDK's StorageFunctionNotFound
  LookupError,
  TypeError,
  AttributeError,
  NotImplementedError,
  ArithmeticError,
)


class Patience(NamedTuple):
  """The deadlines of calls, in seconds."""

  read: float = 120.0  # all attempts and the pauses between them
  attempt: float = 40.0  # the SDK gives each of three endpoints ten to open
  write: float = 300.0  # until final; `VALID_BLOCKS` take 192
  pause: float = 0.5  # before the second attempt; doubles from there


class Connection:
  """The connection to one network, for any thread; ends with `close`.

  Args:
    network: a name the SDK knows, or the ws:// or wss:// address of a node.
    patience: deadlines.
    dial: opens a `bittensor.Substrate`. By default to the network, and to its
      public fallbacks and archives if it has any.

  Raises:
    ChainRejectedError: no such network.
  """

  def __init__(
    self,
    network: str,
    patience: Patience | None = None,
    dial: Dial | None = None,
  ):
    self.where, default = _resolve(network)
    self._network = network
    self._patience = patience or Patience()
    self._dial = dial or default
    self._told: set[str] = set()  # what the SDK and the runtime disagree about
    self._session: asyncio.Task[session_lib.Session] | None = None
    self._leaving: set[asyncio.Task[None]] = set()  # old sessions
    # The SDK is asynchronous, and must answer the node's pings between calls.
    self._loop = session_lib.Loop()
    self._thread = threading.Thread(
      target=self._loop.run_forever, name='bittensor', daemon=True
    )
    self._thread.start()

  def close(self) -> None:
    """Closes the connection for good."""
    if self._loop.is_closed():
      return
    self._run('closing', self._end(), 10)
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join()
    self._loop.close()

  def read(
    self, what: str, ask: Callable[[session_lib.Session], Awaitable[_T]]
  ) -> _T:
    """Returns the answer, repeating the call on new connections in time.

    Raises:
      ChainRejectedError: the block is pruned, or `ask` raises it.
      ChainUnreachableError: no answer in time.
    """
    import bittensor as bt

    patience = self._patience

    async def attempts() -> _T:
      stop = self._loop.time() + patience.read
      pause = patience.pause
      reason: BaseException | None = None
      while True:
        left = stop - self._loop.time()
        try:
          return await asyncio.wait_for(
            self._once(ask), min(left, patience.attempt)
          )
        except BaseException as e:
          if not _is_from_sdk(e):
            raise
          if _is_pruned(e):
            raise interface.ChainRejectedError(
              f'{what}: {self.where} has pruned it; '
              'give the address of an archive node'
            ) from e
          if _is_unknown(e):
            raise self._disagreement(what, e) from e
          if reason is None or str(e):
            reason = e  # says more than the timeout at the end
          # An endpoint that says it is asked too often is not asked again.
          too_often = isinstance(e, bt.RpcPolicyError)
          if too_often or self._loop.time() + pause > stop:
            raise self._unreachable(
              what, reason, 'check the connection, or name another node'
            ) from e
        await asyncio.sleep(pause)
        pause *= 2

    return self._run(what, attempts(), patience.read)

  def write(
    self,
    what: str,
    send: 'Callable[[session_lib.Session], Awaitable[bt.ExtrinsicResult]]',
  ) -> None:
    """Sends once: without an answer it may have been included.

    Raises:
      ChainRejectedError: the chain, or the SDK before sending, rejected it.
      ChainUnreachableError: it may or may not have been included.
    """
    import bittensor as bt

    seconds = self._patience.write

    async def attempt() -> None:
      try:
        result = await asyncio.wait_for(self._once(send), seconds)
        result.raise_for_failure()
      except BaseException as e:
        if not _is_from_sdk(e):
          raise
        if _is_unknown(e):
          raise self._disagreement(what, e) from e
        if not _is_answer(e):
          raise self._unreachable(
            what,
            e,
            f'it may have been included, or be within {VALID_BLOCKS} blocks: '
            'look before you send it again',
          ) from e
        advice = f'; {e.remediation}' if isinstance(e, bt.ChainError) else ''
        raise interface.ChainRejectedError(
          f'{what}: refused by {self.where}: {_line(e)}{advice}'
        ) from e

    self._run(what, attempt(), seconds)

  async def _once(
    self, ask: Callable[[session_lib.Session], Awaitable[_T]]
  ) -> _T:
    """Makes one attempt; drops a connection that gave no answer."""
    if self._session is None:
      self._session = asyncio.create_task(
        session_lib.connect(self._network, self._dial())
      )
    task = self._session
    try:
      # The SDK goes from endpoint to endpoint; running out of patience here
      # does not make it begin with the first again.
      session = await asyncio.shield(task)
    except BaseException:
      # Patience may run out just when it connects: then the session is kept.
      if _failed(task):
        self._forget(task)
      raise
    try:
      return await ask(session)
    except BaseException as e:
      if not _is_answer(e):
        self._forget(task)
        leaving = asyncio.create_task(session_lib.hang_up(session))
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)
        await asyncio.shield(leaving)  # also if patience runs out meanwhile
      raise

  def _forget(self, task: asyncio.Task[session_lib.Session]) -> None:
    if self._session is task:  # else another attempt has reconnected
      self._session = None

  async def _end(self) -> None:
    await asyncio.gather(self._leave(), *self._leaving)
    # A task may not notice that it is canceled, if it connects just then.
    while rest := asyncio.all_tasks() - {asyncio.current_task()}:
      for task in rest:
        task.cancel()
      await asyncio.wait(rest, timeout=1)
      await self._leave()
    self._loop.abort_all()  # among them those that a canceled call opened

  async def _leave(self) -> None:
    """Hangs up if there is an open session."""
    task = self._session
    if task is not None and task.done():
      self._session = None
      if not _failed(task):
        await session_lib.hang_up(task.result())

  def _run(
    self, what: str, work: Coroutine[object, None, _T], limit: float
  ) -> _T:
    future = asyncio.run_coroutine_threadsafe(work, self._loop)
    try:
      # Longer than its own deadline: the SDK might block the loop.
      return future.result(limit + 15)
    except (TimeoutError, concurrent.futures.CancelledError) as e:
      future.cancel()
      raise self._unreachable(what, e, 'start again') from e

  def _disagreement(
    self, what: str, error: BaseException
  ) -> interface.ChainRejectedError:
    """Returns the error of a runtime that the SDK does not know; says it once.

    It goes to the standard error as well, since a node goes on without what it
    could not read.
    """
    import bittensor as bt

    task, spec = self._session, None
    if task is not None and task.done() and not _failed(task):
      spec = task.result().spec
    text = (
      f'the runtime of {self.where}, spec {spec or "unknown"}, is not what SDK '
      f'{bt.__version__} knows: {type(error).__name__}: {_line(error)}; '
      'install a bittensor release of the time of that runtime'
    )
    if text not in self._told:
      self._told.add(text)
      print(f'{what}: {text}', file=sys.stderr, flush=True)
    return interface.ChainRejectedError(f'{what}: {text}')

  def _unreachable(
    self, what: str, error: BaseException, advice: str
  ) -> interface.ChainUnreachableError:
    reason = _line(error) or 'no answer in time'
    return interface.ChainUnreachableError(
      f'{what}: {self.where}: {reason}; {advice}'
    )


def _failed(task: asyncio.Task[session_lib.Session]) -> bool:
  """Returns whether a task has ended without a session."""
  return task.done() and (task.cancelled() or task.exception() is not None)


def _resolve(network: str) -> tuple[str, Dial]:
  """Returns the name of a network, and a function that opens it."""
  with extras.needed('network'):
    import bittensor as bt
    from bittensor import settings

  try:
    label, address = settings.resolve_endpoint(network)
  except ValueError:
    raise interface.ChainRejectedError(
      f'network: expected one of {", ".join(settings.NETWORKS)}, '
      f'or a ws:// or wss:// address, got {network!r}'
    ) from None
  if label not in settings.NETWORKS:
    # Other parts of an address may be a secret of its provider.
    label = urllib.parse.urlsplit(address).hostname or 'the given address'

  def dial() -> 'bt.RpcSubstrate':
    return bt.RpcSubstrate(
      address,
      fallback_endpoints=settings.default_fallback_endpoints(network),
      archive_endpoints=settings.default_archive_endpoints(network),
    )

  return label, dial


def _is_from_sdk(error: BaseException) -> bool:
  """Returns whether the SDK raised an error, or what it is built on did."""
  # A panic of the compiled part is no Exception, and has no public class.
  panic = type(error).__name__ == 'PanicException'
  known = isinstance(error, interface.ChainError)
  return panic or (isinstance(error, Exception) and not known)


def _is_unknown(error: BaseException) -> bool:
  """Returns whether the SDK and the runtime do not know the same things."""
  import bittensor as bt

  if isinstance(error, json.JSONDecodeError | OSError | bt.BittensorError):
    return False  # of a broken endpoint, or understood
  return _is_from_sdk(error) and (
    isinstance(error, _UNKNOWN) or not isinstance(error, Exception)
  )


def _is_pruned(error: BaseException) -> bool:
  # The SDK tells this only by the words of its errors.
  return str(error).startswith(('State discarded', 'no block at height'))


def _is_answer(error: BaseException) -> bool:
  """Returns whether the error is a rejection, not a lost connection."""
  import bittensor as bt

  if isinstance(error, bt.ChainError):
    if error.name is None and error.code == bt.ErrorCode.UNKNOWN:
      return _is_pruned(error)
    return error.name not in _PASSING
  if isinstance(error, bt.RpcConnectionError | bt.ConnectionNotReady):
    return False
  if _is_unknown(error):
    return True
  return isinstance(error, bt.BittensorError | interface.ChainRejectedError)


def _line(error: BaseException) -> str:
  return ' '.join(str(error).split()).rstrip('.')
