"""Processes that share nothing but a chain and buckets, beside the emulator."""

import dataclasses
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import urllib.request
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest
from moto import server as moto_server

from covenant import config as config_lib
from covenant import metrics
from covenant.data import dataset
from covenant.emulate import host as host_lib
from covenant.emulate import localnet
from covenant.emulate import proposals
from covenant.report import amendments as shown
from covenant.report import status as status_lib
from tests import helpers

SCORED = ('uid', 'verdict', 'evaluation', 'after')


def small(*changes):
  """The smoke network, smaller."""
  changes = ('rounds=2', 'miners=2', 'optim.inner.warmup_steps=5', *changes)
  return config_lib.load(f'{helpers.CONFIGS}/localnet.py:smoke', changes)


def decisions(path):
  """Returns the findings of a validator without their blocks."""
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  return [
    {
      'round': row['round'],
      'weights': row['weights'],
      'uids': [{k: d[k] for k in SCORED} for d in row['decisions']],
    }
    for row in rows
  ]


class DeviceShareTest(absltest.TestCase):
  def fraction(self, *changes):
    """The share of a process in a network of five and an evaluator."""
    folder = self.create_tempdir().full_path
    config = helpers.tiny('miners=3', 'validators=2', *changes)
    network = localnet.Localnet(config, folder)
    self.addCleanup(network.chain.close)
    words = network.command(localnet.Member('miner', 0))
    (found,) = [w for w in words if 'memory_fraction' in w]
    return found

  def test_processes_share_the_memory_of_a_device(self):
    # Six of them, and the one that starts them: 0.9 / 7.
    flag = '--config.devices.memory_fraction='
    self.assertEqual(self.fraction(), f'{flag}0.129')
    own = self.fraction('devices.memory_fraction=0.05')
    self.assertEqual(own, f'{flag}0.050')


@pytest.mark.network
class LocalnetTest(absltest.TestCase):
  def folder(self):
    folder = tempfile.TemporaryDirectory(prefix='covenant-')
    self.addCleanup(folder.cleanup)
    return pathlib.Path(folder.name)

  def check_nobody_died(self, network, outcome):
    """Says what the log of one that was started again has."""
    for sight in outcome.sights:
      log = network.folder(sight.member) / 'log.txt'
      self.assertEqual(sight.restarts, 0, log.read_text('utf-8')[-6000:])

  def s3(self, buckets):
    """An S3 server on the loopback; the text of `network.bucket`."""
    logging.getLogger('werkzeug').setLevel(logging.ERROR)
    server = moto_server.ThreadedMotoServer('127.0.0.1', port=0)
    server.start()
    self.addCleanup(server.stop)
    host, port = server.get_host_and_port()
    keys = {'AWS_ACCESS_KEY_ID': 'own', 'AWS_SECRET_ACCESS_KEY': 'secret'}
    patch = mock.patch.dict('os.environ', keys)
    patch.start()
    self.addCleanup(patch.stop)
    for name in buckets:
      put = urllib.request.Request(f'http://{host}:{port}/{name}', method='PUT')
      urllib.request.urlopen(put).close()
    return (
      f's3://run-{{hotkey}}?endpoint=http://{host}:{port}'
      '&key_id=public&secret=public'
    )

  def test_processes_and_emulator_agree_bit_for_bit(self):
    """Promise 1: parameters, histories, scores and weights; over S3."""
    bucket = self.s3(f'run-{uid}' for uid in range(4))
    config = small(f'network.bucket={bucket}')
    host = host_lib.Host(config, dataset.load(config))
    found = []
    host.announce = lambda uid, verdict: found.append((uid, verdict))
    for _ in range(config.rounds):
      host.round()
    workdir = self.folder() / 'net'
    network = localnet.Localnet(config, workdir)
    evaluator = localnet.Member('evaluator', None)
    killed = []

    def kill_the_evaluator(sights):
      if sights[-1].status.get('round') == 1 and not killed:
        killed.append(network.process(evaluator).pid)
        network.process(evaluator).kill()

    outcome = network.run(kill_the_evaluator)
    self.assertLen(killed, 1)
    self.assertTrue(outcome.finished, outcome.sights)
    self.assertTrue(outcome.equal, outcome.sights)
    self.assertLen(outcome.sights, 5)
    for sight in outcome.sights:
      self.assertEqual(sight.status['round'], 2)
      self.assertEqual(sight.status.get('uid'), sight.member.uid)
      self.assertEqual(
        sight.status['fingerprint'], host.validators[0].fingerprint()
      )
      self.assertEqual(sight.status['root'], host.validators[0].root.hex())
      self.assertEqual(sight.restarts, int(sight.member == evaluator))
    table = (workdir / 'evaluator' / 'evaluations.csv').read_text()
    self.assertRegex(table, r'(?s)^round,.*\n1,.*\n2,')
    for uid in 2, 3:
      emulated = workdir / f'emulated-{uid}.jsonl'
      emulated.write_text(
        ''.join(json.dumps(v._asdict()) + '\n' for u, v in found if u == uid)
      )
      real = workdir / f'validator-{uid}' / 'verdicts.jsonl'
      self.assertEqual(decisions(real), decisions(emulated))

  def test_unlike_hardware_ends_equal(self):
    """Two miners and two validators, with other vector instructions each.

    Their losses differ in the last digits; what they share does not. Verdicts
    are the same, and weights nearly.
    """
    isas = {
      'miner-0': 'SSE4_2',
      'miner-1': 'AVX',
      'validator-2': 'AVX2',
      'validator-3': 'SSE4_2',
    }
    start = subprocess.Popen

    def popen(command, **options):
      name = pathlib.Path(command[-1].removeprefix('--workdir=')).name
      if name in isas:
        flags = f'--xla_cpu_max_isa={isas.pop(name)}'
        options['env'] = os.environ | {'XLA_FLAGS': flags}
      return start(command, **options)

    workdir = self.folder() / 'net'
    network = localnet.Localnet(small('rounds=4'), workdir)
    with mock.patch.object(localnet.subprocess, 'Popen', popen):
      outcome = network.run()
    self.assertEqual(isas, {})
    one, other = (
      decisions(workdir / f'validator-{uid}' / 'verdicts.jsonl')
      for uid in (2, 3)
    )
    self.assertLen(one, 4)
    self.assertNotEqual(one, other)  # the losses are not the same to the bit
    for here, there in zip(one, other, strict=True):
      self.assertEqual(
        [(d['uid'], d['verdict']) for d in here['uids']],
        [(d['uid'], d['verdict']) for d in there['uids']],
      )
      self.assertEqual(here['weights'].keys(), there['weights'].keys())
      for uid, weight in here['weights'].items():
        self.assertAlmostEqual(
          weight, there['weights'][uid], delta=0.01 * weight
        )
    self.assertTrue(outcome.finished, outcome.sights)
    self.check_nobody_died(network, outcome)
    self.assertTrue(outcome.equal, outcome.sights)
    self.assertEqual(outcome.sights[0].status['round'], 4)

  def test_a_validator_and_an_evaluator_on_meshes(self):
    """Four devices share the model of the one, two that of the other."""
    fsdp = {'validator-3': 4, 'evaluator': 2}
    start, seen = subprocess.Popen, {}

    def popen(command, **options):
      name = pathlib.Path(command[-1].removeprefix('--workdir=')).name
      if (devices := fsdp.get(name)) is not None:
        options['env'] = os.environ | {'JAX_NUM_CPU_DEVICES': str(devices)}
        command = [*command, f'--config.devices.fsdp={devices}']
        seen[name] = devices
      return start(command, **options)

    config = small(
      'optim.compression.block=(16, 16)', 'optim.compression.k=4', 'rounds=3'
    )
    workdir = self.folder() / 'net'
    network = localnet.Localnet(config, workdir)
    with mock.patch.object(localnet.subprocess, 'Popen', popen):
      outcome = network.run()
    self.assertEqual(seen, fsdp)
    self.assertTrue(outcome.finished, outcome.sights)
    self.check_nobody_died(network, outcome)
    self.assertTrue(outcome.equal, outcome.sights)
    one, four = (
      {
        row['round']: row
        for row in map(json.loads, path.read_text().splitlines())
      }
      for path in sorted(workdir.glob('validator-*/verdicts.jsonl'))
    )
    # On a busy machine one of them may catch up with a round, unjudged.
    both, scored = one.keys() & four.keys(), 0
    self.assertNotEmpty(both)
    for r in both:
      pairs = zip(one[r]['decisions'], four[r]['decisions'], strict=True)
      for a, b in pairs:
        self.assertEqual(a['verdict'], b['verdict'])
        for name, value in (a['evaluation'] or {}).items():
          np.testing.assert_allclose(value, b['evaluation'][name], atol=5e-6)
          scored += 1
    self.assertGreater(scored, 0)
    lines = (workdir / 'evaluator' / 'evaluations.csv').read_text()
    self.assertRegex(lines, r'(?s)^round,.*\n3,')

  def test_a_preempted_miner_is_requeued(self):
    """SIGTERM, as on a spot machine; a new process goes on in the workdir."""
    workdir = self.folder() / 'net'
    network = localnet.Localnet(small('rounds=3'), workdir)
    miner, codes = localnet.Member('miner', 0), []

    def preempt(sights):
      process = network.process(miner)
      if codes or sights[0].status.get('round') != 1:
        return
      process.send_signal(signal.SIGTERM)
      codes.append(process.wait(60))
      saved = json.loads((workdir / 'miner-0' / 'status.json').read_text())
      self.assertEqual(saved['phase'], 'stopped')
      network.start(miner)

    outcome = network.run(preempt)
    self.assertEqual(codes, [0])
    self.assertTrue(outcome.finished and outcome.equal, outcome.sights)
    steps = metrics.read(workdir / 'miner-0' / 'metrics.jsonl', [metrics.Step])
    # On a busy machine it may be back later than in round 2.
    self.assertIn(1, {step.round for step in steps})
    self.assertGreater(max(step.round for step in steps), 1)
    # Anybody sees the whole run, without a hotkey.
    config = config_lib.load(str(workdir / 'config.json'))
    peers = status_lib.Observer(config).look().peers
    self.assertEqual([p.role for p in peers], ['miner'] * 2 + ['validator'] * 2)
    self.assertEqual({peer.round for peer in peers}, {3})
    losses = [p.loss for p in peers[:2] if p.loss is not None]
    self.assertGreater(min(losses), 0)
    self.assertAlmostEqual(sum(peer.weight for peer in peers), 1.0, places=4)

  def test_a_live_network_is_amended_and_extended(self):
    """The operators of both validators propose it; an evaluator follows."""
    edits = (
      'rounds=5',
      'optim.outer.learning_rate=0.5',
      'phases.round_blocks=36',
    )
    config = small('rounds=4', 'optim.inner.decay_steps=40')
    workdir = self.folder() / 'net'
    network, said = localnet.Localnet(config, workdir), []

    def propose(sights):
      if not said and (sights[0].status.get('head') or 0) > 0:
        for uid in '2', '3':
          own = config_lib.load(
            str(workdir / 'config.json'), [f'network.hotkey={uid}']
          )
          said.append(proposals.run(own, '', 3, edits))

    outcome = network.run(propose)
    self.assertLen(said, 2)
    self.assertIn('supported by', said[0])
    self.assertTrue(outcome.finished and outcome.equal, outcome.sights)
    self.assertEqual({s.status['round'] for s in outcome.sights}, {5})
    self.check_nobody_died(network, outcome)
    config = config_lib.load(str(workdir / 'config.json'))
    listed = proposals.run(config, '', None, [])
    self.assertIn('adopted: amendment: from round 3 on', listed)
    (line,) = shown.lines(workdir / 'miner-0')
    self.assertIn('optim.outer.learning_rate = 0.5 (before: 0.7)', line)
    status = status_lib.Observer(config).look()
    self.assertLen(status.changes, 1)
    # The emulator comes to the same bits.
    host = host_lib.Host(config, dataset.load(config))
    self.addCleanup(host.tools.close)
    proposals.run(
      dataclasses.replace(config, network=config_lib.Network()),
      workdir / 'emulated', 3, edits,
    )  # fmt: skip
    while host.validators[0].state.round < host.rounds:
      proposals.support(host, workdir / 'emulated')
      host.round()
    root = host.validators[0].root.hex()
    self.assertEqual(outcome.sights[0].status['root'], root)

  def test_ctrl_c_ends_everybody_and_leaves_the_logs(self):
    workdir = self.folder() / 'net'
    process = subprocess.Popen(
      [
        sys.executable,
        f'{helpers.ROOT}/run.py',
        '--role=localnet',
        f'--config={helpers.CONFIGS}/localnet.py:smoke',
        '--config.miners=1',
        '--config.validators=1',
        f'--workdir={workdir}',
      ],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      env=os.environ | {'PYTHONPATH': str(helpers.ROOT)},
      text=True,
    )
    for line in process.stderr:
      if line.startswith('round'):
        break
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=100)
    self.assertEqual(process.returncode, 1)
    self.assertIn('miner-0', out)
    for name in 'miner-0', 'validator-1', 'evaluator':
      status = json.loads((workdir / name / 'status.json').read_text())
      self.assertEqual(status['phase'], 'stopped', name)
      with self.assertRaises(ProcessLookupError):
        os.kill(status['pid'], 0)
      self.assertTrue((workdir / name / 'log.txt').exists())

  def test_a_workdir_is_for_one_network(self):
    workdir = self.folder()
    localnet.Localnet(small(), workdir).chain.close()
    with self.assertRaisesRegex(localnet.LocalnetError, 'another --workdir'):
      localnet.Localnet(small(), workdir)


if __name__ == '__main__':
  absltest.main()
