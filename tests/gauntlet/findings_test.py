"""Tests for what is found about a round's submissions."""

from absl.testing import absltest
from absl.testing import parameterized

from covenant.gauntlet import findings

Finding = findings.CheckFinding


def report(*results):
  return findings.CheckReport(dict(enumerate(results)), False)


class ReportTest(parameterized.TestCase):
  @parameterized.parameters(*Finding)
  def test_only_likeness_leaves_a_message_valid(self, finding):
    likeness = finding in (Finding.COPY, Finding.TWIN)
    valid = finding is Finding.VALID or likeness
    self.assertEqual(findings.CheckResult(finding).valid, valid)
    self.assertEqual(report(findings.CheckResult(finding)).valid, [0] * valid)

  def test_a_copy_has_no_share_and_twins_have_equal_ones(self):
    self.assertEqual(findings.CheckResult(Finding.VALID).originality, 1.0)
    self.assertEqual(findings.CheckResult(Finding.COPY).originality, 0.0)
    twin = findings.CheckResult(Finding.TWIN, twins=4)
    self.assertEqual(twin.originality, 0.25)

  def test_one_of_each_set_of_similar_messages_is_clear(self):
    valid = findings.CheckResult(Finding.VALID)
    first = valid._replace(origin=0, near=0)
    found = report(first, first, valid, valid._replace(near=2), valid)
    self.assertEqual(found.clear(), [0, 2, 4])
    self.assertTrue(found.repeats([0, 1]))
    self.assertFalse(found.repeats([0, 2, 3]))  # nearly similar: others may be

  @parameterized.parameters(
    (1.0, 1.0, True), (9.0, 9.0, False), (1.0, 0.011, False), (7.9, 0.013, True)
  )
  def test_a_norm_near_a_limit_is_not_clear(self, largest, least, clear):
    result = findings.CheckResult(Finding.VALID, largest=largest, least=least)
    self.assertEqual(report(result).clear(), [0] * clear)


if __name__ == '__main__':
  absltest.main()
