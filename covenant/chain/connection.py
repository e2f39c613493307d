"""A connection to a Bittensor network that is mended when it breaks.

Every call has a deadline. Reads are repeated on new connections until then,
writes are sent once. What the SDK raises becomes one line of `interface`.
"""

import asyncio
import concurrent.futures
import contextlib
import threading
import urllib.parse
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

from covenant.chain import interface

# `bittensor` takes 0.6 s to import: only those who talk to a chain do.

_T = TypeVar('_T')

# What is sent is valid for so many blocks: past them it cannot be included, so
# whoever got no answer knows when to look.
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


class Patience(NamedTuple):
  """How long calls may take, in seconds."""

  read: float = 120.0  # all attempts and the pauses between them
  attempt: float = 40.0  # the SDK gives each of three endpoints ten to open
  write: float = 300.0  # until final; `VALID_BLOCKS` take 192
  pause: float = 0.5  # before the second attempt; doubles from there


class Link(NamedTuple):
  client: Any  # bittensor.Client
  substrate: Any  # bittensor.Substrate; has what the client does not pass on


class Connection:
  """To one network, for any thread; ends with `close`.

  Args:
    network: a name the SDK knows, or the ws:// or wss:// address of a node.
    patience: deadlines.
    dial: opens a `bittensor.Substrate`. By default to the network, and to its
      public fallbacks and archives where it has any.

  Raises:
    ChainRejectedError: no such network.
  """

  def __init__(
    self,
    network: str,
    patience: Patience | None = None,
    dial: Callable[[], Any] | None = None,
  ):
    self.where, default = _resolve(network)
    self._network = network
    self._patience = patience or Patience()
    self._dial = dial or default
    self._link: asyncio.Task[Link] | None = None
    # The SDK is asynchronous, and must answer the node's pings between calls.
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(
      target=self._loop.run_forever, name='bittensor', daemon=True
    )
    self._thread.start()

  def close(self) -> None:
    """Hangs up; nothing can be asked any more."""
    if self._loop.is_closed():
      return
    self._run('closing', self._end(), 10)
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join()
    self._loop.close()

  def read(self, what: str, ask: Callable[[Link], Awaitable[_T]]) -> _T:
    """The answer, asked for again on new connections while there is time.

    Raises:
      ChainRejectedError: the block is pruned, or `ask` says so.
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
        except (bt.BittensorError, OSError) as e:
          if _is_pruned(e):
            raise interface.ChainRejectedError(
              f'{what}: {self.where} has pruned it; '
              'give the address of an archive node'
            ) from e
          if reason is None or str(e):
            reason = e  # that time ran out in the end says less
          # An endpoint that says it is asked too often is not asked again.
          fed_up = isinstance(e, bt.RpcPolicyError)
          if fed_up or self._loop.time() + pause > stop:
            raise self._unreachable(
              what, reason, 'check the connection, or name another node'
            ) from e
        await asyncio.sleep(pause)
        pause *= 2

    return self._run(what, attempts(), patience.read)

  def write(self, what: str, send: Callable[[Link], Awaitable[Any]]) -> None:
    """Sends once, as what got no answer may have been included.

    Raises:
      ChainRejectedError: by the chain, or by the SDK before sending.
      ChainUnreachableError: it may or may not have been included.
    """
    import bittensor as bt

    seconds = self._patience.write

    async def attempt() -> None:
      try:
        result = await asyncio.wait_for(self._once(send), seconds)
        result.raise_for_failure()
      except (bt.BittensorError, OSError) as e:
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

  async def _once(self, ask: Callable[[Link], Awaitable[_T]]) -> _T:
    """One attempt. A connection that gave no answer is not used again."""
    if self._link is None:
      self._link = asyncio.create_task(_connect(self._network, self._dial()))
    task = self._link
    try:
      # The SDK goes from endpoint to endpoint; running out of patience here
      # does not make it begin with the first again.
      link = await asyncio.shield(task)
    except BaseException:
      if task.done():
        self._forget(task)
      raise
    try:
      return await ask(link)
    except BaseException as e:
      if not _is_answer(e):
        self._forget(task)
        await _hang_up(link)
      raise

  def _forget(self, task: asyncio.Task[Link]) -> None:
    if self._link is task:  # else somebody has dialed again
      self._link = None

  async def _end(self) -> None:
    task = self._link
    if task is not None and task.done() and task.exception() is None:
      await _hang_up(task.result())
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
      task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)

  def _run(self, what: str, work: Coroutine[Any, Any, _T], limit: float) -> _T:
    future = asyncio.run_coroutine_threadsafe(work, self._loop)
    try:
      # A little more than it gives itself: the SDK might hold up the loop.
      return future.result(limit + 15)
    except (TimeoutError, concurrent.futures.CancelledError) as e:
      future.cancel()
      raise self._unreachable(what, e, 'start again') from e

  def _unreachable(
    self, what: str, error: BaseException, advice: str
  ) -> interface.ChainUnreachableError:
    reason = _line(error) or 'no answer in time'
    return interface.ChainUnreachableError(
      f'{what}: {self.where}: {reason}; {advice}'
    )


async def _connect(network: str, substrate: Any) -> Link:
  import bittensor as bt

  client = bt.Client(network, substrate=substrate)
  try:
    await client.connect()
  except BaseException:
    with contextlib.suppress(Exception):
      await client.close()
    raise
  return Link(client, substrate)


async def _hang_up(link: Link) -> None:
  with contextlib.suppress(Exception):
    await asyncio.wait_for(link.client.close(), 5)


def _resolve(network: str) -> tuple[str, Callable[[], Any]]:
  """What to call a network, and what dials it."""
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
    # What else is in an address may be a secret of its provider.
    label = urllib.parse.urlsplit(address).hostname or 'the given address'

  def dial() -> Any:
    return bt.RpcSubstrate(
      address,
      fallback_endpoints=settings.default_fallback_endpoints(network),
      archive_endpoints=settings.default_archive_endpoints(network),
    )

  return label, dial


def _is_pruned(error: Exception) -> bool:
  # The SDK keeps what it knows of this to itself but for the words.
  return str(error).startswith(('State discarded', 'no block at height'))


def _is_answer(error: BaseException) -> bool:
  """Whether somebody said no, where else nobody said anything."""
  import bittensor as bt

  if isinstance(error, bt.ChainError):
    if error.name is None and error.code == bt.ErrorCode.UNKNOWN:
      return _is_pruned(error)
    return error.name not in _PASSING
  if isinstance(error, bt.RpcConnectionError | bt.ConnectionNotReady):
    return False
  return isinstance(error, bt.BittensorError | interface.ChainRejectedError)


def _line(error: BaseException) -> str:
  return ' '.join(str(error).split()).rstrip('.')
