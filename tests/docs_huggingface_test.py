"""The commands of docs/huggingface.md, from a run to a fine-tuned model."""

import importlib.util
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import unittest

import pytest
from absl.testing import absltest

from tests import helpers

_CHAT = {
  'messages': [
    {'role': 'user', 'content': 'Who are you?'},
    {'role': 'assistant', 'content': 'A model.'},
  ]
}


@unittest.skipUnless(importlib.util.find_spec('gguf'), 'needs the extra hf')
class HuggingFacePageTest(absltest.TestCase):
  @pytest.mark.docs
  def test_all_commands(self):
    path = helpers.ROOT / 'docs' / 'huggingface.md'
    blocks = re.findall(r'```sh\n(.*?)```', path.read_text(), re.DOTALL)
    folder = pathlib.Path(self.create_tempdir().full_path)
    for name in ('run.py', 'configs'):
      (folder / name).symlink_to(helpers.ROOT / name)
    (folder / 'chats.jsonl').write_text(json.dumps(_CHAT) + '\n')
    said = []
    for block in blocks:
      # A line that begins a command ends the one before.
      for command in re.split(r'\n(?=python )', block.strip()):
        python, *words = shlex.split(command)
        self.assertEqual(python, 'python')
        done = subprocess.run(
          [sys.executable, *words],
          cwd=folder,
          env={**os.environ, 'PYTHONPATH': str(helpers.ROOT)},
          capture_output=True,
          text=True,
          timeout=600,
          check=False,
        )
        self.assertEqual(done.returncode, 0, f'{command}: {done.stderr}')
        said.append(done.stdout)
    self.assertGreater(len(said), 7)
    runs = folder / 'runs'
    for there in ('hf/4', 'gguf/4.gguf', 'finetuned'):
      self.assertTrue((runs / 'mine' / there).exists(), there)
    self.assertTrue((runs / 'samples' / 'samples.jsonl').exists())


if __name__ == '__main__':
  absltest.main()
