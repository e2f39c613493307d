"""Lists of adopted amendments, as validators and liars publish them."""

from absl.testing import absltest

from covenant.protocol import published_rules
from covenant.wire import amendment as amendment_lib
from tests.node import network as network_lib

RUN = network_lib.shared_model().run


def made(round_index, rounds=30):
  return amendment_lib.make(RUN, round_index, {'rounds': rounds})


class PublishedRulesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.network = network_lib.Network(self)
    self.node = self.network.validator(3)
    self.network.block = self.node.schedule.start(1)
    for uid in network_lib.STAKES:
      self.network.commit(uid, 0)
    self.network.block += 2

  def publish(self, uid, adopted):
    self.put(
      uid,
      amendment_lib.encode_adopted(adopted, RUN, network_lib.KEYS[uid].sign),
    )

  def put(self, uid, data):
    published_rules.publish(self.network.objects(uid), data)

  def read(self, known=()):
    return published_rules.read(
      self.node.chain,
      self.node.objects,
      network_lib.shared_model(),
      self.network.block,
      known,
    )

  def test_the_longest_list_of_a_majority(self):
    one, two, three = made(5), made(6), made(7)
    self.publish(3, (one, two))
    self.assertEqual(self.read(), ())
    self.publish(4, (one, two, three))
    self.assertEqual(self.read(), (one, two))
    self.assertEqual(self.read((one, two, three)), (one, two, three))

  def test_after_the_end_of_a_run_its_last_validators_count(self):
    self.publish(3, (made(5),))
    self.publish(4, (made(5),))
    self.network.block += 100_000
    self.assertEqual(self.read(), (made(5),))

  def test_other_orders_are_other_lists(self):
    self.publish(3, (made(5), made(6)))
    self.publish(4, (made(6), made(5)))
    self.assertEqual(self.read(), ())

  def test_hostile_objects_of_a_minority(self):
    one = made(5)
    self.publish(4, (one,))
    self.publish(5, (one,))
    longest = amendment_lib.MAX_ADOPTED
    many = tuple(made(5 + i) for i in range(longest))
    rules = (one, *many[1:])
    sign = network_lib.KEYS[3].sign
    whole = amendment_lib.encode_adopted(rules, RUN, sign)
    more = amendment_lib.encode_adopted((*rules, made(999)), RUN, sign)
    strange = amendment_lib.make(RUN, 6, {'restore': 5, 'protocol': [2]})
    of_another = amendment_lib.encode_adopted((one,), bytes(16), sign)
    for data in (
      b'',
      bytes(1 << 19),
      whole,
      more,
      whole[:-1],
      amendment_lib.encode_adopted((one, strange), RUN, sign),
      of_another,
      network_lib.KEYS[5].sign(b'') * 2,
    ):
      self.put(3, data)
      self.assertEqual(self.read(), (one,))
    # A majority with the longest list is read, and a longer one is not.
    self.put(3, whole)
    self.publish(4, rules)
    self.assertEqual(self.read(), rules)
    with self.assertRaisesRegex(amendment_lib.AmendmentError, 'at most 256'):
      amendment_lib.decode_adopted(
        more, RUN, network_lib.KEYS[3].address, lambda *_: True
      )


if __name__ == '__main__':
  absltest.main()
