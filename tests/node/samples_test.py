"""Samples of text that a run writes while it trains."""

import dataclasses
import json
import pathlib

import pytest
from absl.testing import absltest

from covenant import config as config_lib
from covenant.emulate import emulation
from covenant.node import samples
from covenant.report import folder
from covenant.report import samples as section_lib
from tests import helpers


class SamplesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(self.create_tempdir().full_path)

  def config(self, **changes):
    wanted = {'samples': 2, 'prompt': 'To', 'sample_tokens': 6} | changes
    config = helpers.tiny('rounds=3')
    return dataclasses.replace(
      config, eval=dataclasses.replace(config.eval, **wanted)
    )

  @pytest.mark.slow
  def test_a_run_writes_one_every_few_rounds_and_the_last(self):
    outcome = emulation.run(self.config(), self.workdir)
    found = samples.read(self.workdir)
    self.assertEqual([x['round'] for x in found], [2, 3])
    for line in found:
      self.assertEqual(line['prompt'], 'To')
      self.assertNotEmpty(line['text'])
    (shown,) = section_lib.section(folder.read(self.workdir))
    for line in found:
      self.assertIn(f'<th scope="row">{line["round"]}</th>', shown)
    # Going on from round 2 writes what followed once more, and nothing twice.
    sampler = samples.Sampler(self.config(), self.workdir, 2)
    self.assertEqual([x['round'] for x in samples.read(self.workdir)], [2])
    sampler.add(3, outcome.state.shared.params)
    self.assertEqual(samples.read(self.workdir), found)

  def test_there_are_none_unless_asked_for(self):
    sampler = samples.Sampler(self.config(samples=0), self.workdir)
    self.assertFalse(sampler.is_due(2, last=True))
    self.assertEmpty(samples.read(self.workdir))
    (self.workdir / 'metrics.jsonl').write_text('')
    self.assertEmpty(section_lib.section(folder.read(self.workdir)))

  def test_is_due(self):
    sampler = samples.Sampler(self.config(samples=2), self.workdir)
    due = [n for n in range(1, 6) if sampler.is_due(n, last=n == 5)]
    self.assertEqual(due, [2, 4, 5])

  def test_text_of_a_model_is_no_markup(self):
    line = {'round': 1, 'prompt': '<b>', 'text': '<script>x</script>'}
    (self.workdir / samples.FILE).write_text(json.dumps(line) + '\n')
    (self.workdir / 'metrics.jsonl').write_text('')
    (shown,) = section_lib.section(folder.read(self.workdir))
    self.assertIn('&lt;b&gt;&lt;script&gt;', shown)
    self.assertNotIn('<script>', shown)

  @pytest.mark.slow
  def test_it_can_be_asked_for_in_a_run_that_began_without(self):
    emulation.run(
      dataclasses.replace(self.config(samples=0), rounds=1), self.workdir
    )
    emulation.run(self.config(samples=1), self.workdir)
    self.assertEqual([x['round'] for x in samples.read(self.workdir)], [2, 3])

  def test_the_fields_are_no_part_of_a_run(self):
    self.assertEqual(
      config_lib.identity(self.config()),
      config_lib.identity(self.config(samples=0)),
    )


if __name__ == '__main__':
  absltest.main()
