"""The command line: flags, and one function per role.

  python run.py --config=configs/shakespeare.py
  python run.py --config=configs/shakespeare.py:smoke --config.rounds=10

The console script `covenant`, or `python -m covenant`, takes the same flags
from any folder: `covenant --config=shakespeare:smoke`.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable

import jax
from absl import app
from absl import flags

from covenant import config as config_lib
from covenant import errors
from covenant import startup
from covenant import typing as ct
from covenant.data import dataset
from covenant.data import inspect as inspect_lib
from covenant.data import tokenize as tokenize_lib
from covenant.emulate import emulation
from covenant.emulate import host
from covenant.emulate import localnet
from covenant.emulate import places
from covenant.emulate import proposals
from covenant.node import evaluator as evaluator_lib
from covenant.node import export as export_lib
from covenant.node import finetune as finetune_lib
from covenant.node import multihost as multihost_lib
from covenant.node import preflight
from covenant.node import process
from covenant.node import sample as sample_lib
from covenant.node import sync as sync_lib
from covenant.plan import compile
from covenant.plan import hardware
from covenant.plan import island_table as islands_table
from covenant.plan import planner
from covenant.plan import table
from covenant.pool import worker as worker_lib
from covenant.report import explain
from covenant.report import page
from covenant.report import progress
from covenant.report import status as status_lib
from covenant.report import watch
from covenant.telemetry import machine


def emulate(config: config_lib.Config, workdir: str) -> None:
  """Emulates a whole run on this host, in virtual time.

  Shows a live line, a summary and figures, in the first process alone.
  """
  signals = startup.stoppable('stopping soon, with a checkpoint')
  with multihost_lib.start(config.network) as process_group, signals as stop:
    # The default is named after the time, which processes read differently.
    workdir = process_group.broadcast_from(0, 'workdir', lambda: workdir)
    if process_group.index:
      emulation.run(
        config, workdir, process_group=process_group, profile=_flag('profile')
      )
    else:
      print(progress.header(config), file=sys.stderr)
      _check(config, workdir)
      watch.show(config, workdir, stop, process_group, _flag('profile'))


def _check(config: config_lib.Config, workdir: str) -> None:
  """Checks this machine; plans the config for another one if it must."""
  try:
    preflight.check(config, miners=1)
  except preflight.InsufficientResourcesError as e:
    if e.hardware:
      # A `plan` about other devices raises an error.
      with contextlib.suppress(config_lib.ConfigError):
        plan(config, workdir)
        print()
    raise
  if where := places.describe(config):
    print(where, file=sys.stderr)
  if idle := machine.idle_accelerator(jax.default_backend()):
    print(f'warning: {idle}', file=sys.stderr)


def tokenize(config: config_lib.Config, workdir: str) -> None:
  """Writes the text of `config.data` as token shards to the workdir.

  --workers processes do it; --part=3/64 does a part of the files.
  """
  part = tokenize_lib.parse_part(_flag('part') or '1/1')
  workers = _flag('workers') or machine.cores()
  made = tokenize_lib.run(config, workdir, workers, part)
  if made is None:
    print(
      f'part {part[0]} of {part[1]} is in {workdir}; the manifest follows with '
      'the last part, or with --role=merge'
    )
  else:
    print(inspect_lib.summary(made, workdir))


def merge(config: config_lib.Config, workdir: str) -> None:
  """Writes the manifest of all parts of --role=tokenize in the workdir."""
  del config
  print(inspect_lib.summary(tokenize_lib.merge(workdir), workdir))


def data(config: config_lib.Config, workdir: str) -> None:
  """Prints what the data of a config holds, and verifies its shards."""
  del workdir
  print(inspect_lib.text(config))


def miner(config: config_lib.Config, workdir: str) -> None:
  """Runs one miner of a network, until the run is over or Ctrl-C."""
  _member(config, 'miner', workdir)


def validator(config: config_lib.Config, workdir: str) -> None:
  """Runs one validator of a network, until the run is over or Ctrl-C."""
  _member(config, 'validator', workdir)


def pool(config: config_lib.Config, workdir: str) -> None:
  """Runs one miner of a network whose training is done by workers or stages."""
  from covenant.pool import head as head_lib  # needs the extra `pool`
  from covenant.pool import miner as miner_lib

  preflight.require(config, workdir, 'pool')
  with startup.stoppable('stopping') as stop:
    if any(island.rank for island in config.islands):
      head_lib.HeadProcess(config, workdir, stop).run()
    else:
      miner_lib.PoolProcess(config, workdir).run(stop)


def worker(config: config_lib.Config, workdir: str) -> None:
  """Runs one worker of the pool at --config.pool.url, until Ctrl-C."""
  with startup.stoppable('stopping after this lease') as stop:
    worker_lib.Worker(config, workdir).run(stop)


def stage(config: config_lib.Config, workdir: str) -> None:
  """Runs one stage of the pipeline at --config.pool.url, until Ctrl-C."""
  from covenant.pool import stage_process  # needs the extra `pool`

  with startup.stoppable('stopping') as stop:
    stage_process.StageProcess(config, workdir).run(stop)


def evaluator(config: config_lib.Config, workdir: str) -> None:
  """Evaluates the checkpoints that validators publish, until Ctrl-C."""
  if config.network.coordinator:
    raise config_lib.ConfigError(
      'network.coordinator: expected nothing, because an evaluator is one '
      f'process; got {config.network.coordinator!r}'
    )
  preflight.require(config, workdir, 'evaluator')
  mesh = multihost_lib.start(config.network, config.devices).mesh
  with startup.stoppable('stopping') as stop:
    evaluator_lib.EvaluatorProcess(config, workdir, mesh).run(stop)


def run_localnet(config: config_lib.Config, workdir: str) -> None:
  """Runs a network of processes on this machine, in real time.

  The exit status is 0 if all of them end with the same parameters.
  """
  print(f'{progress.header(config)}\ncompiling, once for all', file=sys.stderr)
  os.environ.update(startup.device_share(localnet.device_share(config)))
  host.Host(config, dataset.load(config)).round()
  screen = progress.MembersScreen(sys.stderr)
  with startup.stoppable('stopping everybody') as stop:
    outcome = localnet.Localnet(config, workdir).run(screen.show, stop)
  print(progress.members_table(outcome.sights))
  print(f'logs, events and checkpoints of each are in {workdir}')
  if not outcome.finished:
    sys.exit('stopped before the last round')
  status = outcome.sights[0].status
  if not outcome.equal:
    sys.exit('NOT EQUAL: the members hold different histories or parameters')
  print(
    f'equal: all {len(outcome.sights)} hold root {status["root"][:16]} and '
    f'state {status["fingerprint"]} after round {status["round"]}'
  )


def examine(config: config_lib.Config, workdir: str) -> None:
  """Lists what this machine lacks for a member of a network."""
  findings = list(preflight.examine(config, workdir, _flag('as') or ''))
  print(preflight.table(findings))
  if not all(f.well for f in findings):
    sys.exit(1)


def status(config: config_lib.Config, workdir: str) -> None:
  """Prints how the members of a network do; --watch goes on doing so."""
  del workdir
  with startup.stoppable('stopping') as stop:
    status_lib.watch(config, sys.stdout, bool(_flag('watch')), stop)


def amend(config: config_lib.Config, workdir: str) -> None:
  """Proposes that a run changes --set from --round on; lists, without."""
  flags_ = _flag('round'), _flag('set') or [], bool(_flag('withdraw'))
  folder = '' if _flag('workdir') == '' else workdir
  print(proposals.run(config, folder, *flags_))


def explain_uid(config: config_lib.Config, workdir: str) -> None:
  """Explains the weight of --uid and amendments, from a validator's records."""
  del config  # the folder has the run's
  print(explain.text(workdir, _flag('uid')))


def plan(config: config_lib.Config, workdir: str) -> None:
  """Prints the costs of a round on --config.plan.hardware, and if it fits.

  With --config.plan.inventory, assigns the devices of many peers to islands.
  """
  del workdir
  if config.plan.inventory:
    print(islands_table.text(config, planner.plan(config)))
    return
  config = hardware.resolve(config)
  table.text(config)  # raises errors before anything is compiled
  print(
    f'compiling the programs of a round for {config.plan.hardware}, on virtual '
    'devices; --config.plan.compile=false only lowers them',
    file=sys.stderr,
    flush=True,
  )
  print(table.text(config, compile.measure(config)))


def report(config: config_lib.Config, workdir: str) -> None:
  """Writes the page of the run in the workdir, which may be under way."""
  del config  # the folder has the run's
  print(f'report: {page.write(workdir)}')


def compare(config: config_lib.Config, workdir: str) -> None:
  """Writes a page that compares the runs in --workdirs."""
  del config
  from covenant.report import comparison  # matplotlib starts slowly

  found = [os.path.expanduser(path) for path in _flag('workdirs')]
  made = comparison.write(found, workdir, _flag('baseline'))
  print(made.table)
  print('figures:', *made.figures)
  print(f'comparison: {made.page}')


def _member(config: config_lib.Config, role: str, workdir: str) -> None:
  if not config.network.coordinator and preflight.lacking_devices(config):
    preflight.require(config, workdir, role)  # reports all else as well
  with multihost_lib.start(config.network, config.devices) as process_group:
    if not process_group.index:
      preflight.require(config, workdir, role)
    with startup.stoppable('stopping') as stop:
      profile = _flag('profile')
      process.Process(config, role, workdir, process_group, profile).run(stop)


def _flag(name: str) -> ct.Json:
  """Returns the value of a flag; None if another program calls a role."""
  return flags.FLAGS[name].value if name in flags.FLAGS else None


ROLES: dict[str, Callable[[config_lib.Config, str], None]] = {
  'emulate': emulate,
  'tokenize': tokenize,
  'merge': merge,
  'data': data,
  'export': export_lib.export,
  'sample': sample_lib.sample,
  'finetune': finetune_lib.finetune,
  'miner': miner,
  'validator': validator,
  'pool': pool,
  'worker': worker,
  'stage': stage,
  'evaluator': evaluator,
  'sync': sync_lib.sync,
  'localnet': run_localnet,
  'doctor': examine,
  'status': status,
  'amend': amend,
  'explain': explain_uid,
  'plan': plan,
  'report': report,
  'compare': compare,
}

_OF_A_RUN = ('export', 'sample', 'finetune')  # its config.json is the default
_WITHOUT_DATA = (  # they read no tokens, or make them
  *('tokenize', 'merge', 'plan', 'report', 'compare', 'explain'),
  *_OF_A_RUN,
)
_OF_A_POOL = ('pool', 'worker', 'stage')  # several may share a GPU
_WITH_FLAGS = (export_lib, sample_lib, finetune_lib)


def _help() -> str:
  """Returns the help of --role: the first line of every role's docstring."""
  first = {name: str(ROLES[name].__doc__).partition('\n')[0] for name in ROLES}
  return '\n'.join(f'{name}: {line}' for name, line in first.items())


_CONFIG = flags.DEFINE_string(
  'config',
  'shakespeare',
  'A config of the package, such as shakespeare or shakespeare:smoke; a file, '
  "as mine.py:smoke; or a run's config.json, which export, sample and finetune "
  'take. Every field is a flag, as in --config.optim.inner_steps=20.',
)
_ROLE = flags.DEFINE_enum('role', 'emulate', list(ROLES), _help())
_WORKDIR = flags.DEFINE_string(
  'workdir', '', 'The folder for all output. Default: runs/DATE-NAME.'
)
flags.DEFINE_list('workdirs', [], 'compare: folders of runs, by commas.')
flags.DEFINE_string(
  'baseline', None, 'compare: the run to compare with. Default: the first.'
)
flags.DEFINE_integer(
  'profile',
  None,
  "emulate, miner, validator: a round, from 0 on, to trace with JAX's profiler "
  'into the workdir.',
  lower_bound=0,
)
flags.DEFINE_integer(
  'workers', None, 'tokenize: processes. Default: all cores.', lower_bound=1
)
flags.DEFINE_string(
  'part', None, 'tokenize: the part of the files that this machine does: K/N.'
)
flags.DEFINE_enum(
  'as',
  None,
  preflight.ROLES,
  'doctor: the role to check for. Default: as the hotkey declared; if it did '
  'not, validator with a permit, and miner without one.',
)
flags.DEFINE_bool('watch', False, 'status: prints again with every block.')
flags.DEFINE_integer('uid', None, 'explain: the uid.', lower_bound=0)
flags.DEFINE_integer('round', None, 'amend: the first round.', lower_bound=1)
flags.DEFINE_multi_string('set', [], 'amend: a change, PATH=VALUE.')
flags.DEFINE_bool('withdraw', False, 'amend: no longer those of --round.')
_PREFIX = '--config.'


def main() -> None:
  """Runs the program; ends it with one line after an error of the user."""
  for module in __name__, *(m.__name__ for m in _WITH_FLAGS):
    for flag in flags.FLAGS.get_key_flags_for_module(module):
      flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # for --help
  app.run(run, flags_parser=_parse)


def run(argv: list[str]) -> None:
  """Runs the role that the parsed flags ask for."""
  if surplus := [a for a in argv[1:] if not a.startswith(_PREFIX)]:
    example = '--config.rounds=3'
    sys.exit(f'error: expected --flags, such as {example}; got {surplus[0]}')
  overrides = [a.removeprefix(_PREFIX) for a in argv[1:]]
  if not flags.FLAGS['verbosity'].present:
    startup.quiet_libraries()
  try:
    source = os.path.expanduser(_CONFIG.value)
    if _ROLE.value in _OF_A_RUN and not flags.FLAGS['config'].present:
      source = export_lib.config_of(_WORKDIR.value) or source
    config = config_lib.load(source, overrides)
    if _ROLE.value not in _WITHOUT_DATA:
      config = dataset.identified(config)
    name = time.strftime('%Y%m%d-%H%M%S-') + config.name
    workdir = os.path.expanduser(_WORKDIR.value or f'runs/{name}')
    startup.keep_compilations()
    share, shared = config.devices.memory_fraction, _ROLE.value in _OF_A_POOL
    os.environ.update(startup.device_share(share, shared=shared))  # before JAX
    ROLES[_ROLE.value](config, workdir)
  except errors.CovenantError as e:
    sys.exit(f'error: {e}')
  except OSError as e:
    if not startup.is_for_people(e):
      raise
    sys.exit(f'error: {startup.os_error(e)}')


def _parse(argv: list[str]) -> list[str]:
  """Parses absl's flags; leaves fields of the config for `run`."""
  fields = [a for a in argv if a.startswith(_PREFIX)]
  rest = [a for a in argv if not a.startswith(_PREFIX)]
  return app.parse_flags_with_usage(rest) + fields
