import hypothesis
import hypothesis.strategies as st
import numpy as np
import tensorstore as ts
from absl.testing import absltest
from absl.testing import parameterized

from covenant.data import receipt as receipt_lib
from covenant.data import tokens as tokens_lib

CONTEXT = 4
SPLIT = tokens_lib.Split(ts.array(np.arange(401, dtype=np.int32)), 0)


def trained(batches):
  """The receipt of who reads batch after batch of ids."""
  receipt = receipt_lib.Receipt()
  for ids in batches:
    receipt.add(SPLIT.read(ids, CONTEXT))
  return receipt


class ReceiptTest(parameterized.TestCase):
  @hypothesis.given(
    st.lists(st.integers(0, 99), min_size=1, max_size=30), st.data()
  )
  def test_a_validator_finds_what_the_miner_says(self, ids, data):
    """In batches of any size, it is a receipt of the sequences in order."""
    cuts = sorted(data.draw(st.sets(st.integers(1, len(ids)))))
    batches = [b for b in np.split(np.array(ids), cuts) if b.size]
    receipt = trained(batches)
    self.assertEqual(receipt.sequences, len(ids))
    self.assertLen(receipt.digest(), receipt_lib.NUM_BYTES)
    self.assertEqual(
      receipt.digest(),
      receipt_lib.of_sequences(SPLIT, np.array(ids), CONTEXT),
    )

  @parameterized.parameters(
    ([0, 1, 2], [0, 1, 3]),
    ([0, 1, 2], [0, 2, 1]),
    ([0, 1, 2], [0, 1]),
    ([0, 1], [0, 1, 1]),
    ([0], []),
  )
  def test_other_data_has_another(self, one, other):
    receipts = {
      receipt_lib.of_sequences(SPLIT, np.array(ids, np.int64), CONTEXT)
      for ids in (one, other)
    }
    self.assertLen(receipts, 2)

  def test_every_token_is_in_it(self):
    tokens_BxL1 = SPLIT.read([3, 5], CONTEXT)
    seen = set()
    for at in np.ndindex(tokens_BxL1.shape):
      changed = tokens_BxL1.copy()
      changed[at] += 1
      receipt = receipt_lib.Receipt()
      receipt.add(changed)
      seen.add(receipt.digest())
    self.assertLen(seen - {trained([[3, 5]]).digest()}, tokens_BxL1.size)

  def test_is_of_tokens_not_of_their_layout_in_memory(self):
    tokens_BxL1 = SPLIT.read([3, 5], CONTEXT)
    want = trained([[3, 5]]).digest()
    for same in (
      np.asfortranarray(tokens_BxL1),
      tokens_BxL1.astype('>i4'),
      tokens_BxL1.astype(np.int64),
    ):
      receipt = receipt_lib.Receipt()
      receipt.add(same)
      self.assertEqual(receipt.digest(), want)

  def test_a_known_receipt(self):
    """Payloads carry it: it must never change."""
    want = 'aa17384bf428d1aa5e687982efddacb1'
    self.assertEqual(trained([[0, 1], [2]]).digest().hex(), want)


if __name__ == '__main__':
  absltest.main()
