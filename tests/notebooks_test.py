"""Every notebook runs from its first cell to its last."""

import pathlib

import nbclient
import nbformat
from absl.testing import absltest
from absl.testing import parameterized

NOTEBOOKS = pathlib.Path(__file__).parent.parent / 'notebooks'


class NotebooksTest(parameterized.TestCase):
  @parameterized.parameters(*[(p.name,) for p in NOTEBOOKS.glob('*.ipynb')])
  def test_runs(self, name):
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    client = nbclient.NotebookClient(
      notebook, timeout=300, resources={'metadata': {'path': str(NOTEBOOKS)}}
    )
    client.execute()
    pictures = [
      output
      for cell in notebook.cells
      for output in cell.get('outputs', [])
      if 'image/png' in output.get('data', {})
    ]
    self.assertNotEmpty(pictures)


if __name__ == '__main__':
  absltest.main()
