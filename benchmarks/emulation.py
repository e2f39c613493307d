"""The cost of emulation: rounds of many miners beside a plain training loop.

  python -m benchmarks.emulation             the ratio to a plain loop
  python -m benchmarks.emulation --miners    time and memory at 8 to 64 miners
  python -m benchmarks.emulation --start-up  a whole run without its training

Both loops do the same inner steps on the same batches of the same model, turn
by turn in one process, and each turn gives one ratio. Start-up (imports,
compilation) is reported apart. Target: at least 0.95 of the plain loop. The
validator checks, agrees and rates, but evaluates no losses on data
(gauntlet.evaluate=0), because the plain loop evaluates nothing.

The start-up is that of the smoke run: the time of the whole process, less its
rounds at the median of all but the first. Imports, compilation, data, held-out
evaluations, checkpoints, figures and the report are in it. Targets: 12 s
cold, with nothing compiled before, and 6 s warm, on an idle machine; CPU
seconds depend less on other load.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import optax
import tensorstore as ts

from covenant import config as config_lib
from covenant.data import tokens
from covenant.emulate import host as host_lib
from covenant.emulate import saved
from covenant.models import llama
from covenant.models import loss as loss_lib

CONFIG = config_lib.Config(
  name='benchmark',
  miners=8,
  model=config_lib.Model(
    vocab_size=64, width=128, layers=4, heads=4, kv_heads=4, ffn_width=344
  ),
  data=config_lib.Data(context=128),
  optim=config_lib.Optim(
    inner_steps=10, inner=config_lib.Inner(microbatch_size=2)
  ),
  gauntlet=config_lib.Gauntlet(evaluate=0),
)


def random_data(vocab_size: int, num_tokens: int) -> tokens.TokenData:
  ids = np.random.default_rng(0).integers(0, vocab_size, num_tokens)
  split = tokens.Split(ts.array(ids.astype(np.int32)), num_tokens)
  return tokens.TokenData(split, split, vocab_size, 0)


class PlainLoop:
  """Runs a plain jitted AdamW step in a loop."""

  def __init__(self, config: config_lib.Config):
    inner = config.optim.inner
    tx = optax.chain(
      optax.clip_by_global_norm(inner.clip_norm),
      optax.adamw(
        inner.learning_rate,
        b1=inner.b1,
        b2=inner.b2,
        weight_decay=inner.weight_decay,
      ),
    )

    def step(params, state, batch_BxL1):
      loss, gradient = loss_lib.next_token_gradient(
        config.model, params, batch_BxL1, inner.microbatch_size
      )
      updates, state = tx.update(gradient, state, params)
      return optax.apply_updates(params, updates), state, loss.total

    self._step = jax.jit(step, donate_argnums=(0, 1))
    self._params = llama.init(config.model, jax.random.key(0))
    self._state = tx.init(self._params)

  def run(self, batches: list[np.ndarray]) -> None:
    value = None
    for batch in batches:
      self._params, self._state, value = self._step(
        self._params, self._state, batch
      )
    jax.block_until_ready(value)


def against_plain(turns: int) -> None:
  began = time.perf_counter()
  subprocess.run([sys.executable, '-c', 'import covenant.cli'], check=True)
  imports = time.perf_counter() - began
  config = CONFIG
  steps = config.miners * config.optim.inner_steps
  shape = (config.optim.inner.batch_size, config.data.context + 1)
  data = random_data(config.model.vocab_size, 2_000_000)
  rng = np.random.default_rng(1)
  batches = [
    rng.integers(0, config.model.vocab_size, shape).astype(np.int32)
    for _ in range(steps)
  ]
  host, plain = host_lib.Host(config, data), PlainLoop(config)
  began = time.perf_counter()
  host.round()
  first = time.perf_counter() - began
  plain.run(batches)
  trained = steps * config.optim.inner.batch_size * config.data.context
  emulated, looped = [], []
  for _ in range(turns):
    began = time.perf_counter()
    host.round()
    middle = time.perf_counter()
    plain.run(batches)
    emulated.append(trained / (middle - began))
    looped.append(trained / (time.perf_counter() - middle))
  ratios = [e / p for e, p in zip(emulated, looped, strict=True)]
  print(f'{llama.num_params(config.model):,} parameters, {turns} turns')
  for name, values in (
    ('emulator, tokens/s', emulated),
    ('plain loop, tokens/s', looped),
    ('emulator / plain loop', ratios),
  ):
    low, middle, high = min(values), statistics.median(values), max(values)
    print(f'{name:22} median {middle:9,.3f}  ({low:,.3f} to {high:,.3f})')
  round_seconds = trained / statistics.median(emulated)
  print(
    f'start-up: imports {imports:.1f} s, compile {first - round_seconds:.1f} s'
  )


def start_up(rounds: int = 4) -> None:
  """Prints the time of whole runs, cold and warm, that is not training."""
  root = pathlib.Path(__file__).resolve().parent.parent
  print('start  process s  CPU s  round s  first round s  not training s')
  with tempfile.TemporaryDirectory() as folder:
    cache = {'XDG_CACHE_HOME': f'{folder}/cache'}
    for turn, bar in (('cold', 12), ('warm', 6), ('warm', 6)):
      workdir = tempfile.mkdtemp(dir=folder)
      spent, began = _cpu_of_children(), time.perf_counter()
      subprocess.run(
        [
          sys.executable,
          'run.py',
          '--config=configs/shakespeare.py:smoke',
          f'--config.rounds={rounds}',
          f'--workdir={workdir}',
        ],
        cwd=root,
        env=os.environ | cache,
        capture_output=True,
        check=True,
      )
      seconds = time.perf_counter() - began
      spent = _cpu_of_children() - spent
      lines = pathlib.Path(workdir, 'metrics.jsonl').read_text().splitlines()
      records = [json.loads(line) for line in lines]
      first, *others = [r['seconds'] for r in records if r['kind'] == 'round']
      median = statistics.median(others)
      print(
        f'{turn:6} {seconds:9.1f} {spent:6.1f} {median:8.2f} {first:14.2f} '
        f'{seconds - rounds * median:15.1f}  (bar: {bar})',
        flush=True,
      )


def _cpu_of_children() -> float:
  used = os.times()
  return used.children_user + used.children_system


def by_miners() -> None:
  print('miners  s/round  s/miner  MB at rest  MB/miner')
  for miners in (8, 16, 32, 64):
    config = dataclasses.replace(
      config_lib.load('configs/shakespeare.py:smoke'),
      miners=miners,
      adversaries=(),
      gauntlet=config_lib.Gauntlet(contributors=miners, evaluate=0),
    )
    data = random_data(config.model.vocab_size, 5_000_000)
    host = host_lib.Host(config, data)
    host.round()
    seconds = []
    for _ in range(3):
      began = time.perf_counter()
      host.round()
      seconds.append(time.perf_counter() - began)
    state = saved.save(host)
    held = sum(x.nbytes for x in jax.tree.leaves((state.shared, state.miners)))
    middle = statistics.median(seconds)
    print(
      f'{miners:6} {middle:8.3f} {middle / miners:8.4f} {held / 1e6:11.2f} '
      f'{held / 1e6 / miners:9.3f}'
    )


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--miners', action='store_true')
  parser.add_argument('--start-up', action='store_true')
  parser.add_argument('--turns', type=int, default=9)
  arguments = parser.parse_args()
  if arguments.start_up:
    start_up()
  elif arguments.miners:
    by_miners()
  else:
    against_plain(arguments.turns)
