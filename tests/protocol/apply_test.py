import jax
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.chain import keys
from covenant.chain import local_chain
from covenant.chain import storage as chain_storage
from covenant.optim import sparseloco
from covenant.protocol import apply
from covenant.protocol import run_storage as run_storage_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import manifest as manifest_lib
from covenant.wire import payload as payload_lib

KEYS = {uid: keys.Key.from_seed(bytes([uid]) * 32) for uid in (0, 3, 5)}


class OuterStepTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.shared_model = shared_state_lib.SharedModel(
      config_lib.load('configs/tiny.py')
    )
    cls.chain = local_chain.LocalChain.create(
      ':memory:', b'', chain_storage.ChainRules()
    )
    root = manifest_lib.genesis(cls.shared_model.run)
    cls.place = apply.Position(0, root, cls.shared_model.init())
    cls.payloads = {uid: cls.payload(uid) for uid in KEYS}

  @classmethod
  def tearDownClass(cls):
    cls.chain.close()
    super().tearDownClass()

  @classmethod
  def payload(cls, uid, key=None, **said):
    """Returns the payload of a random delta from the common position."""
    rng = np.random.default_rng(uid)
    delta = jax.tree.map(
      lambda x: rng.normal(0, 1e-3, x.shape).astype(np.float32),
      cls.shared_model.abstract_params,
    )
    compression = cls.shared_model.method.compression
    message, _ = sparseloco.compress(delta, None, compression, 0.0)
    header = payload_lib.Header(
      cls.shared_model.run, 0, uid, cls.place.root[:16], bytes(16), 12
    )._replace(**said)
    return payload_lib.encode(
      header, message, cls.shared_model.abstract_params, cls.shared_model.spec,
      (key or KEYS[uid]).sign,
    )  # fmt: skip

  def step(self, payloads, place=None):
    """Returns the result of a manifest that lists these payloads."""
    entries = [
      manifest_lib.Entry(uid, KEYS[uid].address, run_storage_lib.digest(data))
      for uid, data in sorted(payloads.items())
    ]
    had = {run_storage_lib.digest(data): data for data in payloads.values()}
    return apply.outer_step(
      self.shared_model, self.chain, place or self.place, entries, had
    )

  def fingerprint(self, applied):
    return shared_state_lib.fingerprint(applied.shared.params)

  def test_all_that_is_listed_counts(self):
    applied = self.step(self.payloads)
    self.assertEqual(list(applied.messages), [0, 3, 5])
    self.assertGreater(applied.delta_norm, 0)
    want, norm = self.shared_model.apply_round(
      self.place.shared, applied.messages
    )
    self.assertEqual(norm, applied.delta_norm)
    self.assertEqual(
      shared_state_lib.fingerprint(want.params), self.fingerprint(applied)
    )

  @parameterized.parameters(
    lambda t: b'',
    lambda t: t.payloads[0],
    lambda t: b'\xff' * len(t.payloads[3]),
    lambda t: t.payload(3, key=KEYS[0]),
    lambda t: t.payload(3, round=1),
    lambda t: t.payload(3, run=b'x' * 16),
    lambda t: t.payload(3, root=b'x' * 16),
  )
  def test_one_bad_payload_disturbs_no_other(self, bad):
    good = {u: p for u, p in self.payloads.items() if u != 3}
    want = self.step(good)
    got = self.step({**good, 3: bad(self)})
    self.assertEqual(list(got.messages), [0, 5])
    self.assertEqual(self.fingerprint(got), self.fingerprint(want))

  def test_no_valid_payload_is_a_no_op(self):
    before = shared_state_lib.fingerprint(self.place.shared.params)
    for payloads in ({}, {0: b'x', 3: b'y'}):
      applied = self.step(payloads)
      self.assertEqual(self.fingerprint(applied), before)
      self.assertEqual(applied.delta_norm, 0.0)
      self.assertEmpty(applied.messages)

  def test_payloads_of_another_round_or_history_count_for_nothing(self):
    for place in (
      self.place._replace(round=1),
      self.place._replace(root=b'x' * 32),
    ):
      self.assertEmpty(self.step(self.payloads, place).messages)

  def test_the_place_that_a_manifest_speaks_of(self):
    manifest = manifest_lib.Manifest(
      self.shared_model.run, 0, self.place.root, 'print', KEYS[0].address, ()
    )
    apply.check_matches(manifest, self.place.root, 'print')
    with self.assertRaisesRegex(
      apply.OutOfSyncError, 'round 0: the history root'
    ):
      apply.check_matches(manifest, b'x' * 32, 'print')
    with self.assertRaisesRegex(
      apply.OutOfSyncError, 'fingerprint here is other'
    ):
      apply.check_matches(manifest, self.place.root, 'other')


if __name__ == '__main__':
  absltest.main()
