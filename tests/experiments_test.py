"""The files in experiments/results are those of the committed studies."""

import collections
import dataclasses
import pathlib
import re
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.models import llama
from covenant.optim import compression as compression_lib
from covenant.optim import quantize
from covenant.optim import sparseloco
from covenant.train import local
from experiments import claims
from experiments import overlap
from experiments import runner
from experiments import study
from experiments import transformations

TINY = (
  'model.width=32',
  'model.layers=1',
  'model.heads=2',
  'model.ffn_width=64',
  'data.context=16',
  'miners=2',
  'rounds=2',
  'eval.every=1',
  'eval.sequences=8',
  'optim.inner_steps=2',
  'optim.inner.warmup_steps=1',
)


class ResultsTest(parameterized.TestCase):
  @parameterized.parameters(*[(module,) for module in claims.STUDIES])
  def test_are_those_of_the_committed_study(self, module):
    runs = claims.runs_of(module)
    if not runs:
      self.skipTest(f'{module.__name__} has no results yet')
    seeds = collections.Counter(run.cell for run in runs)
    plan = study.with_more_seeds(module.STUDY.plan(runs, study.SEEDS), seeds)
    planned = {
      (
        cell.name,
        cell.seed,
        study.digest(study.make_config(cell), cell.program),
      )
      for cell in plan
    }
    self.assertEqual(planned, {(r.cell, r.seed, r.config) for r in runs})
    self.assertLessEqual(max(seeds.values()), study.MOST_SEEDS)
    codes = {study.code(), *study.EARLIER}
    for run in runs:
      self.assertIn(run.code, codes, run.cell)
      last = study.curve(run, study.RESULTS)[-1]
      self.assertEqual(round(last.nats_per_byte, 5), run.nats_per_byte)
      self.assertEqual((last.round, last.tokens), (run.rounds, run.tokens))
    self.assertTrue((study.RESULTS / f'{module.STUDY.name}.png').is_file())

  def test_overlaps_are_those_of_the_committed_study(self):
    rows = study.read_csv(study.RESULTS / 'overlap.csv', overlap.Row)
    for seed in range(study.SEEDS):
      config = study.make_config(study.Cell('overlap', seed))
      own = [row for row in rows if row.seed == seed]
      self.assertEqual([row.round for row in own], [*range(1, 101)])
      self.assertEqual({row.config for row in own}, {study.digest(config)})
      self.assertLessEqual(
        {row.code for row in own}, {study.code(), *study.EARLIER}
      )

  def test_no_curve_is_left_over(self):
    runs = [run for module in claims.STUDIES for run in claims.runs_of(module)]
    curves = {p.name for p in (study.RESULTS / 'curves').glob('*.csv')}
    self.assertEqual(curves, {study.curve_name(run) for run in runs})

  @pytest.mark.docs
  def test_the_page_shows_them(self):
    page = claims.PAGE.read_text(encoding='utf-8')
    self.assertEqual(claims.page(), page)
    self.assertEqual(claims.rows(), claims.ROWS.read_text(encoding='utf-8'))

  def test_every_figure_and_study_is_in_a_group(self):
    page = claims.PAGE.read_text(encoding='utf-8')
    for path in study.RESULTS.glob('*.png'):
      link = re.escape(f'(../experiments/results/{path.name})')
      self.assertRegex(page, rf'!\[[^]]+\]{link}')
    grouped = [name for group in claims.GROUPS for name in group.studies]
    self.assertLen(set(grouped), len(grouped))
    modules = {module.STUDY.name for module in claims.STUDIES}
    self.assertContainsSubset(modules, grouped)


class StudyTest(absltest.TestCase):
  @pytest.mark.slow
  def test_a_run_is_done_once(self):
    work = pathlib.Path(self.create_tempdir())
    cell = study.Cell('tiny', 0)
    first = runner.execute(cell, TINY, work)
    self.assertEqual(first.rounds, 2)
    self.assertEqual(first.bytes_down, first.bytes_up)  # of the other peer
    self.assertLen(study.curve(first, work), 3)
    before = (work / first.config / 'metrics.jsonl').stat().st_mtime_ns
    again = runner.execute(cell._replace(name='renamed'), TINY, work)
    self.assertEqual(again, first._replace(cell='renamed'))
    after = (work / first.config / 'metrics.jsonl').stat().st_mtime_ns
    self.assertEqual(after, before)

  def test_a_digest_is_of_what_changes_numbers(self):
    config = study.make_config(study.Cell('a', 0))
    same = dataclasses.replace(config, name='b')
    other = dataclasses.replace(config, seed=1)
    self.assertEqual(study.digest(config), study.digest(same))
    self.assertNotEqual(study.digest(config), study.digest(other))

  def test_a_sweep_comes_before_its_seeds(self):
    cells = list(study.tuned([], 'x', (), 3, (0.5, 1.0)))
    self.assertEqual([c.name for c in cells], ['x, 0.5', 'x, 1'])
    runs = [
      study.Run(c.name, 0, 'd', 1, 1, 1, 1, loss, 1.0, 'cpu', '')
      for c, loss in zip(cells, (3.0, 2.0), strict=True)
    ]
    chosen = list(study.tuned(runs, 'x', (), 3, (0.5, 1.0)))[2:]
    self.assertEqual([c.seed for c in chosen], [0, 1, 2])
    self.assertEqual({c.sets for c in chosen}, {cells[1].sets})

  def test_two_standard_errors_decide(self):
    self.assertEqual(study.at_most(study.Gap(-0.1, 0.03, 3)), 'PASS')
    self.assertEqual(study.at_most(study.Gap(0.1, 0.03, 3)), 'FAIL')
    self.assertEqual(study.at_most(study.Gap(0.01, 0.03, 3)), 'UNDECIDED')
    alone = study.spread([0.5])
    self.assertEqual(study.more_than(alone), 'UNDECIDED')


class TransformationsTest(absltest.TestCase):
  @pytest.mark.slow
  def test_the_loop_does_what_nodes_do(self):
    """On the same data: to rounding the loss, to the byte what is sent."""
    assigned = local.assigned_ids

    def of_the_run(config, task, split):
      return assigned(config, task._replace(seed=config.seed), split)

    work = pathlib.Path(self.create_tempdir())
    cell = study.Cell('tiny', 0)
    program = transformations.Configured()
    with mock.patch.object(local, 'assigned_ids', of_the_run):
      nodes = runner.execute(cell, TINY, work)
      loop = runner.execute(cell._replace(program=program), TINY, work)
    self.assertNotEqual(loop.config, nodes.config)
    self.assertAlmostEqual(loop.nats_per_byte, nodes.nats_per_byte, delta=2e-5)
    same = nodes._replace(
      config=loop.config, nats_per_byte=loop.nats_per_byte, seconds=loop.seconds
    )
    self.assertEqual(loop, same)

  def test_a_fragment_is_sent_once_a_round(self):
    config = study.make_config(study.Cell('a', 0))  # 15 steps a round
    sent = transformations.Streaming(fragments=5).sent(config)
    leaves = jax.tree.leaves(llama.abstract(config.model))
    whole = sum(4 * x.size for x in leaves)
    steps = [i for i in range(1, 31) if sent(i) > sent(i - 1)]
    self.assertEqual(steps, [3, 6, 9, 12, 15, 18, 21, 24, 27, 30])
    self.assertEqual(sent(30), 2 * sent(15))
    self.assertBetween(sent(15), whole, 1.01 * whole)


class AlphaTest(parameterized.TestCase):
  @parameterized.parameters(quantize.Sign(), quantize.Statistical())
  @pytest.mark.rows(1)
  def test_twice_is_the_square_of_the_rate(self, quantizer):
    """A rate inside the error feedback comes out of it again (aggregation)."""
    compression = compression_lib.TopK(4, (8, 8), quantizer)
    deltas = [
      {'w': np.random.default_rng(i).normal(size=(16, 8)).astype(np.float32)}
      for i in range(3)
    ]
    sent = []
    for rate in (1.0, 0.5):  # a power of two: exact
      error = sparseloco.init_error(deltas[0])
      for delta in deltas:
        scaled = jax.tree.map(lambda x, rate=rate: rate * x, delta)
        message, error = sparseloco.compress(scaled, error, compression, 0.95)
      sent.append(sparseloco.decompress(message, deltas[0], compression)['w'])
    np.testing.assert_allclose(sent[1], 0.5 * sent[0], rtol=1e-6)


if __name__ == '__main__':
  absltest.main()
