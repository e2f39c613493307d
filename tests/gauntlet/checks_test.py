import jax
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant.gauntlet import checks
from covenant.optim import compression as compression_lib
from covenant.optim import sparseloco
from covenant.wire import payload

Finding = checks.CheckFinding
LIKE = {'w': np.zeros((64, 64), np.float32)}
COMPRESSION = compression_lib.TopK(k=8, block=(16, 16))
ROOT = b'r' * 16
EXPECTED = checks.Expected(100, 110, ROOT, {0: b'd' * 16}, 40)


def message(seed, scale=1.0):
  delta = np.random.default_rng(seed).normal(size=(64, 64)) * scale
  sent, _ = sparseloco.compress(
    {'w': np.float32(delta)}, None, COMPRESSION, None
  )
  return jax.tree.map(np.asarray, sent)


def submission(uid, content=None, block=105, **changes):
  header = payload.Header(b'run', 3, uid, ROOT, b'd' * 16, 40)
  header = header._replace(**changes.pop('header', {}))
  content = content if content is not None else message(uid)
  made = checks.Submission(
    uid, block, b'x', digest=b'x', decoded=payload.Payload(header, content)
  )
  return made._replace(**changes)


class ChecksTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.checker = checks.Checker(LIKE, COMPRESSION)

  def check(self, *submissions, **kwargs):
    return self.checker.check(submissions, EXPECTED, b'seed', **kwargs)

  @parameterized.parameters(
    ({}, Finding.VALID),
    ({'block': None}, Finding.MISSING),
    ({'block': 99}, Finding.EARLY),
    ({'block': 100}, Finding.VALID),
    ({'block': 109}, Finding.VALID),
    ({'block': 110}, Finding.LATE),
    ({'twice': True}, Finding.TWICE),
    ({'fetch': 'absent', 'digest': b''}, Finding.ABSENT),
    ({'fetch': 'failed', 'digest': b''}, Finding.UNREACHABLE),
    ({'digest': b'y'}, Finding.DIGEST),
    (
      {'decoded': payload.PayloadError(payload.Reason.LENGTH, 'short')},
      Finding.REFUSED,
    ),
    (
      {'decoded': payload.PayloadError(payload.Reason.ROOT, 'old')},
      Finding.UNSYNCHRONIZED,
    ),
    ({'header': {'root': b'z' * 16}}, Finding.UNSYNCHRONIZED),
    ({'header': {'receipt': b'z' * 16}}, Finding.RECEIPT),
    ({'header': {'sequences': 39}}, Finding.VALID),
    ({'header': {'sequences': 41}}, Finding.RECEIPT),
    ({'header': {'sequences': 0}}, Finding.RECEIPT),
    ({'content': message(0, 0.0)}, Finding.TINY),
    ({'content': message(0, 1e-3)}, Finding.TINY),
    ({'content': message(0, 0.1)}, Finding.VALID),
    ({'content': message(0, 100.0)}, Finding.HUGE),
  )
  def test_verdict_is_of_one_uid_only(self, changes, finding):
    others = [submission(uid) for uid in range(1, 6)]
    report = self.check(submission(0, **changes), *others)
    self.assertEqual(report.checks[0].finding, finding)
    if finding not in (Finding.VALID, Finding.MISSING):
      self.assertTrue(report.checks[0].detail or 'fetch' in changes)
    others = {report.checks[uid].finding for uid in range(1, 6)}
    self.assertEqual(others, {Finding.VALID})
    self.assertFalse(report.fault)

  def test_the_order_of_submissions_does_not_matter(self):
    submissions = [submission(uid) for uid in range(5)]
    submissions[3] = submission(3, message(1), block=107)
    self.assertEqual(
      self.check(*submissions), self.check(*reversed(submissions))
    )

  def test_most_fetches_failing_is_nobodys_fault(self):
    failed = {'fetch': 'failed', 'digest': b'', 'decoded': None}
    report = self.check(
      *(submission(uid, **failed) for uid in range(3)), submission(4)
    )
    self.assertTrue(report.fault)
    verdicts = [report.checks[uid].finding for uid in (0, 1, 2, 4)]
    self.assertEqual(verdicts, [Finding.EXCUSED] * 3 + [Finding.VALID])

  def test_who_committed_nothing_cannot_make_a_fault(self):
    report = self.check(
      *(submission(uid, block=None) for uid in range(5)),
      submission(5, fetch='absent', digest=b''),
      submission(6, fetch='failed', digest=b''),
      submission(7),
    )
    self.assertFalse(report.fault)
    self.assertEqual(report.checks[6].finding, Finding.UNREACHABLE)

  def test_the_later_of_two_is_the_copy(self):
    report = self.check(
      submission(0, message(0), block=107),
      submission(1, message(0), block=104),
      *(submission(uid) for uid in range(2, 6)),
    )
    self.assertEqual(report.checks[0].finding, Finding.COPY)
    self.assertEqual(report.checks[0].twin, 1)
    self.assertIn('uid 1', report.checks[0].detail)
    self.assertEqual(report.valid, [1, 2, 3, 4, 5])

  def test_of_one_block_both_are_blamed(self):
    report = self.check(
      submission(0, message(0)),
      submission(1, message(0)),
      submission(2, message(0), block=106),
      *(submission(uid) for uid in range(3, 7)),
    )
    self.assertEqual(report.valid, [3, 4, 5, 6])
    verdicts = [report.checks[uid].finding for uid in range(3)]
    self.assertEqual(verdicts, [Finding.TWIN, Finding.TWIN, Finding.COPY])
    self.assertEqual([report.checks[uid].twin for uid in range(3)], [1, 0, 0])

  def test_only_who_came_first_or_with_it_is_resembled(self):
    report = self.check(
      submission(0, message(0), block=107),
      *(submission(uid, block=104 + uid) for uid in range(1, 6)),
      threshold=2.0,
    )
    self.assertIsNone(report.checks[1].twin)
    self.assertEqual(
      [report.checks[uid].twin is not None for uid in (0, 2, 5)], [True] * 3
    )
    self.assertIn(report.checks[0].twin, (1, 2, 3))

  def test_copy_of_the_round_before(self):
    previous = {uid: message(uid + 50) for uid in range(5)}
    report = self.check(
      *(submission(uid) for uid in range(5)),
      submission(5, previous[2]),
      previous=previous,
    )
    self.assertEqual(report.valid, [0, 1, 2, 3, 4])
    self.assertEqual(report.checks[5].finding, Finding.COPY)
    self.assertEqual(report.checks[5].twin, 2)

  def test_nobody(self):
    self.assertEqual(self.check(), checks.CheckReport({}, False))


if __name__ == '__main__':
  absltest.main()
