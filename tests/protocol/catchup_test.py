"""A node that joins, or fell behind, gets every bit that the others have."""

import dataclasses
import functools
import json
import tempfile
from unittest import mock

import jax
import numpy as np
import pytest
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
    scenario.get_config(helpers.tiny('optim.outer.momentum=0.5')),
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


def read(bucket, key):
  """Returns an object; None if there is none."""
  try:
    return bucket.get(key, 1 << 20)
  except store_lib.MissingObjectError:
    return None


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
  @pytest.mark.slow
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

  @pytest.mark.slow
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

  @pytest.mark.slow
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

  @pytest.mark.slow
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

  @pytest.mark.slow
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
    # It replayed rounds 3 and 4 from its own state.
    self.assertEqual(own.rounds('history', own.bucket), [2, 3, 4, 5])
    gone = network.nodes['4'].objects.bucket
    gone.delete([info.key for info in gone.list('')])
    network.join('10')
    network.run(7)
    self.assertEqual(network.nodes['10'].root, network.nodes['3'].root)


class MinorityTest(parameterized.TestCase):
  @parameterized.parameters('parameters', 'momentum', 'root', 'fingerprint')
  @pytest.mark.slow
  def test_it_keeps_nobody_out(self, what):
    """39 % of the stake publish wrong checkpoints of every round, first.

    A joiner and a miner that was away stand where all are after at most two
    downloads, and stay there.
    """
    away = faults.Fault(
      faults.Kind.UNREACHABLE, range(2 * ROUND, 6 * ROUND), frozenset('0')
    )
    network = begin(faults=faults.Faults([away]))
    network.set_stake('3', 61.0)
    network.set_stake('4', 39.0)
    loads, load = [], published_checkpoint.load
    lies = {}

    def watched(storage, *args):
      loads.append(storage)
      return load(storage, *args)

    self.enterContext(mock.patch.object(published_checkpoint, 'load', watched))
    while network.block < 8 * ROUND:
      if network.block == 5 * ROUND + 3:
        network.join('10')
      self.lie(network, what, lies)
      network.step()
      if network.block >= 7 * ROUND:
        for name, node in network.nodes.items():
          self.assertGreaterEqual(node.state.round, 6, name)
    self.assertEqual(
      len({(n.root, n.fingerprint()) for n in network.nodes.values()}), 1
    )
    for name in network.nodes:
      storage = network.nodes[name].objects
      self.assertLessEqual(sum(x is storage for x in loads), 2, name)
    self.assertLessEqual(len(network.errors('OutOfSync')), 2)
    counted = network_lib.audit(network)
    self.assertEqual(counted[7 - 1], [0, 1, 2, 5])

  def lie(self, network, what, lies):
    """Puts checkpoints of the liar's up to its round, as if they were true.

    Those of `lies` that are still there are not put again.
    """
    liar = network.nodes['4']
    bucket = liar.objects.bucket
    state, model = liar.shared, network.host.shared_model
    wrong = state._replace(params=jax.tree.map(lambda x: x + 1, state.params))
    if what == 'momentum':
      wrong = state._replace(outer=jax.tree.map(lambda x: x + 1, state.outer))
    for r in range(max(liar.state.round - 2, 0), liar.state.round + 2):
      key = liar.objects.key('checkpoints', r)
      if lies.get(r) == (liar.root, read(bucket, key)):
        continue
      root = liar.root
      if r < liar.state.round:
        history = liar.objects.key('history', r)
        data = read(network.nodes['3'].objects.bucket, history)
        if data is None:
          continue
        root = manifest_lib.decode(data, liar.chain.verify).root
      if what == 'root':
        root = bytes(32)
      place = apply.Position(r, root, state if what == 'root' else wrong)
      bucket.delete([key])
      published_checkpoint.publish(liar.objects, place, model, liar.chain.sign)
      if what == 'fingerprint':
        body = bucket.get(key, 1 << 20)[:-64]
        index = published_checkpoint.Index(**json.loads(body))
        index = index._replace(fingerprint=model.fingerprint(state))
        body = published_checkpoint.encode(index)
        data = body + liar.chain.sign(body)
        bucket.put(key, data, replace=True)
      lies[r] = liar.root, read(bucket, key)


class LiarsTest(parameterized.TestCase):
  """A network after five rounds, where buckets hold something else.

  There are checkpoints of rounds 2 and 4, and what happened since round 2.
  """

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.network = begin()
    run_blocks(cls.network, 6 * ROUND + 2)

  def put(self, name, key, data):
    """Replaces an object, or deletes it, until the test is over."""
    bucket = self.network.nodes[name].objects.bucket
    try:
      before = bucket.get(key, 1 << 30)
      self.addCleanup(bucket.put, key, before, replace=True)
    except store_lib.MissingObjectError:
      self.addCleanup(bucket.delete, [key])
    if data is None:
      bucket.delete([key])
    else:
      bucket.put(key, data, replace=True)

  def without_checkpoint(self):
    """Rounds 2 to 4 must be replayed."""
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
    data = node.objects.bucket.get(node.objects.key('checkpoints', 4), 1 << 20)
    layout = published_checkpoint.layout(self.network.host.shared_model)
    return published_checkpoint.decode(
      data, layout, node.chain.hotkey, node.chain.verify
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
    body = published_checkpoint.encode(index)
    data = b'{' + bytes(100) if what == 'bytes' else body + sign(body)
    self.put('3', liar.objects.key('checkpoints', 4), data)
    loaded, load = [], published_checkpoint.load

    def watched(objects, index, *rest):
      loaded.append(index)
      return load(objects, index, *rest)

    with mock.patch.object(published_checkpoint, 'load', watched):
      assert_at(self, attempt(self.network), self.network)
    self.assertEqual(loaded[-1], self.index('4'))

  @parameterized.parameters(
    b'[' * 100_000,
    b'{"round":' * 5000,
    b'{"a\\u0000b":[]}',
    b'\xff\xfe{}',
    b'null',
    b'[]',
    b'{}',
    b'1' * 5000,
    b'',
  )
  def test_an_index_of_any_bytes_is_passed_over(self, body):
    """With its signature; longer than an index of this model, or not."""
    liar = self.network.nodes['3']
    key = liar.objects.key('checkpoints', 4)
    self.put('3', key, body + liar.chain.sign(body))
    self.assert_joined(loads=1)

  @parameterized.parameters(
    lambda files: {'a\0b': []},
    lambda files: {'\ud800': []},
    lambda files: {'/'.join('a' * 1200): []},
    lambda files: {'a' * 300: []},
    lambda files: {'a': [], 'a/b': []},
    lambda files: {'..': [], '.': []},
    lambda files: files | {'more': []},
    lambda files: dict(list(files.items())[1:]),
    lambda files: files | {'params.embedding': []},
    lambda files: files | {'params.embedding': ['00' * 32] * 9},
    lambda files: files | {'params.embedding': ['00' * 31]},
    lambda files: files | {'params.embedding': ['0G' * 32]},
    lambda files: files | {'params.embedding': [7]},
    lambda files: files | {'params.embedding': '00' * 32},
    lambda files: files | {'params.embedding': ['٣' * 64]},
    lambda files: {name: [[x] for x in files[name]] for name in files},
    lambda files: list(files),
    lambda files: None,
    lambda files: 1e999,
  )
  def test_an_index_of_other_files_is_passed_over(self, change):
    index = self.index('3')
    index = index._replace(files=change(index.files))
    try:
      fingerprint = published_checkpoint.fingerprint_of(index.files)
      index = index._replace(fingerprint=fingerprint)
    except (TypeError, ValueError, AttributeError):
      pass
    self.publish_index('3', index)
    self.assert_joined(loads=1)

  def publish_index(self, name, index):
    liar = self.network.nodes[name]
    body = published_checkpoint.encode(index)
    key = liar.objects.key('checkpoints', index.round)
    self.put(name, key, body + liar.chain.sign(body))

  def assert_joined(self, loads, refused=None):
    """A joiner stands where all are, after so many downloads."""
    node = self.network.nodes['0']
    catch_up = catchup.CatchUp(
      node.chain,
      self.network.host.objects('stranger'),
      self.network.host.shared_model,
      self.network.plan,
      self.network.block,
      self.network.config.rounds,
      refused,
    )
    load = published_checkpoint.load
    with mock.patch.object(
      published_checkpoint, 'load', side_effect=load
    ) as watched:
      assert_at(self, catch_up.run(None), self.network)
    self.assertEqual(watched.call_count, loads)

  def forged(self, name, r, **changes):
    """An index of pieces of the liar's, with a true root."""
    liar, piece = self.network.nodes[name], bytes(range(100))
    digest = run_storage_lib.digest(piece)
    liar.objects.put_once(liar.objects.chunk_key(digest), piece)
    index = self.index(name)
    files = {name: [digest.hex()] for name in index.files}
    fingerprint = published_checkpoint.fingerprint_of(files)
    index = index._replace(round=r, files=files, fingerprint=fingerprint)
    return index._replace(**changes)

  def test_other_parameters_under_the_right_root_are_not_fetched(self):
    """Lies about a round that a manifest names, and about the newest."""
    node, refused = self.network.nodes['0'], set()
    self.publish_index('3', self.forged('3', 4))
    self.publish_index('3', self.forged('3', 5, root=node.root.hex()))
    self.assert_joined(1, refused)
    hotkey = self.network.nodes['3'].chain.hotkey
    # That of the newest round may yet turn out to be right.
    self.assertEqual(refused, {catchup.Refused(hotkey, 4)})
    decode = published_checkpoint.decode
    with mock.patch.object(
      published_checkpoint, 'decode', wraps=decode
    ) as decode:
      self.assert_joined(1, refused)
    self.assertLen(decode.mock_calls, 2)  # of round 5, and of uid 4's round 4

  def test_what_nobody_can_have_is_tried_again(self):
    """A StoreError is no lie, and keeps no other base from being tried."""
    refused = set()
    full = OSError(28, 'No space left on device')
    whole = tempfile.TemporaryDirectory
    with mock.patch.object(tempfile, 'TemporaryDirectory') as folder:
      folder.side_effect = [full, whole()]
      self.assert_joined(2, refused)  # of rounds 4 and 2
    self.assertEmpty(refused)
    with mock.patch.object(tempfile, 'TemporaryDirectory', side_effect=full):
      with self.assertRaisesRegex(store_lib.StoreUnavailableError, 'No space'):
        self.assert_joined(2, refused)
    self.assertEmpty(refused)

  def test_a_lying_source_of_pieces_costs_nothing(self):
    """It has the right index, and other bytes, or none."""
    liar = self.network.nodes['3'].objects
    for digests in self.index('3').files.values():
      for digest in digests:
        self.put('3', liar.chunk_key(bytes.fromhex(digest)), b'lie')
    self.assert_joined(loads=1)

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
    with self.assertRaisesRegex(apply.OutOfSyncError, 'of another model'):
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
    self.assertLen(steps, 3)  # of rounds 2 to 4, once each

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
      key = self.network.nodes[name].objects.key('history', 4)
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
