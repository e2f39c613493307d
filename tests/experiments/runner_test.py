"""Parts of a study, and seeds that undecided claims get."""

import argparse
import dataclasses
import pathlib
from concurrent import futures
from unittest import mock

from absl.testing import absltest

from covenant import config as config_lib
from covenant import metrics
from experiments import runner
from experiments import study


@dataclasses.dataclass(frozen=True)
class Counting:
  """A program whose loss is a number of its seed; runs in no time."""

  scale: float = 0.1

  def run(self, config: config_lib.Config) -> list[metrics.Evaluation]:
    loss = 2.0 + self.scale * (-1) ** config.seed
    return [
      metrics.Evaluation(
        round=0, tokens=1, bytes_up=8, loss=loss, nats_per_byte=loss,
        bits_per_byte=loss, sequences=1, seconds=0.0,
      )
    ]  # fmt: skip


CELLS = ('a', 'b', 'c', 'd')


def _plan(runs, seeds):
  del runs
  for seed in range(seeds):
    for i, name in enumerate(CELLS):
      yield study.Cell(
        name, seed, (f'optim.inner.b1=0.{i + 1}',), Counting(0.1 * i)
      )


def _judge(runs, results):
  del results
  outcome = study.at_most(study.gap(runs, 'b', 'a'))
  yield study.Verdict('X', '', '', '', '', outcome, ('a', 'b'))


STUDY = study.Study('counting', _plan, _judge, lambda runs, path: None)


class RunnerTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.work = pathlib.Path(self.create_tempdir())

  def test_undecided_claims_get_seeds_up_to_the_most(self):
    runs = [
      study.Run(name, seed, '', 1, 1, 1, 1, 2.0, 60.0, '', '')
      for name in CELLS
      for seed in range(3)
    ]
    verdicts = list(_judge(runs, self.work))
    wanted = study.undecided(verdicts, runs)
    self.assertEqual(wanted, {'a': 4, 'b': 4})
    cells = study.with_more_seeds(_plan((), 3), wanted)
    seeds = {n: [c.seed for c in cells if c.name == n] for n in CELLS}
    self.assertEqual(seeds['a'], [0, 1, 2, 3])
    self.assertEqual(seeds['c'], [0, 1, 2])
    many = runs * 3
    self.assertEmpty(study.undecided(verdicts, many))

  def test_figures_are_drawn_of_what_was_measured(self):
    runs = [study.Run('a', 0, 'sets', 1, 1, 1, 1, 2.0, 60.0, '', '')]
    study.write_csv(self.work / 'counting.csv', runs)
    drawn = []
    fake = STUDY._replace(draw=lambda *what: drawn.append(what))
    with (
      mock.patch.object(study, 'RESULTS', self.work),
      mock.patch('sys.argv', ['counting', '--draw']),
    ):
      self.assertTrue(runner.main(fake, '').draw)
    self.assertEqual(drawn, [(runs, self.work / 'counting.png')])

  def test_a_part_is_a_share_of_the_runs(self):
    cells = list(_plan((), 3))
    owners = [
      [i for i in (1, 2, 3) if runner.Part(i, 3).has(cell, ())]
      for cell in cells
    ]
    self.assertTrue(all(len(own) == 1 for own in owners))
    self.assertGreater(len({own[0] for own in owners}), 1)

  def test_parts_are_read(self):
    self.assertEqual(runner.read_part('2/8'), runner.Part(2, 8))
    for text in ('0/8', '9/8', '8', 'a/b', '1/2/3'):
      with self.assertRaisesRegex(argparse.ArgumentTypeError, 'expected i/n'):
        runner.read_part(text)


class CompleteTest(absltest.TestCase):
  def test_parts_together_do_all_and_seeds_are_added(self):
    work = pathlib.Path(self.create_tempdir())
    options = runner.Options(work, budget=60.0)
    self.enter_context(
      mock.patch.object(runner, 'workers', futures.ThreadPoolExecutor)
    )
    for i in (1, 2):
      part = options._replace(part=runner.Part(i, 2), budget=0.0)
      runs = runner.complete(STUDY, part)
    assert runs is not None
    self.assertLen(runs, 12)
    self.assertEqual({r.machine for r in runs} - {'own', 'shared'}, set())
    runs = runner.complete(STUDY, options)
    assert runs is not None
    seeds = {n: [r.seed for r in runs if r.cell == n] for n in CELLS}
    self.assertEqual(seeds['a'], list(range(study.MOST_SEEDS)))
    self.assertEqual(seeds['c'], [0, 1, 2])


if __name__ == '__main__':
  absltest.main()
