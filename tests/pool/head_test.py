"""A pipeline as processes: a head, its stages and a validator."""

import itertools
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from unittest import mock

import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant import metrics
from covenant.chain import local_chain
from covenant.chain import storage as chain_storage
from covenant.config import amend
from covenant.data import dataset
from covenant.emulate import proposals
from covenant.node import connect
from covenant.pool import head as head_lib
from covenant.pool import ledger as accounts
from covenant.pool import orders
from covenant.pool import server as server_lib
from covenant.pool import worker as worker_lib
from covenant.protocol import apply
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.train import local as local_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train import trainer as trainer_lib
from covenant.wire import manifest
from covenant.wire import payload
from tests import helpers

EDITS = [
  'rounds=4',
  'miners=2',
  'islands=1x stages=3,rank=20,bits=4',
  'model.layers=3',
  'optim.inner_steps=4',
  'optim.inner.microbatch_size=2',
  'optim.outer.momentum=0.5',
  'pool.listen=127.0.0.1:0',
  'pool.fee=0.1',
  'pool.deposit=1',
  'pool.threshold=0.0',
  'network.block_seconds=0.5',
  'phases.round_blocks=60',
  'phases.put_blocks=16',
  'phases.select_blocks=16',
  'phases.takeover_blocks=4',
]
# From the last round on.
AMENDED = 3
CHANGES = {
  'optim.inner.learning_rate': 0.004,
  'optim.outer.learning_rate': 0.5,
}


def commands(name):
  """Returns the commands between two marks of docs/islands.md, as words."""
  text = (helpers.ROOT / 'docs' / 'islands.md').read_text()
  text = text.split(f'<!-- {name}: begin -->')[1]
  text = text.split(f'<!-- {name}: end -->')[0].replace('\\\n', ' ')
  return [shlex.split(line) for line in text.splitlines() if 'run.py' in line]


MEMBERS = ('head', 'validator', 'miner')


class PipelineCase(absltest.TestCase):
  """A case with a chain, a validator, a head and stages, as processes."""

  edits = EDITS

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    (self.folder / 'network').mkdir()
    edits = [*self.edits, f'network.path={self.folder}/network']
    self.config = config_lib.load(f'{helpers.CONFIGS}/tiny.py', edits)
    (self.folder / 'config.json').write_text(config_lib.to_json(self.config))
    seed = self.config.seed
    self.chain = local_chain.LocalChain.create(
      connect.chain_file(self.config),
      seed=b'seed',
      rules=chain_storage.ChainRules(
        block_seconds=self.config.network.block_seconds, tempo=4
      ),
      key=connect.local_key(seed, 'validator'),
    )
    self.addCleanup(self.chain.close)
    for uid in range(self.config.miners):
      address = connect.local_key(seed, f'{uid}').address
      self.assertEqual(self.chain.register(address, 0.0, validator=False), uid)
    self.chain.register(self.chain.hotkey, 1000.0, validator=True)
    self.processes = {}
    self.addCleanup(self.end)

  def end(self):
    for process in self.processes.values():
      process.kill()
      process.wait()

  def start(self, name, *arguments, program=f'{helpers.ROOT}/run.py'):
    with open(self.folder / f'{name}.txt', 'a') as log:
      code = [program] if program.endswith('.py') else ['-c', program]
      self.processes[name] = subprocess.Popen(
        [
          sys.executable, *code, f'--config={self.folder}/config.json',
          f'--workdir={self.folder}/{name}', *arguments,
        ],
        stdout=log,
        stderr=log,
        env=os.environ | {'PYTHONPATH': str(helpers.ROOT)},
      )  # fmt: skip
    return self.processes[name]

  def start_head(self):
    self.start('head', '--role=pool', '--config.network.hotkey=0')
    path = self.folder / 'head' / 'address'
    self.until(path.exists, 'the head listens')
    return f'http://{path.read_text()}'

  def stage(self, name, url, **changes):
    return self.start(
      name, '--role=stage', f'--config.pool.url={url}',
      f'--config.pool.key={self.folder}/{name}.key', **changes,
    )  # fmt: skip

  def validator(self):
    self.start(
      'validator', '--role=validator', '--config.network.hotkey=validator'
    )

  def until(self, holds, what):
    deadline = time.monotonic() + 400
    while not holds():
      if time.monotonic() > deadline or any(
        (p.poll() or 0) > 0 for p in self.processes.values()
      ):
        logs = [
          f'{p.name}:\n{p.read_text()}' for p in self.folder.glob('*.txt')
        ]
        self.fail(f'not so: {what}\n' + '\n'.join(logs))
      time.sleep(0.05)

  def status(self, name):
    path = self.folder / name / 'status.json'
    return json.loads(path.read_text()) if path.exists() else {}

  def begin(self, *names):
    """Starts the clock once these are ready."""
    for name in names:
      self.until(
        lambda name=name: 'phase' in self.status(name), f'{name} is ready'
      )
    self.chain.begin(time.time() + 0.5)

  def finish(self):
    """Waits for the end; returns the records of the head's rounds."""
    for name in MEMBERS:
      self.until(
        lambda name=name: self.status(name).get('phase') == 'finished',
        f'{name} is finished',
      )
    for name, process in self.processes.items():
      if name not in MEMBERS and process.poll() is None:
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(60), 0, name)
    lines = (self.folder / 'head' / 'stages.jsonl').read_text().splitlines()
    return [json.loads(line) for line in lines]

  def address(self, name):
    return worker_lib.read_key(str(self.folder / f'{name}.key')).address

  def payload(self, shared_model, round_index, uid):
    """Returns the payload that a miner has put in a round, or None."""
    objects = connect.objects(self.config, shared_model.run, writes=False)
    bucket = objects.bucket_at(f'/{uid}'.encode())
    found = bucket.list(objects.key('payloads', round_index))
    if not found:
      return None
    (info,) = found
    return bucket.get(info.key, shared_model.spec.payload_bytes)

  def check_ledger(self):
    """The accounts are exact; returns the ledger."""
    books = accounts.Ledger(
      self.folder / 'head' / 'ledger.sqlite', accounts.PaymentPolicy()
    )
    self.addCleanup(books.close)
    totals = books.totals()
    earned = totals.pop('earned')
    self.assertEqual(sum(totals.values()), earned)
    return books

  def check_equal(self):
    """All members' histories and parameters are equal; returns them."""
    first, *others = (
      {k: self.status(name)[k] for k in ('round', 'root', 'fingerprint')}
      for name in MEMBERS
    )
    for other in others:
      self.assertEqual(other, first)
    return first


class AdmitTest(absltest.TestCase):
  def test_strangers_have_nothing_fetched(self):
    seats = types.SimpleNamespace(banned={'liar'}, holds='holder'.__eq__)
    process = types.SimpleNamespace(_seats=seats)

    def status(worker, path):
      request = server_lib.Request(worker, 'GET', path, b'', '127.0.0.1')
      found = head_lib.HeadProcess._admit(process, request)
      return found if isinstance(found, int) else found.status

    sections = '/sections?stage=0&number=0&uid=0'
    self.assertEqual(status('holder', sections), 0)
    self.assertEqual(status('stranger', sections), 403)
    self.assertEqual(status('stranger', '/channel'), 0)
    self.assertEqual(status('liar', '/channel'), 403)
    self.assertEqual(status('stranger', '/lease'), 404)


class SectionsTest(absltest.TestCase):
  def test_a_payload_is_fetched_for_who_takes_its_order(self):
    fetched = []
    tensors = types.SimpleNamespace(
      sections_of=lambda order, stage, uid, read: [
        read(types.SimpleNamespace(uid=uid))
      ]
    )
    process = types.SimpleNamespace(
      _seats=types.SimpleNamespace(serve=lambda *key: key == ('a', 1, 2, 3)),
      _log=types.SimpleNamespace(get=lambda number: object()),
      _tensors=tensors,
      _payload=lambda source: fetched.append(source.uid) or b'some',
    )

    def ask(worker, query):
      path = f'/sections?{query}'
      request = server_lib.Request(worker, 'GET', path, b'', '127.0.0.1')
      return head_lib.HeadProcess._answer(process, request)

    self.assertEqual(ask('a', 'stage=1&number=2&uid=3').data, b'some')
    for worker, query in (
      ('b', 'stage=1&number=2&uid=3'), ('a', 'stage=1&number=1&uid=3'),
    ):  # fmt: skip
      reply = ask(worker, query)
      self.assertEqual(reply.status, 400)
      self.assertRegex(reply.text['error'], 'stage 1 is not told .* uid 3')
    self.assertEqual(ask('a', 'stage=x').status, 400)
    self.assertEqual(fetched, [3])


class PayloadTest(absltest.TestCase):
  def test_one_whose_buckets_the_order_does_not_name_is_in_a_mirror(self):
    """As the head made the order while it caught up, or before a restart."""
    asked = []
    source = orders.Source(1, 3, 'aa' * 32, (), (), ())

    def fetch(kind, round_index, refs, mirrors, limit):
      asked.append((kind, round_index, [ref.location for ref in refs], mirrors))
      return {bytes.fromhex(source.digest): b'payload'}

    process = types.SimpleNamespace(
      _model=types.SimpleNamespace(
        payload=lambda source: None,
        places=lambda source: ('2f61', '2f62'),
        spec=types.SimpleNamespace(payload_bytes=9),
      ),
      _context=types.SimpleNamespace(
        objects=types.SimpleNamespace(fetch=fetch, buckets_at=list)
      ),
    )
    found = head_lib.HeadProcess._payload(process, source)
    self.assertEqual(found, b'payload')
    self.assertEqual(asked, [('payloads', 3, [b'/a'], [b'/a', b'/b'])])


class ApplyTest(parameterized.TestCase):
  @parameterized.parameters(
    dict(found=(True, {'liar': 'why'}), tries=2),
    dict(found=(False, {}), tries=1),
    dict(found=orders.OrderError('nobody has the payload'), tries=1),
  )
  def test_a_stage_that_says_false_digests_costs_no_round(self, found, tries):
    """Another state than that of the others may be a stage's lie."""
    head = mock.create_autospec(head_lib.HeadProcess, instance=True)
    head._model, head._training = mock.Mock(), mock.Mock()
    head._model.check_stages.side_effect = [found]
    head._find_liars = lambda e: head_lib.HeadProcess._find_liars(head, e)
    node = mock.Mock()
    node.config.checkpoint.publish = 9
    command = types.SimpleNamespace(round=3)
    error = apply.OutOfSyncError('the fingerprint here is another')
    members = mock.Mock(candidates=[], commitments={})
    with (
      mock.patch.object(head_lib.membership_lib, 'read', return_value=members),
      mock.patch.object(
        head_lib.follow, 'apply_round', side_effect=[error, None]
      ) as applied,
    ):
      if tries == 1:
        with self.assertRaisesRegex(apply.OutOfSyncError, 'another'):
          head_lib.HeadProcess._apply(head, node, command, 7)
      else:
        head_lib.HeadProcess._apply(head, node, command, 7)
        head._training.accuse.assert_called_once_with({'liar': 'why'})
    self.assertEqual(applied.call_count, tries)


@pytest.mark.network
class HeadProcessTest(PipelineCase):
  def test_the_commands_of_the_docs_with_a_stage_killed(self):
    """The bits are those of the emulated pipeline until a stage is killed.

    Another comes in its place, and the run is amended for the last round.
    """
    (head,) = commands('head')
    stages = commands('stages')
    self.assertLen(stages, 3)
    self.run_command('head', head, '127.0.0.1:0', 'network.hotkey=0')
    path = self.folder / 'head' / 'address'
    self.until(path.exists, 'the head listens')
    self.validator()
    self.start(
      'miner', '--role=miner', '--config.network.hotkey=1', '--config.islands='
    )
    names = ['stage-a', 'stage-b', 'stage-c']
    for name, command in zip(names, stages, strict=True):
      key = f'pool.key={self.folder}/{name}.key'
      self.run_command(name, command, path.read_text(), key)
    self.begin('head', 'validator', 'miner', *names)
    self.amend()
    record = self.folder / 'head' / 'stages.jsonl'
    self.until(record.exists, 'a round is trained')
    killed = self.processes.pop('stage-b')
    killed.kill()
    killed.wait()
    self.stage('stage-d', f'http://{path.read_text()}')
    rounds = self.finish()
    end = self.check_equal()
    self.assertEqual(end['round'], self.config.rounds)
    first, *_, last = rounds
    # A layer each, two microbatches per step.
    paid = {self.address(name): 2 * first['steps'] for name in names}
    self.assertEqual(first['work'], paid)
    self.assertEqual((first['replays'], first['caught']), (0, {}))
    self.assertLen(first['idle'], 3)
    self.assertNotIn(self.address('stage-b'), last['holders'])
    self.check_ledger()
    self.assertLen(rounds, self.config.rounds)
    self.assertEqual(self.replay(first), end['fingerprint'])
    for name in ('head', 'stage-a'):
      self.check_measured(name, first)

  def check_measured(self, name, first):
    """A head or a stage has written what its first round took."""
    steps, rounds = (
      [x for x in metrics.read(self.folder / name / 'metrics.jsonl', [kind])
       if x.round == 1]
      for kind in (metrics.Step, metrics.NodeRound)
    )  # fmt: skip
    self.assertLen(steps, first['steps'])
    self.assertAlmostEqual(steps[-1].loss, first['loss'])
    for step in steps:
      self.assertGreater(step.tokens_per_second * step.host_bytes, 0)
      self.assertGreater(step.learning_rate * step.gradient_norm, 0)
    (found,) = rounds
    self.assertGreater(found.train_seconds, 0)
    self.assertGreater(found.pool_bytes_sent * found.pool_bytes_received, 0)

  def amend(self):
    """The operator of the validator proposes an amendment."""
    self.until(lambda: self.chain.head() > 0, 'the clock runs')
    config = config_lib.load(
      f'{self.folder}/config.json', ['network.hotkey=validator']
    )
    edits = [f'{path}={value}' for path, value in CHANGES.items()]
    self.assertIn('supported', proposals.run(config, '', AMENDED, edits))

  def run_command(self, name, command, address, edit):
    """Runs a command of the docs with paths and addresses of this test."""
    self.assertEqual(command[:2], ['python', 'run.py'])
    self.assertIn('--config=CONFIG', command)
    self.assertIn(f'--workdir=runs/{name}', command)
    flags = [
      word.replace('192.168.1.10:8470', address)
      for word in command[2:]
      if not word.startswith(('--config=', '--workdir='))
    ]
    self.start(name, *flags, f'--config.{edit}')

  def replay(self, trained):
    """Applies all payloads on one device; trains the round of a record again.

    Returns:
      The fingerprint at the end.
    """
    config = self.config
    shared_model = shared_state_lib.SharedModel(config)
    shared = shared_model.init()
    place = apply.Position(0, manifest.genesis(shared_model.run), shared)
    plan = round_lib.Schedule(config.phases)
    objects = connect.objects(config, shared_model.run, writes=False)
    bucket = objects.bucket_at(b'/validator')
    for r in range(config.rounds):
      root = place.root
      if r == AMENDED:
        amended = amend.amended(config, r, CHANGES)
        shared_model = shared_model.amended(amended)
      if r == trained['round']:
        seed = self.chain.block_hash(plan.start(r))
        task = local_lib.Task(0, r, seed, root)
        made = self.emulated(shared_model, place.shared, task, trained['steps'])
        self.assertEqual(made, self.payload(shared_model, r, 0))
      history = bucket.get(objects.key('history', r), manifest.MAX_BYTES)
      digest = run_storage_lib.digest(history) if history else None
      messages, weights, adoption = {}, {}, None
      if history:
        decoded = manifest.decode(history, self.chain.verify)
        adoption = decoded.adoption
        for uid in (entry.uid for entry in decoded.entries):
          header = payload.Header(shared_model.run, r, uid, root[:16], b'', 0)
          data = self.payload(shared_model, r, uid)
          found = shared_model.decode(data, header, lambda *_: True)
          messages[uid] = found.message
          weights[uid] = shared_model.weigh(found.header)
      shared, _ = shared_model.apply_round(
        place.shared, messages, weights=weights
      )
      place = place.advance(digest, shared, adoption)
    (amendment,) = place.amendments
    self.assertEqual(amendment.values, CHANGES)
    return apply.fingerprint(shared_model, place)

  def emulated(self, shared_model, shared, task, steps):
    """Returns the payload of a pipeline on one device, of its first round."""
    trainer = trainer_lib.Trainer(
      self.config, shared_model, dataset.load(self.config)
    )
    state = trainer.init(shared.params)
    batches = itertools.islice(trainer.batches(task), steps)
    trained, _ = trainer.train(shared.params, state, task, batches)
    key = connect.local_key(self.config.seed, '0')
    return trainer.seal(trained, task, key.sign).payload


@pytest.mark.network
class RestartTest(PipelineCase):
  edits = [*EDITS, 'rounds=9', 'pool.stages=1', 'pool.patience=20.0']

  def test_a_head_that_is_started_again_while_the_last_stage_is_away(self):
    """It misses rounds and lives on, can be ended, and goes on with another."""
    url = self.start_head()
    self.validator()
    self.start(
      'miner', '--role=miner', '--config.network.hotkey=1', '--config.islands='
    )
    names = ['stage-a', 'stage-b', 'stage-c']
    for name in names:
      self.stage(name, url)
    self.begin('head', 'validator', 'miner', *names)
    records = self.folder / 'head' / 'stages.jsonl'
    self.until(records.exists, 'a round is trained')
    (first,) = map(json.loads, records.read_text().splitlines())
    last = first['holders'][2]
    for name in 'head', *(n for n in names if self.address(n) == last):
      self.processes[name].kill()
      self.processes.pop(name).wait()
    port = int(url.rpartition(':')[2])
    self.again(port)
    said = self.folder / 'head.txt'
    missed = r'round \d+ is missed: .*: 2 \(no worker\)'
    self.until(lambda: re.search(missed, said.read_text()), 'a round is missed')
    rounds = len(records.read_text().splitlines())
    self.assertIsNone(self.processes['head'].poll())
    self.processes['head'].send_signal(signal.SIGINT)
    self.assertIn(self.processes.pop('head').wait(60), (0, 1))
    self.again(port)
    self.stage('stage-d', url)
    self.assertGreater(len(self.finish()), rounds)
    self.check_equal()

  def again(self, port):
    """Starts the head on the port that its stages know."""
    self.start(
      'head', '--role=pool', '--config.network.hotkey=0',
      f'--config.pool.listen=127.0.0.1:{port}',
    )  # fmt: skip


if __name__ == '__main__':
  absltest.main()
