import dataclasses

import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant.gauntlet import ratings
from covenant.gauntlet import work

UIDS = 5


def standing(units=None, parts=(1.0, 1.0, 1.0, 1.0), proof=3.0):
  """A record after one evaluation of units with noise 1.

  Args:
    units: what each unit of own data gains beyond other data, apart from noise.
    parts: the same by stretches of positions.
    proof: in standard errors.
  """
  units = np.ones(8) if units is None else np.asarray(units)
  return ratings.Standing(
    'a', 0, 0, presence=1.0,
    proof_sum=proof, proof_weight=1.0, proof_variance=0.01,
    parts_sum=tuple(parts), level_sum=units.mean(),
    square_sum=(units**2).mean(),
  )  # fmt: skip


class TrainedTest(parameterized.TestCase):
  def usual(self):
    return work.usual({u: standing() for u in range(UIDS)})

  @parameterized.product(
    part=(0.25, 0.5, 0.75, 1.0), strength=(0.5, 1.0, 2.0, 20.0)
  )
  def test_how_hard_a_part_is_trained_does_not_matter(self, part, strength):
    units = np.zeros(8)
    units[: int(8 * part)] = strength
    found = work.trained(standing(units), self.usual())
    self.assertAlmostEqual(found, part)

  @parameterized.parameters(
    ((1.0, 1.0, 1.0, 0.0), 0.75),
    ((3.0, 0.0, 3.0, 0.0), 0.5),
    ((2.0, 2.0, 2.0, 2.0), 1.0),
  )
  def test_positions_that_nobody_trained_on(self, parts, expected):
    found = work.trained(standing(parts=parts), self.usual())
    self.assertAlmostEqual(found, expected)

  def test_relative_to_what_is_usual(self):
    """Honest units do not gain alike, too."""
    uneven = [0.5, 1.0, 1.0, 1.5, 1.5, 1.0, 1.0, 0.5]
    usual = work.usual({u: standing(uneven) for u in range(UIDS)})
    self.assertAlmostEqual(work.trained(standing(uneven), usual), 1.0)
    self.assertAlmostEqual(work.trained(standing(), usual), 1.0)  # no more

  def test_nothing_learned_is_no_work(self):
    self.assertEqual(work.trained(standing(-np.ones(8)), self.usual()), 0.0)
    away = standing(parts=(-1.0, -1.0, 0.0, 0.0))
    self.assertEqual(work.trained(away, self.usual()), 0.0)

  def test_noise_alone_is_no_less(self):
    """Squares below those of other data say nothing of the units."""
    lucky = standing()
    lucky = dataclasses.replace(lucky, square_sum=-0.3)
    self.assertEqual(work.trained(lucky, self.usual()), 1.0)

  @parameterized.parameters(1, 2, 4)
  def test_leaving_out_work_loses_more_than_it_saves(self, missing):
    usual = self.usual()
    part = 1 - missing / 8
    strong = standing([1 / part] * (8 - missing) + [0.0] * missing)
    self.assertAlmostEqual(work.proof_share(standing(), usual), 1.0)
    paid = work.proof_share(strong, usual)
    self.assertAlmostEqual(paid, part**1.5)
    self.assertLess(paid, part)

  def test_nobody_is_certain(self):
    doubtful = standing(proof=0.1)
    self.assertEqual(work.usual({0: doubtful}), work.Usual())
    self.assertEqual(work.proof_share(doubtful, work.Usual()), 0.0)


if __name__ == '__main__':
  absltest.main()
