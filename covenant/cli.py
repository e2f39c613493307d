"""What `python run.py --role=...` does: one function a role."""

import contextlib
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import flags

from covenant import config as config_lib
from covenant import files
from covenant import metrics
from covenant.adversaries import registry
from covenant.data import corpus
from covenant.data import dataset
from covenant.data import shards
from covenant.data import tokenizer
from covenant.emulate import devices as devices_lib
from covenant.emulate import host
from covenant.emulate import localnet
from covenant.emulate import workdir as workdir_lib
from covenant.gauntlet import explain
from covenant.models import llama
from covenant.node import export as export_lib
from covenant.node import multihost as multihost_lib
from covenant.node import needs
from covenant.node import preflight
from covenant.node import process
from covenant.node import watch
from covenant.plan import compile
from covenant.plan import hardware
from covenant.plan import island_table as islands_table
from covenant.plan import planner
from covenant.plan import table
from covenant.pool import miner as miner_lib
from covenant.pool import worker as worker_lib
from covenant.report import comparison
from covenant.report import members
from covenant.report import page
from covenant.report import plots
from covenant.report import progress
from covenant.train import shared_state


def emulate(config: config_lib.Config, workdir: str) -> None:
  """A whole run, watched: a live line, a summary, figures.

  Of several processes the first alone shows and writes them.
  """
  keep_compilations()
  stoppable = _stoppable('stopping after this round, with a checkpoint')
  with multihost_lib.start(config.network) as process_group, stoppable as stop:
    # By default it is named after the time, which is no two processes' own.
    workdir = process_group.ask('workdir', lambda: workdir)
    if process_group.index:
      host.run(
        config, workdir, process_group=process_group, profile=_flag('profile')
      )
    else:
      _watch(config, workdir, stop, process_group)


def _watch(
  config: config_lib.Config,
  workdir: str,
  stop: Callable[[], bool],
  process_group: multihost_lib.ProcessGroup,
) -> None:
  print(_header(config), file=sys.stderr)
  try:
    needs.check(config, miners=1)
  except needs.InsufficientResourcesError as e:
    if e.hardware:
      # Of a config whose `plan` is about other devices there is none.
      with contextlib.suppress(config_lib.ConfigError):
        plan(config, workdir)
        print()
    raise
  if where := devices_lib.describe(config):
    print(where, file=sys.stderr)
  sys.stderr.flush()
  records: list[metrics.Record] = []
  with progress.Progress(config.rounds, stream=sys.stderr) as bar:

    def observe(record: metrics.Record) -> None:
      records.append(record)
      bar.update(record)

    outcome = host.run(
      config, workdir, observe, stop, process_group, _flag('profile')
    )
  bad = registry.dishonest(config)
  figures = plots.write_figures(records, f'{workdir}/figures', bad)
  print(f'\n{config.name}\n{progress.summary(records, bad)}')
  print(f'parameters: {shared_state.fingerprint(outcome.state.shared.params)}')
  print(f'everything is in {workdir}: config.json, metrics.jsonl, tensorboard/')
  print('figures:', *figures)
  print(f'report: {page.write(workdir)}')
  if not outcome.finished:
    print(
      f'\nstopped after round {outcome.state.counters.round} of '
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


def export(config: config_lib.Config, workdir: str) -> None:
  """The newest checkpoint in `workdir` as Hugging Face's transformers load it.

  It is a run's; `config` is that run's, its config.json for one.
  """
  workdir_lib.check_owner(pathlib.Path(workdir), config)
  completed, params = export_lib.newest(workdir)
  folder = export_lib.Exporter(config, workdir).write(completed, params)
  print(
    f'the model after round {completed} is in {folder}; '
    f'transformers.LlamaForCausalLM.from_pretrained({str(folder)!r}) loads it'
  )


def miner(config: config_lib.Config, workdir: str) -> None:
  """One miner of a network, until the run is over or Ctrl-C."""
  _member(config, 'miner', workdir)


def validator(config: config_lib.Config, workdir: str) -> None:
  """One validator of a network, until the run is over or Ctrl-C."""
  _member(config, 'validator', workdir)


def pool(config: config_lib.Config, workdir: str) -> None:
  """One miner of a network whose training workers do."""
  keep_compilations()
  preflight.require(config, workdir, 'pool')
  with _stoppable('stopping') as stop:
    miner_lib.PoolProcess(config, workdir).run(stop)


def worker(config: config_lib.Config, workdir: str) -> None:
  """One worker of a pool, until Ctrl-C."""
  keep_compilations()
  with _stoppable('stopping after this lease') as stop:
    worker_lib.Worker(config, workdir).run(stop)


def evaluator(config: config_lib.Config, workdir: str) -> None:
  """Evaluates the checkpoints that validators publish."""
  keep_compilations()
  preflight.require(config, workdir, 'evaluator')
  with _stoppable('stopping') as stop:
    watch.Watcher(config, workdir).run(stop)


def run_localnet(config: config_lib.Config, workdir: str) -> None:
  """A network of processes on this machine; the exit status says if equal."""
  keep_compilations()
  print(_header(config), file=sys.stderr)
  print('compiling, once for all processes', file=sys.stderr, flush=True)
  host.Host(config, dataset.load(config)).round()
  screen = members.Screen(sys.stderr)
  with _stoppable('stopping everybody') as stop:
    network = localnet.Localnet(config, workdir)
    outcome = network.run(screen.show, stop)
  print(members.table(outcome.sights))
  print(f'logs, events and checkpoints of each are in {workdir}')
  if not outcome.finished:
    sys.exit('stopped before the last round')
  status = outcome.sights[0].status
  if not outcome.equal:
    sys.exit('NOT EQUAL: the members hold different histories or parameters')
  print(
    f'equal: all {len(outcome.sights)} hold root {status["root"][:16]} and '
    f'parameters {status["fingerprint"]} after round {status["round"]}'
  )


def examine(config: config_lib.Config, workdir: str) -> None:
  """Whether this machine, hotkey and bucket can be a miner or a validator."""
  keep_compilations()
  findings = list(preflight.examine(config, workdir))
  print(preflight.table(findings))
  if not all(finding.well for finding in findings):
    sys.exit(1)


def explain_uid(config: config_lib.Config, workdir: str) -> None:
  """Why `--uid` has its weight, from what a validator wrote down."""
  del config
  path = pathlib.Path(workdir, 'verdicts.jsonl')
  if _flag('uid') is None:
    raise config_lib.ConfigError('--uid: expected the uid to explain')
  if not path.exists():
    raise config_lib.ConfigError(
      '--workdir: expected that of a validator or of an emulated run; there is '
      f'no {path}'
    )
  verdicts = files.read_jsonl(path)
  first = verdicts[0].get('validator') if verdicts else None
  decisions = [
    decision
    for verdict in verdicts
    if verdict.get('validator') == first
    for decision in verdict['decisions']
  ]
  print(explain.explain(decisions, _flag('uid')))


def plan(config: config_lib.Config, workdir: str) -> None:
  """What a round costs on `config.plan.hardware`, or who does what of it.

  With `config.plan.inventory` the devices of many, who do the latter.
  """
  del workdir
  if config.plan.inventory:
    print(islands_table.text(config, planner.plan(config)))
    return
  config = hardware.resolve(config)
  table.text(config)  # what cannot be is said at once
  print(
    f'compiling the programs of a round for {config.plan.hardware}, on virtual '
    'devices; --config.plan.compile=false only lowers them',
    file=sys.stderr,
    flush=True,
  )
  print(table.text(config, compile.measure(config)))


def report(config: config_lib.Config, workdir: str) -> None:
  """The page of a run that is over, stopped, or under way."""
  del config  # the folder has the run's
  print(f'report: {page.write(workdir)}')


def compare(config: config_lib.Config, workdir: str) -> None:
  """The runs of `--workdirs` on one page, which is written to `workdir`."""
  del config
  made = comparison.write(_flag('workdirs'), workdir)
  print(made.table)
  print('figures:', *made.figures)
  print(f'comparison: {made.page}')


def _member(config: config_lib.Config, role: str, workdir: str) -> None:
  keep_compilations()
  if config.network.coordinator and role != 'miner':
    raise config_lib.ConfigError(
      'network.coordinator: expected nothing, because only a miner, or an '
      'emulation, can be several processes; got '
      f'{config.network.coordinator!r} for a {role}'
    )
  if not config.network.coordinator and needs.lacking_devices(config):
    preflight.require(config, workdir, role)  # which says all else as well
  # A validator looks at many messages of a model, on one device.
  devices = config.devices if role == 'miner' else None
  with multihost_lib.start(config.network, devices) as process_group:
    if not process_group.index:
      preflight.require(config, workdir, role)
    with _stoppable('stopping') as stop:
      profile = _flag('profile')
      process.Process(config, role, workdir, process_group, profile).run(stop)


ROLES: dict[str, Callable[[config_lib.Config, str], None]] = {
  'emulate': emulate,
  'tokenize': tokenize,
  'export': export,
  'miner': miner,
  'validator': validator,
  'pool': pool,
  'worker': worker,
  'evaluator': evaluator,
  'localnet': run_localnet,
  'doctor': examine,
  'explain': explain_uid,
  'plan': plan,
  'report': report,
  'compare': compare,
}


def _flag(name: str) -> Any:
  """A flag of run.py; None where another program calls a role."""
  return flags.FLAGS[name].value if name in flags.FLAGS else None


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


def keep_compilations() -> None:
  """Lets a second start of a program find what the first compiled."""
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    path = pathlib.Path(cache, 'covenant', 'compiled')
    jax.config.update('jax_compilation_cache_dir', str(path))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


@contextlib.contextmanager
def _stoppable(message: str) -> Iterator[Callable[[], bool]]:
  """Whether Ctrl-C or SIGTERM has asked to stop; a second one stops at once."""
  asked = False

  def ask(number: int, frame: object) -> None:
    nonlocal asked
    del number, frame
    if asked:
      raise KeyboardInterrupt
    asked = True
    print(f'\n{message}; once more: at once', file=sys.stderr, flush=True)

  signals = (signal.SIGINT, signal.SIGTERM)
  previous = {number: signal.signal(number, ask) for number in signals}
  try:
    yield lambda: asked
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
