"""Notebooks: what people edit, what is stored, and whether it runs."""

import os
import pathlib
import re
import shutil
import subprocess

import jupytext
import nbclient
import nbformat
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from tests import helpers

NOTEBOOKS = helpers.ROOT / 'notebooks'
NAMES = sorted(path.stem for path in NOTEBOOKS.glob('*.py'))
EACH = [(name,) for name in NAMES]


def stored(name):
  return nbformat.read(NOTEBOOKS / f'{name}.ipynb', as_version=4)


def pictures(notebook):
  return [
    output
    for cell in notebook.cells
    for output in cell.get('outputs', [])
    if 'image/png' in output.get('data', {})
  ]


class NotebooksTest(parameterized.TestCase):
  def test_all_are_paired(self):
    names = sorted(path.stem for path in NOTEBOOKS.glob('*.ipynb'))
    self.assertEqual(names, NAMES)

  @parameterized.parameters(*EACH)
  def test_in_sync(self, name):
    text = jupytext.read(NOTEBOOKS / f'{name}.py')
    self.assertEqual(
      [(cell.cell_type, cell.source) for cell in stored(name).cells],
      [(cell.cell_type, cell.source) for cell in text.cells],
    )

  @parameterized.parameters(*EACH)
  def test_what_is_stored_ran_once_from_top_to_bottom(self, name):
    notebook = stored(name)
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
    self.assertEqual(
      [cell.execution_count for cell in cells], list(range(1, len(cells) + 1))
    )
    self.assertNotEmpty(pictures(notebook))

  @parameterized.parameters(*EACH)
  def test_opens_in_colab(self, name):
    first, code = (cell.source for cell in stored(name).cells[:2])
    self.assertIn('colab-badge.svg)', first)
    self.assertIn(f'/covenant/blob/main/notebooks/{name}.ipynb)', first)
    # What it needs there comes before all that is of this project.
    self.assertLess(code.index('git clone'), code.index('from covenant'))

  def test_a_release_gives_them_the_address_of_the_repository(self):
    page = (helpers.ROOT / 'docs' / 'releasing.md').read_text()
    (command,) = re.findall(r'^ *(sed -i .*)$', page, re.MULTILINE)
    folder = pathlib.Path(self.create_tempdir().full_path)
    shutil.copytree(NOTEBOOKS, folder / 'notebooks')
    subprocess.run(command, shell=True, cwd=folder, check=True)
    for path in (folder / 'notebooks').glob('0*'):
      self.assertEqual(
        path.read_text().replace('/YOU/covenant', '/OWNER/covenant'),
        (NOTEBOOKS / path.name).read_text(),
      )
      self.assertNotIn('OWNER', path.read_text())
    # Nothing else needs it.
    found = subprocess.run(
      ['git', 'grep', '-l', 'OWNER/covenant', '--', ':!tests', ':!notebooks'],
      cwd=helpers.ROOT,
      capture_output=True,
      text=True,
    )
    self.assertIn(found.stdout.split(), ([], ['docs/releasing.md']))

  @parameterized.parameters(*EACH)
  @pytest.mark.docs
  def test_runs(self, name):
    notebook = stored(name)
    client = nbclient.NotebookClient(
      notebook, timeout=600, resources={'metadata': {'path': str(NOTEBOOKS)}}
    )
    # This checkout, small, and what is compiled is for all of them.
    env = {**os.environ, 'PYTHONPATH': str(helpers.ROOT), 'QUICK': '1'}
    client.execute(env=env)
    self.assertNotEmpty(pictures(notebook))


if __name__ == '__main__':
  absltest.main()
