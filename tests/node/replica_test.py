import jax
import numpy as np
from absl.testing import absltest

from covenant import config as config_lib
from covenant.node import replica as replica_lib
from covenant.optim import sparseloco


class ReplicaTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.replica = replica_lib.Replica(config_lib.load('configs/tiny.py'))
    cls.shared = cls.replica.init()
    cls.messages = {uid: cls.message(uid) for uid in (0, 1, 2)}

  @classmethod
  def message(cls, seed):
    rng = np.random.default_rng(seed)
    delta = jax.tree.map(
      lambda x: rng.normal(0, 1e-3, x.shape).astype(np.float32),
      cls.replica.like,
    )
    compression = cls.replica.method.compression
    return sparseloco.compress(delta, None, compression, 0.0)[0]

  def advance(self, messages):
    shared, delta_norm = self.replica.advance(self.shared, messages)
    return self.replica.fingerprint(shared), delta_norm

  def test_the_order_of_arrival_does_not_matter(self):
    want = self.advance(self.messages)
    for first in self.messages:
      others = {u: m for u, m in self.messages.items() if u != first}
      got = self.advance({first: self.messages[first], **others})
      self.assertEqual(got, want)
    self.assertGreater(want[1], 0)

  def test_everybody_counts(self):
    prints = {self.replica.fingerprint(self.shared)}
    for uids in ((0,), (1,), (0, 1), (0, 1, 2)):
      prints.add(self.advance({u: self.messages[u] for u in uids})[0])
    self.assertLen(prints, 5)

  def test_no_message_is_a_no_op(self):
    before = self.replica.fingerprint(self.shared)
    self.assertEqual(self.advance({}), (before, 0.0))

  def test_the_start_is_a_function_of_the_seed(self):
    again = replica_lib.Replica(config_lib.load('configs/tiny.py'))
    other = replica_lib.Replica(config_lib.load('configs/tiny.py', ['seed=1']))
    one, same, another = (
      r.fingerprint(r.init()) for r in (self.replica, again, other)
    )
    self.assertEqual(one, same)
    self.assertNotEqual(one, another)
    self.assertEqual(self.replica.run, again.run)
    self.assertNotEqual(self.replica.run, other.run)

  def test_fingerprints_differ_in_one_bit(self):
    params = jax.tree.map(np.array, self.shared.params)
    before = replica_lib.fingerprint(params)
    leaf = jax.tree.leaves(params)[0].view(np.uint32)
    leaf[0, 0] ^= 1
    self.assertNotEqual(replica_lib.fingerprint(params), before)

  def test_a_fingerprint_is_of_what_was_asked_for(self):
    """It remembers the last one only."""
    other, _ = self.replica.advance(self.shared, self.messages)
    for shared in (self.shared, other, other, self.shared):
      want = replica_lib.fingerprint(shared.params)
      self.assertEqual(self.replica.fingerprint(shared), want)


if __name__ == '__main__':
  absltest.main()
