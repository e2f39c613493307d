"""A head and its stages in one process for tests: real channels, no chain."""

import dataclasses
import functools
import pathlib
import threading
import types

import numpy as np
from absl.testing import absltest

from covenant import config as config_lib
from covenant.chain import keys
from covenant.config import amend
from covenant.data import dataset
from covenant.node import connect
from covenant.pool import head as head_lib
from covenant.pool import ledger as ledger_lib
from covenant.pool import miner
from covenant.pool import orders as orders_lib
from covenant.pool import seats as seats_lib
from covenant.pool import server as server_lib
from covenant.pool import server_settings
from covenant.pool import stage_audit
from covenant.pool import stage_keeper
from covenant.pool import stage_process
from covenant.pool import stage_tensors
from covenant.pool import stage_training
from covenant.pool import staged_model
from covenant.protocol import apply
from covenant.protocol import published_checkpoint
from covenant.protocol import run_storage
from covenant.train import local as local_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train import trainer as trainer_lib
from covenant.wire import payload
from tests import helpers

POOL = keys.Key.from_seed(b'p' * 32)
ISLAND = '1x stages=3,rank=8,bits=4'


@functools.cache
def make_config(*changes, island=ISLAND):
  return config_lib.load(
    f'{helpers.CONFIGS}/tiny.py',
    [
      'model.layers=3', 'miners=1', f'islands={island}',
      'optim.inner.microbatch_size=2', 'optim.inner.learning_rate=0.002',
      'optim.outer.momentum=0.5',
      'pool.fee=0.1', 'pool.deposit=1', 'pool.threshold=0.0',
      'pool.audits=64', *changes,
    ],
  )  # fmt: skip


@functools.cache
def emulated(config):
  """The same pipeline on one device: (shared model, trainer)."""
  shared_model = shared_state_lib.SharedModel(config)
  return shared_model, trainer_lib.Trainer(
    config, shared_model, dataset.load(config)
  )


def task(round_index):
  return local_lib.Task(0, round_index, 5, bytes(32))


class Worker:
  """A stage process in a thread of this process.

  Args:
    case: stops it when the test ends.
    name: of its key and its workdir.
    fault: called with the process, its stage's number, and each message and
      its answer; returns the answer.
  """

  def __init__(self, case, name, fault=None):
    pool = dataclasses.replace(
      case.config.pool,
      url=f'http://127.0.0.1:{case.server.port}',
      key=str(case.folder / f'{name}.key'),
      **case.worker_settings,
    )
    config = dataclasses.replace(case.config, pool=pool, network=case.network)
    self.process = stage_process.StageProcess(config, case.folder / name)
    self.address = self.process.address
    self.stopping = threading.Event()
    if fault is not None:
      make = self.process._make

      def faulty(index):
        keeper = make(index)
        answer = keeper.answer
        keeper.answer = lambda text, data: fault(
          self, index, text, lambda: answer(text, data)
        )
        return keeper

      self.process._make = faulty
    self.thread = threading.Thread(
      target=self.process.run, args=(self.stopping.is_set,)
    )
    self.thread.start()
    case.addCleanup(self.stop)

  def stop(self):
    self.stopping.set()
    self.thread.join()


class StagesCase(absltest.TestCase):
  """A case with a head's parts; `train` and `apply` are a round's."""

  worker_settings = {}
  changes = ()

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.config = make_config(*self.changes)
    self.island = stage_process.pipeline_of(self.config)
    self.model = staged_model.StagedModel(self.config)
    tensors = stage_tensors.StageTensors(
      self.config, self.island, self.model.spec
    )
    self.log = orders_lib.OrderLog(self.folder / 'orders', self.model.run.hex())
    self.seats = seats_lib.Seats(self.island.stages, self.log, tensors.part)
    self.payloads = {}  # of all rounds, by digest
    self.ledger = ledger_lib.Ledger(
      ':memory:', ledger_lib.PaymentPolicy(0.1, 0, 1)
    )
    self.addCleanup(self.ledger.close)
    self.records = []
    self.network = dataclasses.replace(
      self.config.network, path=str(self.folder), hotkey='validator'
    )
    self.objects = connect.objects(
      dataclasses.replace(self.config, network=self.network), self.model.run
    )
    self.tensors = tensors
    auditor = stage_audit.Auditor(
      self.config,
      self.island,
      self.log,
      tensors.part,
      self.find,
      functools.partial(stage_keeper.load_tensors, self.objects),
    )
    self.model.attach(self.seats, self.log, auditor, lambda: False)
    self.training = stage_training.StageTraining(
      self.config,
      self.island,
      self.seats,
      tensors,
      auditor,
      self.ledger,
      self.model.run,
      self.folder,
      self.records.append,
      lambda: False,
      np.random.default_rng(0),
    )
    self.server = server_lib.PoolServer(
      server_settings.ServerSettings('127.0.0.1', 0),
      POOL.address,
      POOL.sign,
      {'run': self.model.run.hex()},
      keys.verify,
      lambda request: 0,
      self.answer,
      channels=self.seats,
    )
    self.server.start()
    self.addCleanup(self.server.close)
    self.shared = self.model.init()
    self.want, self.trainer = emulated(self.config)
    self.want_shared = self.want.init()
    self.want_state = self.trainer.init(self.want_shared.params)

  def answer(self, request):
    _, asked = miner.parse_path(request.path)
    order = self.log.get(int(asked['number']))
    stage, uid = int(asked['stage']), int(asked['uid'])
    found = self.tensors.sections_of(order, stage, uid, self.find)
    return server_lib.Reply(200, {}, b''.join(found))

  def publish(self, round_index):
    """Publishes what the emulated pipeline has; newcomers begin from it."""
    place = apply.Position(round_index, bytes(32), self.want_shared)
    published_checkpoint.publish(self.objects, place, self.want, POOL.sign)
    validator = types.SimpleNamespace(uid=0, hotkey=POOL.address)
    head_lib.HeadProcess._rebase(
      types.SimpleNamespace(_model=self.model),
      types.SimpleNamespace(
        objects=self.objects, chain=types.SimpleNamespace(verify=keys.verify)
      ),
      types.SimpleNamespace(
        candidates=[validator], location=lambda uid: b'/validator'
      ),
    )

  def amend(self, changes):
    """Goes on by other rules, as a head that has adopted an amendment."""
    config = amend.amended(self.config, 1, changes)
    self.training._config = config
    self.model = self.model.amended(config)
    self.want = self.want.amended(config)
    self.trainer = trainer_lib.Trainer(config, self.want, dataset.load(config))

  def find(self, source):
    """Returns the payload of a source, from the buckets of this test."""
    return self.payloads[source.digest]

  def train(self, round_index, pay=0, late=lambda: False):
    """Trains a round by the stages; returns it."""
    return self.training.train_round(
      task(round_index), self.trainer.split, late, pay
    )

  def payload(self, trained, round_index):
    """Returns the payload of a round."""
    header = payload.Header(
      self.model.run, round_index, 0, bytes(16), trained.receipt,
      trained.sequences,
    )  # fmt: skip
    return header, payload.assemble(
      header, trained.message, self.model.spec, POOL.sign
    )

  def apply(self, data, header):
    """Takes the outer step of one payload."""
    self.payloads[run_storage.digest(data).hex()] = data
    whole = self.model.decode(data, header, lambda *_: True)
    self.shared, _ = self.model.apply_round(self.shared, {0: whole.message})

  def want_round(self, round_index):
    """Trains a round on one device; returns its payload."""
    trained, self.want_state = self.trainer.train(
      self.want_shared.params,
      self.want_state,
      task(round_index),
      self.trainer.batches(task(round_index)),
    )
    header = payload.Header(
      self.model.run, round_index, 0, bytes(16), trained.receipt,
      trained.sequences,
    )  # fmt: skip
    data = payload.encode(
      header, trained.message, self.want.abstract_params, self.want.spec,
      POOL.sign,
    )  # fmt: skip
    self.want_shared, _ = self.want.apply_round(
      self.want_shared, {0: trained.message}
    )
    return data
