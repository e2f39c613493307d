"""Miners on many devices, and on those of several processes."""

import os
import pathlib
import socket
import subprocess
import sys
from unittest import mock

import jax
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.data import dataset
from covenant.emulate import emulation
from covenant.emulate import host as host_lib
from covenant.emulate import places as places_lib
from covenant.protocol import round as round_lib
from covenant.train import local as local_lib
from experiments.chaos import faults
from experiments.chaos import network as network_lib
from tests import helpers

Phase = round_lib.Phase
# Two are honest; one trains from elsewhere; one spoils what it has learned.
MINERS = ('miners=4', 'adversaries=desynchronized,scaled')
# The third trains on other batches. These remember nothing that is not saved.
FORGETFUL = (
  'miners=4', 'adversaries=little-data,scaled', 'gauntlet.evaluate=0',
)  # fmt: skip


def setUpModule():
  """Every row compiles anew, which takes the most time."""
  jax.config.update('jax_disable_most_optimizations', True)
  jax.clear_caches()


def tearDownModule():
  jax.config.update('jax_disable_most_optimizations', False)
  jax.clear_caches()


def written(workdir):
  """Returns the records of a run, without what a clock did."""
  records = helpers.untimed(workdir / 'metrics.jsonl')
  return records, (workdir / 'verdicts.jsonl').read_text().splitlines()


class SideBySideTest(parameterized.TestCase):
  def workdir(self):
    return pathlib.Path(self.create_tempdir().full_path, 'run')

  def outcome(self, peers):
    """All that a run leaves, and the devices that its miners are on."""
    workdir = self.workdir()
    config = helpers.tiny('rounds=2', *MINERS, f'devices.peers={peers}')
    state = emulation.run(config, workdir).state
    used = {jax.tree.leaves(p)[1].device for p in state.miners.values()}
    return helpers.everything(state), written(workdir), len(used)

  @pytest.mark.slow
  def test_as_one_after_another(self):
    """Bit for bit: parameters, private state, chain, metrics, verdicts."""
    one, three = map(self.outcome, (1, 3))  # the first has two of the miners
    self.assertEqual([one[-1], three[-1]], [1, 3])
    self.assertEqual(three[:-1], one[:-1])
    first = jax.devices()[:1]
    with (
      mock.patch.object(jax, 'devices', lambda: first),
      mock.patch.object(places_lib.machine, 'cores', lambda: 3),
    ):
      cores = self.outcome(0)
    self.assertEqual(cores[-1], 1)
    self.assertEqual(cores[:-1], one[:-1])

  @pytest.mark.slow
  def test_miners_that_are_killed(self):
    """While others train, before anything is saved, and after."""
    digests = []
    for peers in 1, 2:
      config = helpers.tiny(
        'miners=2', f'devices.peers={peers}', 'checkpoint.every=1'
      )
      kills = [
        faults.Kill('1', 0, Phase.TRAIN, faults.AFTER),
        faults.Kill('0', 1, Phase.COMMIT, faults.BEFORE),
      ]
      network = network_lib.Network(
        config,
        host_lib.Host(config, dataset.load(config)),
        faults.Faults(kills=kills),
      )
      network.run(2)
      self.assertEqual(network.restarts, 2)
      digests.append(
        {name: network_lib.digest(node) for name, node in network.nodes.items()}
      )
    self.assertEqual(*digests)

  @pytest.mark.slow
  def test_the_first_that_diverges_is_named(self):
    config = helpers.tiny('optim.inner.learning_rate=1e30', 'devices.peers=2')
    with self.assertRaisesRegex(
      local_lib.DivergedError, 'miner 0, round 0: the loss is .* inner step'
    ):
      emulation.run(config, self.workdir())


# One process of an emulation, which stops after a round.
_PROCESS = """
import sys
from covenant import config as config_lib
from covenant.emulate import emulation
from covenant.node import multihost

_, file, workdir, after, *changes = sys.argv
config = config_lib.load(file, changes)
multihost._SHUTDOWN_SECONDS = 5
seen = []
with multihost.start(config.network) as own:
  outcome = emulation.run(
    config, workdir, seen.append, lambda: seen[-1].round == int(after), own
  )
  mine = [u for u, p in outcome.state.miners.items() if p.inner is not None]
  print(own.index, len(seen), mine)
"""
_ENVIRONMENT = {
  'PYTHONPATH': str(helpers.ROOT),
  'JAX_NUM_CPU_DEVICES': '4',
  'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
}


@pytest.mark.network
class TwoProcessesTest(absltest.TestCase):
  def test_two_processes_do_as_one(self):
    """One begins, two go on from there, and one ends the run: the same bits."""
    folder = pathlib.Path(self.create_tempdir().full_path)
    config = helpers.tiny('rounds=3', *FORGETFUL)
    want = emulation.run(config, folder / 'whole')
    parts = folder / 'parts'
    emulation.run(config, parts, stop=lambda: True)
    cache = jax.config.jax_compilation_cache_dir  # what is compiled already
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    processes = [
      subprocess.Popen(
        [
          sys.executable, '-c', _PROCESS, f'{helpers.CONFIGS}/tiny.py', parts,
          '2', 'rounds=3', *FORGETFUL, 'devices.peers=0',
          f'network.coordinator=127.0.0.1:{port}', 'network.processes=2',
          f'network.process={rank}',
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | _ENVIRONMENT | {'JAX_COMPILATION_CACHE_DIR': cache},
      )
      for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=300) for process in processes]
    self.assertEqual([p.returncode for p in processes], [0, 0], said)
    lines = [stdout.splitlines()[-1] for stdout, _ in said]
    # Rank 0 saw two rounds and the evaluations of rounds 0 and 2.
    self.assertEqual(lines, ['0 4 [0, 2]', '1 0 [1, 3]'])
    steps = [int(p.name) for p in (parts / 'checkpoints').glob('*')]
    self.assertEqual(sorted(steps), [1, 2])
    got = emulation.run(config, parts)
    self.assertEqual(
      helpers.everything(got.state), helpers.everything(want.state)
    )
    self.assertEqual(written(parts), written(folder / 'whole'))


if __name__ == '__main__':
  absltest.main()
