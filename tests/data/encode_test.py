"""Tests for covenant.data.encode."""

import pathlib
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.data import corpus
from covenant.data import encode
from covenant.data import shards
from covenant.data import tokenize
from covenant.data import tokenizer as tokenizer_lib
from tests import helpers
from tests.data import text_files
from tests.data import tokenize_test


class EncodeTest(parameterized.TestCase):
  def config(self, path, **fields):
    data = config_lib.Data(source='text', path=str(path), **fields)
    return config_lib.Config(model=config_lib.Model(vocab_size=300), data=data)

  def folder(self) -> pathlib.Path:
    return pathlib.Path(self.create_tempdir().full_path)

  def test_long_documents_are_encoded_in_pieces(self):
    """The ids do not depend on blocks, batches or the format of the file."""
    texts = ['a word\n' * 60, 'x' * 500, 'b ' * 200, 'short', *'cdefgh']
    rows, files = self.folder(), self.folder()
    text_files.write_rows(rows / 'a.jsonl', texts)
    for i, text in enumerate(texts):
      (files / f'{i}.txt').write_text(text)
    longest = []

    class Bytes(tokenizer_lib.Bytes):
      def encode(self, text):
        longest.append(len(text))
        return super().encode(text)

    found = []
    with (
      mock.patch.object(corpus, 'PIECE', 100),
      mock.patch.object(tokenizer_lib, 'Bytes', Bytes),
    ):
      for path in (rows, files):
        encode.load.cache_clear()
        out = str(self.folder() / 'out')
        tokenize.run(self.config(path, heldout_fraction=0.3), out)
        train = shards.open_shards(out).train
        found.append(train.read(np.arange(train.num_sequences(1)), 1)[:, 0])
      encode.load.cache_clear()
    self.assertLessEqual(max(longest), 100)
    np.testing.assert_array_equal(*found)

  def test_nul_matters_to_the_byte_tokenizer_only(self):
    folder = self.folder()
    text_files.write_rows(
      folder / 'a.jsonl', ['a\0b', 'c', *map(str, range(20))]
    )
    with self.assertRaisesRegex(
      config_lib.ConfigError, "'.*a.jsonl' has a NUL at byte 1"
    ):
      tokenize.run(self.config(folder), str(self.folder() / 'out'))
    made = tokenize.run(
      self.config(folder, tokenizer='bpe', heldout_fraction=0.2),
      str(self.folder() / 'out'),
    )
    self.assertEqual(made.sources[0].documents, 22)

  @pytest.mark.network
  def test_processes_write_the_same(self):
    folder = self.folder()
    for i in range(3):
      text_files.write_rows(folder / f'{i}.parquet', tokenize_test.TEXTS[i::3])
    made = []
    for workers in (1, 2, 7):  # 7: two processes encode one file
      out = self.folder() / 'out'
      manifest = tokenize.run(self.config(folder), str(out), workers)
      made.append((manifest, tokenize_test.shard_files(out)))
    self.assertEqual(made[1], made[0])
    self.assertEqual(made[2], made[0])

  @pytest.mark.network
  def test_kill_and_the_same_command(self):
    folder, out, again = self.folder(), self.folder(), self.folder()
    for i in range(6):
      texts = [f'{i} {n} ' + 'some words ' * 300 for n in range(800)]
      text_files.write_rows(folder / f'{i}.jsonl', texts)
    command = [
      sys.executable, str(helpers.ROOT / 'run.py'), '--role=tokenize',
      '--config=configs/tiny.py', '--config.data.source=text',
      f'--config.data.path={folder}', '--workers=2',
    ]  # fmt: skip
    job = subprocess.Popen(
      [*command, f'--workdir={out}'], cwd=helpers.ROOT, start_new_session=True
    )
    while job.poll() is None and not list(out.glob('00*')):
      time.sleep(0.005)
    job.send_signal(signal.SIGKILL)  # its processes end by themselves
    job.wait()
    self.assertFalse((out / 'manifest.json').exists())
    for folder in (out, again):
      subprocess.run(
        [*command, f'--workdir={folder}'], cwd=helpers.ROOT, check=True
      )
    self.assertEqual(
      tokenize_test.shard_files(out), tokenize_test.shard_files(again)
    )
    self.assertEqual(
      (out / 'manifest.json').read_bytes(),
      (again / 'manifest.json').read_bytes(),
    )
    self.assertEmpty(list(out.glob('.*.partial')))


if __name__ == '__main__':
  absltest.main()
