import pathlib
import subprocess

import jax
from absl.testing import absltest

import covenant
from covenant.telemetry import provenance


class ProvenanceTest(absltest.TestCase):
  def test_each_start_is_a_line(self):
    folder = self.create_tempdir().full_path
    self.assertEmpty(provenance.read(folder))
    provenance.record(folder)
    provenance.record(folder)
    first, second = provenance.read(folder)
    self.assertLessEqual(first['time'], second['time'])
    self.assertEqual(first['versions']['jax'], jax.__version__)
    self.assertEqual(first['versions']['covenant'], covenant.__version__)
    self.assertEqual(first['devices'], f'{jax.device_count()} x cpu')

  def test_the_commit_of_a_checkout(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    self.assertEqual(provenance.commit(root), '')

    def git(*words):
      author = ['-c', 'user.name=a', '-c', 'user.email=a@b.c']
      subprocess.run(
        ['git', *author, *words], cwd=root, check=True, capture_output=True
      )

    git('init')
    (root / 'a').write_text('1')
    git('add', 'a')
    git('commit', '-m', 'first')
    found = provenance.commit(root)
    self.assertRegex(found, r'^[0-9a-f]{12}$')
    (root / 'a').write_text('2')
    self.assertEqual(provenance.commit(root), f'{found}-dirty')


if __name__ == '__main__':
  absltest.main()
