"""All three kinds of islands over slow links, against their emulation.

  sudo python -m experiments.joined_islands             25 minutes
  sudo python -m experiments.joined_islands --quick     5 minutes, three rounds

Real processes on this machine, each in a network namespace of its own with a
link of 200 Mb/s and 50 ms (experiments/namespaces.py): a full replica, a pool
with three workers, a pipeline's head with three stages, a validator and an
evaluator. After half of the rounds the process of the middle stage is killed,
and another one starts in its place. Without root the program says so and does
nothing.

The emulation trains the same sequences in one process, without links or
failures: the replica, the pool (experiments/emulated_pool.py) and the pipeline
on one device. The workers of a pool divide a round by who comes first, so it is
emulated three times: with workers of equal speeds, and of unequal ones in two
ways. At the inner rate here these end nearly alike; at 0.01, that of
configs/localnet.py, up to 3 % apart.

Bars, written before the first run, but for the mean; runs before it had one
emulation, at the rate of 0.01, and missed the second bar (docs/islands.md):
  equal  All members end with the same history and the same parameters.
  loss   The held-out loss differs from that of the emulation, in the mean over
         the kinds of workers, by less than 2 %.
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from covenant import config as config_lib
from covenant import typing as ct
from covenant.data import assignment
from covenant.data import dataset
from covenant.emulate import localnet
from covenant.node import evaluator as evaluator_lib
from covenant.protocol import round as round_lib
from covenant.train import local as local_lib
from experiments import emulated_pool
from experiments import namespaces
from experiments import pool_workers

_ROOT = pathlib.Path(__file__).parents[1]
CONFIG = str(_ROOT / 'configs' / 'localnet.py')
LINK = namespaces.Link(200e6, 200e6, 0.05, burst=65536)
SETS = (
  'miners=3',
  'validators=1',
  'model.layers=3',
  'optim.inner_steps=8',
  'optim.inner.batch_size=8',
  'optim.inner.microbatch_size=2',
  'optim.inner.learning_rate=0.004',
  'optim.inner.warmup_steps=16',
  'pool.subrounds=4',
  'pool.steps=2',
  'pool.batch=4',
  'phases.round_blocks=80',
  'phases.put_blocks=16',
  'phases.select_blocks=20',
  'pool.patience=10.0',
  'network.block_seconds=0.75',
  f'network.bucket={namespaces.BUCKET}',
)
REPLICA, POOL, PIPELINE = range(3)  # uids
ISLAND = '1x stages=3,rank=20,bits=4'
PORT = 8470
WORKERS = ('worker-0', 'worker-1', 'worker-2')
STAGES = ('stage-0', 'stage-1', 'stage-2')
SPARE = 'stage-3'
SPEEDS = ((2.0, 2.0, 2.0), (2.0, 1.9, 1.8), (2.0, 1.0, 1.0))
_STOP_SECONDS = 60.0


class Result(NamedTuple):
  """The end of the network."""

  equal: bool
  loss: float  # held-out, nats per byte
  killed: int  # rounds that were over when the stage was killed
  rounds: list[dict[str, ct.Json]]  # of the pipeline, from stages.jsonl
  pool: list[dict[str, ct.Json]]  # of the pool, from pool.jsonl
  seeds: list[bytes]  # of the assignments of each round


class Emulated(NamedTuple):
  """The end of an emulation."""

  loss: float  # held-out, nats per byte
  sequences: int  # of the pool


class Helpers:
  """The processes of workers and stages.

  Args:
    folder: the folder of the network.
    wires: the namespaces.
  """

  def __init__(self, folder: pathlib.Path, wires: namespaces.Wires):
    self._folder, self._wires = folder, wires
    self._processes: dict[str, subprocess.Popen[bytes]] = {}

  def start(self, name: str, island: str, uid: int) -> None:
    """Starts a worker or a stage of a uid."""
    url = f'http://{self._wires.address(_folder(uid))}:{PORT}'
    with open(self._folder / f'{name}.txt', 'wb') as log:
      self._processes[name] = subprocess.Popen(
        [
          *self._wires.under(name),
          sys.executable,
          str(_ROOT / 'run.py'),
          f'--role={name.partition("-")[0]}',
          f'--config={self._folder}/config.json',
          f'--workdir={self._folder}/{name}',
          f'--config.islands={island}',
          f'--config.pool.url={url}',
          f'--config.pool.key={self._folder}/{name}.key',
        ],
        stdout=log,
        stderr=log,
      )

  def kill(self, name: str) -> None:
    """Kills a process at once."""
    process = self._processes.pop(name)
    process.kill()
    process.wait()

  def end(self) -> None:
    """Asks all processes to stop, and waits for them."""
    for process in self._processes.values():
      process.send_signal(signal.SIGTERM)
    until = time.monotonic() + _STOP_SECONDS
    for process in self._processes.values():
      try:
        process.wait(max(until - time.monotonic(), 0.1))
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _folder(uid: int) -> str:
  return localnet.Member('miner', uid).name


def flags(member: localnet.Member) -> Sequence[str]:
  """Returns the flags of a pool and of a head."""
  if member.uid not in (POOL, PIPELINE):
    return ()
  island = ISLAND if member.uid == PIPELINE else ''
  listen = f'--config.pool.listen=0.0.0.0:{PORT}'
  return '--role=pool', f'--config.islands={island}', listen


def measure(config: config_lib.Config, folder: pathlib.Path) -> Result:
  """Runs the network in a folder; the middle stage is killed and replaced."""
  members = localnet.members(config)
  names = [*(member.name for member in members), *WORKERS, *STAGES, SPARE]
  killed: list[int] = []
  with contextlib.ExitStack() as stack:
    wires = stack.enter_context(namespaces.Wires(names, LINK))
    buckets = config.miners + config.validators
    stack.enter_context(namespaces.store(wires, buckets))
    network = localnet.Localnet(
      config,
      folder / 'net',
      under=lambda member: wires.under(member.name),
      flags=flags,
    )
    helpers = Helpers(folder / 'net', wires)
    stack.callback(helpers.end)
    for name in WORKERS:
      helpers.start(name, '', POOL)
    for name in STAGES:
      helpers.start(name, ISLAND, PIPELINE)

    def observe(sights: list[localnet.Sight]) -> None:
      done = sights[PIPELINE].status.get('round') or 0
      if not killed and done >= config.rounds // 2:
        killed.append(done)
        helpers.kill(STAGES[1])
        helpers.start(SPARE, ISLAND, PIPELINE)

    outcome = network.run(observe)
    if not outcome.finished:
      raise localnet.LocalnetError('the network did not end')
    last = _records(folder / 'net' / 'evaluator' / 'evaluations.jsonl')[-1]
    plan = round_lib.Schedule(config.phases)
    starts = [plan.assignment_block(r) for r in range(config.rounds)]
    seeds = [network.chain.block_hash(block) for block in starts]
    rounds, pool = (
      _records(folder / 'net' / _folder(uid) / f'{name}.jsonl')
      for uid, name in ((PIPELINE, 'stages'), (POOL, 'pool'))
    )
    network.chain.close()
  return Result(
    outcome.equal, last['nats_per_byte'], killed[0], rounds, pool, seeds
  )


def _records(path: pathlib.Path) -> list[dict[str, ct.Json]]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def make_kit(config: config_lib.Config) -> emulated_pool.Kit:
  """Returns the programs of all emulations."""
  config = config_lib.edit(config, [f'islands=2x ; {ISLAND}'])
  return emulated_pool.Kit(config, dataset.load(config))


def emulate(
  kit: emulated_pool.Kit, seeds: Sequence[bytes], speeds: Sequence[float]
) -> Emulated:
  """Trains the same islands in one process.

  Args:
    kit: the programs.
    seeds: of the assignments of each round.
    speeds: of the pool's workers, sequences per second.
  """
  config, trainer, model = kit.config, kit.trainer, kit.shared_model
  crowd = pool_workers.members(len(speeds), 0.0, config.seed)
  pool = emulated_pool.Emulation(
    kit,
    POOL,
    [m._replace(speed=speed) for m, speed in zip(crowd, speeds, strict=True)],
  )
  shared = model.init()
  states = {uid: trainer.init(shared.params) for uid in (REPLICA, PIPELINE)}
  sequences = 0
  for r, seed in enumerate(seeds):
    made, _ = pool.round(shared, r, seed)
    messages, sequences = {POOL: made.message}, sequences + made.sequences
    for uid in states:
      task = local_lib.Task(uid, r, seed, bytes(32))
      trained, states[uid] = trainer.train(
        shared.params, states[uid], task, trainer.batches(task)
      )
      messages[uid] = trained.message
    shared, _ = model.apply_round(shared, messages)
  found = evaluator_lib.Evaluator(config, kit.data).evaluate(shared.params)
  return Emulated(found.nats_per_byte, sequences)


def table(
  config: config_lib.Config, found: Result, emulated: Sequence[Emulated]
) -> Iterator[str]:
  """Yields the lines of the comparison."""
  steps = [record['steps'] for record in found.rounds]
  whole = sum(n == config.optim.inner_steps for n in steps)
  losses = sorted(e.loss for e in emulated)
  error = found.loss / statistics.mean(losses) - 1
  replaced = max(record['replaced'] for record in found.rounds)
  bypassed = sum(sum(record['bypassed']) for record in found.rounds)
  taken = sum(record['sequences'] for record in found.pool)
  assigned = config.rounds * assignment.per_miner(config)
  yield '| | measured | |'
  yield '| --- | --- | --- |'
  same = 'met' if found.equal else 'MISSED'
  yield f'| history and parameters of all members | | {same} |'
  verdict = 'met' if abs(error) < 0.02 else 'MISSED'
  yield (
    f'| held-out loss, nats per byte; emulations | {found.loss:.4f}; '
    f'{losses[0]:.4f} to {losses[-1]:.4f} ({error:+.2%}) | {verdict} |'
  )
  for what, measured in {
    'rounds; over at the kill': f'{config.rounds}; {found.killed}',
    'rounds of the pipeline; with all steps': f'{len(steps)}; {whole}',
    'stages replaced; steps that bypassed one': f'{replaced}; {bypassed}',
    'sequences of the pool; of the emulated one; assigned': (
      f'{taken}; {emulated[0].sequences}; {assigned}'
    ),
  }.items():
    yield f'| {what} | {measured} | |'


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--quick', action='store_true', help='three rounds')
  parser.add_argument('--workdir', help='a new folder; none: a temporary one')
  options = parser.parse_args()
  if os.geteuid():
    print('joined islands: skipped, as network namespaces need root')
    return
  namespaces.prepare()
  rounds = 3 if options.quick else 20
  sets = (*SETS, f'rounds={rounds}', f'eval.every={rounds}')
  config = config_lib.load(CONFIG, sets)
  with tempfile.TemporaryDirectory() as temporary:
    found = measure(config, pathlib.Path(options.workdir or temporary))
  kit = make_kit(config)
  emulated = [emulate(kit, found.seeds, speeds) for speeds in SPEEDS]
  print('\n'.join(table(config, found, emulated)))


if __name__ == '__main__':
  main()
