"""The process of a stage: it holds layers of a pipeline for a pool's head.

It needs the run's config and its island: no data, chain, bucket or open port.
A stage's state is on this machine's disk, and only what crosses its boundaries
and its tensors' sections leave it. A process may hold several stages, each with
a thread of its own: so it takes over the layers of a neighbor.
"""

import asyncio
import collections
import contextlib
import functools
import os
import ssl
import sys
import threading
import time
import traceback
import urllib.parse
from collections.abc import Callable

import numpy as np

from covenant import config as config_lib
from covenant import extras
from covenant import typing as ct
from covenant.node import connect
from covenant.node import workdir as workdir_lib
from covenant.pool import channel as channel_lib
from covenant.pool import client as client_lib
from covenant.pool import orders as orders_lib
from covenant.pool import stage_keeper
from covenant.pool import stage_meter
from covenant.pool import worker as worker_lib
from covenant.store import interface as store_lib
from covenant.store import ranges
from covenant.store import traffic
from covenant.train import island as island_lib
from covenant.train.pipeline import stage as stage_lib
from covenant.train.pipeline import stage_warm_up
from covenant.wire import payload

with extras.needed('pool'):
  import aiohttp

_LOOK_SECONDS = 0.2
_LONGEST_WAIT = 10.0  # seconds between retries, at most
# Messages that a stage takes in any order but this: back before forth.
_PASSING = ('forward', 'last', 'look_up')

# Reasons of a head to refuse a channel, by HTTP status.
_REFUSALS = {
  401: "it does not take this worker's key; see its pool.workers",
  403: 'this worker was caught with false numbers; it may come again later',
  404: 'it has no stages; --role=worker is for a pool without a pipeline',
  429: 'too many requests come from this address',
}

Send = Callable[[dict[str, ct.Json], bytes], None]
# The message -> a context in which its work is measured.
Measure = Callable[[dict[str, ct.Json]], contextlib.AbstractContextManager]


def pipeline_of(config: config_lib.Config) -> config_lib.Island:
  """Returns the pipeline of a head or a stage; raises ConfigError."""
  islands = [i for i in config.islands if i.rank]
  if len(config.islands) != 1 or not islands:
    raise config_lib.ConfigError(
      'islands: expected the one pipeline of this process, such as '
      f"'1x stages=3,rank=20,bits=4', got {len(config.islands)} islands"
    )
  return island_lib.of(config, 0)


class StageThread:
  """The thread of a stage: it takes messages, back before forth.

  Args:
    make: makes the stage, in the thread.
    send: takes its answers.
    index: its number.
    measure: measures its work.
  """

  def __init__(
    self,
    make: Callable[[], stage_keeper.StageKeeper],
    send: Send,
    index: int,
    measure: Measure = lambda text: contextlib.nullcontext(),
  ):
    self._measure = measure
    self._waiting = collections.deque[tuple[dict[str, ct.Json], bytes]]()
    self._there = threading.Condition()
    self._ended = False
    self._thread = threading.Thread(
      target=self._run, args=(make, send, index), daemon=True
    )
    self._thread.start()

  def put(self, text: dict[str, ct.Json], data: bytes) -> None:
    with self._there:
      self._waiting.append((text, data))
      self._there.notify()

  def end(self) -> None:
    """Ends the thread after the message under way."""
    with self._there:
      self._ended = True
      self._waiting.clear()
      self._there.notify()
    self._thread.join()

  def _take(self) -> tuple[dict[str, ct.Json], bytes] | None:
    with self._there:
      while not self._waiting and not self._ended:
        self._there.wait()
      if self._ended:
        return None
      for i, (text, _) in enumerate(self._waiting):
        if text.get('do') == 'backward':
          found = self._waiting[i]
          del self._waiting[i]
          return found
        if text.get('do') not in _PASSING:
          break
      return self._waiting.popleft()

  def _run(
    self, make: Callable[[], stage_keeper.StageKeeper], send: Send, index: int
  ) -> None:
    try:
      with self._measure({'do': 'take'}):
        keeper = make()
      while (message := self._take()) is not None:
        with self._measure(message[0]):
          answer = keeper.answer(*message)
        if answer is not None:
          send(*answer)
    except Exception as e:  # whatever it is, the head must learn of it
      traceback.print_exc()
      send({'did': 'failed', 'stage': index, 'error': f'{e}'[:500]}, b'')


class StageProcess:
  """A process that holds stages until it is stopped.

  Args:
    config: the config of the run, with `pool.url` and one pipeline.
    workdir: the folder of its state.

  Raises:
    ConfigError: `pool.url` or the pipeline is missing, or the key cannot be
      read.
  """

  def __init__(
    self, config: config_lib.Config, workdir: str | os.PathLike[str]
  ):
    scheme = urllib.parse.urlsplit(config.pool.url).scheme
    if scheme not in ('http', 'https'):
      raise config_lib.ConfigError(
        "pool.url: expected that of a pipeline's head, http://HOST:PORT, got "
        f'{config.pool.url!r}'
      )
    self._config = config
    self._island = pipeline_of(config)
    self._key = worker_lib.read_key(config.pool.key)
    self._run_id = payload.run_id(config_lib.identity(config))
    self._client = client_lib.Client(
      config.pool.url, self._key, self._run_id, config.pool.hotkey
    )
    self.address = self._key.address
    self._asking = threading.Lock()
    self._workdir = workdir_lib.Workdir(workdir, 'stage', self._key.address)
    self._objects = connect.objects(config, self._run_id, writes=False)
    self._workdir.measure(config)
    self._meter = stage_meter.StageMeter(
      config, self._island, self._workdir.telemetry
    )
    self._threads: dict[int, StageThread] = {}

  def run(self, stop: Callable[[], bool]) -> None:
    """Holds stages; comes back to the head whenever it is lost."""
    _say(f'stage {self._key.address} of {self._config.pool.url}')
    self._workdir.status(phase='ready')
    try:
      self._follow(stop)
      self._workdir.status(phase='stopped')
    finally:
      self._workdir.telemetry.close()

  def _follow(self, stop: Callable[[], bool]) -> None:
    wait = 0.0
    while not stop():
      try:
        asyncio.run(self._serve(stop))
        wait = _LOOK_SECONDS
      except (
        client_lib.PoolUnreachableError,
        aiohttp.ClientError,
        OSError,
      ) as e:
        wait, why = min(2 * wait + 0.5, _LONGEST_WAIT), _reason(e)
        traffic.POOLS.add('open', 0, 0.0, 2)
        self._workdir.status(error=why)
        _say(f'{why}; again in {wait:.0f} s')
      self._end_threads()
      self._client.forget()
      until = time.monotonic() + wait
      while not stop() and time.monotonic() < until:
        self._meter.pulse()
        time.sleep(_LOOK_SECONDS)

  async def _serve(self, stop: Callable[[], bool]) -> None:
    """Opens a channel to the head and serves it until it is closed."""
    with self._asking:
      opening, headers = await asyncio.to_thread(
        self._client.sign_request, 'GET', '/channel'
      )
    url = self._config.pool.url.rstrip('/') + '/channel'
    async with (
      aiohttp.ClientSession(trace_configs=[_no_redirects()]) as session,
      session.ws_connect(
        url,
        headers=headers,
        ssl=ssl.create_default_context(),
        heartbeat=channel_lib.HEARTBEAT_SECONDS,
        max_msg_size=0,
      ) as socket,
    ):
      channel = channel_lib.Channel(
        socket,
        opening,
        False,
        self._key.sign,
        self._client.is_pool,
        self._key.address,
      )
      has = [s for s in range(self._island.stages) if self._file(s).exists()]
      most = self._config.pool.stages
      channel.send({'did': 'hello', 'has': has, 'most': most})
      watch = asyncio.create_task(self._watch(channel, stop))
      try:
        await channel.run(self._receive)
      finally:
        watch.cancel()

  async def _watch(
    self, channel: channel_lib.Channel, stop: Callable[[], bool]
  ) -> None:
    while not stop():
      self._meter.pulse()
      await asyncio.sleep(_LOOK_SECONDS)
    channel.close()

  def _receive(
    self, channel: channel_lib.Channel, text: dict[str, ct.Json], data: bytes
  ) -> None:
    """Gives a message to the thread of its stage."""
    index = int(text['stage'])
    if not 0 <= index < self._island.stages:
      raise ValueError(f'there is no stage {index}')
    if text['do'] == 'leave':
      if index in self._threads:
        self._threads.pop(index).end()
        self._meter.remove(index)
        _say(f'left stage {index}')
    else:
      if index not in self._threads:
        _say(f'took stage {index}')
        self._threads[index] = StageThread(
          lambda: self._make(index),
          channel.send,
          index,
          functools.partial(self._meter.work, index),
        )
      self._threads[index].put(text, data)
    self._workdir.status(phase='ready', stages=sorted(self._threads), error='')

  def _make(self, index: int) -> stage_keeper.StageKeeper:
    stage = stage_lib.Stage(self._config, self._island, index)
    self._meter.add(index, stage)
    stage_warm_up.warm_up(stage)
    fetch = lambda number, source: self._fetch(index, number, source)  # noqa: E731
    load = functools.partial(stage_keeper.load_tensors, self._objects)
    return stage_keeper.StageKeeper(
      stage, self._file(index), self._run_id.hex(), fetch, load
    )

  def _fetch(
    self, index: int, number: int, source: orders_lib.Source
  ) -> list[bytes]:
    """Returns the sections of a source, by range from the bucket of a peer.

    Where no bucket has them, or none can be read from here, the head has them.
    """
    spans = list(zip(source.ends[::2], source.ends[1::2], strict=True))
    digest = bytes.fromhex(source.digest)
    key = self._objects.key('payloads', source.round, digest)
    for location in source.locations:
      bucket = self._objects.bucket_at(bytes.fromhex(location))
      if bucket is None:
        continue
      try:
        return orders_lib.check(ranges.read(bucket, key, spans), source)
      except (store_lib.StoreError, orders_lib.OrderError) as e:
        self._workdir.status(error=f'{e}')
    path = f'/sections?stage={index}&number={number}&uid={source.uid}'
    sizes = [b - a for a, b in spans]
    with self._asking:
      _, data = self._client.ask('GET', path, longest=sum(sizes))
    cuts = np.cumsum([0, *sizes])
    sections = [data[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    return orders_lib.check(sections, source)

  def _file(self, index: int):
    return self._workdir.path / f'stage-{index}'

  def _end_threads(self) -> None:
    for thread in self._threads.values():
      thread.end()
    self._meter.remove(*self._threads)
    self._threads.clear()


def _reason(error: Exception) -> str:
  """Returns why there is no channel, for people."""
  if isinstance(error, aiohttp.WSServerHandshakeError):
    why = _REFUSALS.get(error.status, error.message)
    return f'pool.url: the head refuses the channel ({error.status}): {why}'
  return f'{error}'


def _no_redirects() -> aiohttp.TraceConfig:
  """Returns a trace that refuses redirects: a head is where its URL says."""

  async def refuse(*_: object) -> None:
    raise aiohttp.ClientError('the head redirects; expected it at pool.url')

  traced = aiohttp.TraceConfig()
  traced.on_request_redirect.append(refuse)
  return traced


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
