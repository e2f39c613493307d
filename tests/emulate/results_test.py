"""Runs from Python, and docs/python.md."""

import contextlib
import io
import os
import pathlib
import re

import pyarrow
import pytest
from absl.testing import absltest

import covenant
from covenant import config as config_lib
from covenant import metrics
from covenant.emulate import results as results_lib
from tests import helpers

PAGE = (helpers.ROOT / 'docs' / 'python.md').read_text(encoding='utf-8')


class PageTest(absltest.TestCase):
  @pytest.mark.docs
  def test_the_blocks_of_the_page_run_one_after_another(self):
    blocks = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)
    self.assertLen(blocks, 3)
    folder = self.create_tempdir().full_path
    before, names, out = os.getcwd(), {}, io.StringIO()
    try:
      os.chdir(folder)
      with contextlib.redirect_stdout(out):
        for block in blocks:
          exec(block, names)  # noqa: S102
    finally:
      os.chdir(before)
    first, stopped = names['results'], names['stopped']
    self.assertTrue(first.finished)
    self.assertEqual(first.rounds['round'], [1, 2, 3, 4])
    self.assertTrue(pathlib.Path(folder, 'first', 'report.html').exists())
    self.assertIn('held-out loss', out.getvalue())  # the summary
    # `enough` stopped it at the first evaluation below its limit.
    self.assertFalse(stopped.finished)
    values = stopped.evaluations['nats_per_byte']
    self.assertLess(values[-1], 5)
    self.assertTrue(all(value >= 5 for value in values[:-1]))
    self.assertEqual(
      stopped.evaluations['round'][-1], stopped.rounds['round'][-1]
    )
    self.assertEqual(names['again'], stopped._replace(params=None))


class EmulateTest(absltest.TestCase):
  @pytest.mark.slow
  def test_tables_have_the_fields_of_their_records(self):
    folder = pathlib.Path(self.create_tempdir().full_path, 'run')
    seen = []
    config = helpers.tiny('rounds=2')
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
      got = covenant.emulate(config, workdir=folder, callbacks=[seen.append])
    self.assertEmpty(out.getvalue())
    records = metrics.read(folder / 'metrics.jsonl')
    self.assertEqual(seen, records)
    rounds = metrics.rounds(records)
    self.assertEqual(got.rounds['loss'], [r.loss for r in rounds])
    self.assertEqual(got.steps['step'], list(range(len(got.steps['step']))))
    self.assertLen(got.miners['uid'], sum(len(r.uids) for r in rounds))
    for table in (got.rounds, got.evaluations, got.steps, got.miners):
      frame = pyarrow.table(table)
      self.assertEqual(frame.column_names, list(table))
      self.assertGreater(frame.num_rows, 0)
    self.assertIsNotNone(got.params)
    self.assertEqual(covenant.read_results(folder), got._replace(params=None))

  def test_wrong_arguments_are_errors_for_people(self):
    with self.assertRaisesRegex(config_lib.ConfigError, 'did you mean'):
      covenant.emulate('tinny')
    with self.assertRaisesRegex(config_lib.ConfigError, 'rounds'):
      results_lib.prepare('tiny', ['rounds=0'])
    with self.assertRaisesRegex(
      config_lib.ConfigError, 'there is no .*config.json'
    ):
      covenant.read_results(self.create_tempdir().full_path)


if __name__ == '__main__':
  absltest.main()
