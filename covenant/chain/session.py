"""One open connection to a Bittensor network, and how it ends.

The SDK can close only a substrate that it has opened. It forgets one whose
opening is canceled, or fails with an error that it does not expect, such as a
runtime that it cannot parse: the socket stays open, and a task of the SDK
reconnects it forever. The socket also stays open if closing is cut short, since
the endpoint is silent. So the loop notes what each opening starts, and ends it.
"""

import asyncio
import contextlib
import contextvars
import weakref
from typing import Any, NamedTuple

_CLOSE_SECONDS = 5.0  # limit of the closing handshake

# The substrate that is being opened by the task that is running.
_opening = contextvars.ContextVar[object]('opening', default=None)


class Session(NamedTuple):
  """One open connection."""

  client: Any  # bittensor.Client, whose types reject its own storage items
  substrate: Any  # bittensor.Substrate; for calls that the client lacks
  spec: int | None  # version of the runtime when it was opened


class Loop(asyncio.SelectorEventLoop):
  """An event loop that knows what the opening of a substrate started."""

  def __init__(self) -> None:
    self._owners = weakref.WeakKeyDictionary[Any, object]()
    super().__init__()

  def create_task(self, coro: Any, **kwargs: Any) -> Any:
    task = super().create_task(coro, **kwargs)
    self._owners[task] = _opening.get()
    return task

  async def create_connection(self, *args: Any, **kwargs: Any) -> Any:
    transport, protocol = await super().create_connection(*args, **kwargs)
    self._owners[transport] = _opening.get()
    return transport, protocol

  def release(self, substrate: object) -> None:
    """Cancels the tasks and aborts the sockets of a substrate's opening."""
    for started, owner in list(self._owners.items()):
      if owner is substrate:
        if isinstance(started, asyncio.Task):
          started.cancel()
        else:
          started.abort()

  def abort_all(self) -> None:
    """Aborts all sockets; they are closed in the next turn of the loop."""
    for started in list(self._owners):
      if not isinstance(started, asyncio.Task):
        started.abort()


async def connect(network: str, substrate: Any) -> Session:
  """Opens a session, in a task of its own; leaves nothing behind if it fails.

  Args:
    network: a name the SDK knows, or an address.
    substrate: a new bittensor.Substrate.
  """
  import bittensor as bt

  client = bt.Client(network, substrate=substrate)
  _opening.set(substrate)
  spec = None
  try:
    await client.connect()
    with contextlib.suppress(Exception):
      spec = int(await client.spec_version())
  except BaseException:
    await _close(client, substrate)
    raise
  return Session(client, substrate, spec)


async def hang_up(session: Session) -> None:
  """Closes a session; aborts it if the endpoint does not answer in time."""
  await _close(session.client, session.substrate)


async def finalized(session: Session) -> int:
  """Returns the newest final block."""
  if hasattr(session.client, 'finalized_block'):
    return int(await session.client.finalized_block())
  # SDK 11.1 only streams them, the present one first.
  async for header in session.client.blocks(finalized=True):
    return int(header.number)
  raise ConnectionResetError('the stream of final blocks ended')


async def _close(client: Any, substrate: Any) -> None:
  loop = asyncio.get_running_loop()
  try:
    with contextlib.suppress(Exception):
      await asyncio.wait_for(client.close(), _CLOSE_SECONDS)
  finally:  # also if it is canceled meanwhile
    if isinstance(loop, Loop):
      loop.release(substrate)
