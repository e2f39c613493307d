"""The process of a pool: a miner to the network, a server to its workers.

Beside a miner's files its workdir has ledger.sqlite, the accounts
(covenant/pool/ledger.py), payouts.jsonl, one payment order per line, and
pool.jsonl, each worker's work per round.
"""

import os
import pathlib
import secrets
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from covenant import config as config_lib
from covenant import files
from covenant.chain import interface as chain_lib
from covenant.chain import keys
from covenant.data import tokens as tokens_lib
from covenant.node import base as node_lib
from covenant.node import miner as miner_lib
from covenant.node import process
from covenant.pool import lease_trainer as lease_trainer_lib
from covenant.pool import ledger as ledger_lib
from covenant.pool import merge as merge_lib
from covenant.pool import pool as pool_lib
from covenant.pool import server as server_lib
from covenant.pool import verification
from covenant.protocol import round as round_lib
from covenant.train import local as local_lib

_LOOK_SECONDS = 0.05  # poll interval for the end of a sub-round
_WAIT_SECONDS = 0.5  # pause of a worker without a lease

Report = Callable[[int, pool_lib.PoolResult, int], None]


class PoolMiner(miner_lib.Miner):
  """A miner whose training others do.

  Args:
    *args: as `node.Node`.
    pool: of the workers.
    ledger: of the pool.
    report: told of every round: its number, what came of it, and of how many
      sequences.
    **kwargs: as `miner.Miner`.
  """

  def __init__(
    self,
    *args: Any,
    pool: pool_lib.Pool,
    ledger: ledger_lib.Ledger,
    report: Report,
    **kwargs: Any,
  ):
    self._pool = pool
    self._ledger = ledger
    self._report = report
    self._head = 0
    self.stop: Callable[[], bool] = lambda: False
    super().__init__(*args, **kwargs)

  def _fresh(self) -> local_lib.MinerState:
    return super()._fresh()._replace(inner=None)  # each lease has its own

  def poll(self, head: int) -> int:
    if self.state.round >= self.config.rounds:
      self.can = round_lib.MINER - {
        round_lib.Phase.TRAIN
      }  # workers may go home
    return super().poll(head)

  def _train(self, command: round_lib.Command, head: int) -> None:
    self._head = head
    super()._train(command, head)

  def _contribute(self, task: local_lib.Task) -> None:
    """Trains a round; raises RetryLaterError without work or when stopped."""
    split, context = self._trainer.split, self.config.data.context
    ids_N = local_lib.assigned_ids(self.config, task, split).reshape(-1)
    blocks = self.plan.put_opens(task.round) - self._head
    now = time.monotonic()
    self._pool.begin(
      pool_lib.PoolTask(
        task.round,
        task.root,
        self.shared.params,
        len(ids_N),
        lambda first, n: split.read(ids_N[first : first + n], context),
        now,
        now + max(blocks, 0) * self.chain.block_seconds,
      ),
      self._ledger.held(),
      self._ledger.banned(task.round - self.config.pool.ban_rounds),
    )
    while not self._pool.advance(time.monotonic()):
      time.sleep(_LOOK_SECONDS)
      if self.stop():
        break
    outcome = self._pool.finish()
    if not outcome.sequences or self.stop():
      raise node_lib.RetryLaterError
    self._ledger.settle(
      task.round,
      self._meter(task.uid),
      outcome.work,
      outcome.proven,
      outcome.caught,
    )
    work, self.private = self._trainer.compress_round(
      self.shared.params,
      self.private,
      outcome.params,
      ids_N[: outcome.sequences],
      outcome.loss,
    )
    self.contribution = self._trainer.seal(work, task, self.chain.sign)
    self._report(task.round, outcome, len(ids_N))

  def _meter(self, uid: int) -> int:
    """Returns the rao that the network has paid to the uid in total.

    If the chain is unreachable, the last known amount; a later round catches
    up. Bittensor does not report pay, so there only work is recorded.
    """
    if self.config.network.chain != 'local':
      return self._ledger.meter
    try:
      earned = self.chain.earned(self.plan.finalized(self.chain.head()))
    except chain_lib.ChainError:
      return self._ledger.meter
    return round(earned.get(uid, 0.0) * ledger_lib.RAO)


class PoolProcess(process.Process):
  """One pool and its gate. Arguments and errors as of `process.Process`."""

  def __init__(
    self, config: config_lib.Config, workdir: str | os.PathLike[str]
  ):
    self._workdir = pathlib.Path(workdir)
    super().__init__(config, 'pool', workdir)

  def _miner(
    self, common: tuple[Any, ...], data: tokens_lib.TokenData
  ) -> miner_lib.Miner:
    config, chain, _, shared_model, start = common
    lease_trainer = lease_trainer_lib.LeaseTrainer(config, shared_model)
    merger = merge_lib.Merger(config, shared_model.abstract_params)
    allowed = set(config.pool.workers)

    def verify(worker: str, data: bytes, signature: bytes) -> bool:
      if allowed and worker not in allowed:
        return False
      return keys.verify(worker, data, signature)

    self._pool = pool_lib.Pool(
      config,
      shared_model.abstract_params,
      shared_model.run,
      merger,
      verification.Inspector(config, shared_model.abstract_params, merger),
      lambda params, job: lease_trainer.train(params, job)[0],
      verify,
      np.random.default_rng(secrets.randbits(128)),
    )
    params, message = lease_trainer.warm_up()
    self._pool.warm_up(params, message)
    policy = ledger_lib.Policy(
      config.pool.fee, round(config.pool.threshold * ledger_lib.RAO)
    )
    self._ledger = ledger_lib.Ledger(self._workdir / 'ledger.sqlite', policy)
    longest = {
      '/lease': 1000,
      '/parameters': 0,
      '/delta': self._pool.payload_bytes,
      '/account': 0,
    }
    hello = {'run': shared_model.run.hex(), 'pool': chain.hotkey}
    self._server = server_lib.PoolServer(
      _address(config.pool.listen),
      secrets.token_hex(16),
      lambda: hello,
      verify,
      self._answer,
      longest,
    )
    trainer = local_lib.Trainer(config, shared_model, data)
    private = trainer.init(start.shared.params)
    trainer.compress_round(
      start.shared.params, private, params, np.zeros(1, int), 0.0
    )
    return PoolMiner(
      *common,
      trainer=trainer,
      pool=self._pool,
      ledger=self._ledger,
      report=self._report,
      observe=self._journal.event,
    )

  def run(self, stop: Callable[[], bool]) -> None:
    assert isinstance(self._node, PoolMiner)
    self._node.stop = stop
    serving = threading.Thread(target=self._server.serve_forever, daemon=True)
    serving.start()
    host, port = self._server.server_address[:2]
    self._journal.status(address=f'{host}:{port}')
    _say(f'pool of {self._chain.hotkey}: workers may come to {host}:{port}')
    try:
      super().run(stop)
    finally:
      self._server.shutdown()
      self._server.server_close()
      self._ledger.close()

  def _answer(self, request: server_lib.Request) -> server_lib.Reply:
    path, _, query = request.path.partition('?')
    asked = dict(urllib.parse.parse_qsl(query))
    try:
      match path:
        case '/lease':
          return self._lease(request.worker, int(asked['most']))
        case '/parameters':
          return self._parameters(bytes.fromhex(asked['base']))
        case '/delta':
          number, loss = int(asked['number']), float(asked['loss'])
          return self._deliver(request.worker, number, loss, request.body)
    except (KeyError, ValueError):
      return server_lib.Reply(400, {'error': f'{path}: malformed'})
    account = self._ledger.account(request.worker)
    return server_lib.Reply(200, account._asdict())

  def _lease(self, worker: str, most: int) -> server_lib.Reply:
    job = self._pool.take(worker, time.monotonic(), most)
    if job is None:
      return server_lib.Reply(200, {'wait': _WAIT_SECONDS})
    text = job._asdict() | {'base': job.base.hex()}
    tokens_NxL1 = text.pop('tokens_NxL1')
    return server_lib.Reply(200, text, tokens_NxL1.astype('<i4').tobytes())

  def _parameters(self, base: bytes) -> server_lib.Reply:
    found = self._pool.parameters(base)
    if found is None:
      return server_lib.Reply(410, {'error': 'the sub-round is over'})
    data, salt = found
    return server_lib.Reply(200, {'salt': salt.hex()}, data)

  def _deliver(
    self, worker: str, number: int, loss: float, data: bytes
  ) -> server_lib.Reply:
    verdict = self._pool.deliver(worker, number, data, loss, time.monotonic())
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
    self._journal.record(
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
    self._write_payouts()
    _say(_line(round_index, outcome, assigned, totals))

  def _write_payouts(self) -> None:
    """Appends the orders of the ledger that the file does not have yet."""
    path = self._workdir / 'payouts.jsonl'
    written = files.read_jsonl(path)
    last = written[-1]['number'] if written else 0
    orders = self._ledger.orders(after=last)
    files.append_jsonl(path, *(order._asdict() for order in orders))


def _line(
  round_index: int,
  outcome: pool_lib.PoolResult,
  assigned: int,
  totals: Mapping[str, int],
) -> str:
  leases = sum(
    n
    for counts in outcome.verdicts.values()
    for verdict, n in counts.items()
    if verdict is pool_lib.LeaseVerdict.VALID
  )
  text = (
    f'round {round_index}: {outcome.sequences} of {assigned} sequences, '
    f'{leases} leases of {len(outcome.work)} workers, loss {outcome.loss:.3f}; '
    f'earned {totals["earned"] / ledger_lib.RAO:.9f} TAO in all'
  )
  for worker, counts in sorted(outcome.verdicts.items()):
    for verdict, n in counts.items():
      if verdict is not pool_lib.LeaseVerdict.VALID:
        text += f'\n  {worker}: {n} x {verdict.value}'
  return text


def _address(text: str) -> tuple[str, int]:
  host, _, port = text.rpartition(':')
  if not host or not port.isdecimal() or int(port) > 65535:
    raise config_lib.ConfigError(
      f'pool.listen: expected HOST:PORT, got {text!r}'
    )
  return host, int(port)


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
