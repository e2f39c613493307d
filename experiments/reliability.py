"""Faults: no fault divides the nodes, stops them or loses work.

  python -m experiments.reliability               the matrix, 25 minutes
  python -m experiments.reliability --quick       a part of it, 1 minute
  python -m experiments.reliability --only=clocks rows of a name with this text
  python -m experiments.reliability --real-time=8 8 rounds of processes, 4 min
  python -m experiments.reliability --soak=30     30 minutes of real processes

The matrix is experiments/chaos/matrix.py: the code of the real nodes in
virtual time, with injected faults. It is written to
experiments/results/reliability.csv. Attacks on a pool (experiments/chaos/
pools.py) and on its server (pool_sockets.py) follow, in
experiments/results/pool_attacks.csv and pool_server_attacks.csv. What one node
meets alone (single_node.py) is last, in single_node.csv.

The rounds in real time (experiments/chaos/realtime.py) are of processes and
sockets, with fifty strangers that commit to payloads in buckets that are dead,
slow, endless or lie.

The soak starts configs/localnet.py as real processes and kills a random one
(SIGKILL) every few seconds until the run is over; Localnet restarts them, as an
operator's supervisor would. The victims and the times are a function of --seed;
the effect depends on the machine.

All pass if every check holds; the exit status says so.
"""

import argparse
import csv
import pathlib
import sys

from covenant import config as config_lib
from experiments.chaos import matrix
from experiments.chaos import pool_sockets
from experiments.chaos import pools
from experiments.chaos import realtime
from experiments.chaos import scenario as scenario_lib
from experiments.chaos import single_node
from experiments.chaos import soak

ROOT = pathlib.Path(__file__).parent
RESULTS = ROOT / 'results' / 'reliability.csv'
POOL_RESULTS = ROOT / 'results' / 'pool_attacks.csv'
SOCKET_RESULTS = ROOT / 'results' / 'pool_server_attacks.csv'
NODE_RESULTS = ROOT / 'results' / 'single_node.csv'
CONFIGS = ROOT.parent / 'configs'
HEADER = (
  'fault',
  'injected',
  'rounds',
  'payloads',
  'equal roots',
  'equal parameters',
  'bits of a run without faults',
  'verdict',
)
SOCKET_HEADER = (
  "attack on a pool's server",
  'struck',
  'requests answered of an honest worker',
  'verdict',
)
POOL_HEADER = (
  'bad workers of a pool',
  'their leases',
  'refused',
  'sequences trained',
  'their pay per worker, of an honest one',
  'verdict',
)
NODE_HEADER = (
  'item',
  'attack on one node, or fault',
  'tried',
  'got through',
  'verdict',
)
STRANGERS = 50
# Rows of each table that are run; the chaos tests have more of each.
ALL, QUICK = slice(None), slice(1, None, 24)


def main(argv: list[str]) -> bool:
  """Runs the matrix or the soak; returns True if every check holds."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--quick', action='store_true')
  parser.add_argument('--only', default='', metavar='TEXT')
  parser.add_argument('--real-time', type=int, default=0, metavar='ROUNDS')
  parser.add_argument('--soak', type=float, default=0.0, metavar='MINUTES')
  parser.add_argument('--kill', type=float, default=20.0, metavar='SECONDS')
  parser.add_argument('--seed', type=int, default=0)
  options = parser.parse_args(argv)
  if options.real_time:
    return realtime.run(options.real_time, STRANGERS)
  if options.soak:
    return soak.run(options.soak, options.kill, options.seed)
  base = config_lib.load(str(CONFIGS / 'tiny.py'))
  if options.only:
    chosen = [s for s in matrix.scenarios() if options.only in s.name]
    return bool(chosen) and run_matrix(base, chosen, options.seed)
  chosen = matrix.scenarios()[QUICK] if options.quick else None
  nodes = run_matrix(base, chosen, options.seed)
  attacks = run_pools(base, options.quick, options.seed)
  return run_single_node(base, options.quick) and attacks and nodes


def run_pools(base: config_lib.Config, quick: bool, seed: int) -> bool:
  """Prints a Markdown table of attacks on a pool."""
  suite = pools.PoolSuite(pools.get_config(base))
  chosen = pools.scenarios()[QUICK if quick else ALL]
  print('\n' + _line(POOL_HEADER), _line(['---'] * len(POOL_HEADER)), sep='\n')
  results = []
  for scenario in chosen:
    results.append(suite.run(scenario, seed))
    print(_line(_pool_row(results[-1])), flush=True)
  print(
    '\n' + _line(SOCKET_HEADER), _line(['---'] * len(SOCKET_HEADER)), sep='\n'
  )
  servers = []
  for outcome in pool_sockets.outcomes(QUICK if quick else ALL):
    servers.append(outcome)
    print(_line(_socket_row(outcome)), flush=True)
  if not quick:
    with open(POOL_RESULTS, 'w', newline='') as file:
      csv.writer(file).writerows([POOL_HEADER, *map(_pool_row, results)])
    with open(SOCKET_RESULTS, 'w', newline='') as file:
      csv.writer(file).writerows([SOCKET_HEADER, *map(_socket_row, servers)])
  passed = [result.passed for result in (*results, *servers)]
  print(f'{sum(passed)} of {len(passed)} attacks on a pool passed')
  return all(passed)


def run_single_node(base: config_lib.Config, quick: bool) -> bool:
  """Prints a Markdown table of what one node meets alone."""
  print('\n' + _line(NODE_HEADER), _line(['---'] * len(NODE_HEADER)), sep='\n')
  results = []
  for outcome in single_node.outcomes(base, QUICK if quick else ALL):
    results.append(outcome)
    print(_line(_node_row(outcome)), flush=True)
  if not quick:
    with open(NODE_RESULTS, 'w', newline='') as file:
      csv.writer(file).writerows([NODE_HEADER, *map(_node_row, results)])
  passed = sum(result.passed for result in results)
  print(f'{passed} of {len(results)} cases of one node passed')
  return passed == len(results)


def _node_row(result: single_node.Outcome) -> list[str]:
  return [
    str(result.item),
    result.name,
    str(result.tried),
    str(result.through),
    f'FAILED: {result.wrong}' if result.wrong else 'passed',
  ]


def _socket_row(result: pool_sockets.SocketOutcome) -> list[str]:
  return [
    result.name,
    str(result.struck),
    f'{result.answered} of {pool_sockets.REQUESTS}',
    f'FAILED: {result.wrong}' if result.wrong else 'passed',
  ]


def _pool_row(result: pools.PoolOutcome) -> list[str]:
  return [
    result.name,
    str(result.leases),
    str(result.refused),
    f'{result.sequences:.0%}',
    f'{result.pay:.2f}',
    f'FAILED: {result.wrong}' if result.wrong else 'passed',
  ]


def run_matrix(
  base: config_lib.Config,
  chosen: list[scenario_lib.Scenario] | None,
  seed: int,
) -> bool:
  """Prints a Markdown table, a row per scenario as it ends.

  Args:
    base: the config that the scenarios change.
    chosen: the scenarios; None is all, which are written to `RESULTS`.
    seed: of the faults.
  """
  suite = scenario_lib.Suite(scenario_lib.get_config(base))
  print(_line(HEADER), _line(['---'] * len(HEADER)), sep='\n', flush=True)
  results = []
  for scenario in matrix.scenarios() if chosen is None else chosen:
    results.append(suite.run(scenario, seed))
    print(_line(_row(results[-1])), flush=True)
  if chosen is None:
    with open(RESULTS, 'w', newline='') as file:
      csv.writer(file).writerows([HEADER, *map(_row, results)])
  passed = sum(result.passed for result in results)
  injected = sum(sum(result.injected.values()) for result in results)
  print(f'{passed} of {len(results)} passed; {injected} faults were injected')
  return passed == len(results)


def _row(result: scenario_lib.Result) -> list[str]:
  words = [f'{kind} {n}' for kind, n in result.injected.items()]
  return [
    result.name,
    ', '.join(words),
    str(result.rounds),
    str(result.payloads),
    *(
      'yes' if is_so else 'no'
      for is_so in (
        result.equal_roots,
        result.equal_parameters,
        result.undisturbed,
      )
    ),
    f'FAILED: {result.wrong}' if result.wrong else 'passed',
  ]


def _line(cells: list[str] | tuple[str, ...]) -> str:
  return f'| {" | ".join(cells)} |'


if __name__ == '__main__':
  sys.exit(not main(sys.argv[1:]))
