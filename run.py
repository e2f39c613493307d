"""Pre-trains a language model with many emulated miners.

python run.py --config=configs/shakespeare.py
python run.py --config=configs/shakespeare.py:smoke --config.rounds=10
"""

import datetime
import pathlib
import sys

from absl import app
from absl import flags
from absl import logging

from covenant import cli
from covenant import config as config_lib
from covenant import metrics
from covenant.chain import interface as chain
from covenant.emulate import localnet
from covenant.node import multihost
from covenant.node import preflight
from covenant.store import interface as store
from covenant.train import local

_CONFIG = flags.DEFINE_string(
  'config',
  'configs/shakespeare.py',
  'A file under configs/, with :VARIANT if it has some. Every field can be '
  'set as in --config.optim.inner_steps=20; covenant/config/ lists them.',
)
_ROLE = flags.DEFINE_enum(
  'role',
  'emulate',
  list(cli.ROLES),
  'emulate: a whole run on this host, in virtual time. localnet: the same as '
  'processes, in real time. miner, validator, evaluator: one member of a '
  'network. pool: a miner whose training others do. worker: one of these, for '
  '--config.pool.url. doctor: what a member of a network would lack here. '
  'explain: why --uid has its weight. plan: what a round costs on '
  '--config.plan.hardware, and whether it fits, or who does what of '
  '--config.plan.inventory. report: the page of a run. compare: the page of '
  'several, --workdirs. tokenize: text to token shards.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir', '', 'Where everything is written. Default: runs/DATE-NAME.'
)
flags.DEFINE_list('workdirs', [], 'compare: folders of runs, by commas.')
flags.DEFINE_integer(
  'profile',
  None,
  "emulate, miner, validator: a round, from 0 on, to trace with JAX's profiler "
  'into the workdir.',
  lower_bound=0,
)
flags.DEFINE_integer('uid', None, 'explain: whose weight.', lower_bound=0)
_PREFIX = '--config.'
# What whoever started the program can mend; all else is a bug of ours.
_FOR_PEOPLE = (
  config_lib.ConfigError,
  local.DivergedError,
  chain.ChainError,
  store.StoreError,
  preflight.PreflightError,
  multihost.MultihostError,
  localnet.LocalnetError,
  metrics.MetricsError,
)


def main(argv: list[str]) -> None:
  overrides = [a.removeprefix(_PREFIX) for a in argv[1:] if a[:9] == _PREFIX]
  if len(overrides) < len(argv) - 1:
    sys.exit(f'error: expected only --flags, got {argv[1:]}')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # Orbax is talkative
  try:
    config = config_lib.load(_CONFIG.value, overrides)
    now = datetime.datetime.now().strftime('%Y%m%d-%H%M%S')
    workdir = _WORKDIR.value or pathlib.Path('runs', f'{now}-{config.name}')
    cli.ROLES[_ROLE.value](config, str(workdir))
  except _FOR_PEOPLE as e:
    sys.exit(f'error: {e}')
  except KeyboardInterrupt:
    sys.exit('stopped')


def _parse(argv: list[str]) -> list[str]:
  """Absl's flags; the config's fields are left over for `main`."""
  fields = [a for a in argv if a.startswith(_PREFIX)]
  rest = [a for a in argv if a not in fields]
  return app.parse_flags_with_usage(rest) + fields


if __name__ == '__main__':
  app.run(main, flags_parser=_parse)
