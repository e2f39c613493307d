"""Charts of all that a run and a process measure."""

import json
import pathlib

from absl.testing import absltest

from covenant import metrics
from covenant.report import page
from tests.report import reader
from tests.report import workdirs


class SeriesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path, 'run')

  def rows(self):
    return reader.Reader(page.write(self.folder).read_text()).rows

  def steps(self, name, **fields):
    """Adds four steps of two rounds to a file."""
    steps = [
      metrics.Step(
        round=1 + i // 2, step=i, tokens=512, loss=4.0 - i, learning_rate=0.5,
        gradient_norm=None if i == 3 else 1.0 + i, **fields,
      )
      for i in range(4)
    ]  # fmt: skip
    with open(self.folder / name, 'a') as file:
      file.writelines(metrics.encode(step) + '\n' for step in steps)

  def test_every_number_of_a_round_is_drawn(self):
    workdirs.write(self.folder, rounds=2, miners=4)
    self.steps('steps.jsonl')
    rows = self.rows()
    for head, last in (
      (['last inner step'], ['0.001']),
      # The mean norm of a round; the last step's is not finite.
      (['update', 'error feedback', 'gradient'], ['1', '1', '3']),
      (['all miners'], ['512']),
      (['accepted', 'miners that trained'], ['4', '4']),
      (['payloads'], ['4,000']),
      (
        ['whole round', 'training', 'exchange', 'outer step', 'scoring'],
        ['2', '0', '0', '0', '0'],
      ),
    ):
      start = rows.index(['rounds completed', *head])
      self.assertEqual(rows[start + 2], ['2', *last])

  def test_a_process_has_its_own(self):
    workdirs.events(self.folder)
    self.steps('metrics.jsonl', tokens_per_second=100.0, mfu=0.25)
    record = metrics.NodeRound(
      round=1, seconds=9.0, queue_seconds=5.0, bytes_sent=2_000_000,
      bytes_received=3_000_000, send_rate=1e6, receive_rate=2e6, retries=1,
      failures=0, host_bytes=10**9, host_free_bytes=2 * 10**9,
      disk_free_bytes=3 * 10**9, train_seconds=3.0,
    )  # fmt: skip
    with open(self.folder / 'metrics.jsonl', 'a') as file:
      file.write(metrics.encode(record) + '\n')
    status = {'role': 'miner', 'uid': 3, 'hotkey': '5Abc', 'round': 7}
    (self.folder / 'status.json').write_text(json.dumps(status))
    rows = self.rows()
    for head, row in (
      (['inner step', 'Training loss'], ['3', '1']),
      (['inner step', 'Gradient norm'], ['3', '']),
      (['inner step', 'Utilization'], ['3', '0.25']),
      (
        ['rounds completed', 'bytes sent', 'bytes received'],
        ['1', '2,000,000', '3,000,000'],
      ),
      (['rounds completed', 'seconds', 'queue', 'train'], ['1', '9', '5', '3']),
      (['rounds completed', 'retries', 'failures'], ['1', '1', '0']),
    ):
      self.assertIn(head, rows)
      self.assertIn(row, rows[rows.index(head) :])
    text = (self.folder / 'report.html').read_text()
    self.assertIn(
      'The miner of a network, uid 3, after 7 rounds. Hotkey 5Abc.', text
    )


if __name__ == '__main__':
  absltest.main()
