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

  def check(self, *submissions, usual_norm=30.0, answering=None, **kwargs):
    expected = EXPECTED._replace(usual_norm=usual_norm, answering=answering)
    return self.checker.check(submissions, expected, b'seed', **kwargs)

  def norm(self, message):
    return float(np.linalg.norm(self.checker._norms(message)))

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

  def test_a_fault_is_told_by_those_who_answered_lately(self):
    """Uids that never answer cannot be excused, however many they are."""
    failed = {'fetch': 'failed', 'digest': b'', 'decoded': None}
    report = self.check(
      *(submission(uid, **failed) for uid in range(5)),
      *(submission(uid) for uid in range(5, 8)),
      answering=dict.fromkeys((5, 6, 7), 1.0),
    )
    self.assertFalse(report.fault)
    self.assertEqual(report.checks[0].finding, Finding.UNREACHABLE)
    report = self.check(
      *(submission(uid, **failed) for uid in range(5)),
      *(submission(uid) for uid in range(5, 8)),
      answering={3: 1.0, 4: 1.0, 5: 1.0, 6: 0.01, 7: 0.01},
    )
    self.assertTrue(report.fault)  # by work, not by uids
    found = [report.checks[uid].finding for uid in range(5)]
    self.assertEqual(found, [Finding.UNREACHABLE] * 3 + [Finding.EXCUSED] * 2)

  def test_of_similar_messages_one_counts_and_all_are_valid(self):
    report = self.check(
      submission(0, message(0), block=107),
      submission(1, message(0), block=104),
      *(submission(uid) for uid in range(2, 6)),
    )
    self.assertEqual(report.checks[0].finding, Finding.COPY)
    self.assertEqual(report.checks[0].twin, 1)
    self.assertIn('uid 1', report.checks[0].detail)
    self.assertEqual(report.checks[1].finding, Finding.VALID)
    self.assertEqual(report.valid, [0, 1, 2, 3, 4, 5])
    self.assertEqual(report.clear(), [1, 2, 3, 4, 5])
    self.assertTrue(report.repeats([0, 1, 2]))
    self.assertFalse(report.repeats([0, 2, 3]))
    self.assertEqual(
      [report.checks[uid].originality for uid in (0, 1, 2)], [0.0, 1.0, 1.0]
    )

  def test_of_one_block_the_lowest_uid_counts_and_both_share(self):
    report = self.check(
      submission(0, message(0)),
      submission(1, message(0)),
      submission(2, message(0), block=106),
      *(submission(uid) for uid in range(3, 7)),
    )
    self.assertEqual(report.clear(), [0, 3, 4, 5, 6])
    verdicts = [report.checks[uid].finding for uid in range(3)]
    self.assertEqual(verdicts, [Finding.TWIN, Finding.TWIN, Finding.COPY])
    self.assertEqual([report.checks[uid].twin for uid in range(3)], [1, 0, 0])
    shares = [report.checks[uid].originality for uid in range(3)]
    self.assertEqual(shares, [0.5, 0.5, 0.0])

  @parameterized.parameters(
    ({}, 0.0, [0]),
    ({}, 1.0, [0]),
    # Half of all are small, and nothing is known of earlier rounds.
    ({1: 1e-2, 2: 1e-2, 3: 1e-2, 4: 90, 5: 90}, 0.0, []),
    ({1: 60, 2: 60, 3: 60}, 1.0, []),  # the round says it is not
    ({1: 1e-2, 2: 1e-2, 3: 1e-2}, 50.0, []),  # earlier rounds say so
  )
  def test_too_large_by_the_round_and_by_those_before(
    self, scales, usual, huge
  ):
    """Half of the uids may set the median of a round, not of history."""
    report = self.check(
      submission(0, message(0, 100.0)),
      *(submission(u, message(u, scales.get(u, 1.0))) for u in range(1, 6)),
      usual_norm=usual * self.norm(message(1)),
    )
    found = [u for u, c in report.checks.items() if c.finding is Finding.HUGE]
    self.assertEqual(found, huge)

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
    self.assertEqual(report.checks[5].finding, Finding.REPLAY)
    self.assertEqual(report.checks[5].twin, 2)

  def test_nobody(self):
    self.assertEqual(self.check(), checks.CheckReport({}, False))


if __name__ == '__main__':
  absltest.main()
