"""The codec of the tests writes and reads what a real node did."""

from absl.testing import absltest

from tests.chain import runtime as runtime_lib


def raw(text):
  return bytes.fromhex(text.removeprefix('0x'))


class RecordedTest(absltest.TestCase):
  """Bytes of a node of spec 461, both ways."""

  def setUp(self):
    super().setUp()
    self.runtime = runtime_lib.of(runtime_lib.RECORDED)
    self.recorded = runtime_lib.recorded()

  def test_storage_keys(self):
    cases = [*self.recorded['storage_keys'], *self.recorded['storage_values']]
    self.assertGreater(len(cases), 15)
    for case in cases:
      key = self.runtime.key(
        case['pallet'], case['storage_function'], case['params']
      )
      self.assertEqual(key.hex(), raw(case['key_hex']).hex(), case)

  def test_storage_values(self):
    checked = 0
    for case in self.recorded['storage_values']:
      if case['raw_hex'] is not None:
        names = case['pallet'], case['storage_function']
        kind = self.runtime.codec.storage_entry(*names).value_type
        data = raw(case['raw_hex'])
        got = self.runtime.codec.decode(kind, data, True)
        self.assertEqual(got, case['decoded'])
        self.assertEqual(self.runtime.value(*names, got), data)
        checked += 1
    self.assertGreaterEqual(checked, 6)

  def test_maps(self):
    for case in self.recorded['query_maps']:
      names = case['pallet'], case['storage_function']
      if names == ('System', 'Account'):
        continue  # of no use here
      for key, value in case['raw_changes']:
        self.assertTrue(key.startswith(case['prefix_hex']))
        kind = self.runtime.codec.storage_entry(*names).value_type
        got = self.runtime.codec.decode(kind, raw(value), True)
        self.assertEqual(self.runtime.value(*names, got), raw(value))

  def test_calls(self):
    checked = 0
    for case in self.recorded['calls']:
      if case['function'] in ('set_weights', 'burned_register', 'add_stake'):
        data = self.runtime.codec.compose_call(
          case['module'], case['function'], case['params']
        )
        self.assertEqual(bytes(data).hex(), raw(case['data_hex']).hex())
        checked += 1
    self.assertEqual(checked, 3)

  def test_extrinsics(self):
    for case in self.recorded['extrinsics']:
      got = self.runtime.codec.decode_extrinsic(
        raw(case['extrinsic_hex']), True
      )
      self.assertEqual(got['address'], case['address'])
      self.assertEqual(got['nonce'], case['nonce'])

  def test_events(self):
    case = self.recorded['events']
    kind = self.runtime.codec.storage_entry('System', 'Events').value_type
    got = self.runtime.codec.decode(kind, raw(case['raw_hex']), True)
    self.assertLen(got, len(case['decoded']))
    mine = self.runtime.codec.decode(
      kind,
      self.runtime.events(
        [None, self.runtime.error('Commitments', 'SpaceLimitExceeded')]
      ),
      True,
    )
    self.assertEqual(
      [e['event_id'] for e in mine], ['ExtrinsicSuccess', 'ExtrinsicFailed']
    )
    self.assertEqual(set(mine[0]), set(got[0]))

  def test_an_item_that_the_runtime_does_not_have(self):
    item = 'SubtensorModule', 'SubnetEpochConsensus', [1]
    with self.assertRaises(KeyError):
      self.runtime.key(*item)
    later = runtime_lib.of(runtime_lib.LATER)
    self.assertTrue(later.key(*item))
    # All else is the same.
    for case in self.recorded['storage_keys']:
      self.assertEqual(
        later.key(case['pallet'], case['storage_function'], case['params']),
        raw(case['key_hex']),
      )


if __name__ == '__main__':
  absltest.main()
