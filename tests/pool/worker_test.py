import os
import pathlib

import jax
import numpy as np
from absl.testing import absltest

from covenant import config as config_lib
from covenant.pool import deltas as deltas_lib
from covenant.pool import pool as pool_lib
from covenant.pool import worker as worker_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import payload
from tests import helpers

TINY = f'{helpers.CONFIGS}/tiny.py'


class KeyTest(absltest.TestCase):
  def test_a_key_is_made_once_and_for_its_owner(self):
    path = self.create_tempdir().full_path + '/new/worker.key'
    address = worker_lib.read_key(path).address
    self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
    self.assertEqual(worker_lib.read_key(path).address, address)
    os.chmod(path, 0o644)
    with self.assertRaisesRegex(config_lib.ConfigError, 'chmod 600'):
      worker_lib.read_key(path)
    secret = 'not hex, and not to be shown'
    pathlib.Path(path).write_text(secret)
    os.chmod(path, 0o600)
    with self.assertRaisesRegex(config_lib.ConfigError, 'as hex') as raised:
      worker_lib.read_key(path)
    self.assertNotIn(secret, str(raised.exception))


class LeaseTrainerTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.config = config_lib.load(TINY)
    self.shared_model = shared_state_lib.SharedModel(self.config)
    self.trainer = worker_lib.LeaseTrainer(self.config, self.shared_model)

  def test_a_lease_is_a_function_of_parameters_and_job(self):
    params, _ = self.trainer.warm_up()
    tokens_2xL1 = np.ones((2, self.config.data.context + 1), np.int32)
    job = pool_lib.Job(1, 2, b'b' * 16, 3, 2, tokens_2xL1)
    first, loss = self.trainer.train(params, job)
    second, again = self.trainer.train(params, job)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    self.assertEqual(loss, again)
    data = self.trainer.encode(job, first, lambda _: b's' * 64)
    like = self.shared_model.abstract_params
    found = payload.decode(
      data,
      job.header(self.shared_model.run),
      like,
      deltas_lib.spec(self.config, like),
      lambda _, by: by == b's' * 64,
    )
    jax.tree.map(np.testing.assert_array_equal, found.message, first)

  def test_parameters_are_parsed_in_order(self):
    leaves, treedef = jax.tree.flatten(self.shared_model.abstract_params)
    draw = np.random.default_rng(0)
    params = [draw.standard_normal(x.shape).astype('<f4') for x in leaves]
    data = b''.join(x.tobytes() for x in params)
    jax.tree.map(
      np.testing.assert_array_equal,
      self.trainer.parameters(data),
      treedef.unflatten(params),
    )
    with self.assertRaisesRegex(ValueError, 'expected .* bytes, got'):
      self.trainer.parameters(data[:-4])

  def test_an_algorithm_without_local_steps_is_refused(self):
    edits = ['optim.method=ddp', 'optim.inner_steps=1']
    config = config_lib.load(TINY, edits)
    with self.assertRaisesRegex(config_lib.ConfigError, '^optim.method: '):
      worker_lib.LeaseTrainer(config, shared_state_lib.SharedModel(config))


if __name__ == '__main__':
  absltest.main()
