"""A round of a pool: what is leased, delivered, inspected, audited, merged.

The workers are made of numbers: they train nothing. Those that train are in
tests/emulate/pool_test.py.
"""

import collections
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.optim import sparseloco
from covenant.pool import deltas as deltas_lib
from covenant.pool import pool as pool_lib
from covenant.wire import payload
from tests import helpers

RUN, ROOT_OF_RUN = b'r' * 16, bytes(32)
LIKE = {
  'a': jax.ShapeDtypeStruct((64, 64), jnp.float32),
  'b': jax.ShapeDtypeStruct((128,), jnp.float32),
}
VALID = pool_lib.LeaseVerdict.VALID


@functools.cache
def common():
  config = config_lib.load(
    f'{helpers.CONFIGS}/tiny.py', ['pool.subrounds=2', 'pool.steps=2']
  )
  merger = deltas_lib.Merger(config, LIKE)
  inspector = deltas_lib.Inspector(config, LIKE, merger)
  compression = deltas_lib.compression(config)
  compress = jax.jit(
    lambda delta: sparseloco.compress(delta, None, compression, None)[0]
  )
  return config, merger, inspector, deltas_lib.spec(config, LIKE), compress


def honest(job):
  """A direction that all share, and noise that the lease decides."""
  draw = np.random.default_rng(int(job.tokens_NxL1[0, 0]))
  delta = {
    name: (0.5 + draw.standard_normal(x.shape)).astype(np.float32)
    for name, x in LIKE.items()
  }
  return jax.device_get(common()[-1](delta))


def encode(job, message, header=None):
  spec = common()[3]
  header = header or job.header(RUN)
  return payload.encode(header, message, LIKE, spec, lambda d: d * 2)


class InspectorTest(absltest.TestCase):
  def test_a_delta_of_norm_zero_is_tiny_among_few(self):
    """Two deltas have no median to compare with."""
    _, _, inspector, _, compress = common()
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), LIKE)
    deltas = []
    for number, scale in enumerate((1.0, 0.0)):
      tree = jax.tree.map(lambda x, s=scale: x + np.float32(s), zeros)
      lease = mock.Mock(number=number, sequences=4)
      message = jax.device_get(compress(tree))
      deltas.append(deltas_lib.Delta(lease, message, 1.0, 0.0))
    verdicts = inspector.inspect(deltas, np.random.default_rng(0))
    self.assertIs(verdicts[0], VALID)
    self.assertIs(verdicts[1], pool_lib.LeaseVerdict.TINY)


class PoolTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    config, merger, inspector, _, _ = common()
    self.audited = []

    def again(params, job):
      del params
      self.audited.append(job.number)
      return honest(job)

    self.pool = pool_lib.PoolState(
      config, LIKE, RUN, merger, inspector, again,
      lambda worker, data, by: by == data * 2 and worker != 'forger',
      np.random.default_rng(3),
    )  # fmt: skip

  def begin(self, sequences=32, held=None, banned=(), params=None):
    params = params or jax.tree.map(lambda x: jnp.zeros(x.shape), LIKE)
    tokens_NxL1 = np.arange(sequences * 5, dtype=np.int32).reshape(-1, 5)
    task = pool_lib.PoolTask(
      3, ROOT_OF_RUN, params, sequences,
      lambda first, n: tokens_NxL1[first : first + n], 0.0, 100.0,
    )  # fmt: skip
    self.pool.begin(task, held or {}, set(banned))

  def work(self, job, worker, now, message=None):
    message = honest(job) if message is None else message
    data = encode(job, message)
    return self.pool.deliver(worker, job.number, data, 1.0, now)

  def subround(self, workers, now, lie=lambda worker, message: message):
    """All leases of one by workers in turn; their jobs by worker."""
    jobs = collections.defaultdict(list)
    for worker in workers * 99:
      job = self.pool.take(worker, now, most=1)
      if job is None:
        break
      jobs[worker].append(job)
      self.work(job, worker, now + 1, lie(worker, honest(job)))
    return jobs

  def test_a_round(self):
    """Its parameters, its sequences, its work, and that it repeats."""
    ends = []
    for _ in range(2):
      self.begin()
      bases = set()
      for now, over in (0.0, False), (2.0, True):
        jobs = self.subround(list('abcdefgh'), now)
        bases |= {job.base for x in jobs.values() for job in x}
        self.assertLen(jobs, 8)
        self.assertEqual(self.pool.advance(now + 1), over)
      self.assertLen(bases, 2)
      outcome = self.pool.finish()
      self.assertEqual(outcome.sequences, 32)
      self.assertEqual(sum(outcome.work.values()), 32)
      self.assertEqual(outcome.loss, 1.0)
      self.assertNotEmpty(outcome.proven)
      self.assertLen(self.audited, 2)
      self.audited.clear()
      self.assertEmpty(outcome.caught)
      moved = outcome.params['a'].mean()
      self.assertLess(moved, -0.2)  # a quarter of the elements, two bits
      ends.append(outcome.params)
    jax.tree.map(np.testing.assert_array_equal, *ends)

  @parameterized.parameters(
    ('stale', lambda job, m: (job.number + 1, encode(job, m)), 'STALE'),
    ('short', lambda job, m: (job.number, encode(job, m)[:-1]), 'REFUSED'),
    (
      'another base',
      lambda job, m: (
        job.number,
        encode(job, m, job.header(RUN)._replace(root=bytes(16))),
      ),
      'REFUSED',
    ),
    (
      'other data',
      lambda job, m: (
        job.number,
        encode(job, m, job.header(RUN)._replace(receipt=bytes(16))),
      ),
      'RECEIPT',
    ),
    (
      'fewer sequences',
      lambda job, m: (
        job.number,
        encode(job, m, job.header(RUN)._replace(sequences=1)),
      ),
      'RECEIPT',
    ),
  )
  def test_what_is_not_of_the_lease_is_refused_and_leased_again(
    self, name, make, verdict
  ):
    del name
    self.begin()
    job = self.pool.take('a', 0.0)
    number, data = make(job, honest(job))
    found = self.pool.deliver('a', number, data, 1.0, 1.0)
    self.assertEqual(found.name, verdict)
    again = self.pool.take('b', 2.0) if verdict != 'STALE' else job
    np.testing.assert_array_equal(again.tokens_NxL1, job.tokens_NxL1)

  def test_another_workers_lease_and_signature_are_refused(self):
    self.begin()
    job = self.pool.take('a', 0.0)
    self.assertEqual(self.work(job, 'b', 1.0).name, 'STALE')
    job = self.pool.take('forger', 0.0)
    self.assertEqual(self.work(job, 'forger', 1.0).name, 'REFUSED')

  def test_bad_deltas_are_not_merged_and_their_leases_are_given_again(self):
    self.begin()
    draw = np.random.default_rng(1)
    kept = []

    def noise(path, x):
      codes = getattr(path[-1], 'name', '') == 'codes'
      return draw.integers(0, 4, x.shape, np.uint8) if codes else x

    def scales(path, x):
      return x * 0 if getattr(path[-1], 'name', '') == 'scales' else x

    def lie(worker, message):
      if worker == 'noise':
        return jax.tree_util.tree_map_with_path(noise, message)
      if worker == 'zeros':
        return jax.tree_util.tree_map_with_path(scales, message)
      if worker in ('copy', 'original'):
        kept.append(message)
        return kept[0]
      return message

    workers = ['original', *'abcde', 'noise', 'zeros', 'copy']
    jobs = self.subround(workers[:8], 0.0, lie)
    self.assertLen(jobs, 8)
    self.pool.advance(1.0)
    jobs = self.subround(workers[:6] + ['copy'], 2.0, lie)
    job = self.pool.take('a', 4.0)
    self.assertIsNone(job)
    self.pool.advance(5.0)
    verdicts = {
      worker: {v.name for v in counts}
      for worker, counts in self.pool.finish().verdicts.items()
    }
    self.assertEqual(verdicts['noise'], {'APART'})
    self.assertEqual(verdicts['zeros'], {'TINY'})
    self.assertIn('COPY', verdicts['copy'] | verdicts['original'])
    for worker in 'abcde':
      self.assertEqual(verdicts[worker], {'VALID'})

  def test_who_fails_an_audit_has_worked_for_nothing(self):
    """Its delta points where the others do, but is of another lease."""
    self.begin(held={'cheat': 10**12, 'a': 1})
    draw = np.random.default_rng(2)

    def lie(worker, message):
      if worker != 'cheat':
        return message
      tokens_NxL1 = draw.integers(10**6, 10**7, (1, 1))
      return honest(pool_lib.Job(0, 0, b'', 0, 1, tokens_NxL1.astype(np.int32)))

    self.subround(['cheat', *'abcdefg'], 0.0, lie)
    self.pool.advance(1.0)
    self.assertIsNone(self.pool.take('cheat', 2.0))
    jobs = self.subround(list('abcdefg'), 2.0)
    # What it had is leased again, first.
    self.assertEqual(jobs['a'][0].tokens_NxL1[0, 0], 0)
    self.pool.advance(3.0)
    outcome = self.pool.finish()
    self.assertEqual(outcome.caught, {'cheat'})
    self.assertNotIn('cheat', outcome.work)
    self.assertEqual(
      outcome.verdicts['cheat'], {pool_lib.LeaseVerdict.FALSE: 1}
    )

  def test_time_ends_a_round_with_what_is_there(self):
    self.begin()
    for worker in 'abcd':
      job = self.pool.take(worker, 0.0)
      if worker != 'c':
        self.work(job, worker, 1.0)
    self.assertFalse(self.pool.advance(49.0))
    before = job.base
    self.assertFalse(self.pool.advance(50.0))
    self.assertIsNone(self.pool.parameters(before))
    self.assertEqual(self.work(job, 'c', 51.0).name, 'STALE')
    self.assertTrue(self.pool.advance(100.0))
    outcome = self.pool.finish()
    self.assertEqual(outcome.sequences, 4)  # those before c's
    self.assertEqual(sum(outcome.work.values()), 6)
    self.assertIsNone(self.pool.take('a', 101.0))

  def simulate(self, workers, rounds=3, sequences=128, squatters=(), asks=0.0):
    """Rounds of workers of one sequence per second, and of squatters.

    A squatter asks before all others in every sub-round, or later in it, and
    returns nothing; each of its leases is by a new key if it is named so.
    Returns (trained, claimable, seconds) of every round.
    """
    found = []
    for r in range(rounds):
      self.begin(sequences=sequences)
      now, due, keys, base = 0.0, {}, 0, None
      while True:
        current = self.pool._round
        if current.base != base:
          base, opened = current.base, now
          squatted = set()
        if now >= opened + asks * (current.until - opened):
          for name in squatters:
            if name not in squatted:
              keys += 1
              key = f'{name}-{r}-{keys}' if name.startswith('new') else name
              self.pool.take(key, now, origin=name)
              squatted.add(name)
        for worker in workers:
          job, at = due.get(worker, (None, now))
          if job is not None and at <= now:
            self.work(job, worker, now)
            job = None
          if job is None:
            job = self.pool.take(worker, now, most=4, origin=worker)
            at = now + len(job.tokens_NxL1) / 1.0 if job else 0.0
            due[worker] = job, at
        now += 0.5
        if self.pool.advance(now):
          break
      outcome = self.pool.finish()
      trained = sum(outcome.work.values())
      found.append((trained, outcome.sequences, now))
    return found

  def test_honest_workers_alone(self):
    for trained, claimable, seconds in self.simulate(list('abcdefgh')):
      self.assertEqual((trained, claimable), (128, 128))
      self.assertLess(seconds, 40.0)

  @parameterized.product(
    squatters=(['one'], ['new'], [f'new{i}' for i in range(12)], ['a-b'] * 1),
    asks=(0.0, 0.5, 0.99),
  )
  def test_squatters_cost_next_to_nothing(self, squatters, asks):
    """One key, throw-away keys of one address or of many; at any time."""
    alone = self.simulate(list('abcdefgh'))
    found = self.simulate(list('abcdefgh'), squatters=squatters, asks=asks)
    for (trained, claimable, seconds), (_, _, usual) in zip(
      found, alone, strict=True
    ):
      self.assertEqual((trained, claimable), (128, 128))
      self.assertLess(seconds, 100.0)
      del usual
    # From the second round on the honest are known.
    for (_, _, seconds), (_, _, usual) in zip(
      found[1:], alone[1:], strict=True
    ):
      self.assertLessEqual(seconds, 1.5 * usual + 4.0)

  def test_a_proven_worker_that_squats_is_new_again(self):
    self.simulate(list('abcd'), rounds=1)
    self.assertIn('a', self.pool._trusted)
    found = self.simulate(list('bcd'), rounds=2, squatters=['a'])
    for trained, claimable, _ in found:
      self.assertEqual((trained, claimable), (128, 128))
    self.assertNotIn('a', self.pool._trusted)

  def test_a_new_worker_proves_itself_beside_others(self):
    self.simulate(list('abcd'), rounds=1)
    self.simulate(list('abcde'), rounds=2)
    self.assertIn('e', self.pool._trusted)

  def test_new_keys_of_one_address_wait_for_each_other(self):
    self.begin()
    jobs = [self.pool.take(f'k{i}', 0.0, origin='one') for i in range(9)]
    self.assertLen([job for job in jobs if job], 2)
    self.assertIsNotNone(self.pool.take('other', 0.0, origin='two'))
    self.work(jobs[0], 'k0', 1.0)
    self.assertIsNotNone(self.pool.take('k5', 1.0, origin='one'))

  def test_leases_that_never_come_back_are_struck(self):
    self.begin()
    for now in range(4):
      self.pool.take('bad', float(now))  # asks again and again
    self.assertIsNone(self.pool.take('bad', 5.0))
    self.assertIsNotNone(self.pool.take('good', 5.0))
    self.pool.advance(100.0)
    lost = self.pool.finish().verdicts['bad']
    self.assertEqual(lost, {pool_lib.LeaseVerdict.LOST: 3})

  def test_parameters_and_bodies_are_for_who_has_a_lease(self):
    self.begin()
    job = self.pool.take('a', 0.0)
    self.assertTrue(self.pool.holds('a', job.number))
    self.assertFalse(self.pool.holds('b', job.number))
    self.assertFalse(self.pool.holds('a', job.number + 1))
    for want in (True, True, True, False):
      self.assertEqual(self.pool.may_fetch('a', job.base), want)
    self.assertFalse(self.pool.may_fetch('b', job.base))
    self.assertFalse(self.pool.may_fetch('a', bytes(16)))
    self.work(job, 'a', 1.0)
    self.assertFalse(self.pool.holds('a', job.number))

  def test_nobody_came(self):
    self.begin(banned=['a'])
    self.assertIsNone(self.pool.take('a', 0.0))
    self.assertTrue(self.pool.advance(100.0))
    outcome = self.pool.finish()
    self.assertEqual(outcome.sequences, 0)
    np.testing.assert_array_equal(outcome.params['b'], np.zeros(128))

  def test_one_bad_worker_after_another_costs_it_its_turn(self):
    self.begin()
    for now in range(3):
      job = self.pool.take('bad', float(now))
      self.pool.deliver('bad', job.number, b'', 1.0, now + 0.5)
    self.assertIsNone(self.pool.take('bad', 5.0))
    self.assertIsNotNone(self.pool.take('good', 5.0))


if __name__ == '__main__':
  absltest.main()
