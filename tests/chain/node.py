"""A node of a subnet in memory: JSON-RPC over websockets, on the loopback.

The SDK connects to it as to any other node. What it does not know it refuses
with the errors of a real one, and tests make it fail: requests of a method hang
or drop the connection, it goes down, it has pruned old states.
"""

import asyncio
import collections
import json
import threading
from collections.abc import Callable
from typing import Any

from websockets.asyncio import server as websockets

from tests.chain import runtime as runtime_lib
from tests.chain import substrate

HANG, DROP = 'hang', 'drop'
_NO_METHOD = {'code': -32601, 'message': 'Method not found'}
_INVALID = {'code': 1010, 'message': 'Invalid Transaction'}


class RpcError(Exception):
  """The error of a JSON-RPC answer."""

  def __init__(self, error: dict[str, Any]):
    super().__init__(error['message'])
    self.error = error


class Node:
  """A server of one chain; ends with `close`.

  Attributes:
    chain: the chain.
    url: where it listens.
    asked: the methods that were called so far, and how often.
    connections: number of connections that were opened.
    answers: replaces the answer to a method.
  """

  def __init__(self, chain: substrate.Subtensor):
    self.chain = chain
    self.asked: collections.Counter[str] = collections.Counter()
    self.connections = 0
    self.answers: dict[str, Callable[[list[Any]], Any]] = {}
    self._faults = collections.defaultdict[str, collections.deque[Any]](
      collections.deque
    )
    self._open: set[websockets.ServerConnection] = set()
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
    self._thread.start()
    self._port = 0
    self._run(self._listen())

  @property
  def url(self) -> str:
    return f'ws://127.0.0.1:{self._port}'

  def fail(self, method: str, *faults: Any) -> None:
    """Plans the next answers to a method: None, HANG, DROP, or an error."""
    self._faults[method].extend(faults)

  def planned(self, method: str) -> int:
    """Number of planned faults that have not come yet."""
    return len(self._faults[method])

  def forget_faults(self) -> None:
    self._faults.clear()

  def drop(self) -> None:
    """Cuts all connections."""
    self._run(self._cut())

  def go_down(self) -> None:
    """Nobody can connect any more."""
    self._run(self._stop())

  def come_up(self) -> None:
    self._run(self._listen())

  def close(self) -> None:
    self._run(self._end())
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join()
    self._loop.close()

  def _run(self, work: Any) -> None:
    asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

  async def _listen(self) -> None:
    self._server = await websockets.serve(
      self._serve, '127.0.0.1', self._port, max_size=2**24, compression=None
    )
    self._port = next(iter(self._server.sockets)).getsockname()[1]

  async def _stop(self) -> None:
    self._server.close(close_connections=False)
    await self._cut()
    await self._server.wait_closed()

  async def _cut(self) -> None:
    # Those in their handshake, too, which `_serve` has not seen.
    for connection in [*self._server.handlers, *self._open]:
      connection.transport.abort()

  async def _end(self) -> None:
    await self._stop()
    # A connection that was accepted last has a task, but no handler as yet.
    while rest := asyncio.all_tasks() - {asyncio.current_task()}:
      await self._cut()
      for task in rest:
        task.cancel()
      await asyncio.wait(rest, timeout=1)

  async def _serve(self, connection: websockets.ServerConnection) -> None:
    self.connections += 1
    self._open.add(connection)
    try:
      async for text in connection:
        asyncio.create_task(self._reply(connection, json.loads(text)))
    except Exception:  # it was cut
      pass
    finally:
      self._open.discard(connection)

  async def _reply(
    self, connection: websockets.ServerConnection, request: Any
  ) -> None:
    method, params = request['method'], request['params']
    self.asked[method] += 1
    fault = self._faults[method].popleft() if self._faults[method] else None
    if fault == HANG:
      return
    if fault == DROP:
      connection.transport.abort()
      return
    if isinstance(fault, threading.Event):
      await asyncio.to_thread(fault.wait)
      fault = None
    try:
      if fault is not None:
        raise RpcError(fault)
      answer = {'result': self._answer(method, params)}
    except RpcError as e:
      answer = {'error': e.error}
    frame = {'jsonrpc': '2.0', 'id': request['id'], **answer}
    await connection.send(json.dumps(frame))
    if method == 'author_submitAndWatchExtrinsic' and 'result' in answer:
      await self._watch(connection, answer['result'])
    if method == 'chain_subscribeFinalizedHeads' and 'result' in answer:
      head = self._chain_getHeader(self._chain_getFinalizedHead())
      await self._tell(connection, 'chain_finalizedHead', 'heads', head)

  async def _watch(
    self, connection: websockets.ServerConnection, where: str
  ) -> None:
    """Tells of the block that has an extrinsic, which is final at once."""
    block = where.removeprefix('sub-')
    for update in 'ready', {'inBlock': block}, {'finalized': block}:
      await self._tell(connection, 'author_extrinsicUpdate', where, update)

  async def _tell(
    self,
    connection: websockets.ServerConnection,
    method: str,
    subscription: str,
    result: Any,
  ) -> None:
    params = {'subscription': subscription, 'result': result}
    frame = {'jsonrpc': '2.0', 'method': method, 'params': params}
    await connection.send(json.dumps(frame))

  def _answer(self, method: str, params: list[Any]) -> Any:
    if method in self.answers:
      return self.answers[method](params)
    found = getattr(self, f'_{method}', None)
    if found is None:
      raise RpcError(_NO_METHOD | {'data': method})
    return found(*params)

  def _block(self, block_hash: str | None) -> substrate.Block:
    """The state of a block; an error where it is pruned."""
    number = self.chain.number(block_hash)
    if number is None:
      raise RpcError(
        {
          'code': 4003,
          'message': 'Client error: UnknownBlock: Header was not found in the '
          f'database: {block_hash}',
        }
      )
    if number < self.chain.oldest:
      raise RpcError(
        {
          'code': 4003,
          'message': f'Client error: Api called for an unknown Block: State '
          f'already discarded for {block_hash}',
        }
      )
    return self.chain.blocks[number]

  def _chain_getBlockHash(self, number: int | None = None) -> str | None:
    number = self.chain.head if number is None else number
    return self.chain.hash(number) if 0 <= number <= self.chain.head else None

  def _chain_getHead(self) -> str:
    return self.chain.hash(self.chain.head)

  def _chain_getFinalizedHead(self) -> str:
    return self.chain.hash(max(self.chain.head - self.chain.lag, 0))

  def _chain_getHeader(self, block_hash: str | None = None) -> Any:
    number = self.chain.number(block_hash)
    if number is None:
      return None
    parent = self.chain.hash(number - 1) if number else '0x' + 64 * '0'
    return {
      'number': hex(number),
      'parentHash': parent,
      'stateRoot': '0x' + 64 * '0',
      'extrinsicsRoot': '0x' + 64 * '0',
      'digest': {'logs': []},
    }

  def _chain_getBlock(self, block_hash: str | None = None) -> Any:
    number = self.chain.number(block_hash)
    if number is None:
      return None
    extrinsics = self.chain.blocks[number].extrinsics
    return {
      'block': {
        'header': self._chain_getHeader(block_hash),
        'extrinsics': ['0x' + data.hex() for data in extrinsics],
      },
      'justifications': None,
    }

  def _state_getRuntimeVersion(self, block_hash: str | None = None) -> Any:
    number = self.chain.number(block_hash)
    # That of a block makes the next one.
    blocks = self.chain.blocks
    later = self.chain.head if number is None else number + 1
    spec = blocks[later].spec if later < len(blocks) else self.chain.spec
    return {
      'specName': 'node-subtensor',
      'specVersion': spec,
      'transactionVersion': 1,
      'apis': [],
    }

  def _state_getMetadata(self, block_hash: str | None = None) -> Any:
    raise RpcError(_NO_METHOD | {'data': 'state_getMetadata'})

  def _state_getStorageAt(self, key: str, block: str | None = None) -> Any:
    found = self._block(block).storage.get(bytes.fromhex(key[2:]))
    return None if found is None else '0x' + found.hex()

  def _state_queryStorageAt(
    self, keys: list[str], block: str | None = None
  ) -> Any:
    changes = [[key, self._state_getStorageAt(key, block)] for key in keys]
    return [{'block': block, 'changes': changes}]

  def _state_getKeysPaged(
    self, prefix: str, count: int, start: str, block: str | None = None
  ) -> Any:
    keys = sorted('0x' + key.hex() for key in self._block(block).storage)
    found = [k for k in keys if k.startswith(prefix) and k > start]
    return found[:count]

  def _state_call(
    self, name: str, params: str, block_hash: str | None = None
  ) -> Any:
    number = self.chain.number(block_hash)
    assert number is not None
    version = self._state_getRuntimeVersion(block_hash)['specVersion']
    runtime = runtime_lib.of(version)
    netuid = int.from_bytes(
      bytes.fromhex(params.removeprefix('0x'))[:2], 'little'
    )
    match name:
      case 'Metadata_metadata_at_version':
        return '0x' + runtime_lib.metadata(version).hex()
      case 'SubnetInfoRuntimeApi_get_metagraph':
        self._block(block_hash)
        known = netuid == self.chain.netuid
        value = self.chain.metagraph(number) if known else None
      case 'SubnetInfoRuntimeApi_get_next_epoch_start_block':
        tempo = self.chain.state['Tempo']
        value = (number // tempo + 1) * tempo
      case 'TransactionPaymentApi_query_info':
        value = {'partial_fee': 0}
      case _:
        raise RpcError(
          {
            'code': 4003,
            'message': 'Client error: Execution failed: Exported method '
            f'{name} is not found',
          }
        )
    api, _, method = name.partition('_')
    return '0x' + runtime.answer(api, method, value).hex()

  def _account_nextIndex(self, address: str) -> int:
    return self.chain.nonces[address]

  def _author_submitAndWatchExtrinsic(self, data: str) -> str:
    try:
      return 'sub-' + self.chain.submit(bytes.fromhex(data[2:]))
    except substrate.InvalidTransactionError as e:
      raise RpcError(_INVALID | {'data': str(e)}) from None

  def _chain_subscribeFinalizedHeads(self) -> str:
    return 'heads'

  def _chain_unsubscribeFinalizedHeads(self, where: str) -> bool:
    del where
    return True

  def _author_unwatchExtrinsic(self, where: str) -> bool:
    del where
    return True
