from unittest import mock

from absl.testing import absltest

from covenant.emulate import measurements
from covenant.node import base as node_lib
from covenant.node import evaluator
from covenant.protocol import checkpoint
from covenant.protocol import round as round_lib

Phase = round_lib.Phase


class MeasurementsTest(absltest.TestCase):
  def test_seconds_are_summed_by_field_until_the_lap(self):
    stopwatch = measurements.Stopwatch()
    for phase, seconds in (
      (Phase.TRAIN, 1.0),
      (Phase.VOTE, 0.5),
      (Phase.UPLOAD, 0.25),
      (Phase.SCORE, 2.0),
    ):
      stopwatch.observe(node_lib.Event(0, 0, phase.value, '', seconds))
    with mock.patch.object(
      measurements.time, 'perf_counter', side_effect=(3, 7)
    ):
      stopwatch.train(lambda: None)
    want = {
      'train_seconds': 5.0,
      'exchange_seconds': 0.75,
      'outer_seconds': 0.0,
      'score_seconds': 2.0,
    }
    self.assertEqual(stopwatch.lap(), want)
    self.assertEqual(stopwatch.lap(), dict.fromkeys(want, 0.0))

  def test_every_phase_has_a_field(self):
    stopwatch = measurements.Stopwatch()
    for phase in Phase:
      stopwatch.observe(node_lib.Event(0, 0, phase.value, '', 1.0))
    self.assertEqual(sum(stopwatch.lap().values()), len(Phase))

  def test_an_evaluation(self):
    record = measurements.evaluation_record(
      checkpoint.RunCounters(3, 0, 100, 7), evaluator.HeldOut(1.5, 0.5, 9), 2.0
    )
    self.assertEqual(
      (record.round, record.tokens, record.bytes_up), (3, 100, 7)
    )
    self.assertAlmostEqual(record.bits_per_byte, 0.7213475204444817)


if __name__ == '__main__':
  absltest.main()
