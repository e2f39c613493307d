import pathlib

from absl.testing import absltest

from covenant.report import curves
from covenant.report import folder
from covenant.report import seeds
from tests.report import workdirs


class SeedsTest(absltest.TestCase):
  def read(self, **runs):
    root = pathlib.Path(self.create_tempdir().full_path)
    return {
      name: folder.read(workdirs.write(root / name, **changes))
      for name, changes in runs.items()
    }

  def test_runs_are_grouped_by_all_but_seed_and_machine(self):
    runs = self.read(
      a={'seed': 0}, b={'seed': 1}, c={'seed': 2, 'miners': 3}, d={}
    )
    found = seeds.groups(runs)
    self.assertEqual(
      [(g.name, list(g.runs)) for g in found],
      # The seed of d is that of a.
      [('a (mean of 2 seeds)', ['a', 'b']), ('c', ['c']), ('d', ['d'])],
    )
    self.assertEqual(found[1].deviation, 0)

  def test_a_curve_has_the_rounds_that_all_have(self):
    runs = self.read(a={'rounds': 4}, b={'rounds': 6})
    group = seeds.Group('both', runs)
    points = seeds.points(
      group,
      lambda run: run.evaluations,
      dict.fromkeys(runs, curves.rounds_completed),
      lambda record: record.loss,
    )
    self.assertEqual([p.x for p in points], [0, 2, 4])
    self.assertEqual(points[0], (0, 5.6, 5.6, 5.6))


if __name__ == '__main__':
  absltest.main()
