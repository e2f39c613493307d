"""A sync of two real processes, and the miner that goes on from it."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
from unittest import mock

import pytest
from absl.testing import absltest

from covenant import config as config_lib
from covenant.chain import local_chain
from covenant.data import dataset
from covenant.emulate import host as host_lib
from covenant.node import connect
from covenant.node import sync
from covenant.protocol import apply
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import bucket as bucket_lib
from covenant.store import location as location_lib
from covenant.train import pieces as pieces_lib
from covenant.wire import manifest as manifest_lib
from experiments.chaos import network as network_lib
from experiments.chaos import scenario
from tests import helpers

MINERS, VALIDATORS = ('0', '1', '2'), ('3', '4')
JOINER = '10'  # the hotkey, which registers after the sync
ROUNDS, NEWEST = 5, 4  # that are decided; before the newest checkpoint
PIECE = 1024  # bytes, so that both ranks fetch some of a tensor

# A role whose clock and whose buckets are files. Reads of rank 1 fail while
# there is a file `broken`, and its disk while there is a file `full`.
_PROCESS = """
import errno
import pathlib
import sys

from covenant import cli
from covenant import config as config_lib
from covenant.chain import local_chain
from covenant.node import connect
from covenant.node import multihost
from covenant.node import preflight
from covenant.protocol import piece_files
from covenant.store import bucket as bucket_lib
from covenant.store import interface
from covenant.store import location as location_lib
from covenant.train import pieces

_, role, folder, workdir, piece, *changes = sys.argv
folder = pathlib.Path(folder)
config = config_lib.load(f'{folder}/config.json', changes)
multihost._HEARTBEAT_SECONDS = multihost._SHUTDOWN_SECONDS = 5
pieces.PIECE_BYTES = int(piece)
for function in pieces.pieces, pieces.piece_digests:
  function.__defaults__ = (int(piece),)
is_second = config.network.process == 1
real, write = bucket_lib.open_for_reading, piece_files._write

def chain(config, reads_only=False):
  key = connect.local_key(config.seed, config.network.hotkey)
  clock = lambda: float((folder / 'clock').read_text())
  return local_chain.LocalChain.open(connect.chain_file(config), key, clock)

def open_for_reading(location, **kwargs):
  name = location.bucket.rpartition('-')[2]
  if location.kind == 'memory':  # of the process that has played the run
    where = str(folder / 'network' / 'buckets' / name)
    location = location_lib.Location('file', where)
  made = real(location, **kwargs)
  get = made.get
  def checked(key, limit):
    if is_second and 'chunks' in key and (folder / 'broken').exists():
      raise interface.StoreUnavailableError(f'{name}: injected')
    return get(key, limit)
  made.get = checked
  return made

def checked_write(file, at, data):
  if is_second and (folder / 'full').exists():
    raise OSError(errno.ENOSPC, 'injected')
  write(file, at, data)

connect.chain, bucket_lib.open_for_reading = chain, open_for_reading
piece_files._write = checked_write
preflight._clock = lambda chain, head: ''
try:
  cli.ROLES[role](config, workdir)
except multihost.MultihostError as e:  # as `cli.run` does
  sys.exit(f'error: {e}')
"""
_ENVIRONMENT = {
  'PYTHONPATH': str(helpers.ROOT),
  'JAX_NUM_CPU_DEVICES': '2',
  'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',  # compiling takes the most time
}


@functools.cache
def played() -> tuple[config_lib.Config, network_lib.Network]:
  """A run whose first payloads nobody has any more, but for a checkpoint."""
  tiny = helpers.tiny('optim.outer.momentum=0.5', 'model.kv_heads=2')
  config = dataclasses.replace(
    scenario.get_config(tiny),
    miners=len(MINERS),
    validators=len(VALIDATORS),
    checkpoint=config_lib.Checkpoint(every=1, keep=2, publish=2),
    gauntlet=dataclasses.replace(tiny.gauntlet, evaluate=0, weights_every=1),
    network=dataclasses.replace(tiny.network, block_seconds=0.1),
  )
  network = network_lib.Network(
    config, host_lib.Host(config, dataset.load(config))
  )
  while network.block < (ROUNDS + 1) * scenario.ROUND + 1:
    network.step()
  for name in (*MINERS, *VALIDATORS):
    network.nodes[name].objects.delete_before('payloads', NEWEST)
  return config, network


class Folder:
  """The run in files, which processes of two devices each join."""

  def __init__(self, path):
    self.path = pathlib.Path(path)
    self.config, network = played()
    buckets = self.path / 'network' / 'buckets'
    for name in (*MINERS, *VALIDATORS):
      source = network.nodes[name].objects.bucket
      where = location_lib.Location('file', str(buckets / name))
      copy = bucket_lib.open_bucket(where)
      for info in source.list(''):
        copy.put(info.key, source.get(info.key, 1 << 30))
    self.config = dataclasses.replace(
      self.config,
      network=dataclasses.replace(
        self.config.network,
        path=str(self.path / 'network'),
        hotkey=JOINER,
      ),
    )
    chain_file = connect.chain_file(self.config)
    chain_file.write_bytes(network.host.chain.dump())
    (self.path / 'config.json').write_text(config_lib.to_json(self.config))
    (self.path / 'clock').write_text(repr(network.host.now))
    self.workdir = self.path / 'joiner'
    self.processes = []

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.processes:
      process.kill()
      process.wait()

  def start(self, role):
    """Returns both ranks."""
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    for name in '', 'rank-1':
      (self.workdir / name / 'status.json').unlink(missing_ok=True)
    ranks = [self._start(role, rank, port) for rank in range(2)]
    self.processes += ranks
    return ranks

  def _start(self, role, rank, port):
    changes = (
      f'network.coordinator=127.0.0.1:{port}', 'network.processes=2',
      f'network.process={rank}', 'devices.fsdp=2', 'devices.tensor=2',
    )  # fmt: skip
    with open(self.path / f'log-{rank}.txt', 'wb') as log:
      return subprocess.Popen(
        [
          sys.executable, '-c', _PROCESS, role, self.path, self.workdir,
          str(PIECE), *changes,
        ],
        stdout=log,
        stderr=log,
        env=os.environ | _ENVIRONMENT,
      )  # fmt: skip

  def log(self, rank):
    return (self.path / f'log-{rank}.txt').read_text()

  def status(self, rank):
    path = self.workdir / (f'rank-{rank}' if rank else '') / 'status.json'
    return json.loads(path.read_text()) if path.exists() else {}

  def wait(self, is_done):
    """Returns the statuses once that of each rank is as expected."""
    deadline = time.monotonic() + 500
    while True:
      found = [self.status(rank) for rank in range(2)]
      if all(map(is_done, found)):
        return found
      ended = [process.poll() for process in self.processes]
      logs = self.log(0) + self.log(1)
      assert not any(ended), f'{ended}: {logs}'
      assert time.monotonic() < deadline, f'{found} {logs}'
      time.sleep(0.01)

  def stop(self, ranks):
    """Asks rank 0 to stop; returns how both end."""
    ranks[0].terminate()
    codes = [process.wait(60) for process in ranks]
    self.processes = [p for p in self.processes if p not in ranks]
    return codes


def synced_alone(path) -> apply.Position:
  """Returns what a sync of one process gets, on one device."""
  config, network = played()
  objects = run_storage_lib.RunStorage(
    network.host.shared_model.run,
    network.host.objects('stranger').bucket,
    b'',
    network.host.objects('stranger').bucket_at,
  )
  with mock.patch.multiple(
    connect,
    chain=lambda config, reads_only: network.host.chain,
    objects=lambda config, run, writes: objects,
  ):
    alone = sync.Sync(config, path)
    alone.step()
    alone.run(lambda: True)
  return alone.place


@pytest.mark.network
class RankedSyncTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(mock.patch.object(pieces_lib, 'PIECE_BYTES', PIECE))
    for function in pieces_lib.pieces, pieces_lib.piece_digests:
      self.enterContext(mock.patch.object(function, '__defaults__', (PIECE,)))

  def folder(self):
    return self.enter_context(Folder(self.create_tempdir().full_path))

  def test_two_processes_get_the_bits_of_one(self):
    folder = self.folder()
    alone = synced_alone(self.create_tempdir().full_path)
    _, network = played()
    incumbent = network.nodes[VALIDATORS[0]]
    self.assertEqual((alone.round, alone.root), (ROUNDS, incumbent.root))
    (folder.path / 'broken').touch()
    ranks = folder.start('sync')
    # What fails on one rank fails on all, which say where, and try again.
    found = folder.wait(lambda status: 'injected' in status.get('error', ''))
    self.assertEqual(found[0]['error'], found[1]['error'])
    self.assertRegex(found[0]['error'], 'rank 1: 3: injected')
    (folder.path / 'full').touch()
    (folder.path / 'broken').unlink()
    found = folder.wait(lambda status: 'Errno' in status['error'])
    self.assertEqual(found[0]['error'], found[1]['error'])
    self.assertRegex(
      found[0]['error'],
      f'checkpoint of round {NEWEST} cannot be stored: rank 1: .*28.*injected',
    )
    (folder.path / 'full').unlink()
    for status in folder.wait(lambda status: status.get('phase') == 'synced'):
      self.assertEqual(status['round'], ROUNDS)
    self.assertEqual(folder.stop(ranks), [0, 0], folder.log(0) + folder.log(1))
    self.assertEqual(folder.status(1)['phase'], 'stopped')
    self.assertFalse((folder.workdir / sync.JOINING).exists())
    self.assertFalse((folder.workdir / 'rank-1' / sync.JOINING).exists())
    model = network.host.shared_model
    root, first = manifest_lib.genesis(model.run), folder.config.first_round
    genesis = apply.Position(first, root, model.init())
    place = sync.start(folder.workdir, folder.config, genesis)
    self.assertEqual((place.round, place.root), (ROUNDS, alone.root))
    self.assertEqual(helpers.bits(place.shared), helpers.bits(alone.shared))
    self.check_miner_goes_on(folder, alone)

  def check_miner_goes_on(self, folder, place):
    """Buckets are gone when the miner starts: it fetches nothing."""
    shutil.rmtree(folder.path / 'network' / 'buckets')
    now = played()[1].host.now
    chain = local_chain.LocalChain.open(
      connect.chain_file(folder.config), clock=lambda: now
    )
    key = connect.local_key(folder.config.seed, JOINER)
    chain.register(key.address, 0.0, False)
    chain.close()
    (folder.path / 'clock').write_text(repr(now + chain.block_seconds))
    ranks = folder.start('miner')
    model = played()[1].host.shared_model
    for status in folder.wait(lambda status: status.get('phase')):
      self.assertEqual(status['round'], place.round)
      self.assertEqual(status['root'], place.root.hex())
      self.assertEqual(status['fingerprint'], apply.fingerprint(model, place))
    self.assertEqual(folder.stop(ranks), [0, 0], folder.log(0) + folder.log(1))

  @pytest.mark.thorough  # as multihost_test.py does with a miner
  def test_when_one_is_killed_the_other_says_which(self):
    for victim in range(2):
      folder = self.folder()
      ranks = folder.start('sync')
      folder.wait(lambda status: status.get('phase') == 'synced')
      ranks[victim].kill()
      self.assertNotEqual(ranks[1 - victim].wait(60), 0)
      # JAX ends a process at once when its coordinator, rank 0, is gone.
      said = f'error: rank {victim} has ended|leader task .* task {victim}'
      self.assertRegex(folder.log(1 - victim), said)


if __name__ == '__main__':
  absltest.main()
