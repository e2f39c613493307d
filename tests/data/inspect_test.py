"""Tests for covenant.data.inspect."""

import pathlib

from absl.testing import absltest

from covenant import config as config_lib
from covenant.data import inspect as inspect_lib
from covenant.data import shards
from covenant.data import tokenize
from tests.data import text_files

TEXTS = [f'{i} ' + 'the cat sat ' * (i % 7 + 1) for i in range(60)]


class InspectTest(absltest.TestCase):
  def write(self, name: str) -> str:
    folder = pathlib.Path(self.create_tempdir().full_path)
    for i in range(22):
      text_files.write_rows(folder / f'{name}{i}.jsonl', TEXTS[i::22])
    data = config_lib.Data(source='text', path=str(folder))
    tokenize.run(config_lib.Config(data=data), str(folder / 'out'))
    return str(folder / 'out')

  def config(self, **data) -> config_lib.Config:
    return config_lib.Config(
      rounds=10, data=config_lib.Data(source='shards', context=16, **data)
    )

  def test_a_folder(self):
    path = self.write('a')
    text = inspect_lib.text(self.config(path=path))
    manifest = shards.read_manifest(path)
    self.assertIn(f'digest   {manifest.digest}', text)
    self.assertIn(f'{manifest.num_tokens("train"):,} tokens', text)
    self.assertIn('source   a0.jsonl: 3 documents', text)
    self.assertIn('source   ... 2 more', text)
    self.assertRegex(text, r"sample   '.*the cat sat")
    self.assertIn('rounds   0 to 9: 80 sequences of 16 per miner', text)

  def test_phases(self):
    one, two = self.write('a'), self.write('b')
    share = config_lib.DataShare
    phases = (
      config_lib.DataPhase(0, (share(one),)),
      config_lib.DataPhase(6, (share(one, 1.0), share(two, 3.0))),
    )
    text = inspect_lib.text(self.config(phases=phases))
    self.assertIn('rounds   0 to 5', text)
    self.assertIn('rounds   6 to 9', text)
    self.assertRegex(text, f'75.00% {two}: .* sequences, drawn .* on average')

  def test_damage(self):
    path = self.write('a')
    file = pathlib.Path(path, '000003', 'train-00000.tokens')
    file.write_bytes(b'x' + file.read_bytes()[1:])
    with self.assertRaisesRegex(config_lib.ConfigError, '000003/train-00000'):
      inspect_lib.text(self.config(path=path))

  def test_text(self):
    config = config_lib.Config(data=config_lib.Data(source='synthetic'))
    self.assertRegex(inspect_lib.text(config), 'train +900,001 tokens')


if __name__ == '__main__':
  absltest.main()
