import pathlib
import struct
import time
from unittest import mock

from absl.testing import absltest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from covenant import tensorboard


class EventWriterTest(absltest.TestCase):
  def test_files_are_in_the_order_of_starts_whatever_the_clock_says(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    starts = []
    for seconds in (2e9, 1e9, 1e9, 2e9, 3e9):
      with mock.patch.object(time, 'time', return_value=seconds):
        tensorboard.EventWriter(folder, 3).close()
      (new,) = {path.name for path in folder.iterdir()} - {*starts}
      starts.append(new)
    self.assertEqual(starts, sorted(starts))

  def test_tensorboards_own_classes_read_it(self):
    folder = pathlib.Path(self.create_tempdir().full_path, 'events')
    writer = tensorboard.EventWriter(folder, 300)
    writer.add_scalar('round/loss', -1.5, 70_000)
    writer.add_scalar('round/tokens_per_second', 1e30, 0)
    writer.flush()
    writer.close()
    (path,) = folder.iterdir()
    self.assertRegex(path.name, r'^events\.out\.tfevents\.\d{10}\..*\.from300$')
    data, events = path.read_bytes(), []
    while data:
      (length,) = struct.unpack('<Q', data[:8])
      event = data[12 : 12 + length]
      crcs = data[8:12], data[12 + length : 16 + length]
      want = masked_crc32c(data[:8]), masked_crc32c(event)
      self.assertEqual(crcs, tuple(struct.pack('<I', c) for c in want))
      events.append(event_pb2.Event.FromString(event))
      data = data[16 + length :]
    first, purge, loss, speed = events
    self.assertEqual(first.file_version, 'brain.Event:2')
    self.assertEqual(purge.step, 300)
    self.assertEqual(purge.session_log.status, event_pb2.SessionLog.START)
    (value,) = loss.summary.value
    self.assertEqual(
      (loss.step, value.tag, value.simple_value), (70_000, 'round/loss', -1.5)
    )
    self.assertEqual(speed.step, 0)
    self.assertGreater(loss.wall_time, 1e9)


if __name__ == '__main__':
  absltest.main()
