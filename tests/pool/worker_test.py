import os
import pathlib
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.pool import deltas as deltas_lib
from covenant.pool import pool as pool_lib
from covenant.pool import worker as worker_lib
from covenant.protocol import amendments
from covenant.train import shared_state as shared_state_lib
from covenant.wire import amendment as amendment_lib
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

  @pytest.mark.slow
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

  @pytest.mark.slow
  def test_a_lease_of_a_compiled_batch_compiles_nothing(self):
    # The rate is that of no other test: programs are shared in a process.
    config = config_lib.load(TINY, ['optim.inner.learning_rate=0.00375'])
    trainer = worker_lib.LeaseTrainer(config, self.shared_model)
    params, _ = trainer.warm_up()
    trainer.compile(2)
    for batch, names in (2, []), (3, ['jit(step)']):
      shape = 2 * batch, config.data.context + 1
      job = pool_lib.Job(1, 2, b'b' * 16, 3, 2, np.ones(shape, np.int32))
      with helpers.compilations() as found:
        trainer.train(params, job)
      self.assertEqual(found, names)

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


class _Pool:
  """Stands for the client of a pool that hands out a lease per turn."""

  def __init__(self, params, tokens_NxL1):
    self.data = b''.join(
      np.asarray(x, '<f4').tobytes() for x in jax.tree.leaves(params)
    )
    self.base = pool_lib.parameters_id(self.data, b's' * 16)
    self.tokens_NxL1 = tokens_NxL1
    self.amendments, self.round, self.sent = [], 0, []

  def ask(self, method, path, data=b'', longest=0):
    del method, longest
    if path.startswith('/lease'):
      text = {
        'round': self.round, 'number': 1, 'base': self.base.hex(), 'step': 3,
        'steps': 2, 'amendments': self.amendments,
      }  # fmt: skip
      return text, self.tokens_NxL1.astype('<i4').tobytes()
    if path.startswith('/parameters'):
      return {'salt': (b's' * 16).hex()}, self.data
    if path.startswith('/delta'):
      self.sent.append(data)
    return {'verdict': 'VALID'}, b''


class WaitingTest(parameterized.TestCase):
  @parameterized.parameters(
    (6, ['turn', 2, 'turn', 4, 'turn', 'sleep', 'turn', 'sleep']),
    (64, ['turn', 2, 'turn', 4, 'turn', 8, 'turn', 'sleep']),
  )
  def test_batches_are_compiled_before_the_first_lease(self, most, want):
    """The pool is not there at first, then has no lease, then has one."""
    folder, said = self.create_tempdir().full_path, []
    sets = 'pool.url=http://127.0.0.1:1', f'pool.key={folder}/key'
    config = config_lib.load(TINY, [*sets, f'pool.batch={most}'])
    worker = worker_lib.Worker(config, folder)
    self.addCleanup(worker._workdir.__exit__)
    worker._lease_trainer = mock.Mock(compile=said.append)

    def turn():
      said.append('turn')
      match said.count('turn'):
        case 1:
          raise worker_lib.PoolUnreachableError('it is not there')
        case 4:
          worker._round = 0
      return 1.0

    sleep = mock.patch.object(
      worker_lib, '_sleep', lambda *_: said.append('sleep')
    )
    tell = mock.patch.object(worker, '_tell')
    with mock.patch.object(worker, '_turn', turn), sleep, tell:
      worker.run(lambda: said.count('turn') == 4)
    self.assertEqual(said, want)


class AmendedTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.create_tempdir().full_path
    self.config = config_lib.load(
      TINY, ['pool.url=http://127.0.0.1:1', f'pool.key={folder}/key']
    )
    self.worker = worker_lib.Worker(self.config, folder)
    self.addCleanup(self.worker._workdir.__exit__)
    self.model = shared_state_lib.SharedModel(self.config)
    tokens_2xL1 = np.ones((2, self.config.data.context + 1), np.int32)
    params = self.model.init().params
    self.pool = self.worker._client = _Pool(params, tokens_2xL1)
    self.job = pool_lib.Job(0, 1, self.pool.base, 3, 2, tokens_2xL1)
    self.params = params

  def want(self, config, round_index):
    """Returns the message of an honest worker in a round under a config."""
    trainer = worker_lib.LeaseTrainer(config, self.model.amended(config))
    job = self.job._replace(round=round_index)
    message, _ = trainer.train(self.params, job)
    return trainer.encode(job, message, self.worker._key.sign)

  @pytest.mark.slow
  def test_a_lease_is_trained_by_the_rules_of_its_round(self):
    values = {'optim.inner.weight_decay': 0.9, 'rounds': 400}
    one = amendment_lib.make(self.model.run, 5, values)
    self.pool.amendments = amendment_lib.list_to_json([one])
    amended = amendments.config_at(self.config, [one], 5)
    for self.pool.round in (4, 5):
      self.worker._turn()
    before, after = self.pool.sent
    self.assertEqual(before, self.want(self.config, 4))
    self.assertEqual(after, self.want(amended, 5))
    self.assertNotEqual(after, self.want(self.config, 5))

  def test_amendments_that_are_none(self):
    other = amendment_lib.make(b'x' * 16, 5, {'rounds': 400})
    for raw in ('x', [1], [[]], amendment_lib.list_to_json([other])):
      self.pool.amendments = raw
      with self.assertRaisesRegex(worker_lib.PoolUnreachableError, '/lease'):
        self.worker._turn()

  def test_numbers_of_a_pool_that_are_none(self):
    def says(**text):
      self.worker._client.ask = lambda *_, **__: (text, b'')

    for wait in 'x', 10**400, None:
      says(wait=wait)
      with self.assertRaisesRegex(worker_lib.PoolUnreachableError, '/lease'):
        self.worker._turn()
    says(wait=float('nan'))
    self.assertEqual(self.worker._turn(), 0.0)
    for held in 'x', 1e999, []:
      says(held=held)
      self.worker._tell()
      self.assertNotIn('account', self.worker._workdir._status)


if __name__ == '__main__':
  absltest.main()
