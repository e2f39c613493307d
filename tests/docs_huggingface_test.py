"""The commands of docs/huggingface.md, and of the pages of its runs."""

import contextlib
import importlib.util
import io
import json
import pathlib
import re
import shlex
import unittest
import warnings

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


def commands(page, start=''):
  """Returns the commands of a page of docs/, from a heading on."""
  text = (helpers.ROOT / 'docs' / page).read_text()
  blocks = re.findall(r'```sh\n(.*?)```', text[text.index(start) :], re.DOTALL)
  return [b.replace('\\\n', ' ').splitlines() for b in blocks]


@unittest.skipUnless(importlib.util.find_spec('gguf'), 'needs the extra hf')
class HuggingFacePageTest(absltest.TestCase):
  @pytest.mark.docs
  def test_all_commands(self):
    lines = sum(commands('huggingface.md'), [])
    # The same of a workdir and of several, with two of these runs.
    report, compare = commands('operating.md', '## Reading a run')[0]
    lines.append(report.replace('DIR', 'runs/samples'))
    lines.append(
      compare.replace('DIR,DIR,DIR', 'runs/mine,runs/samples').replace(
        'NEW', 'runs/page'
      )
    )
    lines.append(f'{lines[-1]} --baseline=samples')
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
    text = (helpers.ROOT / 'docs' / 'huggingface.md').read_text()
    for program in re.findall(r'```python\n(.*?)```', text, re.DOTALL):
      with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(action='ignore'),  # of transformers
      ):
        exec(compile(program, 'huggingface.md', 'exec'), {})
    runs = folder / 'runs'
    for there in ('hf/4', 'gguf/4.gguf', 'finetuned', 'report.html'):
      self.assertTrue((runs / 'mine' / there).exists(), there)
    texts = (runs / 'samples' / 'samples.jsonl').read_text().splitlines()
    page = (runs / 'samples' / 'report.html').read_text()
    self.assertLen(texts, 2)  # every two rounds of four
    self.assertIn('To be', page)
    self.assertTrue((runs / 'page' / 'compare.html').exists())


if __name__ == '__main__':
  absltest.main()
