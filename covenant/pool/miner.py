"""The process of a pool: a miner to the network, a server to its workers.

Beside a miner's files its workdir has ledger.sqlite, the accounts
(covenant/pool/ledger.py), payouts.jsonl, one payment order per line, and
pool.jsonl, each worker's work per round.
"""

import json
import os
import pathlib
import re
import secrets
import sys
import time
import urllib.parse
from collections.abc import Callable

import jax
import numpy as np

from covenant import config as config_lib
from covenant import files
from covenant import typing as ct
from covenant.chain import interface as chain_lib
from covenant.chain import keys
from covenant.data import tokens as tokens_lib
from covenant.node import base as node_lib
from covenant.node import miner as miner_lib
from covenant.node import process
from covenant.pool import deltas as deltas_lib
from covenant.pool import ledger as ledger_lib
from covenant.pool import pool as pool_lib
from covenant.pool import server as server_lib
from covenant.pool import server_settings as settings_lib
from covenant.pool import tasks
from covenant.pool import visitors
from covenant.pool import worker as worker_lib
from covenant.protocol import apply
from covenant.train import local as local_lib
from covenant.train import trainer as trainer_lib
from covenant.wire import amendment as amendment_lib

_LOOK_SECONDS = 0.05  # poll interval for the end of a sub-round
_WAIT_SECONDS = 0.5  # pause of a worker without a lease

_NUMBER = re.compile(r'[0-9]{1,9}')

Report = Callable[[int, pool_lib.PoolResult, int], None]


def policy(
  pool: pool_lib.PoolState,
  ledger: ledger_lib.Ledger,
  report: Report,
  stop: Callable[[], bool],
  follow: Callable[[miner_lib.Miner], None] = lambda node: None,
) -> miner_lib.MinerPolicy:
  """Trains by the workers of a pool.

  Args:
    pool: the pool of the workers.
    ledger: the accounts of the pool.
    report: called after every round with its number, its result and the number
      of assigned sequences.
    stop: returns True to end the training of a round early.
    follow: called before a round, by whose rules the pool then works.
  """

  def batches(node: miner_lib.Miner, task: local_lib.Task) -> tuple[()]:
    """The workers read their own."""
    del node, task
    return ()

  def train(
    node: miner_lib.Miner,
    task: local_lib.Task,
    params: ct.Params,
    batches: miner_lib.Batches,
  ) -> node_lib.Future[local_lib.TrainedRound | None]:
    """Trains a round; raises RetryLaterError without work or when stopped."""
    del batches
    if task.round >= node.config.rounds:
      return node_lib.Future.done(None)  # workers may go home
    follow(node)
    trainer = node.role.slot.trainer
    ids_N = local_lib.assigned_ids(node.config, task, trainer.split).reshape(-1)
    result = _train(pool, ledger, node, task, ids_N, stop)
    if not result.sequences or stop():
      raise node_lib.RetryLaterError
    ledger.settle(
      task.round,
      network_pay(ledger, node, task.uid),
      result.work,
      result.proven,
      result.caught,
    )
    work, private = trainer.compress_round(
      params,
      node.role.miner_state.result(),
      result.params,
      ids_N[: result.sequences],
      result.loss,
    )
    node.role.miner_state = node_lib.Future.done(private)
    report(task.round, result, len(ids_N))
    return node_lib.Future.done(work)

  return miner_lib.HONEST._replace(batches=batches, train=train)


def _train(
  pool: pool_lib.PoolState,
  ledger: ledger_lib.Ledger,
  node: miner_lib.Miner,
  task: local_lib.Task,
  ids_N: np.ndarray,
  stop: Callable[[], bool],
) -> pool_lib.PoolResult:
  """Returns the workers' result for a task before the put window opens."""
  split, context = node.role.slot.trainer.split, node.config.data.context
  blocks = node.schedule.put_opens(task.round) - node.head
  now = time.monotonic()
  pool.begin(
    pool_lib.PoolTask(
      task.round,
      task.root,
      node.shared.params,
      len(ids_N),
      lambda first, n: split.read(ids_N[first : first + n], context),
      now,
      now + max(blocks, 0) * node.chain.block_seconds,
    ),
    ledger.held(),
    ledger.banned(task.round - node.config.pool.ban_rounds),
  )
  while not pool.advance(time.monotonic()):
    time.sleep(_LOOK_SECONDS)
    if stop():
      break
  return pool.finish()


def network_pay(
  ledger: ledger_lib.Ledger, node: miner_lib.Miner, uid: int
) -> int:
  """Returns the rao that the network has paid to the uid in total.

  If the chain is unreachable, the last known amount; a later round catches
  up. Bittensor does not report pay, so there only work is recorded.
  """
  if node.config.network.chain != 'local':
    return ledger.meter
  try:
    block = node.schedule.finalized(node.chain.head())
    earned = node.chain.earned(block)
  except chain_lib.ChainError:
    return ledger.meter
  return round(earned.get(uid, 0.0) * ledger_lib.RAO)


def verifier(config: config_lib.Pool) -> Callable[[str, bytes, bytes], bool]:
  """Returns the check of a signature by a worker that the pool admits."""
  allowed = set(config.workers)

  def verify(worker: str, data: bytes, signature: bytes) -> bool:
    if allowed and worker not in allowed:
      return False
    return keys.verify(worker, data, signature)

  return verify


def open_ledger(
  config: config_lib.Pool, workdir: pathlib.Path
) -> ledger_lib.Ledger:
  """Opens the accounts of a pool by its terms."""
  terms = ledger_lib.PaymentPolicy(
    config.fee, round(config.threshold * ledger_lib.RAO), config.deposit
  )
  return ledger_lib.Ledger(workdir / 'ledger.sqlite', terms)


class PoolProcess:
  """A pool and its server; arguments and errors are those of `Process`."""

  def __init__(
    self, config: config_lib.Config, workdir: str | os.PathLike[str]
  ):
    self._workdir = pathlib.Path(workdir)
    self._stop: Callable[[], bool] = lambda: False
    self._process = process.Process(config, 'pool', workdir, build=self._build)

  def _build(
    self,
    context: node_lib.Context,
    start: apply.Position,
    data: tokens_lib.TokenData,
    mesh: jax.sharding.Mesh | None,
  ) -> miner_lib.Miner:
    del mesh
    config, shared_model = context.config, context.shared_model
    lease_trainer = worker_lib.LeaseTrainer(config, shared_model)
    self._lease_trainer, self._amendments = lease_trainer, []
    merger = deltas_lib.Merger(config, shared_model.abstract_params)
    verify = verifier(config.pool)
    self._ledger = open_ledger(config.pool, self._workdir)
    self._pool = pool_lib.PoolState(
      config,
      shared_model.abstract_params,
      shared_model.run,
      merger,
      deltas_lib.Inspector(config, shared_model.abstract_params, merger),
      lambda params, job: self._lease_trainer.train(params, job)[0],
      verify,
      np.random.default_rng(secrets.randbits(128)),
      self._ledger.workers(),
    )
    params, message = lease_trainer.warm_up()
    self._pool.warm_up(params, message)
    self._server = server_lib.PoolServer(
      settings_lib.of(config.pool),
      context.chain.hotkey,
      context.chain.sign,
      {'run': shared_model.run.hex()},
      verify,
      self._admit,
      self._answer,
      self._pool.is_trusted,
    )
    trainer = trainer_lib.Trainer(config, shared_model, data)
    private = trainer.init(start.shared.params)
    trainer.compress_round(
      start.shared.params, private, params, np.zeros(1, int), 0.0
    )
    role = miner_lib.role(miner_lib.LocalSlot(trainer), start)
    # Each lease has moments of its own.
    private = role.miner_state.result()._replace(inner=None)
    role.miner_state = node_lib.Future.done(private)
    own = policy(
      self._pool,
      self._ledger,
      self._report,
      lambda: self._stop(),
      self._follow,
    )
    return node_lib.Node(context, start, role, miner_lib.handlers(own))

  def _follow(self, node: miner_lib.Miner) -> None:
    """Takes the rules of a round, which an amendment may have changed."""
    if node.config != self._pool.config:
      self._lease_trainer = worker_lib.LeaseTrainer(
        node.config, node.shared_model
      )
      self._pool.config = node.config
    self._amendments = amendment_lib.list_to_json(node.amendments)

  def run(self, stop: Callable[[], bool]) -> None:
    """Serves workers and follows the run, until it is over or asked to stop."""
    self._stop = stop
    self._server.start()
    host, port = self._server.address
    self._process.workdir.status(address=f'{host}:{port}')
    hotkey = self._process.node.chain.hotkey
    _say(f'pool of {hotkey}: workers may come to {host}:{port}')
    try:
      self._process.run(stop)
    finally:
      self._server.close()
      self._ledger.close()

  def _admit(self, request: server_lib.Request) -> int | server_lib.Reply:
    """Returns the largest body that a request may have; nobody else waits.

    A delta is awaited while its lease is open.
    """
    path, asked = parse_path(request.path)
    if path not in ('/lease', '/parameters', '/delta', '/account'):
      return server_lib.Reply(404, {'error': 'unknown path'})
    if path != '/delta':
      return 0
    number = asked.get('number', '')
    if not _NUMBER.fullmatch(number):
      return server_lib.Reply(400, {'error': f'{path}: malformed'})
    if not self._pool.holds(request.worker, int(number)):
      return self._verdict(pool_lib.LeaseVerdict.STALE)
    return self._pool.payload_bytes

  def _answer(self, request: server_lib.Request) -> server_lib.Reply:
    path, asked = parse_path(request.path)
    worker = request.worker
    try:
      match path:
        case '/lease':
          most = int(asked['most'])
          return self._lease(worker, most, request.address)
        case '/parameters':
          return self._parameters(worker, bytes.fromhex(asked['base']))
        case '/delta':
          number, loss = int(asked['number']), float(asked['loss'])
          return self._deliver(worker, number, loss, request.body)
    except (KeyError, ValueError):
      return server_lib.Reply(400, {'error': f'{path}: malformed'})
    account = self._ledger.account(worker)
    return server_lib.Reply(200, account._asdict())

  def _lease(self, worker: str, most: int, address: str) -> server_lib.Reply:
    origin = visitors.group(address)
    job = self._pool.take(worker, time.monotonic(), most, origin)
    if job is None:
      return server_lib.Reply(200, {'wait': _WAIT_SECONDS})
    text = job._asdict() | {'base': job.base.hex()}
    tokens_NxL1 = text.pop('tokens_NxL1')
    if self._amendments:
      text['amendments'] = self._amendments
    return server_lib.Reply(200, text, tokens_NxL1.astype('<i4').tobytes())

  def _parameters(self, worker: str, base: bytes) -> server_lib.Reply:
    found = self._pool.parameters(base)
    if found is not None and not self._pool.may_fetch(worker, base):
      why = 'parameters are sent with a lease, a few times'
      return server_lib.Reply(403, {'error': why})
    if found is None:
      return server_lib.Reply(410, {'error': 'the sub-round is over'})
    data, salt = found
    return server_lib.Reply(200, {'salt': salt.hex()}, data)

  def _deliver(
    self, worker: str, number: int, loss: float, data: bytes
  ) -> server_lib.Reply:
    return self._verdict(
      self._pool.deliver(worker, number, data, loss, time.monotonic())
    )

  def _verdict(self, verdict: pool_lib.LeaseVerdict) -> server_lib.Reply:
    text = {'verdict': verdict.name, 'text': verdict.value}
    return server_lib.Reply(200, text)

  def _report(
    self, round_index: int, outcome: pool_lib.PoolResult, assigned: int
  ) -> None:
    totals = self._ledger.totals()
    verdicts = {
      worker: {verdict.name: n for verdict, n in counts.items()}
      for worker, counts in outcome.verdicts.items()
    }
    self._process.workdir.record(
      'pool',
      {
        'round': round_index,
        'sequences': outcome.sequences,
        'assigned': assigned,
        'loss': outcome.loss,
        'work': dict(outcome.work),
        'caught': sorted(outcome.caught),
        'verdicts': verdicts,
        'rao': totals,
      },
    )
    write_payouts(self._ledger, self._workdir / 'payouts.jsonl')
    tao = totals['earned'] / ledger_lib.RAO
    _say(tasks.describe(round_index, outcome, assigned, tao))


def write_payouts(ledger: ledger_lib.Ledger, path: pathlib.Path) -> None:
  """Appends the orders of a ledger that the file does not have yet.

  A file that a power failure has damaged is written anew.
  """
  orders = ledger.orders()
  lines = [json.dumps(order._asdict()).encode() for order in orders]
  written = files.read_lines(path)
  if written != lines[: len(written)]:
    files.write_lines(path, lines, durable=True)
  else:
    new = orders[len(written) :]
    files.append_jsonl(path, *(order._asdict() for order in new))


def parse_path(path: str) -> tuple[str, dict[str, str]]:
  """Splits a path into its name and its query."""
  name, _, query = path.partition('?')
  return name, dict(urllib.parse.parse_qsl(query, max_num_fields=8))


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
