import dataclasses
import pathlib

import pytest
from absl.testing import absltest
from absl.testing import parameterized
from matplotlib import image

from covenant.report import plots
from tests.report import workdirs


def _records(rounds, miners):
  """Returns records of a run whose last miner joins half-way."""
  return workdirs.records(rounds, miners, joins=rounds // 2 + 1)


class PlotsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def _ink(self, path):
    """Fraction of the pixels that are not white."""
    pixels_HxWxC = image.imread(path)
    self.assertEqual(pixels_HxWxC.shape[:2], (600, 960))
    return (pixels_HxWxC[:, :, :3].min(axis=-1) < 0.9).mean()

  @parameterized.named_parameters(
    ('usual', 12, 4), ('one_miner', 3, 1), ('many_miners', 20, 64)
  )
  @pytest.mark.rows(1)
  def test_figures(self, rounds, miners):
    paths = plots.write_figures(_records(rounds, miners), self.folder / 'new')
    self.assertEqual(
      [path.name for path in paths],
      ['loss_tokens.png', 'loss_bytes.png', 'miner_losses.png', 'weights.png'],
    )
    empty = plots.write_figures([], self.folder / 'empty')
    for path, blank in zip(paths, empty, strict=True):
      self.assertGreater(self._ink(path), self._ink(blank) + 0.005)

  @parameterized.named_parameters(
    ('no_record', []),
    ('first_evaluation', _records(0, 2)),
    ('one_round', _records(1, 2)[1:]),
  )
  @pytest.mark.rows(1)
  def test_short_runs(self, records):
    for path in plots.write_figures(records, self.folder):
      self.assertGreater(self._ink(path), 0.001)
    for axis in ('tokens', 'bytes'):
      path = plots.compare({'a': records, 'b': []}, self.folder / 'c.png', axis)
      self.assertGreater(self._ink(path), 0.001)

  def test_a_uid_that_registers_later(self):
    first, *others = [r for r in _records(4, 3) if r.kind == 'round'][1:]
    records = [dataclasses.replace(first, weights=(0.5, 0.5)), *others]
    *_, path = plots.write_figures(records, self.folder)
    self.assertGreater(self._ink(path), 0.001)

  @pytest.mark.slow
  def test_adversaries_are_marked(self):
    records = _records(12, 4)
    *_, plain = plots.write_figures(records, self.folder / 'plain')
    *_, marked = plots.write_figures(records, self.folder / 'a', {3: 'copier'})
    self.assertGreater(self._ink(marked), 0.01)
    self.assertNotEqual(plain.read_bytes(), marked.read_bytes())

  @parameterized.parameters('tokens', 'bytes')
  def test_compare(self, axis):
    runs = {f'{miners} miners': _records(8, miners) for miners in range(1, 9)}
    path = self.folder / 'figures' / 'compare.png'
    self.assertEqual(plots.compare(runs, path, axis), path)
    self.assertGreater(self._ink(path), 0.02)

  @pytest.mark.slow
  def test_equal_runs_make_equal_files(self):
    first = plots.write_figures(_records(4, 2), self.folder / 'a')
    second = plots.write_figures(_records(4, 2), self.folder / 'b')
    for a, b in zip(first, second, strict=True):
      self.assertEqual(a.read_bytes(), b.read_bytes())


if __name__ == '__main__':
  absltest.main()
