"""A pool and its workers as processes; one is killed, one cheats."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from absl.testing import absltest

from covenant import config as config_lib
from covenant.chain import keys
from covenant.chain import local_chain
from covenant.chain import storage as chain_storage
from covenant.data import assignment
from covenant.data import dataset
from covenant.node import connect
from covenant.pool import ledger as accounts
from covenant.pool import worker as worker_lib
from covenant.protocol import membership as membership_lib
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.train import local as local_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import manifest
from covenant.wire import payload
from tests import helpers

EDITS = [
  'rounds=2',
  'optim.inner_steps=16',
  'pool.subrounds=4',
  'pool.steps=2',
  'pool.batch=1',
  'pool.audits=99',
  'pool.fee=0.1',
  'pool.deposit=1',
  'pool.threshold=0.0',
  'pool.listen=127.0.0.1:0',
  'network.hotkey=0',
  'network.block_seconds=0.25',
  'phases.round_blocks=44',
  'phases.put_blocks=12',
  'phases.select_blocks=4',
  'phases.takeover_blocks=2',
]
# A worker that flips the sign of every delta.
CHEAT = """
import jax
from covenant import cli
from covenant.pool import worker

train = worker.LeaseTrainer.train

def flip(path, x):
  return x ^ 1 if getattr(path[-1], 'name', '') == 'codes' else x

def lie(self, params, job):
  message, loss = train(self, params, job)
  return jax.tree_util.tree_map_with_path(flip, message), loss

worker.LeaseTrainer.train = lie
cli.main()
"""


@pytest.mark.network
class PoolProcessTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    (self.folder / 'network').mkdir()
    edits = [*EDITS, f'network.path={self.folder}/network']
    self.config = config_lib.load(f'{helpers.CONFIGS}/tiny.py', edits)
    (self.folder / 'config.json').write_text(config_lib.to_json(self.config))
    seed = self.config.seed
    self.chain = local_chain.LocalChain.create(
      connect.chain_file(self.config),
      seed=b'seed',
      rules=chain_storage.ChainRules(block_seconds=0.25, tempo=4),
      key=connect.local_key(seed, 'validator'),
    )
    self.addCleanup(self.chain.close)
    address = connect.local_key(seed, '0').address
    self.assertEqual(self.chain.register(address, 0.0, validator=False), 0)
    self.chain.register(self.chain.hotkey, 1000.0, validator=True)
    self.processes = []
    self.addCleanup(self.end)

  def end(self):
    for process in self.processes:
      process.kill()
      process.wait()

  def start(self, name, *arguments, program=f'{helpers.ROOT}/run.py'):
    with open(self.folder / f'{name}.txt', 'w') as log:
      code = [program] if program.endswith('.py') else ['-c', program]
      self.processes.append(
        subprocess.Popen(
          [
            sys.executable, *code, f'--config={self.folder}/config.json',
            f'--workdir={self.folder}/{name}', *arguments,
          ],
          stdout=log,
          stderr=log,
          env=os.environ | {'PYTHONPATH': str(helpers.ROOT)},
        )
      )  # fmt: skip
    return self.processes[-1]

  def worker(self, name, url, program=f'{helpers.ROOT}/run.py'):
    key = self.folder / f'{name}.key'
    process = self.start(
      name, '--role=worker', f'--config.pool.url={url}',
      f'--config.pool.key={key}', program=program,
    )  # fmt: skip
    return process

  def wait(self, name, ready):
    """Until a status.json is as wanted."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
      path = self.folder / name / 'status.json'
      if path.exists() and ready(status := json.loads(path.read_text())):
        return status
      if any((process.poll() or 0) > 0 for process in self.processes):
        break
      time.sleep(0.05)
    logs = [p.read_text() for p in self.folder.glob('*.txt')]
    self.fail(f'{name} is not ready:\n' + '\n'.join(logs))

  def log(self, name):
    return (self.folder / f'{name}.txt').read_text()

  def address(self, name):
    return worker_lib.read_key(str(self.folder / f'{name}.key')).address

  def test_a_round_is_delivered_whatever_workers_do(self):
    pool = self.start('pool', '--role=pool')
    status = self.wait('pool', lambda s: 'address' in s)
    url = f'http://{status["address"]}'
    good, killed = self.worker('good', url), self.worker('killed', url)
    cheat = self.worker('cheat', url, program=CHEAT)
    for name in 'good', 'killed', 'cheat':
      self.wait(name, lambda s: 'phase' in s)
    self.chain.begin(time.time() + 0.5)
    while self.chain.head() < 1:
      time.sleep(0.05)
    self.chain.set_weights({0: 1.0})
    self.wait('killed', lambda s: 'VALID' in s.get('leases', {}))
    killed.kill()
    self.wait('pool', lambda s: s['phase'] == 'finished')
    self.assertEqual(pool.wait(60), 0, self.log('pool'))
    for process in good, cheat:
      process.send_signal(signal.SIGTERM)
    for name, process in ('good', good), ('cheat', cheat):
      self.assertEqual(process.wait(60), 0, self.log(name))

    lines = (self.folder / 'pool' / 'pool.jsonl').read_text().splitlines()
    rounds = [json.loads(line) for line in lines]
    self.assertLen(rounds, 2)
    for one in rounds:
      # How many there was time for depends on this machine.
      self.assertBetween(one['sequences'], 1, one['assigned'])
      self.assertIn(self.address('good'), one['work'])
      self.assertNotIn(self.address('cheat'), one['work'])
    self.assertIn(self.address('killed'), rounds[0]['work'])
    caught = [worker for one in rounds for worker in one['caught']]
    self.assertEqual(caught, [self.address('cheat')])
    # A lease may be late where the machine is busy.
    self.assertRegex(
      self.log('good'), r'round 0: leases: .*\d+ VALID.*; TAO: h'
    )

    books = accounts.Ledger(
      self.folder / 'pool' / 'ledger.sqlite', accounts.PaymentPolicy()
    )
    self.addCleanup(books.close)
    totals = books.totals()
    earned = totals.pop('earned')
    self.assertGreater(earned, 0)
    self.assertEqual(sum(totals.values()), earned)
    self.assertEqual(books.account(self.address('cheat')), (0, 0, 0))
    self.assertGreater(books.account(self.address('good')).paid, 0)
    payouts = (self.folder / 'pool' / 'payouts.jsonl').read_text()
    orders = [json.loads(line) for line in payouts.splitlines()]
    self.assertEqual(sum(o['rao'] for o in orders), totals['paid'])
    self.check_payload(1, rounds[1]['sequences'])

  def check_payload(self, last, sequences):
    """The network is shown what a miner would show."""
    shared_model = shared_state_lib.SharedModel(self.config)
    plan = round_lib.Schedule(self.config.phases)
    membership = membership_lib.read(self.chain, plan.put_closes(last), plan)
    entry = membership.commitments[0]
    self.assertEqual(entry.round, last)
    objects = connect.objects(self.config, shared_model.run)
    key = objects.key('payloads', last, entry.digest)
    data = objects.bucket.get(key, shared_model.spec.payload_bytes)
    self.assertEqual(run_storage_lib.digest(data), entry.digest)
    root = manifest.genesis(shared_model.run)
    for r in range(last):  # nobody is there to make a manifest
      root = manifest.extend(root, r, None)
    found = shared_model.decode(
      data,
      payload.Header(shared_model.run, last, 0, root[:16], b'', 0),
      lambda text, by: keys.verify(membership.peers[0].hotkey, text, by),
    )
    split = dataset.load(self.config).train
    task = local_lib.Task(
      0, last, self.chain.block_hash(plan.start(last)), root
    )
    ids_N = local_lib.assigned_ids(self.config, task, split).reshape(-1)
    ids_N = ids_N[:sequences]
    self.assertEqual(found.header.sequences, sequences)
    context = self.config.data.context
    receipt = assignment.receipt_of(split, ids_N, context)
    self.assertEqual(found.header.receipt, receipt)


if __name__ == '__main__':
  absltest.main()
