"""The process of a stage; whole ones are in stage_training_test.py."""

import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import threading
import types
import urllib.request
from unittest import mock

import aiohttp
from absl.testing import absltest
from absl.testing import parameterized
from aiohttp import test_utils
from aiohttp import web

from covenant import config as config_lib
from covenant import metrics
from covenant.pool import client as client_lib
from covenant.pool import orders
from covenant.pool import stage_process
from covenant.store import interface
from covenant.train.pipeline import stage as stage_lib
from tests.pool import serving
from tests.pool import stage_meter_test
from tests.pool import stages


class PipelineTest(parameterized.TestCase):
  @parameterized.parameters('', '1x steps=3', '1x ; 1x stages=3,rank=4')
  def test_needs_one_pipeline(self, islands):
    config = config_lib.edit(stages.make_config(), [f'islands={islands}'])
    with self.assertRaisesRegex(config_lib.ConfigError, 'the one pipeline'):
      stage_process.pipeline_of(config)

  def test_needs_the_address_of_a_head(self):
    with self.assertRaisesRegex(config_lib.ConfigError, 'pool.url: expected'):
      stage_process.StageProcess(stages.make_config(), self.create_tempdir())


class TelemetryTest(absltest.TestCase):
  def test_steps_are_in_metrics_and_at_the_endpoint(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    pool = config_lib.Pool(url='http://127.0.0.1:9', key=f'{folder}/key')
    telemetry = config_lib.Telemetry(prometheus='0')
    config = dataclasses.replace(
      stages.make_config(), pool=pool, telemetry=telemetry
    )
    process = stage_process.StageProcess(config, folder / 'stage')
    self.addCleanup(process.run, lambda: True)  # closes what is open
    stage = stage_meter_test.make_stage(config, 1)
    process._meter.add(1, stage)
    for text in stage_meter_test.MESSAGES:
      with process._meter.work(1, text):
        pass
    (step,) = metrics.read(folder / 'stage/metrics.jsonl', [metrics.Step])
    self.assertEqual((step.stage, step.loss), (1, 2.5))
    status = json.loads((folder / 'stage/status.json').read_text())
    with urllib.request.urlopen(status['metrics'], timeout=10) as answer:
      self.assertIn('covenant_step_loss 2.5', answer.read().decode())


def make_process(case, url):
  """Returns the process of a stage that would open a channel to a head."""
  folder = case.create_tempdir().full_path
  pool = config_lib.Pool(url=url, key=f'{folder}/key')
  config = dataclasses.replace(stages.make_config(), pool=pool)
  process = stage_process.StageProcess(config, f'{folder}/stage')
  process._client._run = serving.RUN
  return process


class TlsTest(serving.ServerCase):
  def test_a_channel_over_tls(self):
    certificate, key = self.certificate()
    said = queue.SimpleQueue()
    server = self.serve(
      serving.Listener(
        open=lambda channel: said.put('open'),
        receive=lambda channel, text, data: said.put(text['did']),
      ),
      certificate=certificate,
      certificate_key=key,
    )
    process = make_process(self, f'https://127.0.0.1:{server.port}')
    self.addCleanup(client_lib._opener.cache_clear)
    client_lib._opener.cache_clear()
    # The variable by which the owner of a certificate authority names it.
    self.enterContext(mock.patch.dict(os.environ, SSL_CERT_FILE=certificate))
    stopping = threading.Event()
    thread = threading.Thread(target=process.run, args=(stopping.is_set,))
    thread.start()
    try:
      self.assertEqual(said.get(timeout=60), 'open')
      self.assertEqual(said.get(timeout=60), 'hello')
    finally:
      stopping.set()
      thread.join()


class RefusalTest(serving.ServerCase):
  def test_a_head_that_refuses_a_worker_is_told_with_the_reason(self):
    server = self.serve(serving.Listener())
    del self.longest['/channel']
    process = make_process(self, f'http://127.0.0.1:{server.port}')
    said = []
    with mock.patch.object(stage_process, '_say', said.append):
      process.run(lambda: len(said) > 1)
    self.assertRegex(said[1], r'^pool.url: .* channel \(404\): .*--role=worker')


class RedirectTest(absltest.TestCase):
  def test_a_head_that_redirects_is_refused(self):
    reached = []

    async def ask():
      async def answer(request):
        reached.append(request.path)
        raise web.HTTPFound('/elsewhere')

      server = test_utils.TestServer(web.Application(), port=0)
      server.app.router.add_get('/{any}', answer)
      trace = [stage_process._no_redirects()]
      async with server, aiohttp.ClientSession(trace_configs=trace) as session:
        await session.ws_connect(server.make_url('/channel'))

    with self.assertRaisesRegex(aiohttp.ClientError, 'the head redirects'):
      asyncio.run(ask())
    self.assertEqual(reached, ['/channel'])


class FetchTest(absltest.TestCase):
  """A stage reads its sections of a payload, from a bucket or the head."""

  def setUp(self):
    super().setUp()
    self.payload = bytes(range(100))
    self.read, self.asked = [], []
    spans = (3, 10, 10, 20, 60, 61)
    digests = tuple(
      orders.section_digest(self.payload[a:b])
      for a, b in zip(spans[::2], spans[1::2], strict=True)
    )
    self.source = orders.Source(4, 7, '0f' * 16, ('aa', 'bb'), spans, digests)
    self.want = [self.payload[3:10], self.payload[10:20], self.payload[60:61]]

  def fetch(self, buckets, of_head=b''):
    """Returns the sections, with buckets by location and the head's answer."""

    def read(bucket, key, spans):
      self.read.append((key, spans))
      if bucket == b'down':
        raise interface.StoreUnavailableError('no answer')
      return [bucket[a:b] for a, b in spans]

    def ask(method, path, longest):
      self.asked.append((path, longest))
      return {}, of_head

    process = types.SimpleNamespace(
      _objects=types.SimpleNamespace(
        bucket_at=lambda place: buckets.get(place.hex()),
        key=lambda *parts: '/'.join(
          x.hex() if isinstance(x, bytes) else str(x) for x in parts
        ),
      ),
      _client=types.SimpleNamespace(ask=ask),
      _asking=threading.Lock(),
      _workdir=mock.Mock(),
    )
    with mock.patch.object(stage_process.ranges, 'read', read):
      return stage_process.StageProcess._fetch(process, 1, 5, self.source)

  def test_by_range_from_the_bucket_of_the_peer(self):
    self.assertEqual(self.fetch({'aa': self.payload}), self.want)
    key = 'payloads/7/' + '0f' * 16
    self.assertEqual(self.read, [(key, [(3, 10), (10, 20), (60, 61)])])
    self.assertEqual(self.asked, [])

  def test_from_another_if_one_is_down_or_has_other_bytes(self):
    other = b'x' * 100
    for bad in b'down', other:
      self.read.clear()
      found = self.fetch({'aa': bad, 'bb': self.payload})
      self.assertEqual(found, self.want)
      self.assertLen(self.read, 2)

  def test_from_the_head_if_no_bucket_has_them(self):
    self.assertEqual(self.fetch({}, b''.join(self.want)), self.want)
    self.assertEqual(self.asked, [('/sections?stage=1&number=5&uid=4', 18)])
    with self.assertRaisesRegex(orders.OrderError, 'uid 4, round 7: a section'):
      self.fetch({}, bytes(18))


class Keeper:
  """Answers with what it was asked, once it may."""

  def __init__(self):
    self.begun, self.may = threading.Event(), threading.Event()

  def answer(self, text, data):
    self.begun.set()
    self.may.wait()
    if text['do'] == 'fail':
      raise stage_lib.StageError('no')
    return text, data


class ThreadTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.keeper, self.said = Keeper(), []
    self.there = threading.Semaphore(0)

    def send(text, data):
      self.said.append(text.get('do') or text['did'])
      self.there.release()

    self.thread = stage_process.StageThread(lambda: self.keeper, send, 2)
    self.addCleanup(self.thread.end)
    self.addCleanup(self.keeper.may.set)

  def test_goes_back_before_it_goes_forth(self):
    self.thread.put({'do': 'begin'}, b'')
    self.keeper.begun.wait()
    order = ('forward', 'forward', 'backward', 'update', 'forward', 'backward')
    for what in order:
      self.thread.put({'do': what}, b'')
    self.keeper.may.set()
    for _ in range(7):
      self.there.acquire()
    self.assertEqual(
      self.said,
      ['begin', 'backward', 'forward', 'forward', 'update', 'backward',
       'forward'],
    )  # fmt: skip

  def test_its_work_is_measured(self):
    self.thread.end()
    work = []

    @contextlib.contextmanager
    def measure(text):
      work.append(text['do'])
      yield
      work.append('done')

    thread = stage_process.StageThread(
      lambda: self.keeper, lambda *_: self.there.release(), 2, measure
    )
    self.keeper.may.set()
    thread.put({'do': 'begin'}, b'')
    self.there.acquire()
    thread.end()
    self.assertEqual(work, ['take', 'done', 'begin', 'done'])

  def test_a_failure_is_told(self):
    self.keeper.may.set()
    self.thread.put({'do': 'fail'}, b'')
    self.there.acquire()
    self.assertEqual(self.said, ['failed'])


if __name__ == '__main__':
  absltest.main()
