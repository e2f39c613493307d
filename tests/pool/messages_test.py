"""Messages of strangers to a pool's head, and of a head to its stages."""

import json

import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.pool import messages
from covenant.pool import orders as orders_lib
from covenant.pool import seats as seats_lib
from tests import mutations
from tests.pool import orders_test


class OrderParser:
  """An order, as a stage gets it."""

  def __init__(self, folder):
    del folder
    self.seeds = [
      messages.pack(*orders_lib.encode(orders_test.order(number, 'a')))
      for number in (0, 7)
    ]

  def __call__(self, mutant):
    try:
      found = orders_lib.decode(*messages.unpack(mutant))
    except (orders_lib.OrderError, ValueError) as e:
      return str(e)
    assert found.after
    return 'accepted'


class Channel:
  """A channel to a worker."""

  waiting = 0

  def __init__(self, worker):
    self.worker = worker

  def send(self, text, data=b''):
    json.dumps(text)

  def close(self):
    pass


class SeatsParser:
  """The messages of a worker about a stage, which it may not hold."""

  def __init__(self, folder):
    self.log = orders_lib.OrderLog(folder, 'g')
    for number in range(2):
      self.log.add(orders_test.order(number, self.log.id))
    state = self.log.state(1)
    at = {'number': 1, 'id': state, 'digests': {'x': ['0f']}, 'square': 2.5}
    said = {'microbatch': 1, 'attempt': 0, 'seconds': 0.5, 'nats': 1.0}
    self.seeds = [
      json.dumps(text).encode()
      for text in (
        {'did': 'hello', 'has': [0, 1], 'most': 2},
        {'did': 'at', 'stage': 0, **at},
        {'did': 'forward', 'stage': 1, **said},
        {'did': 'failed', 'stage': 0, 'error': 'no'},
      )
    ]

  def __call__(self, mutant):
    part = lambda order, stage: order.of_tensors([stage])  # noqa: E731
    seats = seats_lib.Seats(2, self.log, part)
    channels, outcome = [Channel('a'), Channel('b')], 'accepted'
    for channel in channels:
      seats.open(channel)
      seats.receive(channel, {'did': 'hello', 'has': [0, 1], 'most': 1}, b'')
    for channel in channels:
      try:
        text, data = messages.unpack(mutant)
        seats.receive(channel, text, data)
      except messages.MALFORMED as e:
        outcome = type(e).__name__
    for channel in channels:
      seats.close(channel)
    assert not seats.worker(0) and not seats.worker(1)
    return outcome


PARSERS = (('order', OrderParser), ('seats', SeatsParser))


class MessagesTest(parameterized.TestCase):
  def parse(self, parser, count, seed):
    parse = parser(self.create_tempdir().full_path)
    outcomes = mutations.parse_many(parse, count, seed)
    self.assertEqual(sum(outcomes.values()), count)

  @parameterized.named_parameters(*PARSERS)
  def test_some(self, parser):
    self.parse(parser, 400, seed=1)

  @parameterized.named_parameters(*PARSERS)
  @pytest.mark.slow
  def test_many(self, parser):
    self.parse(parser, 20_000, seed=2)

  @parameterized.parameters(
    {'did': 'hello', 'has': [1e999], 'most': 1},
    {'did': 'hello', 'has': [], 'most': 1e999},
    {'did': 'failed', 'stage': 1e999},
    {'did': 'at', 'stage': 0, 'number': 1e999, 'id': 'g'},
    {'did': 'at', 'stage': 0, 'number': 0, 'id': 'g', 'square': 10**400},
    {'did': 'at', 'stage': 0, 'number': 0, 'id': 'g', 'square': 0.0,
     'digests': []},
  )  # fmt: skip
  def test_numbers_that_are_none_are_malformed(self, **text):
    parse = SeatsParser(self.create_tempdir().full_path)
    self.assertIn(
      parse(json.dumps(text).encode()), ('OverflowError', 'AttributeError')
    )


if __name__ == '__main__':
  absltest.main()
