import hashlib

import jax
import numpy as np
import pytest
from absl.testing import absltest

from covenant import config as config_lib
from covenant.models import sharding
from covenant.optim import algorithm as algorithm_lib
from covenant.optim import sparseloco
from covenant.train import pieces as pieces_lib
from covenant.train import shared_state as shared_state_lib


class ReplicaTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.shared_model = shared_state_lib.SharedModel(
      config_lib.load('configs/tiny.py')
    )
    cls.shared = cls.shared_model.init()
    cls.messages = {uid: cls.message(uid) for uid in (0, 1, 2)}

  @classmethod
  def message(cls, seed):
    rng = np.random.default_rng(seed)
    delta = jax.tree.map(
      lambda x: rng.normal(0, 1e-3, x.shape).astype(np.float32),
      cls.shared_model.abstract_params,
    )
    compression = cls.shared_model.method.compression
    return sparseloco.compress(delta, None, compression, 0.0)[0]

  def advance(self, messages):
    shared, delta_norm = self.shared_model.apply_round(self.shared, messages)
    return self.shared_model.fingerprint(shared), delta_norm

  def test_the_order_of_arrival_does_not_matter(self):
    want = self.advance(self.messages)
    for first in self.messages:
      others = {u: m for u, m in self.messages.items() if u != first}
      got = self.advance({first: self.messages[first], **others})
      self.assertEqual(got, want)
    self.assertGreater(want[1], 0)

  def test_everybody_counts(self):
    prints = {self.shared_model.fingerprint(self.shared)}
    for uids in ((0,), (1,), (0, 1), (0, 1, 2)):
      prints.add(self.advance({u: self.messages[u] for u in uids})[0])
    self.assertLen(prints, 5)

  def test_no_message_is_a_no_op(self):
    before = self.shared_model.fingerprint(self.shared)
    self.assertEqual(self.advance({}), (before, 0.0))

  def test_the_start_is_a_function_of_the_seed(self):
    again = shared_state_lib.SharedModel(config_lib.load('configs/tiny.py'))
    other = shared_state_lib.SharedModel(
      config_lib.load('configs/tiny.py', ['seed=1'])
    )
    one, same, another = (
      r.fingerprint(r.init()) for r in (self.shared_model, again, other)
    )
    self.assertEqual(one, same)
    self.assertNotEqual(one, another)
    self.assertEqual(self.shared_model.run, again.run)
    self.assertNotEqual(self.shared_model.run, other.run)

  def test_fingerprints_differ_in_one_bit(self):
    params = jax.tree.map(np.array, self.shared.params)
    before = shared_state_lib.fingerprint(params)
    leaf = jax.tree.leaves(params)[0].view(np.uint32)
    leaf[0, 0] ^= 1
    self.assertNotEqual(shared_state_lib.fingerprint(params), before)

  def test_a_fingerprint_is_of_what_was_asked_for(self):
    """Only the last fingerprint is cached."""
    other, _ = self.shared_model.apply_round(self.shared, self.messages)
    for shared in (self.shared, other, other, self.shared):
      anew = shared_state_lib.SharedModel(config_lib.load('configs/tiny.py'))
      want = anew.fingerprint(shared)
      self.assertEqual(self.shared_model.fingerprint(shared), want)

  def test_a_fingerprint_covers_the_outer_optimizer(self):
    config = config_lib.load('configs/tiny.py', ['optim.outer.momentum=0.5'])
    shared_model = shared_state_lib.SharedModel(config)
    shared = shared_model.init()
    before = shared_model.fingerprint(shared)
    found = {before}
    for name, leaf in shared_state_lib.named_leaves(shared).items():
      flipped = np.array(leaf)
      flipped.reshape(-1).view(np.uint32)[-1] ^= 1

      def swap(path, x, name=name, flipped=flipped):
        here = jax.tree_util.keystr(path, simple=True, separator='.')
        return flipped if here == name else x

      other = jax.tree_util.tree_map_with_path(swap, shared)
      found.add(shared_model.fingerprint(other))
    self.assertLen(found, 1 + len(jax.tree.leaves(shared)))
    self.assertEqual(shared_model.fingerprint(shared), before)

  def test_a_fingerprint_is_a_hash_of_the_digests_of_pieces(self):
    """By the rule of docs/protocol.md, written down a second time."""
    want = hashlib.blake2b(digest_size=16, person=b'covenant.state')
    for name, leaf in shared_state_lib.named_leaves(self.shared).items():
      data = np.asarray(leaf, '<f4').tobytes()
      cut = [data[i : i + 2**25] for i in range(0, len(data), 2**25)]
      digests = [hashlib.blake2b(x, digest_size=32).digest() for x in cut]
      want.update(name.encode() + b'\0' + len(cut).to_bytes(4, 'little'))
      want.update(b''.join(digests))
    found = self.shared_model.fingerprint(self.shared)
    self.assertEqual(found, want.hexdigest())


class MeshTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    sizes = ['model.kv_heads=2', 'optim.outer.momentum=0.5']
    self.config = config_lib.load('configs/tiny.py', sizes)
    devices = config_lib.Devices(fsdp=2, tensor=2)
    self.mesh = sharding.mesh(devices, jax.devices())

  @pytest.mark.slow
  def test_the_state_is_that_of_one_device(self):
    plain = shared_state_lib.SharedModel(self.config)
    sharded = shared_state_lib.SharedModel(self.config, self.mesh)
    want, got = plain.init(), sharded.init()
    specs = jax.tree.map(lambda x: x.sharding.spec, got)
    self.assertEqual(specs.params, sharded.specs)
    self.assertEqual(specs.outer.trace, sharded.specs)
    self.assertEqual(sharded.fingerprint(got), plain.fingerprint(want))
    compression = plain.method.compression
    messages = {}
    for uid in range(3):
      messages[uid], _ = sparseloco.compress(
        jax.tree.map(lambda x, u=uid: x * (u + 1.0), want.params),
        None,
        compression,
        None,
      )
    for some in (messages, {2: messages[2]}):
      some = jax.device_get(some)
      want, _ = plain.apply_round(want, some)
      got, _ = sharded.apply_round(got, some)
      self.assertEqual(sharded.fingerprint(got), plain.fingerprint(want))
    self.assertEqual(jax.tree.map(lambda x: x.sharding.spec, got), specs)

  @pytest.mark.slow
  def test_what_waits_in_host_memory_is_the_same(self):
    message, _ = sparseloco.compress(
      jax.tree.map(
        np.asarray, shared_state_lib.SharedModel(self.config).init().params
      ),
      None,
      algorithm_lib.make(self.config).compression,
      None,
    )
    messages = {1: jax.device_get(message)}
    found = set()
    for mesh, offload in ((None, False), (None, True), (self.mesh, True)):
      shared_model = shared_state_lib.SharedModel(self.config, mesh, offload)
      shared = shared_model.init()
      after, _ = shared_model.apply_round(shared, messages)
      want = 'pinned_host' if offload else 'device'
      kinds = {x.sharding.memory_kind for x in jax.tree.leaves(after)}
      self.assertEqual(kinds, {want})
      found.add(
        (shared_model.fingerprint(shared), shared_model.fingerprint(after))
      )
    self.assertLen(found, 1)

  def test_says_what_cannot_be_on_a_mesh(self):
    for variant, field in (('', 'model.kv_heads'), ('ddp', 'all tensors')):
      config = config_lib.load(f'configs/tiny.py:{variant}')
      if variant:
        config = config_lib.load(
          f'configs/tiny.py:{variant}', ['model.kv_heads=2']
        )
      with self.assertRaisesRegex(config_lib.ConfigError, field):
        shared_state_lib.SharedModel(config, self.mesh)


class StreamTest(absltest.TestCase):
  def test_a_large_leaf_has_one_fingerprint_wherever_it_lies(self):
    x = np.arange(7 * 4 * 8, dtype=np.float32).reshape(7, 4, 8)
    mesh = sharding.mesh(config_lib.Devices(fsdp=4), jax.devices())
    where = jax.NamedSharding(mesh, jax.P(None, 'fsdp'))
    want = shared_state_lib.fingerprint({'x': x}, 100)
    for lying in (x, jax.numpy.array(x), jax.device_put(x, where)):
      self.assertEqual(shared_state_lib.fingerprint({'x': lying}, 100), want)
    for at in (0, 24, 25, x.size - 1):
      other = x.copy()
      other.reshape(-1).view(np.uint32)[at] ^= 1
      self.assertNotEqual(shared_state_lib.fingerprint({'x': other}, 100), want)

  def test_pieces_are_cut_at_multiples_of_a_size(self):
    x = np.arange(7 * 4 * 8, dtype=np.float32).reshape(7, 4, 8)
    mesh = sharding.mesh(config_lib.Devices(fsdp=4), jax.devices())
    where = jax.NamedSharding(mesh, jax.P(None, 'fsdp'))
    for lying in (x, jax.device_put(x, where), x[:, ::2, :1].copy()):
      got = [p.tobytes() for p in pieces_lib.pieces(lying, 100)]
      data = np.asarray(lying).tobytes()
      want = [data[i : i + 100] for i in range(0, len(data), 100)]
      self.assertEqual(got, want)


if __name__ == '__main__':
  absltest.main()
