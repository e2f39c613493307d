"""A node that joins, or fell behind, gets every bit that the others have."""

import dataclasses
import functools
import json
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.chain import interface as chain_lib
from covenant.chain import storage as chain_storage
from covenant.data import dataset
from covenant.emulate import host as host_lib
from covenant.protocol import apply
from covenant.protocol import catchup
from covenant.protocol import published_checkpoint
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.wire import manifest as manifest_lib
from experiments.chaos import faults
from experiments.chaos import network as network_lib
from experiments.chaos import scenario
from tests import helpers

ROUND = 20  # blocks
MINERS, VALIDATORS = ('0', '1', '2'), ('3', '4')


@functools.cache
def host():
  """Three miners, two validators; checkpoints every other round, two stay."""
  config = dataclasses.replace(
    scenario.get_config(helpers.tiny()),
    miners=len(MINERS),
    validators=len(VALIDATORS),
    checkpoint=config_lib.Checkpoint(every=1, keep=2, publish=2),
  )
  config = dataclasses.replace(
    config, gauntlet=dataclasses.replace(config.gauntlet, evaluate=0)
  )
  return config, host_lib.Host(config, dataset.load(config))


def begin(**kwargs):
  config, shared = host()
  return network_lib.Network(config, shared, **kwargs)


def bits(shared):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(shared)]


def run_blocks(network, last):
  while network.block < last:
    network.step()


def objects_of(network, name):
  return network.nodes[name].objects


def attempt(network, place=None):
  """Returns the position that a node without a state reaches now."""
  node = network.nodes['0']
  catch_up = catchup.CatchUp(
    node.chain,
    network.host.objects('stranger'),
    network.host.shared_model,
    network.plan,
    network.block,
    network.config.rounds,
  )
  return catch_up.run(place)


def stored(network, kind):
  """The rounds of which validators have objects of a kind."""
  return {
    r
    for name in VALIDATORS
    for r in objects_of(network, name).rounds(
      kind, objects_of(network, name).bucket
    )
  }


def assert_at(test, place, network, name='0'):
  node = network.nodes[name]
  test.assertEqual(place.round, node.state.round)
  test.assertEqual(place.root, node.root)
  test.assertEqual(bits(place.shared), bits(node.shared))


class JoinTest(absltest.TestCase):
  def test_a_joiner_of_any_time_equals_the_incumbents(self):
    """From the beginning, then from checkpoints, after objects were pruned."""
    network = begin()
    places = {}
    for r in range(7):
      for block in (r * ROUND + 1, r * ROUND + 12):
        run_blocks(network, block)
        for node in network.nodes.values():
          places[node.state.round] = (node.root, bits(node.shared))
        place = attempt(network)
        self.assertEqual(place.round, max(r - 1, 0))
        self.assertEqual((place.root, bits(place.shared)), places[place.round])
    self.assertEqual(stored(network, 'checkpoints'), {4, 6})
    for kind in 'history', 'payloads', 'proposals', 'verdicts':
      self.assertEqual(min(stored(network, kind)), 4, kind)
    # Miners keep more: a joiner may start from the checkpoint before.
    own = objects_of(network, '0')
    self.assertEqual(own.rounds('payloads', own.bucket)[0], 2)

  def test_joiners_train_and_stay_equal(self):
    network = begin(
      script={
        r * ROUND + 3 + 4 * r: lambda network, r=r: network.join(str(10 + r))
        for r in (0, 2, 3)
      }
    )
    network.run(6)
    self.assertEqual(network.faults.count[faults.Kind.JOIN], 3)
    self.assertEqual(network_lib.audit(network)[5], [0, 1, 2, 5, 6, 7])
    for node in network.nodes.values():
      self.assertEqual(bits(node.shared), bits(network.nodes['3'].shared))

  def test_a_chain_that_forgot_does_not_matter(self):
    """A miner that was away longer than the chain remembers, and a joiner."""
    away = faults.Fault(
      faults.Kind.UNREACHABLE,
      range(ROUND + 2, 5 * ROUND + 2),
      frozenset('0'),
    )
    with mock.patch.object(chain_storage, 'HISTORY', 45):
      network = begin(
        faults=faults.Faults([away]),
        script={5 * ROUND + 5: lambda network: network.join('10')},
      )
      network.run(7)
      with self.assertRaisesRegex(
        chain_lib.ChainRejectedError, 'state is kept for 45 blocks'
      ):
        network.host.chain.peers(ROUND)
    counted = network_lib.audit(network)
    self.assertEqual(counted[3], [1, 2])
    self.assertEqual(counted[6], [0, 1, 2, 5])
    self.assertGreater(network.faults.count[faults.Kind.UNREACHABLE], 70)

  def test_nobody_goes_beyond_the_last_round(self):
    """The run is over, and everybody at rest, when somebody comes late."""
    network = begin()
    network.run(2)
    late = network.block + 3 * ROUND
    network.host.now = late * network.host.chain.block_seconds
    node = network.nodes['0']
    late = catchup.CatchUp(
      node.chain, node.objects, network.host.shared_model, network.plan, late, 2
    )
    assert_at(self, late.run(None), network)

  def test_validators_that_caught_up_have_the_whole_history(self):
    """So a joiner finds it, though those who were there be gone."""
    collect = round_lib.Phase.COLLECT
    network = begin(
      faults=faults.Faults(
        kills=[
          faults.Kill('3', 3, collect, 0, 2 * ROUND),
          faults.Kill('4', 5, collect, 0, network_lib.FOR_EVER),
        ]
      )
    )
    network.run(6)
    self.assertEqual(network.faults.count[faults.Kind.KILL], 2)
    own = network.nodes['3'].objects
    # It went on from the checkpoint of round 4, and over round 4.
    self.assertEqual(own.rounds('history', own.bucket), [2, 4, 5])
    gone = network.nodes['4'].objects.bucket
    gone.delete([info.key for info in gone.list('')])
    network.join('10')
    network.run(7)
    self.assertEqual(network.nodes['10'].root, network.nodes['3'].root)


class LiarsTest(parameterized.TestCase):
  """A network after four rounds, where buckets hold something else.

  There are checkpoints of rounds 2 and 4, and what happened since round 2.
  """

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.network = begin()
    run_blocks(cls.network, 5 * ROUND + 2)

  def put(self, name, key, data):
    """Replaces an object, or deletes it, until the test is over."""
    bucket = self.network.nodes[name].objects.bucket
    before = bucket.get(key, 1 << 30)
    self.addCleanup(bucket.put, key, before, replace=True)
    if data is None:
      bucket.delete([key])
    else:
      bucket.put(key, data, replace=True)

  def without_checkpoint(self):
    """Rounds 2 and 3 must be replayed."""
    for name in VALIDATORS:
      key = self.network.nodes[name].objects.key('checkpoints', 4)
      self.put(name, key, None)

  def forge(self, name, r):
    """A manifest of a validator that was never voted for."""
    node = self.network.nodes[name]
    key = node.objects.key('history', r)
    true = node.objects.bucket.get(key, manifest_lib.MAX_BYTES)
    manifest = manifest_lib.decode(true, node.chain.verify)
    manifest = manifest._replace(
      entries=manifest.entries[1:], hotkey=node.chain.hotkey
    )
    self.put(name, key, manifest_lib.encode(manifest, node.chain.sign))

  def index(self, name):
    node = self.network.nodes[name]
    return published_checkpoint.read_index(
      node.objects, node.objects.bucket, 4, node.chain.hotkey, node.chain.verify
    )

  def test_own_place_is_gone_on_from(self):
    self.without_checkpoint()
    place = self.network.nodes['0'].place
    with mock.patch.object(published_checkpoint, 'load') as load:
      assert_at(self, attempt(self.network, place), self.network)
    load.assert_not_called()

  @parameterized.parameters('root', 'fingerprint', 'files', 'signer', 'bytes')
  def test_a_lying_checkpoint_is_passed_over(self, what):
    liar = self.network.nodes['3']
    sign, index = liar.chain.sign, self.index('3')
    match what:
      case 'root':
        index = index._replace(root=bytes(32).hex())
      case 'fingerprint':
        index = index._replace(fingerprint=bytes(16).hex())
      case 'files':
        name = next(iter(index.files))
        index = index._replace(files=index.files | {'../' + name: []})
      case 'signer':
        sign = self.network.nodes['4'].chain.sign
    body = json.dumps(index._asdict()).encode()
    data = b'{' + bytes(100) if what == 'bytes' else body + sign(body)
    self.put('3', liar.objects.key('checkpoints', 4), data)
    loaded, load = [], published_checkpoint.load

    def watched(objects, index, *rest):
      loaded.append(index)
      return load(objects, index, *rest)

    with mock.patch.object(published_checkpoint, 'load', watched):
      assert_at(self, attempt(self.network), self.network)
    self.assertEqual(loaded[-1], self.index('4'))

  def test_corrupt_chunks_come_from_a_mirror(self):
    infos = self.network.nodes['3'].objects.bucket.list('')
    chunks = [info.key for info in infos if '/chunks/' in info.key]
    self.assertNotEmpty(chunks)
    for key in chunks:
      self.put('3', key, b'no')
    assert_at(self, attempt(self.network), self.network)

  def test_a_liar_cannot_fill_the_disk(self):
    liar = self.network.nodes['3']
    chunk = bytes(1 << 20)
    digest = run_storage_lib.digest(chunk)
    liar.objects.put_once(liar.objects.chunk_key(digest), chunk)
    index = self.index('3')._replace(files={'a': [digest.hex()] * 1000})
    with self.assertRaisesRegex(apply.OutOfSyncError, 'too large'):
      published_checkpoint.load(
        liar.objects,
        index,
        [liar.objects.bucket],
        self.network.host.shared_model,
      )

  def test_a_lying_history_is_not_applied(self):
    self.without_checkpoint()
    self.forge('3', 2)
    steps, step = [], apply.outer_step

    def watched(*args):
      steps.append(args)
      return step(*args)

    with mock.patch.object(apply, 'outer_step', watched):
      assert_at(self, attempt(self.network), self.network)
    self.assertLen(steps, 2)  # of rounds 2 and 3, once each

  def test_a_history_that_everybody_forges_leads_nowhere(self):
    self.without_checkpoint()
    for name in VALIDATORS:
      self.forge(name, 2)
    with self.assertRaisesRegex(apply.OutOfSyncError, 'leads to the root'):
      attempt(self.network)

  def test_the_last_round_is_what_the_chain_says(self):
    """Nobody has a history of it when all validators died after the vote."""
    self.without_checkpoint()
    for name in VALIDATORS:
      key = self.network.nodes[name].objects.key('history', 3)
      self.put(name, key, None)
    assert_at(self, attempt(self.network), self.network)

  def test_a_payload_that_its_owner_lost_comes_from_a_mirror(self):
    self.without_checkpoint()
    for name in MINERS:
      own = self.network.nodes[name].objects
      for info in own.bucket.list(own.key('payloads', 3)):
        self.put(name, info.key, None)
    assert_at(self, attempt(self.network), self.network)
    for name in VALIDATORS:
      own = self.network.nodes[name].objects
      for info in own.bucket.list(own.key('payloads', 3)):
        self.put(name, info.key, None)
    with self.assertRaisesRegex(
      store_lib.StoreUnavailableError, 'payload of uid 0'
    ):
      attempt(self.network)


if __name__ == '__main__':
  absltest.main()
