import jax
import numpy as np
from absl.testing import absltest

from covenant import config as config_lib
from covenant.data import dataset
from covenant.emulate import host as host_lib
from covenant.node import replica as replica_lib
from covenant.wire import payload


class ReplicaTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    config = config_lib.load('configs/tiny.py')
    cls.host = host_lib.Host(config, dataset.load(config))
    cls.state = cls.host.init()
    cls.payloads = {
      uid: cls.host.miner.contribute(cls.state.shared.params, private, uid, 0)[
        0
      ].payload
      for uid, private in cls.state.miners.items()
    }

  def advance(self, payloads, round_index=0):
    shared, advance = self.host.replica.advance(
      self.state.shared, payloads, round_index
    )
    return replica_lib.fingerprint(shared.params), advance

  def test_the_order_of_arrival_does_not_matter(self):
    backwards = dict(reversed(self.payloads.items()))
    self.assertEqual(self.advance(self.payloads)[0], self.advance(backwards)[0])

  def test_one_bad_payload_disturbs_no_other(self):
    good = {u: p for u, p in self.payloads.items() if u != 1}
    want, _ = self.advance(good)
    for bad in (b'', self.payloads[0], b'\xff' * len(self.payloads[1])):
      got, advance = self.advance({**good, 1: bad})
      self.assertEqual(got, want)
      self.assertEqual(list(advance.refused), [1])

  def test_no_valid_payload_is_a_no_op(self):
    before = replica_lib.fingerprint(self.state.shared.params)
    for payloads in ({}, {0: b'x', 1: b'y'}):
      got, advance = self.advance(payloads)
      self.assertEqual(got, before)
      self.assertEqual(advance.delta_norm, 0.0)

  def test_payloads_of_another_round_count_for_nothing(self):
    before = replica_lib.fingerprint(self.state.shared.params)
    got, advance = self.advance(self.payloads, round_index=1)
    self.assertEqual(got, before)
    reasons = {r.reason for r in advance.refused.values()}
    self.assertEqual(reasons, {payload.Reason.ROUND})

  def test_fingerprints_differ_in_one_bit(self):
    params = jax.tree.map(np.array, self.state.shared.params)
    before = replica_lib.fingerprint(params)
    leaf = jax.tree.leaves(params)[0].view(np.uint32)
    leaf[0, 0] ^= 1
    self.assertNotEqual(replica_lib.fingerprint(params), before)


if __name__ == '__main__':
  absltest.main()
