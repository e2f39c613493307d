"""Leases and the result of a round, as workers and people see them."""

import numpy as np
from absl.testing import absltest

from covenant.pool import tasks

VALID, FALSE = tasks.LeaseVerdict.VALID, tasks.LeaseVerdict.FALSE


class TasksTest(absltest.TestCase):
  def test_the_header_has_what_was_trained(self):
    tokens_4xL1 = np.arange(20, dtype=np.int32).reshape(4, 5)
    job = tasks.Job(3, 7, b'b' * 16, 12, 2, tokens_4xL1)
    self.assertEqual(job.batch, 2)
    header = job.header(b'r' * 16)
    self.assertEqual(
      (header.run, header.round, header.uid, header.sequences),
      (b'r' * 16, 3, 7, 4),
    )
    other = job._replace(tokens_NxL1=tokens_4xL1[::-1])
    self.assertNotEqual(other.header(b'r' * 16), header)

  def test_a_round_is_described(self):
    verdicts = {'a': {VALID: 2}, 'b': {VALID: 1, FALSE: 1}}
    made = tasks.PoolResult(
      None, 6, 2.5, {'a': 4, 'b': 2}, set(), {'b'}, verdicts
    )
    first, second = tasks.describe(4, made, 8, 0.25).splitlines()
    self.assertEqual(
      first,
      'round 4: 6 of 8 sequences, 3 leases of 2 workers, loss 2.500; earned '
      '0.250000000 TAO in all',
    )
    self.assertEqual(second, f'  b: 1 x {FALSE.value}')


if __name__ == '__main__':
  absltest.main()
