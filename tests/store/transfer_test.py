"""One read under way."""

from absl.testing import absltest

from covenant.store import transfer as transfer_lib


class CancelTest(absltest.TestCase):
  def test_a_read_is_ended_once_however_often_it_is_canceled(self):
    transfer, ended = transfer_lib.Transfer(), []
    transfer.on_cancel(lambda: ended.append('first'))
    for _ in range(3):
      transfer.cancel()
    self.assertEqual(ended, ['first'])

  def test_a_read_that_begins_after_its_end_is_ended_at_once(self):
    transfer, ended = transfer_lib.Transfer(), []
    transfer.cancel()
    transfer.on_cancel(lambda: ended.append('late'))
    transfer.cancel()
    self.assertEqual(ended, ['late'])


if __name__ == '__main__':
  absltest.main()
