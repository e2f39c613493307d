"""Nodes whose shards are on the devices of several processes.

Two processes of four devices, and four of one, train, save, restore, score and
apply the bits of one process with all of these devices.
"""

import hashlib
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.data import dataset
from covenant.node import validator as validator_lib
from covenant.optim import host_copy
from covenant.protocol import checkpoint as checkpoint_lib
from covenant.train import local as local_lib
from covenant.train import placement as placement_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train import trainer as trainer_lib
from tests import helpers

CHANGES = (
  'optim.inner.batch_size=8',
  'optim.compression.block=(4,4)',
  'optim.compression.k=4',
  'optim.outer.momentum=0.5',
  'model.heads=4',
  'model.kv_heads=2',
  'gauntlet.sequences=4',
)
_PROCESS = """
import json
import sys
from covenant import config as config_lib
from covenant.node import multihost
from tests.train import processes_test

_, folder, *changes = sys.argv
config = processes_test.config(*changes)
with multihost.start(config.network, config.devices) as own:
  found = processes_test.play(config, own.mesh, folder)
  print(json.dumps(found))
"""


def config(*changes: str) -> config_lib.Config:
  return helpers.tiny(*CHANGES, *changes)


def play(
  config: config_lib.Config, mesh: jax.sharding.Mesh, folder: str
) -> list:
  """Trains two rounds with a restart in between; returns digests of it all."""
  place = placement_lib.Placement(mesh)
  model = shared_state_lib.SharedModel(config, place.home_mesh)
  data = dataset.load(config)
  trainer = trainer_lib.Trainer(config, model, data, mesh)
  judge = validator_lib.judge(config, model, data, place)
  shared, found = model.init(), []
  private = trainer.init(shared.params)
  for r in range(2):
    tree = {'shared': shared, 'private': private}
    with checkpoint_lib.Checkpoints(folder, config.checkpoint) as checkpoints:
      checkpoints.save_tree(r, tree)
    with checkpoint_lib.Checkpoints(folder, config.checkpoint) as checkpoints:
      restored = checkpoints.restore_tree(tree)
    assert restored is not None
    assert bits(restored) == bits(tree)
    shared, private = restored['shared'], restored['private']
    task = local_lib.Task(1, r, b'seed', bytes(32))
    work, private = trainer.train(
      shared.params, private, task, trainer.batches(task)
    )
    made = trainer.seal(work, task, lambda data: bytes(64))
    after, norm = model.apply_round(shared, {1: work.message})
    tokens = judge.split.read(np.arange(4), config.data.context)
    opened = judge.scorer.open(
      shared.params, after.params, {1: work.message}, tokens
    )
    score = judge.scorer.score(opened, work.message, tokens)
    shared = after
    found.append(
      [
        bits(made.payload), made.loss, made.error_norm, norm,
        model.fingerprint(shared), bits(private), list(vars(score).values()),
      ]
    )  # fmt: skip
  leaves = [host_copy.whole(x) for x in jax.tree.leaves(private)]
  if not jax.process_index():
    np.savez(f'{folder}.npz', *leaves)
  return found


def bits(tree) -> str:
  """Returns a digest of every bit of a tree, wherever its shards are."""
  if isinstance(tree, bytes):
    tree = np.frombuffer(tree, np.uint8)
  digest = hashlib.sha256()
  for name, of_leaf in helpers.bits(jax.tree.map(host_copy.whole, tree)):
    digest.update(name.encode() + of_leaf)
  return digest.hexdigest()


# The places of `error_norm` and the private state in a round of `play`. Sums
# within a process and sums over processes are added in another order than those
# of one process, so moments may differ in their last bits.
_PRIVATE = (2, 5)
_PRIVATE_DIFFERENCE = 1e-5  # of the L2 norm of a tensor of the private state


@pytest.mark.network
class ProcessesTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('two_of_four_devices', 2, 4, 4, 2),
    ('four_of_one_device', 4, 1, 2, 2),
  )
  def test_processes_compute_the_bits_of_one(
    self, processes, each, fsdp, tensor
  ):
    folder = pathlib.Path(self.create_tempdir().full_path)
    devices = f'devices.fsdp={fsdp}', f'devices.tensor={tensor}'
    said = self.run_all(processes, each, folder / 'several', devices)
    (want,) = self.run_all(1, processes * each, folder / 'one', devices)
    self.assertLen(json.loads(want), 2)
    self.assertEqual(said, [said[0]] * processes)
    rounds = zip(json.loads(said[0]), json.loads(want), strict=True)
    for found, alone in rounds:
      for i, (value, expected) in enumerate(zip(found, alone, strict=True)):
        if each == 1 or i not in _PRIVATE:
          self.assertEqual(value, expected, i)
    with (
      np.load(folder / 'several.npz') as several,
      np.load(folder / 'one.npz') as one,
    ):
      self.assertEqual(several.files, one.files)
      for name in one.files:
        differs = np.linalg.norm(np.float64(several[name]) - one[name])
        most = _PRIVATE_DIFFERENCE * np.linalg.norm(np.float64(one[name]))
        self.assertLessEqual(differs, most, name)

  def run_all(self, processes, each, folder, devices):
    """Returns the last line of each process."""
    where: tuple[str, ...] = ()
    if processes > 1:
      with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        where = (
          f'network.coordinator=127.0.0.1:{free.getsockname()[1]}',
          f'network.processes={processes}',
        )
    environment = os.environ | {
      'PYTHONPATH': str(helpers.ROOT),
      'JAX_NUM_CPU_DEVICES': str(each),
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',  # compiling takes the most time
    }
    started = [
      subprocess.Popen(
        [
          sys.executable, '-c', _PROCESS, folder, *devices, *where,
          f'network.process={rank}',
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
      )
      for rank in range(processes)
    ]  # fmt: skip
    said = [process.communicate(timeout=500) for process in started]
    errors = [stderr[-2000:] for _, stderr in said]
    codes = [process.returncode for process in started]
    self.assertEqual(codes, [0] * processes, errors[0])
    return [stdout.splitlines()[-1] for stdout, _ in said]


if __name__ == '__main__':
  absltest.main()
