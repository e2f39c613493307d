"""The fault matrix, in virtual time, through the code of the real nodes."""

import functools
import subprocess
import sys

import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.protocol import round as round_lib
from experiments.chaos import faults
from experiments.chaos import kills as kills_lib
from experiments.chaos import matrix
from experiments.chaos import network as network_lib
from experiments.chaos import scenario as scenario_lib
from experiments.chaos import storm as storm_lib
from tests import helpers

Phase = round_lib.Phase
Fault = faults.Fault
Kind = faults.Kind
# Those that break in their own way; `python -m experiments.reliability` runs
# all of them.
CHOSEN = (
  'kill -9 in every phase',
  'kill -9 while catching up',
  'object corrupted: leader lies',
  'chain 9 blocks late: a third',
  'newest block taken back, every block',
  'commitments without an answer: everybody',
  'chain unreachable for 2 minutes, at the vote',
  'everybody down for 4 rounds, from the vote on',
  'leader dead for ever, then a miner joins',
  'two leaders: equal stakes, split votes',
  'leader equivocates: commits one, serves the other',
  'leader equivocates: withholds the bytes',
  'silent permit holders with the most stake: 10',
  'a miner gains a permit, is killed and comes back',
  'the leader goes silent for 5 rounds and comes back',
  'all validators but the last go silent for 5 rounds',
  'a stake jumps: that of the last validator',
  'clocks 30 s off, half of them late',
  'a miner ten times slower',
  'a third of the miners leaves, as many join',
  'attack: a uid changes hands twice in every put window',
  'attack: 3 miners are at a new location in every block',
  'network partition: the leader, 2 rounds',
  'disk full at the leader, bucket and saves',
  'no valid payload in a round',
  'a validator forges checkpoints: other parameters',
  'a validator forges checkpoints: the fingerprint of others',
  'a validator forges checkpoints: brackets',
  'attack: a leader proposes a harmful message alone',
  'attack: a bought majority votes for uids that do not exist',
  'attack: a bought majority votes for a harmful message alone',
  'attack: the others are down from one vote on, a minority votes',
  'attack: 40 strangers commit to payloads that nobody has',
  'everything at once, by chance',
)


@functools.cache
def suite():
  base = helpers.tiny()
  return scenario_lib.Suite(scenario_lib.get_config(base))


@pytest.mark.chaos
class MatrixTest(parameterized.TestCase):
  @parameterized.parameters(*CHOSEN)
  def test_nothing_is_divided_stopped_or_lost(self, name):
    (scenario,) = [s for s in matrix.scenarios() if s.name == name]
    result = suite().run(scenario)
    self.assertEqual(result.wrong, '')
    self.assertTrue(result.equal_roots)
    self.assertTrue(result.equal_parameters)
    self.assertGreater(sum(result.injected.values()), 0)
    if scenario.kills:
      count = result.injected[Kind.KILL.value]
      self.assertEqual(count, len(scenario.kills))

  def test_every_role_is_killed_in_every_phase(self):
    kills = kills_lib.everywhere()
    for name, can in (('0', round_lib.MINER), ('6', round_lib.VALIDATOR)):
      phases = {kill.phase for kill in kills if kill.name == name}
      self.assertEqual(phases, can - {Phase.CATCH_UP})

  def test_a_fault_that_strikes_nobody_is_noticed(self):
    never = Fault(Kind.DOWN, range(10**6, 10**6 + 1))
    result = suite().run(scenario_lib.Scenario('never', (never,), rounds=2))
    self.assertIn('never injected', result.wrong)
    result = suite().run(scenario_lib.Scenario('nothing', rounds=2))
    self.assertIn('nothing was injected', result.wrong)

  def test_a_node_elsewhere_is_noticed(self):
    """The checks of the matrix can fail."""
    network = suite().network(scenario_lib.Scenario(''))
    network.run(2)
    self.assertEqual(
      network_lib.audit(network), {0: list(range(6)), 1: list(range(6))}
    )
    node = network.nodes['3']
    shared = node.shared
    node.shared = network_lib.flipped(shared)
    with self.assertRaisesRegex(AssertionError, 'not all at one place'):
      network_lib.audit(network)
    node.shared = shared
    network.faults.written = {
      key: copies
      for key, copies in network.faults.written.items()
      if '/history/00000001' not in key
    }
    with self.assertRaisesRegex(AssertionError, 'round 1 has 0 histories'):
      network_lib.audit(network)

  def test_a_round_without_payloads_moves_nothing_but_the_counters(self):
    (scenario,) = [
      s for s in matrix.scenarios() if s.name == 'no valid payload in a round'
    ]
    network = suite().network(scenario)
    network.run(2)
    before = {n: (x.root, x.fingerprint()) for n, x in network.nodes.items()}
    network.run(3)
    for name, node in network.nodes.items():
      root, fingerprint = before[name]
      self.assertEqual(node.state.round, 3)
      self.assertEqual(node.fingerprint(), fingerprint)
      self.assertNotEqual(node.root, root)

  def test_a_node_out_of_sync_repairs_itself_and_says_so(self):
    flip = Fault(Kind.FLIP, range(41, 42), frozenset('6'))
    network = suite().network(scenario_lib.Scenario('', (flip,)))
    network.run(3)
    self.assertEqual(network.faults.count, {Kind.FLIP: 1})
    said = [seen for seen in network.events if seen.event.error]
    self.assertLen(said, 1)
    self.assertEqual(said[0].name, '6')
    self.assertIn(
      'OutOfSyncError: round 1: the fingerprint here', said[0].event.error
    )
    (repair,) = [s for s in network.events if s.event.what == 'catch up']
    self.assertEqual((repair.name, repair.event.error), ('6', ''))
    self.assertEqual(repair.event.block, said[0].event.block + 1)
    places = {n.fingerprint() for n in network.nodes.values()}
    self.assertLen(places, 1)


class FaultsTest(parameterized.TestCase):
  @pytest.mark.chaos
  def test_the_same_seed_makes_the_same_faults(self):
    storm = storm_lib.storm(rounds=4)
    counts, ends = [], []
    for seed in 0, 0, 1:
      network = suite().network(storm, seed)
      network.run(storm.rounds)
      counts.append(dict(network.faults.count))
      ends.append([network_lib.digest(n) for n in network.nodes.values()])
    self.assertEqual(counts[0], counts[1])
    self.assertEqual(ends[0], ends[1])
    self.assertNotEqual(counts[0], counts[2])

  def test_a_fault_strikes_whom_it_names_when_it_says(self):
    fault = Fault(
      Kind.DOWN, range(3, 5), frozenset('1'), frozenset('2'), rate=1.0
    )
    for block, name, owner, want in (
      (3, '1', '2', True),
      (4, '1', '2', True),
      (2, '1', '2', False),
      (5, '1', '2', False),
      (3, '0', '2', False),
      (3, '1', '1', False),
    ):
      self.assertEqual(fault.strikes(0, block, name, owner), want)

  def test_a_rate_is_the_share_that_is_struck(self):
    fault = Fault(Kind.DOWN, range(10_000), rate=0.3)
    struck = [fault.strikes(7, block, '0') for block in fault.blocks]
    self.assertBetween(np.mean(struck), 0.28, 0.32)


_FULL_DISK = """
import pathlib, resource, signal, sys
import numpy as np
from covenant import config
from covenant.node import base, workdir
from covenant.protocol import checkpoint

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = pathlib.Path(sys.argv[1])
log = workdir.Workdir(folder, 'miner', '0')
checkpoints = checkpoint.Checkpoints(
  folder / 'checkpoints', config.Checkpoint(every=1)
)
refused = 0
def save(i):
  global refused
  try:
    checkpoints.save_tree(i, dict(a=np.full(100, i)))
  except checkpoint.CheckpointError:
    refused += 1
save(1)
checkpoints._checkpointer.latest
limit = resource.RLIM_INFINITY
resource.setrlimit(resource.RLIMIT_FSIZE, (20, limit))
for i in 2, 3, 4:
  save(i)
  log.event(base.Event(i, i, 'train', 'no space'))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for i in 5, 6:
  save(i)
log.status(phase='well')
checkpoints.__exit__()
again = checkpoint.Checkpoints(
  folder / 'checkpoints', config.Checkpoint(every=1)
)
newest = again.restore_tree(dict(a=np.zeros(100, int)))['a'][0]
again.__exit__()
print(refused, newest, (folder / 'status.json').read_text())
"""


@pytest.mark.network
class FullDiskTest(absltest.TestCase):
  def test_checkpoints_and_journal_say_so_and_go_on(self):
    """A real limit on files, in a process of its own."""
    done = subprocess.run(
      [sys.executable, '-c', _FULL_DISK, self.create_tempdir().full_path],
      capture_output=True,
      text=True,
      cwd=helpers.ROOT,
      timeout=100,
      check=False,
    )
    self.assertEqual(done.returncode, 0, done.stderr[-2000:])
    refused, newest, status = done.stdout.split(maxsplit=2)
    self.assertGreater(int(refused), 0)
    self.assertEqual(newest, '6')
    self.assertIn('"phase": "well"', status)
    self.assertIn('cannot write what happened', done.stderr)


if __name__ == '__main__':
  absltest.main()
