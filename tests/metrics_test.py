import dataclasses
import json
import math
import pathlib
import struct

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized
from tensorboardX.proto import event_pb2

from covenant import metrics


def _round(number, **changes):
  fields = dict(
    round=number,
    tokens=5120 * number,
    loss=0.1 + 0.2,  # not representable: the file must keep every bit
    miner_losses=(0.25, 0.35),
    uids=(0, 7),
    learning_rate=3e-3,
    bytes_up=2000 * number,
    bytes_round=2000,
    dense_bytes_round=400_000,
    compression_ratio=200.0,
    delta_norm=0.5,
    error_norm=1.5,
    payloads=2,
    seconds=1.25,
    tokens_per_second=4096.0,
    weights=(0.75, 0.0, 0.25),
  )
  return metrics.Round(**(fields | changes))


def _evaluation(number, **changes):
  fields = dict(
    round=number,
    tokens=5120 * number,
    bytes_up=2000 * number,
    loss=1.8,
    nats_per_byte=1.8,
    bits_per_byte=1.8 / math.log(2),
    sequences=512,
    seconds=0.5,
  )
  return metrics.Evaluation(**(fields | changes))


def _event_steps(folder):
  """Returns (step, purges) of the events in TensorBoard's record framing."""
  events = []
  for path in sorted(folder.iterdir()):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack('<Q', data[:8])
      event = event_pb2.Event.FromString(data[12 : 12 + length])
      events.append((event.step, event.HasField('session_log')))
      data = data[16 + length :]
  return events


class MetricsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.path = self.folder / 'run' / 'metrics.jsonl'
    self.tensorboard = self.folder / 'run' / 'tensorboard'

  def _writer(self, resume=None):
    return metrics.MetricsWriter(self.path, self.tensorboard, resume=resume)

  def _write(self, *records, resume=None):
    with self._writer(resume) as writer:
      for record in records:
        writer.write(record)

  def test_round_trip(self):
    records = [_evaluation(0), _round(1), _round(2), _evaluation(2)]
    self._write(*records)
    self.assertEqual(metrics.read(self.path), records)

  def test_line_is_the_documented_schema(self):
    self._write(_round(1))
    fields = json.loads(self.path.read_text())
    self.assertEqual(fields['kind'], 'round')
    self.assertEqual(fields['uids'], [0, 7])
    schema = [field.name for field in dataclasses.fields(metrics.Round)]
    self.assertEqual(list(fields), ['kind'] + schema)

  def test_every_record_is_flushed(self):
    with self._writer() as writer:
      writer.write(_round(1))
      self.assertEqual(metrics.read(self.path), [_round(1)])

  def test_numpy_and_jax_scalars_become_python_numbers(self):
    record = _round(
      np.int64(3),
      tokens=jnp.int32(9),
      loss=np.float32(0.5),
      delta_norm=jnp.float32(0.25),
      miner_losses=np.array([0.25, 0.5], np.float32),
      uids=range(2),
      bytes_up=0,
    )
    plain = _round(
      3,
      tokens=9,
      loss=0.5,
      delta_norm=0.25,
      miner_losses=(0.25, 0.5),
      uids=(0, 1),
      bytes_up=0,
    )
    self.assertEqual(record, plain)
    self.assertEqual(metrics.decode(metrics.encode(record)), plain)

  @parameterized.parameters(math.nan, math.inf, -math.inf, np.float32('nan'))
  def test_non_finite_is_an_error_that_names_the_field(self, value):
    with self.assertRaisesRegex(
      metrics.MetricsError, r"round 7: 'loss' is -?(nan|inf).*diverged"
    ):
      _round(7, loss=value)
    with self.assertRaisesRegex(metrics.MetricsError, r"'miner_losses'\[1\]"):
      _round(7, miner_losses=(1.0, value))

  @parameterized.parameters(
    (dict(tokens=1.5), "'tokens' is 1.5, not an integer"),
    (dict(tokens=True), "'tokens' is True, not a number"),
    (dict(loss='3'), "'loss' is '3', not a number"),
    (dict(loss=None), "'loss' is None"),
    (dict(uids=3), "'uids' is 3, not a list"),
    (dict(uids='01'), "'uids' is '01', not a list"),
    (dict(uids=(1,)), '2 miner_losses for 1 uids'),
  )
  def test_wrong_type(self, changes, message):
    with self.assertRaisesRegex(metrics.MetricsError, message):
      _round(1, **changes)

  def test_records_of_one_kind(self):
    records = [_evaluation(0), _round(1), _evaluation(1)]
    self.assertEqual(metrics.rounds(records), [records[1]])
    self.assertEqual(metrics.evaluations(records), [records[0], records[2]])

  def test_resume_drops_what_came_after_the_checkpoint(self):
    first = [_evaluation(0)] + [_round(r) for r in (1, 2, 3)] + [_evaluation(3)]
    self._write(*first)
    redone = _round(3, loss=0.7)
    self._write(redone, resume=2)
    self.assertEqual(metrics.read(self.path), first[:3] + [redone])
    self.assertEqual([p.name for p in self.path.parent.glob('*.tmp')], [])

  def test_resume_drops_a_torn_last_line(self):
    self._write(_round(1), _round(2))
    whole = self.path.read_bytes()
    self.path.write_bytes(whole[:-9])
    self.assertEqual(metrics.read(self.path), [_round(1)])
    self._write(_round(2), resume=1)
    self.assertEqual(self.path.read_bytes(), whole)

  def test_resumed_file_equals_an_uninterrupted_one(self):
    records = [_round(r) for r in range(1, 7)]
    self._write(*records)
    whole = self.path.read_bytes()
    for cut in range(0, len(whole), 97):  # killed anywhere
      self.path.write_bytes(whole[:cut])
      done = len(metrics.read(self.path))
      checkpoint = done - done % 2
      self._write(*records[checkpoint:], resume=checkpoint)
      self.assertEqual(self.path.read_bytes(), whole)

  def test_without_a_checkpoint_the_file_starts_anew(self):
    self._write(_round(1), _round(2))
    self._write(_round(1))
    self.assertEqual(metrics.read(self.path), [_round(1)])

  def test_resume_without_a_file(self):
    self._write(_round(3), resume=2)
    self.assertEqual(metrics.read(self.path), [_round(3)])

  def test_resume_refuses_a_malformed_file_and_leaves_it(self):
    self._write(_round(1))
    content = self.path.read_bytes() + b'{"kind": "oops"}\n'
    self.path.write_bytes(content)
    with self.assertRaisesRegex(metrics.MetricsError, 'jsonl:2: kind is .oops'):
      self._writer(resume=1)
    self.assertEqual(self.path.read_bytes(), content)

  @parameterized.parameters(
    b'oops', b'', b'\xff', b'\0' * 512, b'{"kind":', b'[' * 5000
  )
  def test_torn_lines_cost_themselves(self, torn):
    """Anywhere in the file; the next writer removes them."""
    self._write(_round(1), _round(2))
    whole = self.path.read_bytes()
    first, second = whole.splitlines(keepends=True)
    for content in (
      torn + b'\n' + whole,
      first + torn + b'\n' + second,
      whole + torn + b'\n',
      whole + torn,
    ):
      self.path.write_bytes(content)
      self.assertEqual(metrics.read(self.path), [_round(1), _round(2)])
      self._write(resume=2)
      self.assertEqual(self.path.read_bytes(), whole)
    zeros = first + b'\0' * 512 + second
    self.path.write_bytes(zeros)
    self.assertEqual(metrics.read(self.path), [_round(1), _round(2)])

  @parameterized.parameters(
    ('[]', 'not a JSON object but a list'),
    ('{}', 'kind is None; allowed: round, evaluation'),
    ('{"kind": ["round"]}', r"kind is \['round'\]"),
    ('{"kind": "round", "round": 1}', 'round: missing bytes_round, bytes_up'),
  )
  def test_malformed_lines_name_their_number(self, line, message):
    self._write(_round(1))
    with open(self.path, 'ab') as file:
      file.write(line.encode('latin-1') + b'\n')
    with self.assertRaisesRegex(
      metrics.MetricsError, f'metrics.jsonl:2: {message}'
    ):
      metrics.read(self.path)

  @parameterized.parameters(
    ('1.8,', 'NaN,', "'loss' is nan"),
    ('1.8,', '1e999,', "'loss' is inf"),
    ('"loss"', '"lost": 0, "loss"', 'unknown field lost'),
  )
  def test_decode_refuses(self, old, new, message):
    line = metrics.encode(_evaluation(4)).replace(old, new, 1)
    with self.assertRaisesRegex(metrics.MetricsError, message):
      metrics.decode(line)

  def test_reads_runs_of_before_a_field_was_there(self):
    line = metrics.encode(_round(4)).replace('"train_seconds": 0.0, ', '')
    self.assertNotIn('train_seconds', line)
    self.assertEqual(metrics.decode(line), _round(4))

  def test_tensorboard_gets_the_scalars_and_the_purge(self):
    self._write(_round(1), _round(2), _evaluation(2))
    self._write(_round(2), resume=1)
    events = _event_steps(self.tensorboard)
    self.assertIn((0, True), events)
    self.assertIn((2, True), events)
    # All fields but `round` and the two lists.
    self.assertEqual(events.count((1, False)), 17)

  def test_a_step_and_a_round_of_a_process(self):
    step = metrics.Step(3, 20, 512, math.nan, 1.5, 1e-3, skipped=1)
    self.assertIsNone(step.loss)
    self.assertNotIn('mfu', metrics.encode(step))
    node = metrics.NodeRound(3, 2.0, 0.5, 10, 20, 5.0, 4.0, 1, 0, 7, 8, 9)
    self._write(_round(2), step, node)
    self.assertEqual(metrics.read(self.path), [_round(2)])
    self.assertEqual(
      metrics.read(self.path, [metrics.Step, metrics.NodeRound]), [step, node]
    )
    events = _event_steps(self.tensorboard)
    self.assertIn((20, False), events)  # by the inner step

  def test_sync_and_close_may_be_repeated(self):
    writer = self._writer()
    writer.write(_round(1))
    writer.sync()
    writer.sync()
    writer.close()
    writer.close()
    self.assertEqual(metrics.read(self.path), [_round(1)])


if __name__ == '__main__':
  absltest.main()
