"""What `python run.py --role=...` does: one function a role."""

import contextlib
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator

import jax

from covenant import config as config_lib
from covenant.data import corpus
from covenant.data import shards
from covenant.data import tokenizer
from covenant.emulate import host
from covenant.models import llama
from covenant.node import replica
from covenant.report import metrics
from covenant.report import plots
from covenant.report import progress


def emulate(config: config_lib.Config, workdir: str) -> None:
  """A whole run on this host, watched: a live line, a summary, figures."""
  _keep_compilations()
  print(_header(config), file=sys.stderr, flush=True)
  records: list[metrics.Record] = []
  with (
    progress.Progress(config.rounds, stream=sys.stderr) as bar,
    _stoppable() as stop,
  ):

    def observe(record: metrics.Record) -> None:
      records.append(record)
      bar.update(record)

    outcome = host.run(config, workdir, observe, stop)
  figures = plots.write_figures(records, f'{workdir}/figures')
  print(f'\n{config.name}\n{progress.summary(records)}')
  print(f'parameters: {replica.fingerprint(outcome.state.shared.params)}')
  print(f'everything is in {workdir}: config.json, metrics.jsonl, tensorboard/')
  print('figures:', *figures)
  if not outcome.finished:
    print(
      f'\nstopped after round {outcome.state.position.round} of '
      f'{config.rounds}. To go on: the same command with --workdir={workdir}'
    )


def tokenize(config: config_lib.Config, workdir: str) -> None:
  """The text of `config.data` as token shards in `workdir`."""
  documents = corpus.load(config.data, config.seed)
  encoder = tokenizer.make(config.data, config.model.vocab_size, documents)
  shards.write(workdir, documents, encoder)
  print(
    f'wrote token shards to {workdir}; train on them with '
    f'--config.data.source=shards --config.data.path={workdir}'
  )


ROLES: dict[str, Callable[[config_lib.Config, str], None]] = {
  'emulate': emulate,
  'tokenize': tokenize,
}


def _header(config: config_lib.Config) -> str:
  """What is about to run, and what a peer sends, in two lines."""
  optim = config.optim
  sent = {'diloco': 'the dense delta', 'ddp': 'the dense gradient'}
  exchange = sent.get(optim.method) or (
    f'{optim.compression.kind}, {optim.compression.k} of each '
    f'{optim.compression.block[0]} x {optim.compression.block[1]} block of '
    f'each tensor, quantizer {optim.compression.quantizer!r}, error feedback '
    f'{optim.compression.error_decay}'
  )
  return (
    f'{config.name}: {llama.num_params(config.model):,} parameters, '
    f'{config.miners} miners, {config.rounds} rounds of {optim.inner_steps} '
    f'steps of {optim.inner.batch_size} x {config.data.context} tokens\n'
    f'{optim.method}: each sends {exchange}'
  )


def _keep_compilations() -> None:
  """Lets a second start of a program find what the first compiled."""
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    path = pathlib.Path(cache, 'covenant', 'compiled')
    jax.config.update('jax_compilation_cache_dir', str(path))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


@contextlib.contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
  """Whether Ctrl-C or SIGTERM has asked to stop; a second one stops at once."""
  asked = False

  def ask(number: int, frame: object) -> None:
    nonlocal asked
    del number, frame
    if asked:
      raise KeyboardInterrupt
    asked = True
    print(
      '\nstopping after this round, with a checkpoint; once more: at once, '
      'back to the last checkpoint',
      file=sys.stderr,
      flush=True,
    )

  signals = (signal.SIGINT, signal.SIGTERM)
  previous = {number: signal.signal(number, ask) for number in signals}
  try:
    yield lambda: asked
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
