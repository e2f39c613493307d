"""The text of --role=explain."""

import json
import pathlib

from absl.testing import absltest

from covenant.report import explain


class ExplainTest(absltest.TestCase):
  def test_texts_of_others_command_no_terminal(self):
    """A reason may have the words of a store, or of a peer."""
    folder = pathlib.Path(self.create_tempdir().full_path)
    now = dict(score=1.0, rating=0.0, mu=25.0, sigma=8.0)
    decision = dict(
      round=0, uid=3, hotkey='5F', verdict='UNREACHABLE', evaluation=None,
      before=now, after=now, reasons=['it says \x1b[2J and \ud800'],
    )  # fmt: skip
    record = dict(round=0, validator='a', decisions=[decision])
    (folder / 'verdicts.jsonl').write_text(json.dumps(record) + '\n')
    found = explain.text(str(folder), 3)
    self.assertIn('it says ?[2J and ?', found)
    self.assertIn('\n', found)


if __name__ == '__main__':
  absltest.main()
