"""The state of a run before a node takes part in it."""

import pathlib
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest

from covenant.models import generate
from covenant.node import connect
from covenant.node import export
from covenant.node import sample
from covenant.node import sync
from covenant.protocol import run_storage as run_storage_lib
from tests.node import network as network_lib


class SyncTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.network = network_lib.Network(self)
    self.workdir = self.create_tempdir().full_path
    # A stranger: it has no uid, and no bucket that others know.
    chain, objects = self.network.chain, self.network.objects(0)
    objects = run_storage_lib.RunStorage(
      network_lib.shared_model().run,
      objects.bucket,
      b'',
      objects.bucket_at,
    )
    self.enterContext(
      mock.patch.multiple(
        connect,
        chain=lambda config, reads_only: chain,
        objects=lambda config, run, writes: objects,
      )
    )

  def play(self):
    """Plays round 0, in which one payload counts."""
    miner = self.network.miner(1)
    schedule = miner.schedule
    self.network.block = schedule.put_opens(0)
    digest = self.network.publish(1, 0, self.network.payload(miner))
    self.network.block = schedule.start(1)
    data = self.network.manifest(3, [(1, digest)])
    for uid in network_lib.STAKES:
      self.network.propose(uid, data)
    self.network.block = schedule.start(2) + 4

  def test_follows_a_run_and_leaves_its_state_to_a_node(self):
    config, genesis = network_lib.CONFIG, network_lib.start()
    syncing = sync.Sync(config, self.workdir)
    joining = pathlib.Path(self.workdir, sync.JOINING)
    joining.mkdir()  # an attempt by a checkpoint broke off
    (joining / 'w.tensor').touch()
    self.assertFalse(syncing.step())  # nothing is decided yet
    self.assertTrue(joining.exists())
    self.play()
    self.assertTrue(syncing.step())
    self.assertFalse(joining.exists())
    self.assertFalse(syncing.step())  # it is there
    place = syncing.place
    self.assertEqual(place.round, 1)
    self.assertNotEqual(place.root, genesis.root)
    syncing.run(lambda: True)  # ends, with its state on the disk
    model = network_lib.shared_model()
    found = sync.start(self.workdir, config, genesis)
    self.assertEqual((found.round, found.root), (1, place.root))
    self.assertEqual(
      model.fingerprint(found.shared), model.fingerprint(place.shared)
    )
    # Exports and texts are of it, too.
    completed, params = export.newest(self.workdir)
    self.assertEqual(completed, 1)
    jax.tree.map(np.testing.assert_array_equal, params, place.shared.params)
    source = sample.of_workdir(config, self.workdir)
    said = sample.continued(source, 'To be', 3, generate.Sampling())
    self.assertNotEmpty(''.join(said))
    again = sync.Sync(config, self.workdir)
    self.assertEqual(again.place.root, place.root)
    again.run(lambda: True)

  def test_without_it_a_node_begins_at_the_genesis(self):
    config, genesis = network_lib.CONFIG, network_lib.start()
    self.assertIs(sync.start(self.workdir, config, genesis), genesis)


if __name__ == '__main__':
  absltest.main()
