import json

from absl.testing import absltest
from absl.testing import parameterized

from covenant.chain import keys
from covenant.node import published_status
from tests.node import network as network_lib

RUN = bytes(16)
KEY = network_lib.KEYS[0]


def status(**changes):
  made = published_status.make('miner', 'running', 3, 2.5, 'train: Error')
  return made._replace(**changes)


class PublishedStatusTest(parameterized.TestCase):
  def decode(self, data, hotkey=KEY.address, run=RUN):
    return published_status.decode(data, run, hotkey, keys.verify)

  def test_round_trip(self):
    data = published_status.encode(status(), RUN, KEY.sign)
    self.assertEqual(self.decode(data), status()._replace(
      time=self.decode(data).time))  # fmt: skip
    self.assertLess(len(data), published_status.MAX_BYTES)

  def test_a_loss_that_is_not_finite_is_left_out(self):
    made = published_status.make('miner', 'running', 3, float('nan'), '')
    self.assertIsNone(made.loss)

  def test_of_another_hotkey_or_run(self):
    data = published_status.encode(status(), RUN, KEY.sign)
    other = network_lib.KEYS[1].address
    self.assertIsNone(self.decode(data, hotkey=other))
    self.assertIsNone(self.decode(data, run=b'1' * 16))
    self.assertIsNone(self.decode(data[:-1] + b'0'))

  @parameterized.parameters(
    dict(round=-1),
    dict(round=1.5),
    dict(round=2**63),
    dict(loss='2'),
    dict(loss=True),
    dict(time=None),
    dict(time=10**400),
    dict(error='x' * 300),
    dict(role=7),
  )
  def test_values_of_other_types_are_refused(self, **changes):
    data = published_status.encode(status(**changes), RUN, KEY.sign)
    self.assertIsNone(self.decode(data))

  @parameterized.parameters(
    b'', b'x' * 64, b'[' * 3000, b'{"role": 1}', b'[]', b'\xff\xfe'
  )
  def test_hostile_bytes_are_refused(self, body):
    signed = body + KEY.sign(b'covenant.status\0' + RUN + body)
    self.assertIsNone(self.decode(signed))

  def test_unknown_fields_are_refused(self):
    body = json.dumps(status()._asdict() | {'more': 1}).encode()
    signed = body + KEY.sign(b'covenant.status\0' + RUN + body)
    self.assertIsNone(self.decode(signed))

  def test_in_a_bucket(self):
    network = network_lib.Network(self)
    objects, run = network.objects(0), network_lib.shared_model().run
    read = lambda: published_status.read(  # noqa: E731
      network.objects(3), run, objects.location, KEY.address, keys.verify
    )
    self.assertIsNone(read())
    for r in (3, 4):
      data = published_status.encode(status(round=r), run, KEY.sign)
      published_status.publish(objects, data)
      self.assertEqual(read().round, r)
    unusable = published_status.read(
      objects, run, b'nowhere', KEY.address, keys.verify
    )
    self.assertIsNone(unusable)


if __name__ == '__main__':
  absltest.main()
