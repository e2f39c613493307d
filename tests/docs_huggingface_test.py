"""The commands of docs/huggingface.md, from a run to a fine-tuned model."""

import contextlib
import importlib.util
import io
import json
import pathlib
import re
import shlex
import unittest

import pytest
from absl.testing import absltest
from absl.testing import flagsaver

from covenant import cli
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
    lines = ''.join(blocks).replace('\\\n', ' ').splitlines()
    folder = pathlib.Path(self.create_tempdir().full_path)
    (folder / 'configs').symlink_to(helpers.ROOT / 'configs')
    (folder / 'chats.jsonl').write_text(json.dumps(_CHAT) + '\n')
    self.assertGreater(len(lines), 7)
    for line in lines:
      python, *words = shlex.split(line)
      self.assertEqual(python, 'python')
      with (
        self.subTest(line),
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()) as out,
        flagsaver.flagsaver(verbosity=0),
      ):
        cli.run(cli._parse(words))
      if '--role=sample' in words:
        self.assertGreater(len(out.getvalue()), len('To be\n'))
    runs = folder / 'runs'
    for there in ('hf/4', 'gguf/4.gguf', 'finetuned', 'report.html'):
      self.assertTrue((runs / 'mine' / there).exists(), there)
    self.assertIn(
      'samples.jsonl', [p.name for p in (runs / 'samples').iterdir()]
    )


if __name__ == '__main__':
  absltest.main()
