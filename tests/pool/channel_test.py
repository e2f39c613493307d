"""Channels over sockets that the test holds."""

import asyncio
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from covenant.chain import keys
from covenant.pool import channel as channel_lib
from covenant.store import traffic

WORKER = keys.Key.from_seed(b'w' * 32)
POOL = keys.Key.from_seed(b'p' * 32)


class Socket:
  """One end: what is sent is passed on by the test's rule."""

  def __init__(self, forward):
    self.forward = forward
    self.came = asyncio.Queue()

  async def send_bytes(self, data):
    for one in self.forward(data):
      self.other.came.put_nowait(one)

  async def receive_bytes(self):
    data = await self.came.get()
    if data is None:
      raise TypeError('closed')
    return data

  async def close(self):
    self.other.came.put_nowait(None)
    return True


def pair(
  forward=lambda data: [bytes(data)], opening=(b'o', b'o'), most=lambda: 1e9
):
  """Returns both ends, the pool's first."""
  one, two = Socket(forward), Socket(forward)
  one.other, two.other = two, one

  def end(socket, is_pool):
    own, other = (POOL, WORKER) if is_pool else (WORKER, POOL)
    return channel_lib.Channel(
      socket,
      opening[not is_pool],
      is_pool,
      own.sign,
      lambda data, by: keys.verify(other.address, data, by),
      WORKER.address,
      most,
    )

  return end(one, True), end(two, False)


async def exchange(make, count):
  """Sends numbered messages to the pool; returns what it received."""
  pool, worker = make()
  got = []

  def receive(channel, text, data):
    got.append((text, data))
    channel.send({'again': text['n']}, data)

  back = []
  ends = [
    asyncio.create_task(pool.run(receive)),
    asyncio.create_task(worker.run(lambda c, text, data: back.append(text))),
  ]
  for n in range(count):
    worker.send({'n': n}, bytes([n]))
  while len(back) < count and not any(end.done() for end in ends):
    await asyncio.sleep(0)
  worker.close()
  await asyncio.gather(*ends)
  worker.send({'n': count})  # does nothing
  return got, back


class ChannelTest(parameterized.TestCase):
  def test_messages_arrive_in_order_both_ways(self):
    got, back = asyncio.run(exchange(pair, 5))
    self.assertEqual(got, [({'n': n}, bytes([n])) for n in range(5)])
    self.assertEqual(back, [{'again': n} for n in range(5)])

  def test_bytes_are_counted(self):
    before = traffic.POOLS.totals
    asyncio.run(exchange(pair, 3))
    moved = traffic.POOLS.totals.since(before)
    # Either end sends three messages, each with a signature of 64 bytes.
    self.assertGreater(moved.bytes_received, 6 * 64)
    self.assertEqual(moved.bytes_sent, moved.bytes_received)

  @parameterized.named_parameters(
    ('changed', lambda data: [bytes(data[:-1]) + bytes([data[-1] ^ 1])]),
    ('repeated', lambda data: [data, data]),
    ('without a signature', lambda data: [data[64:]]),
    ('empty', lambda data: [b'']),
  )
  def test_a_false_message_closes_it(self, forward):
    got, _ = asyncio.run(exchange(lambda: pair(forward), 2))
    self.assertLessEqual(len(got), 1)

  def test_a_message_of_another_channel_closes_it(self):
    got, _ = asyncio.run(exchange(lambda: pair(opening=(b'o', b'other')), 1))
    self.assertEmpty(got)

  @parameterized.parameters(-1, 0, 1)
  def test_long_messages_travel_in_parts(self, more):
    # A signature, the text and its end, and the data.
    size = 2 * channel_lib.PART_BYTES - 64 - len('{"n": 0}\n') + more
    sizes = []

    def forward(data):
      sizes.append(len(data))
      return [bytes(data)]

    got = asyncio.run(self.send_some(lambda: pair(forward), [size, 1]))
    self.assertEqual([len(data) for _, data in got], [size, 1])
    whole, small = channel_lib.PART_BYTES, 64 + len('{"n": 1}\n') + 1
    tail = [whole - 1] if more < 0 else [whole, more]
    self.assertEqual(sizes, [whole, *tail, small])

  def test_a_message_that_is_of_no_use_is_not_kept(self):
    """As of who holds no stage; the next one arrives."""
    size = 3 * channel_lib.PART_BYTES
    got = asyncio.run(self.send_some(lambda: pair(most=lambda: 0), [size, 1]))
    self.assertEqual([text for text, _ in got], [{'n': 1}])
    # It is kept no more once it is of no use, even if it is again.
    allowed = iter([size, 0, size, size])
    got = asyncio.run(
      self.send_some(lambda: pair(most=lambda: next(allowed)), [size, 1])
    )
    self.assertEqual([text for text, _ in got], [{'n': 1}])

  async def send_some(self, make, sizes):
    """Sends the pool messages of some sizes; returns what it received."""
    pool, worker = make()
    got = []
    ends = [
      asyncio.create_task(
        pool.run(lambda _, text, data: got.append((text, data)))
      ),
      asyncio.create_task(worker.run(lambda *_: None)),
    ]
    for n, size in enumerate(sizes):
      worker.send({'n': n}, bytes(size))
    worker.close()
    await asyncio.gather(*ends)
    return got

  def test_bytes_wait_until_they_are_read(self):
    async def exchange():
      pool, _ = pair()
      send, may_read = pool._socket.send_bytes, asyncio.Event()

      async def wait(data):
        await may_read.wait()
        await send(data)

      with mock.patch.object(pool._socket, 'send_bytes', wait):
        end = asyncio.create_task(pool.run(lambda *_: None))
        # A signature, the text and its end, and the data.
        size = 64 + len('{"n": 0}\n') + 2 * channel_lib.PART_BYTES
        for n in range(3):
          pool.send({'n': n}, bytes(2 * channel_lib.PART_BYTES))
        self.assertEqual(pool.waiting, 3 * size)
        may_read.set()
        while pool.waiting:
          await asyncio.sleep(0)
        pool.close()
        await end

    asyncio.run(exchange())

  @parameterized.parameters('send_bytes', 'close')
  def test_who_does_not_read_holds_up_no_end(self, what):
    async def exchange():
      pool, _ = pair()
      never = asyncio.get_running_loop().create_future()

      async def wait(*_):
        await never

      with mock.patch.object(pool._socket, what, wait):
        end = asyncio.create_task(pool.run(lambda *_: None))
        pool.send({'n': 0}, b'much')
        pool.close()
        await end

    with mock.patch.object(channel_lib, '_CLOSE_SECONDS', 0.01):
      asyncio.run(exchange())

  def test_a_long_text_of_a_worker_closes_it(self):
    limit = channel_lib._TEXT_BYTES

    async def exchange(size):
      pool, worker = pair()
      got = []
      ends = [
        asyncio.create_task(pool.run(lambda c, text, data: got.append(text))),
        asyncio.create_task(worker.run(lambda *_: None)),
      ]
      worker.send({'n': 'x' * size}, bytes(2 * limit))
      worker.close()
      await asyncio.gather(*ends)
      return got

    self.assertLen(asyncio.run(exchange(limit // 2)), 1)
    self.assertEmpty(asyncio.run(exchange(limit)))


if __name__ == '__main__':
  absltest.main()
