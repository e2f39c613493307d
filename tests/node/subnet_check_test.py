"""Tests for the findings of doctor about the rules of a subnet."""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.chain import interface
from covenant.node import preflight
from covenant.node import subnet_check
from tests import helpers
from tests.chain import control
from tests.chain import runtime as runtime_lib
from tests.chain import substrate

RULES = interface.Subnet(
  block=1000,
  runtime=462,
  sdk='bittensor 11.3.0',
  tempo=360,
  commitment_bytes=3100,
  weights_interval=100,
  min_weights=1,
  stake_threshold=100.0,
  version_key=7,
  sealed=True,
  reveal_epochs=1,
  mechanisms=1,
  owner_uids=(3,),
  permits=64,
  immunity=5000,
  oldest=800,
)
WELL = (
  r'well +runtime +spec 462, read by bittensor 11\.\d\.\d',
  r'well +space +24 commitments of 128 bytes fit an epoch of 360 blocks',
  r'well +state +the state of \d+ blocks ago can be read',
  r'well +weights +at least 1',
  r'well +stake +1,000.0; 0.0 are needed',
  r'well +version +0 is required',
  r'well +immunity +a newcomer is not replaced for 4,096 blocks',
)
BAD_RULES = {
  'Tempo': 5000,
  'StakeThreshold': 5000 * substrate.RAO,
  'MinAllowedWeights': 200,
  'ImmunityPeriod': 10,
  'WeightsSetRateLimit': 5000,
}
BAD = ['space', 'interval', 'weights', 'stake', 'immunity']
STORE = """
import os

from covenant.store import bucket
from covenant.store import location

def open_named(name, write):
  where = location.Location('file', os.environ['HOME'] + '/bucket')
  return bucket.open_bucket(where)
"""
PEER = interface.Peer(5, 'hotkey', 500.0, True, 10)


def config(**changes):
  base = config_lib.load(f'{helpers.CONFIGS}/72b.py')
  return dataclasses.replace(base, **changes)


class FindingsTest(parameterized.TestCase):
  def examine(self, role='validator', peer=PEER, settings=None, **rules):
    found = subnet_check.examine(
      subnet_check.Situation(
        settings or config(), RULES._replace(**rules), peer, role, 12.0
      )
    )
    return {f.name: f for f in found}

  @parameterized.parameters('miner', 'validator', 'pool', 'evaluator', '')
  def test_a_subnet_of_the_usual_rules_is_well(self, role):
    found = self.examine(role)
    self.assertEqual([f.text for f in found.values() if not f.well], [])
    self.assertContainsSubset(
      {'runtime', 'space', 'state', 'weights', 'version', 'sealing'}, found
    )

  def test_a_chain_without_rules_has_no_findings(self):
    found = subnet_check.examine(
      subnet_check.Situation(
        config(), interface.Subnet(block=5), None, 'validator', 12.0
      )
    )
    self.assertEmpty(list(found))

  @parameterized.parameters(
    ('miner', 2300, True),
    ('miner', 3001, False),
    ('validator', 700, True),
    ('validator', 1000, False),
  )
  def test_commitments_must_fit_an_epoch(self, role, tempo, well):
    """24 fit; rounds of 103 blocks, one commitment or up to three each."""
    found = self.examine(role, tempo=tempo)['space']
    self.assertEqual(found.well, well, found.text)
    self.assertIn('24 commitments of 128 bytes', found.text)
    if not well:
      (blocks,) = (
        int(word.replace(',', ''))
        for word in found.text.partition('the tempo to ')[2].split()[:1]
      )
      self.assertTrue(self.examine(role, tempo=blocks)['space'].well)

  @parameterized.parameters(
    ('state', {'oldest': None}, 'archive node'),
    ('interval', {'weights_interval': 400}, 'gauntlet.weights_every to 4'),
    ('weights', {'min_weights': 1024}, 'must lower MinAllowedWeights'),
    ('stake', {'stake_threshold': 800.0}, 'stake 300.0 more'),
    (
      'runtime',
      {'weights_error': 'StorageFunctionNotFound: SubnetEpochConsensus'},
      'cannot compose weights .* SubnetEpochConsensus.*another release',
    ),
    ('immunity', {'immunity': 200}, 'too short'),
  )
  def test_what_will_not_work(self, name, rules, text):
    found = self.examine(**rules)
    self.assertEqual([f.name for f in found.values() if not f.well], [name])
    self.assertRegex(found[name].text, text)

  def test_the_window_is_as_long_as_finality_takes(self):
    for blocks, well in ((9, False), (10, True)):
      phases = dataclasses.replace(config().phases, takeover_blocks=blocks)
      for role in ('validator', ''):
        found = self.examine(role, settings=config(phases=phases))['window']
        self.assertEqual(found.well, well, found.text)
      # A miner cannot change it, so it does not keep one from starting.
      found = self.examine('miner', settings=config(phases=phases))['window']
      self.assertTrue(found.well)

  @parameterized.parameters('8b', '72b', '1t')
  def test_the_windows_of_the_recipes_are(self, name):
    settings = config_lib.load(f'{helpers.CONFIGS}/{name}.py')
    self.assertTrue(self.examine(settings=settings)['window'].well)

  def test_rules_about_weights_are_the_validators(self):
    rules = {'weights_interval': 400, 'min_weights': 1024, 'weights_error': 'x'}
    found = self.examine('miner', **rules)
    self.assertEqual([f.text for f in found.values() if not f.well], [])

  @parameterized.parameters((3, True), (0, False))
  def test_only_the_owner_burns(self, uid, well):
    gauntlet = dataclasses.replace(config().gauntlet, burn=0.5, burn_uid=uid)
    found = self.examine(settings=config(gauntlet=gauntlet))['burn']
    self.assertEqual(found.well, well)
    if not well:
      self.assertIn('which is uid 3', found.text)
      found = self.examine(settings=config(gauntlet=gauntlet), owner_uids=())[
        'burn'
      ]
      self.assertIn('not registered', found.text)

  @parameterized.parameters((2, 1, True), (2, 2, False), (1, 1, False))
  def test_the_mechanism_exists(self, count, chosen, well):
    network = dataclasses.replace(config().network, mechanism=chosen)
    found = self.examine(settings=config(network=network), mechanisms=count)[
      'mechanism'
    ]
    self.assertEqual(found.well, well, found.text)

  def test_a_node_needs_no_state_that_a_node_without_archive_prunes(self):
    self.assertLess(subnet_check.oldest_needed(config()), 256)


class TableTest(control.ChainTestCase):
  """Against a node."""

  def table(self, role='validator', takeover=10, **state):
    self.subnet.state |= {'owner': control.BOB, 'MinAllowedWeights': 1} | state
    self.subnet.step(600)
    settings = helpers.tiny(f'phases.takeover_blocks={takeover}')
    return preflight.table(
      list(preflight.subnet(settings, self.chain, self.chain.head(), role))
    )

  def test_all_is_well(self):
    text = self.table()
    self.assertNotIn('NOT WELL', text)
    for line in WELL:
      self.assertRegex(text, line)

  def test_what_is_not(self):
    self.subnet.spec = runtime_lib.RECORDED
    self.subnet.oldest = 590
    text = self.table(**BAD_RULES)
    self.assertContainsSubset([*BAD, 'state'], not_well(text))

  def test_a_chain_that_does_not_answer(self):
    self.node.go_down()
    self.chain._connection._patience = control.ONCE
    text = preflight.table(
      list(preflight.subnet(helpers.tiny(), self.chain, 3, 'miner'))
    )
    self.assertRegex(text, 'NOT WELL +subnet .*127.0.0.1')
    self.node.come_up()


# Long enough for a chain whose blocks are final late.
PHASES = [
  f'--config.phases.{name}_blocks={count}'
  for name, count in (
    ('round', 60), ('put', 8), ('select', 13), ('takeover', 13),
  )
]  # fmt: skip


@pytest.mark.network
class DoctorTest(control.ChainTestCase):
  """`--role=doctor`, a process, against a node."""

  def doctor(self, *flags, **state):
    self.subnet.state |= {'owner': control.BOB, 'MinAllowedWeights': 1} | state
    self.subnet.genesis = time.time() - 600 * substrate.BLOCK_SECONDS
    self.subnet.step(600)
    home = pathlib.Path(self.create_tempdir().full_path)
    wallet = home / '.bittensor' / 'wallets'
    shutil.copytree(f'{self.path}/w', wallet / 'w')
    (home / 'store.py').write_text(STORE)
    network = {
      'chain': 'bittensor', 'name': self.node.url, 'netuid': 1, 'wallet': 'w',
      'hotkey': 'h', 'store': f'{home}/store.py:open_named',
    }  # fmt: skip
    fields = [
      f'--config.network.{key}={value}' for key, value in network.items()
    ]
    return subprocess.run(
      [sys.executable, helpers.ROOT / 'run.py', '--role=doctor',
       f'--config={helpers.CONFIGS}/tiny.py', f'--workdir={home}/work',
       *PHASES, *fields, *flags],
      env=os.environ | {'HOME': str(home)}, text=True, capture_output=True,
    )  # fmt: skip

  def test_all_is_well(self):
    done = self.doctor()
    self.assertEqual(not_well(done.stdout), [], done.stdout)
    self.assertEqual(done.returncode, 0, done.stderr)
    for line in (*WELL, r'well +chain +block \d+', r'well +bucket +file:'):
      self.assertRegex(done.stdout, line)

  def test_what_is_not(self):
    done = self.doctor(**BAD_RULES)
    self.assertEqual(done.returncode, 1, done.stderr)
    self.assertContainsSubset(BAD, not_well(done.stdout))

  def test_what_a_miner_need_not_heed(self):
    done = self.doctor('--as=miner', **BAD_RULES)
    self.assertEqual(not_well(done.stdout), ['space', 'immunity'])


def not_well(table):
  """The checks of a table that failed."""
  lines = [line.split() for line in table.splitlines()]
  return [words[2] for words in lines if words[:2] == ['NOT', 'WELL']]


if __name__ == '__main__':
  absltest.main()
