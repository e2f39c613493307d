"""Ranks in threads, and a miner of two real processes."""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.chain import interface as chain_lib
from covenant.chain import local_chain
from covenant.chain import storage as chain_storage
from covenant.data import dataset
from covenant.models import sharding
from covenant.node import connect
from covenant.node import multihost as multihost_lib
from covenant.store import interface as store_lib
from covenant.train import local as local_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train import trainer as trainer_lib
from tests import helpers

MINER = connect.local_key(0, '0')
VALIDATOR = connect.local_key(0, '1')


def pair():
  """The two ends of a link: rank 0 and rank 1."""
  here, there = multiprocessing.Pipe()
  return multihost_lib.ProcessGroup(0, [here]), multihost_lib.ProcessGroup(
    1, [there]
  )


def three():
  """Rank 0 between two others."""
  pipes = [multiprocessing.Pipe() for _ in range(2)]
  others = [multihost_lib.ProcessGroup(i + 1, [pipes[i][1]]) for i in range(2)]
  return multihost_lib.ProcessGroup(0, [here for here, _ in pipes]), *others


def run(program, process_group=None):
  """Returns the value or the exception of `program` on each of two ranks."""

  def one(own):
    try:
      with own:
        return program(own)
    except Exception as e:
      return e

  with concurrent.futures.ThreadPoolExecutor() as pool:
    return list(pool.map(one, process_group or pair()))


class RanksTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('nothing', None), ('truth', True), ('number', 0.1), ('text', 'text'),
    ('bytes', b'\0'), ('tuple', (1, b'two', ('three', None))),
    ('mapping', {3: 0.5, b'key': ()}),
  )  # fmt: skip
  def test_all_get_the_answer_of_rank_0(self, answer):
    asked = []

    def program(process_group):
      def ask():
        asked.append(process_group.index)
        return answer

      return process_group.broadcast_from(
        0, 'what', ask
      ), process_group.broadcast_from(0, 'and', lambda: 1)

    self.assertEqual(run(program), [(answer, 1)] * 2)
    self.assertEqual(asked, [0])

  @parameterized.parameters(
    chain_lib.ChainError, chain_lib.ChainRejectedError,
    chain_lib.ChainUnreachableError, store_lib.StoreError,
    store_lib.MissingObjectError, store_lib.StoreUnavailableError,
    config_lib.ConfigError, ValueError,
  )  # fmt: skip
  def test_all_get_its_error_and_go_on(self, error):
    def program(process_group):
      def fail():
        raise error('why')

      try:
        process_group.broadcast_from(0, 'what', fail)
      except error as e:
        return (
          type(e),
          str(e),
          process_group.broadcast_from(0, 'and', lambda: 7),
        )

    self.assertEqual(run(program), [(error, 'why', 7)] * 2)

  @parameterized.parameters(lambda: 1 / 0, lambda: object(), lambda: {1j: 2})
  def test_a_bug_of_rank_0_ends_all(self, answer):
    first, second = run(
      lambda process_group: process_group.broadcast_from(0, 'what', answer)
    )
    self.assertIsInstance(first, (ZeroDivisionError, TypeError))
    self.assertIsInstance(second, multihost_lib.MultihostError)
    self.assertIn(f'{type(first).__name__}: {first}', str(second))

  @parameterized.parameters(0, 1, 2)
  def test_another_rank_can_be_asked(self, asked):
    def program(process_group):
      got = process_group.broadcast_from(
        asked, 'what', lambda: process_group.index
      )
      return got, process_group.broadcast_from(
        0, 'and', lambda: 7 + process_group.index
      )

    self.assertEqual(run(program, three()), [(asked, 7)] * 3)

  def test_its_errors_are_everybodys(self):
    def program(process_group):
      def fail():
        raise local_lib.DivergedError('why')

      try:
        process_group.broadcast_from(1, 'what', fail)
      except local_lib.DivergedError as e:
        return str(e), process_group.broadcast_from(0, 'and', lambda: 7)

    self.assertEqual(run(program, three()), [('why', 7)] * 3)

  def test_a_bug_of_its_ends_all(self):
    got = run(
      lambda process_group: process_group.broadcast_from(
        1, 'what', lambda: 1 / 0
      ),
      three(),
    )
    self.assertIsInstance(got[1], ZeroDivisionError)
    for other in got[0], got[2]:
      self.assertIsInstance(other, multihost_lib.MultihostError)
      self.assertRegex(str(other), 'rank 1 has ended: ZeroDivisionError')

  def test_who_drifts_from_it_ends(self):
    def program(process_group):
      return process_group.broadcast_from(
        1, ('work', process_group.index == 1), lambda: None
      )

    first, second, third = run(program, three())
    self.assertIsNone(second)
    for other in first, third:
      self.assertIsInstance(other, multihost_lib.MultihostError)
      self.assertIn('diverged from rank 1', str(other))

  def test_rank_0_collects(self):
    def program(process_group):
      own = bytes([process_group.index])
      return [process_group.gather(rank, lambda: own) for rank in (2, 1, 2)]

    nothing = [b''] * 3
    want = [[b'\2', b'\1', b'\2'], nothing, nothing]
    self.assertEqual(run(program, three()), want)

  def test_who_asks_something_else_ends(self):
    def program(process_group):
      process_group.broadcast_from(0, ('commit', b'same'), lambda: None)
      return process_group.broadcast_from(
        0, ('commit', bytes([process_group.index])), lambda: None
      )

    first, second = run(program)
    self.assertIsNone(first)
    self.assertIsInstance(second, multihost_lib.MultihostError)
    self.assertIn('rank 1 has diverged', str(second))

  @parameterized.parameters(0, 1)
  def test_nobody_waits_for_one_that_has_ended(self, gone):
    def program(process_group):
      if process_group.index == gone:
        raise MemoryError('here alone')
      while True:
        process_group.broadcast_from(0, 'what', lambda: None)

    outcomes = run(program)
    self.assertIsInstance(outcomes[gone], MemoryError)
    self.assertIsInstance(outcomes[1 - gone], multihost_lib.MultihostError)
    self.assertIn(f'rank {gone} has ended', str(outcomes[1 - gone]))

  @mock.patch.object(multihost_lib, '_NOTICE_SECONDS', 0.0)
  def test_an_error_of_devices_says_which_rank_has_ended(self):
    first, second, third = three()
    third.broadcast_from(2, 'what', lambda: 'sent before its end')
    third.__exit__(None, None, None)
    with self.assertRaisesRegex(
      multihost_lib.MultihostError, 'rank 2 has ended; .*: Connection closed'
    ):
      with first:
        raise jax.errors.JaxRuntimeError('Connection closed')
    with self.assertRaisesRegex(multihost_lib.MultihostError, 'rank 0 has'):
      with second:
        raise jax.errors.JaxRuntimeError('Connection closed')
    own, _other = pair()
    with self.assertRaises(jax.errors.JaxRuntimeError):
      with own:
        raise jax.errors.JaxRuntimeError('of this rank alone')

  def test_one_process_asks_itself(self):
    process_group = multihost_lib.ProcessGroup()
    self.assertIs(process_group.broadcast_from(0, 'what', lambda: self), self)


class SharedBatchTest(parameterized.TestCase):
  """A trainer on several devices of one process."""

  def trainer(self, variant, devices, *changes):
    config = config_lib.load(
      f'{helpers.CONFIGS}/tiny.py:{variant}',
      ('optim.inner.batch_size=8', *changes),
    )
    shared_model = shared_state_lib.SharedModel(config)
    mesh = None
    if devices:
      wanted = config_lib.Devices(data=devices)
      mesh = sharding.mesh(wanted, jax.devices())
    trainer = trainer_lib.Trainer(
      config, shared_model, dataset.load(config), mesh
    )
    return trainer, shared_model.init().params

  def work(self, *args):
    """Returns the results of two rounds from the same parameters."""
    trainer, params = self.trainer(*args)
    private, works = trainer.init(params), []
    for r in range(2):
      task = local_lib.Task(1, r, b'seed', bytes(32))
      work, private = trainer.train(
        params, private, task, trainer.batches(task)
      )
      works.append(work)
    self.assertFalse(any(x.is_deleted() for x in jax.tree.leaves(params)))
    return works, private

  @parameterized.parameters(
    ('diloco', 'optim.inner.microbatch_size=2', 'model.scan_layers=True'),
    ('ddp', 'optim.inner.microbatch_size=0', 'model.scan_layers=False'),
  )
  @pytest.mark.slow
  def test_several_devices_do_as_one(self, variant, *changes):
    """Up to rounding, whatever is sent whole; in L2, as Adam magnifies it."""
    alone, _ = self.work(variant, 0, *changes)
    shared, _ = self.work(variant, 2, *changes)
    for one, two in zip(alone, shared, strict=True):
      self.assertAlmostEqual(one.loss, two.loss, delta=1e-5)
      self.assertEqual(one.receipt, two.receipt)
      whole, gap = (
        np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))
        for tree in (
          one.message,
          jax.tree.map(np.subtract, one.message, two.message),
        )
      )
      self.assertGreater(whole, 0)
      self.assertLess(gap / whole, 1e-5)

  @pytest.mark.slow
  def test_the_same_devices_do_the_same(self):
    first, second = (self.work('', 4) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)

  @pytest.mark.slow
  def test_a_mesh_of_one_device_is_that_device(self):
    first, second = (self.work('', devices) for devices in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, second)

  @parameterized.parameters(
    (3, (), 'batch_size: expected a multiple of 3, .* got 8'),
    (2, ('optim.inner.batch_size=12', 'optim.inner.microbatch_size=4'),
     'microbatch_size: expected a divisor of 6'),
  )  # fmt: skip
  def test_a_batch_must_be_shared_evenly(self, devices, changes, message):
    with self.assertRaisesRegex(config_lib.ConfigError, message):
      self.trainer('', devices, *changes)


class MeshTest(parameterized.TestCase):
  """Returns the mesh of the devices that a miner's ranks have together."""

  def start(self, processes=1, **devices):
    """Returns a mesh as of processes that have four devices each."""
    with (
      mock.patch.object(jax, 'process_count', lambda: processes),
      mock.patch.object(jax, 'local_device_count', lambda: 8 // processes),
    ):
      own = config_lib.Devices(**devices)
      return multihost_lib.start(config_lib.Network(), own).mesh

  def test_of_one_process(self):
    self.assertIsNone(self.start())
    self.assertIsNone(multihost_lib.start(config_lib.Network()).mesh)
    self.assertEqual(self.start(fsdp=2, tensor=2).devices.shape, (1, 2, 2))

  def test_of_two_processes(self):
    for data in (0, 4):
      mesh = self.start(2, data=data, fsdp=2)
      self.assertEqual(mesh.devices.shape, (4, 2, 1))
    self.assertEqual(self.start(2, fsdp=4, tensor=2).devices.shape, (1, 4, 2))
    mesh = self.start(4, data=0, fsdp=2, tensor=2)
    self.assertEqual(mesh.devices.shape, (2, 2, 2))

  @parameterized.parameters(
    (dict(), r'devices.data: expected 0 \(or 8\), for all 8 .* of 2 .* got 1'),
    (dict(fsdp=4), r'devices.data: expected 0 \(or 2\)'),
    (dict(fsdp=3), 'fsdp .*tensor: expected a divisor or a .* of the 4 .* 3'),
    (dict(fsdp=16), 'fsdp .*tensor: expected .* a divisor of all 8, got 16'),
  )
  def test_of_two_processes_refuses(self, devices, message):
    with self.assertRaisesRegex(config_lib.ConfigError, message):
      self.start(2, **devices)


# A member of a network whose clock is a file.
_MEMBER = """
import pathlib
import sys
from covenant import config as config_lib
from covenant import cli
from covenant.chain import local_chain
from covenant.node import connect
from covenant.node import multihost
from covenant.node import preflight
from covenant.store import interface

_, role, clock, file, workdir, *changes = sys.argv
multihost._HEARTBEAT_SECONDS = multihost._SHUTDOWN_SECONDS = 5
real, left = connect.objects, [1]  # uploads that fail

def chain(config):
  key = connect.local_key(config.seed, config.network.hotkey)
  now = pathlib.Path(clock).read_text
  return local_chain.LocalChain.open(
    connect.chain_file(config), key, clock=lambda: float(now())
  )

def objects(config, run, writes=True):
  made = real(config, run, writes)
  put = made.bucket.put
  def once(key, data, *, replace=False):
    if role == 'miner' and 'payloads' in key and left:
      left.pop()
      raise interface.StoreUnavailableError('injected')
    put(key, data, replace=replace)
  made.bucket.put = once
  return made

connect.chain, connect.objects = chain, objects
preflight._clock = lambda chain, head: ''  # its clock is late on a slow machine
cli.ROLES[role](config_lib.load(file, changes), workdir)
"""
_ENVIRONMENT = {
  'PYTHONPATH': str(helpers.ROOT),
  'JAX_NUM_CPU_DEVICES': '2',
  'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',  # compiling takes the most time
}
_BLOCK_SECONDS = 0.05  # how often processes look, too
_ROUND_BLOCKS = 16


class Network:
  """A miner of two ranks, two devices each, and a validator of one or two."""

  names = 'miner', 'miner/rank-1', 'validator'

  def __init__(self, folder, *changes, block_seconds=_BLOCK_SECONDS):
    self.folder = pathlib.Path(folder)
    self.block_seconds = block_seconds
    tiny = helpers.tiny('rounds=3', *changes)
    self.config = dataclasses.replace(
      tiny,
      miners=1,
      gauntlet=dataclasses.replace(tiny.gauntlet, evaluate=1, sequences=4),
      checkpoint=config_lib.Checkpoint(every=1, publish=1),
      phases=config_lib.Phases(
        round_blocks=_ROUND_BLOCKS,
        put_blocks=6,
        select_blocks=4,
        takeover_blocks=2,
      ),
      network=config_lib.Network(
        path=str(self.folder / 'network'), block_seconds=self.block_seconds
      ),
    )
    self._file = self.folder / 'config.json'
    self._file.write_text(config_lib.to_json(self.config))
    self._clock = self.folder / 'clock'
    self._began = time.time()
    self.to(0)
    (self.folder / 'network').mkdir()
    self.chain = local_chain.LocalChain.create(
      connect.chain_file(self.config),
      seed=b'seed',
      rules=chain_storage.ChainRules(block_seconds=self.block_seconds),
      clock=lambda: float(self._clock.read_text()),
    )
    for name, stake in (('0', 0.0), ('1', 100.0)):
      key = connect.local_key(self.config.seed, name)
      self.chain.register(key.address, stake, validator=stake > 0)
    self.processes = []

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.processes:
      process.kill()
      process.wait()
    self.chain.close()

  def to(self, block):
    """Sets the clock, to the middle of a block."""
    now = self._began + (block + 0.5) * self.block_seconds
    temporary = self.folder / 'clock.tmp'
    temporary.write_text(repr(now))
    os.replace(temporary, self._clock)

  def begin(self):
    self.chain.begin(self._began)

  def start_miner(self, *devices):
    """Returns both ranks."""
    return self._start_ranks('miner', '0', *(devices or ('devices.data=0',)))

  def start_ranked_validator(self, *devices):
    """Returns both ranks."""
    self.names = (*Network.names, 'validator/rank-1')
    return self._start_ranks('validator', '1', *devices)

  def _start_ranks(self, role, hotkey, *devices):
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    return [
      self._start(
        role, f'network.hotkey={hotkey}', 'network.processes=2',
        f'network.coordinator=127.0.0.1:{port}', f'network.process={rank}',
        *devices,
      )
      for rank in range(2)
    ]  # fmt: skip

  def start_validator(self):
    return self._start('validator', 'network.hotkey=1')

  def _start(self, role, *changes):
    with open(self.folder / 'log.txt', 'ab') as log:
      process = subprocess.Popen(
        [
          sys.executable, '-c', _MEMBER, role, self._clock, self._file,
          self.folder / role, *changes,
        ],
        stdout=log,
        stderr=log,
        env=os.environ | _ENVIRONMENT,
      )  # fmt: skip
    self.processes.append(process)
    return process

  def statuses(self):
    """Returns the status of the ranks and of the validator."""
    found = []
    for name in self.names:
      path = self.folder / name / 'status.json'
      found.append(json.loads(path.read_text()) if path.exists() else {})
    return found

  def lines(self, path):
    rows = (self.folder / path).read_text().splitlines()
    return [json.loads(row) for row in rows]

  def events(self, path):
    """Returns the actions and errors of a process."""
    names = 'block', 'round', 'what', 'error'
    return [tuple(row[n] for n in names) for row in self.lines(path)]

  def wait(self, done):
    """Until `done`, or until a process has ended badly."""
    deadline = time.monotonic() + 500
    while not done():
      log = (self.folder / 'log.txt').read_text()
      ended = [process.poll() for process in self.processes]
      assert not any(ended), f'{ended}: {log}'
      assert time.monotonic() < deadline, f'{self.statuses()} {log}'
      time.sleep(0.01)

  def ready(self, members=4):
    self.wait(lambda: all(s.get('phase') for s in self.statuses()[:members]))

  def play(self, first, end):
    """Lets everybody do all there is to do in each block."""
    for block in range(first, end):
      self.to(block)
      self.wait(
        lambda block=block: all(
          s['phase'] == 'finished'
          or (s['phase'], s['head']) == ('waiting', block)
          for s in self.statuses()
        )
      )

  def play_rest(self, first):
    self.play(first, (self.config.rounds + 1) * _ROUND_BLOCKS)
    self.wait(lambda: all(p.poll() == 0 for p in self.processes))


@pytest.mark.network
class TwoProcessesTest(absltest.TestCase):
  def network(self, *changes, **options):
    folder = tempfile.TemporaryDirectory(prefix='covenant-')
    self.addCleanup(folder.cleanup)
    return self.enter_context(Network(folder.name, *changes, **options))

  def test_two_ranks_are_one_miner(self):
    network = self.network()
    network.start_miner()
    network.start_validator()
    network.ready()
    network.begin()
    network.play_rest(0)
    first, second, validator = network.statuses()
    for name in 'phase', 'round', 'root', 'fingerprint':
      self.assertEqual(first[name], validator[name], name)
      self.assertEqual(second[name], validator[name], name)
    self.assertEqual(first['loss'], second['loss'])
    verdicts = [
      decision['verdict']
      for row in network.lines('validator/verdicts.jsonl')
      for decision in row['decisions']
    ]
    self.assertEqual(verdicts, ['VALID'] * 3)
    # The store was down for rank 0 once: both heard of it, and went on.
    events = network.events('miner/events.jsonl')
    self.assertEqual(events, network.events('miner/rank-1/events.jsonl'))
    errors = [error for *_, error in events if error]
    self.assertEqual(errors, ['StoreUnavailableError: injected'])
    published = [
      r for _, r, what, error in events
      if what == 'upload' and not error
    ]  # fmt: skip
    self.assertEqual(published, [0, 1, 2])

  def test_shards_over_ranks(self):
    """Parameters that no process has whole, also after a restart."""
    network = self.network('model.kv_heads=2', block_seconds=0.3)
    cut = 'devices.fsdp=2', 'devices.tensor=2'
    groups = [
      network.start_miner(*cut),
      network.start_ranked_validator(*cut),
    ]
    network.ready()
    network.begin()
    network.play(0, 2 * _ROUND_BLOCKS)
    for group in groups:
      group[0].terminate()  # which the others hear of
      for process in group:
        self.assertEqual(process.wait(60), 0)
        network.processes.remove(process)
    network.start_miner(*cut)
    network.start_ranked_validator(*cut)
    network.play_rest(2 * _ROUND_BLOCKS)
    for status in network.statuses()[1:]:
      for name in 'phase', 'round', 'root', 'fingerprint':
        self.assertEqual(status[name], network.statuses()[0][name], name)
    verdicts = [
      decision['verdict']
      for row in network.lines('validator/verdicts.jsonl')
      for decision in row['decisions']
    ]
    self.assertEqual(verdicts, ['VALID'] * 3)
    self.assertEqual(
      network.lines('validator/verdicts.jsonl'),
      network.lines('validator/rank-1/verdicts.jsonl'),
    )
    # Both ranks have published the last state, beside the rounds.
    bucket = network.folder / 'network' / 'buckets' / '1'
    (path,) = bucket.glob('*/checkpoints/00000003')
    index = json.loads(path.read_bytes()[:-64])
    status = network.statuses()[0]
    self.assertEqual(index['fingerprint'], status['fingerprint'])
    pieces = {d for some in index['files'].values() for d in some}
    there = {x.name for x in bucket.glob('*/chunks/*')}
    self.assertContainsSubset(pieces, there)

  @pytest.mark.slow
  def test_a_restart_loses_nothing(self):
    outcomes = []
    for killed in False, True:
      network = self.network()
      process_group = network.start_miner()
      network.start_validator()
      network.ready()
      network.begin()
      here = _ROUND_BLOCKS + 4  # of round 1 it has trained, nothing is sent
      network.play(0, here)
      if killed:
        for process in process_group:
          process.kill()
          process.wait()
          network.processes.remove(process)
        for name in 'miner', 'miner/rank-1':
          (network.folder / name / 'status.json').unlink()
        network.start_miner()
        network.ready()
      network.play_rest(here)
      outcomes.append(network.statuses()[0]['root'])
    self.assertEqual(*outcomes)

  @pytest.mark.slow
  def test_when_one_is_killed_the_other_ends(self):
    for victim in range(2):
      network = self.network()
      process_group = network.start_miner()
      network.ready(members=2)
      process_group[victim].kill()
      self.assertNotEqual(process_group[1 - victim].wait(30), 0)


if __name__ == '__main__':
  absltest.main()
