import concurrent.futures
import contextlib
import hashlib
import json
import math
import os
import pathlib
import signal
import sqlite3
import subprocess
import sys
import time
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.chain import clock as clock_lib
from covenant.chain import interface
from covenant.chain import keys
from covenant.chain import local_chain
from covenant.chain import storage as chain_storage
from tests import helpers

RULES = chain_storage.ChainRules(
  block_seconds=12.0, tempo=5, emission=2.0, capacity=4
)
QUICK = hypothesis.settings(deadline=None)


def make_key(name):
  return keys.Key.from_seed(
    hashlib.blake2b(str(name).encode(), digest_size=32).digest()
  )


class Clock:
  def __init__(self, now=0.0):
    self.now = now

  def __call__(self):
    return self.now

  def to(self, block):
    self.now = RULES.block_seconds * block


class LocalTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.clock = Clock()
    self.path = os.path.join(self.create_tempdir().full_path, 'a chain?.db')

  def create(self, path=':memory:', rules=RULES, begin=True, **changes):
    chain = local_chain.LocalChain.create(
      path, b'seed', rules._replace(**changes), clock=self.clock
    )
    self.addCleanup(chain.close)
    if begin:
      chain.begin(0.0)
    return chain

  def open(self, name, clock=None):
    chain = local_chain.LocalChain.open(
      self.path, make_key(name), clock or self.clock, timeout=0.001
    )
    self.addCleanup(chain.close)
    return chain

  def join(self, chain, name, stake=0.0, validator=False):
    key = make_key(name)
    chain.register(key.address, stake, validator)
    return chain.seen_by(key)

  # Time.

  def test_before_it_begins(self):
    chain = self.create(begin=False)
    ann = self.join(chain, 'ann')
    self.assertEqual(chain.head(), -1)
    with self.assertRaisesRegex(interface.ChainRejectedError, 'block 0: .* -1'):
      chain.peers(0)
    self.clock.now = 100.0
    chain.begin(124.0)
    self.assertEqual(chain.head(), -1)
    self.clock.now = 124.0
    self.assertEqual(ann.head(), 0)
    self.assertEqual(ann.timestamp(0), 124.0)
    (peer,) = chain.peers(0)
    self.assertEqual(peer.registered, 0)
    chain.begin(124.0)
    with self.assertRaisesRegex(
      interface.ChainRejectedError, 'began at 124.0, not at 1'
    ):
      chain.begin(125.0)

  def test_processes_learn_that_it_began(self):
    chain = self.create(self.path, begin=False)
    other = self.open('other')
    self.assertEqual(other.head(), -1)
    chain.begin(0.0)
    self.assertEqual(other.head(), 0)

  @QUICK
  @hypothesis.given(
    st.floats(0, 2e9), st.floats(0.001, 100), st.integers(0, 10**7)
  )
  def test_a_block_is_there_when_it_begins(self, genesis, step, block):
    clock = Clock()
    chain = local_chain.LocalChain.create(
      ':memory:', b'', RULES._replace(block_seconds=step), clock=clock
    )
    with contextlib.closing(chain):
      chain.begin(genesis)
      clock.now = genesis + block * step
      # Far from 0 two blocks may begin at one float; it is the later one then.
      self.assertEqual(chain.timestamp(chain.head()), clock.now)
      self.assertGreaterEqual(chain.head(), block)
      clock.now = math.nextafter(clock.now, -math.inf)
      self.assertEqual(chain.head(), chain.head())

  def test_a_clock_set_back(self):
    chain = self.create()
    self.clock.to(7)
    self.assertEqual(chain.head(), 7)
    self.clock.to(5)
    self.assertEqual(chain.head(), 7)
    self.clock.to(8)
    self.assertEqual(chain.head(), 8)

  def test_hashes_follow_from_the_seed(self):
    chain, same = self.create(), self.create(tempo=9)
    other = local_chain.LocalChain.create(':memory:', b'seeb', RULES)
    self.addCleanup(other.close)
    other.begin(0.0)
    self.clock.to(1000)
    hashes = [chain.block_hash(n) for n in range(1001)]
    self.assertLen(set(hashes), 1001)
    self.assertEqual(hashes, [same.block_hash(n) for n in range(1001)])
    self.assertNotIn(other.block_hash(3), hashes)

  # What is past stays.

  def test_who_comes_late_gets_a_later_block(self):
    chain = self.create(self.path)
    slow_clock = Clock()
    slow = self.open('slow', slow_clock)
    reader = self.open('reader')
    chain.register(slow.hotkey, 0.0, False)
    self.clock.to(9)
    slow_clock.to(6)  # it slept after looking at the clock
    self.assertEqual(reader.commitments(9), {})
    slow.commit(b'late')
    self.assertEqual(reader.commitments(9), {})
    self.clock.to(10)
    want = {0: interface.CommittedData(10, b'late')}
    self.assertEqual(reader.commitments(10), want)
    self.assertEqual(reader.commitments(9), {})
    self.assertEqual(self.open('third').commitments(10), want)

  def test_nobody_reads_a_block_that_is_being_written(self):
    chain = self.create(self.path)
    reader = self.open('reader')
    seen = []

    def stop_here():
      """The writer holds the lock and has looked at the clock: block 4."""
      now, self.clock.now = self.clock.now, RULES.block_seconds * 8
      with contextlib.suppress(interface.ChainUnreachableError):
        seen.append(reader.commitments(8))
      seen.append(reader.commitments(3))  # sealed: always there
      return now

    writer = self.open('writer', stop_here)
    chain.register(writer.hotkey, 0.0, False)
    self.clock.to(4)
    self.assertEqual(reader.commitments(3), {})
    writer.commit(b'in 4')
    self.assertEqual(seen, [{}])
    self.assertEqual(
      reader.commitments(8), {0: interface.CommittedData(4, b'in 4')}
    )

  def test_a_commitment_in_the_same_block_replaces(self):
    chain = self.create()
    ann = self.join(chain, 'ann')
    self.clock.to(3)
    ann.commit(b'one')
    ann.commit(b'two')
    self.assertEqual(
      ann.commitments(3), {0: interface.CommittedData(3, b'two')}
    )
    self.assertEqual(ann.commitments(2), {})
    ann.commit(b'three')  # block 3 was read
    self.assertEqual(ann.commitments(3)[0].data, b'two')
    self.clock.to(4)
    self.assertEqual(
      ann.commitments(4), {0: interface.CommittedData(4, b'three')}
    )

  def test_history(self):
    chain = self.create(self.path)
    ann = self.open('ann')
    chain.register(ann.hotkey, 0.0, False)
    seen = {}
    for block in range(1, 600):
      self.clock.to(block)
      ann.commit(str(block).encode())
      seen[block] = ann.commitments(block)
    for block in range(599 - chain_storage.HISTORY, 600):
      self.assertEqual(chain.commitments(block), seen[block])
      self.assertLen(chain.peers(block), 1)
    for read in (chain.commitments, chain.peers, chain.earned):
      with self.assertRaisesRegex(
        interface.ChainRejectedError, '342: .* 256 .* 343 on'
      ):
        read(599 - chain_storage.HISTORY - 1)
    self.assertLen(chain.block_hash(0), 32)  # joiners replay old rounds
    with contextlib.closing(sqlite3.connect(self.path)) as file:
      for table in ('commitments', 'earned'):
        ((rows,),) = file.execute(f'SELECT count(*) FROM {table}').fetchall()
        self.assertLess(rows, chain_storage.HISTORY + 5)

  # Registration.

  def test_uids(self):
    chain = self.create(immunity=10)
    for i, name in enumerate('abcd'):
      address = make_key(name).address
      self.assertEqual(chain.register(address, 0.0, False), i)
      self.assertEqual(chain.register(address, 9.0, True), i)  # as it was
    self.assertEqual(
      {(p.stake, p.permit) for p in chain.peers(0)}, {(0.0, False)}
    )
    chain.deregister(make_key('b').address)
    self.assertEqual(chain.register(make_key('e').address, 0.0, False), 1)
    with self.assertRaisesRegex(
      interface.ChainRejectedError, 'all 4 uids .* 10 blocks'
    ):
      chain.register(make_key('f').address, 0.0, False)
    with self.assertRaisesRegex(
      interface.ChainRejectedError, 'is not registered'
    ):
      chain.deregister(make_key('b').address)

  def test_who_earned_least_is_replaced(self):
    chain = self.create(immunity=10)
    boss = self.join(chain, 'boss', 5.0, True)
    self.join(chain, 'a')
    poor = self.join(chain, 'b')
    self.clock.to(4)
    self.join(chain, 'c')  # immune until 14
    boss.set_weights({1: 3, 2: 1})
    poor.commit(b'of the old one')
    self.clock.to(13)
    earned = chain.earned(12)
    self.assertGreater(earned[1], earned[2])
    self.assertGreater(earned[2], earned[3])
    self.assertEqual(chain.register(make_key('new').address, 0.0, False), 2)
    self.assertEqual(chain.earned(13) | {2: 0.0}, earned | {2: 0.0})
    self.assertEqual(chain.earned(13)[2], 0.0)
    self.assertEqual(chain.earned(12), earned)
    self.assertEqual(chain.commitments(13), {})
    self.assertEqual(chain.peers(13)[2].registered, 13)
    # What was said of the old one does not pay the new one.
    self.clock.to(25)
    self.assertEqual(chain.earned(25)[2], 0.0)
    self.assertGreater(chain.earned(25)[1], earned[1])
    boss.set_weights({1: 3, 2: 1})
    self.clock.to(30)
    self.assertGreater(chain.earned(30)[2], 0.0)

  def test_a_validator_does_not_inherit_weights(self):
    chain = self.create()
    boss = self.join(chain, 'boss', 5.0, True)
    self.join(chain, 'a')
    self.clock.to(1)
    boss.set_weights({1: 1})
    self.clock.to(2)
    chain.deregister(boss.hotkey)
    self.assertEqual(self.join(chain, 'new', 5.0, True).peers(1)[0].uid, 0)
    self.assertEqual(chain.weights(), {})
    self.clock.to(5)
    self.assertEqual(chain.earned(5), {0: 10.0, 1: 0.0})

  def test_the_longest_there_goes_first(self):
    chain = self.create(immunity=0)
    for i, name in enumerate('abcd'):
      self.clock.to(i)
      self.join(chain, name)
    self.clock.to(4)
    uids = [chain.register(make_key(n).address, 0.0, False) for n in 'ef']
    self.assertEqual(uids, [0, 1])

  def test_bad_stakes(self):
    chain = self.create()
    ann = self.join(chain, 'ann')
    for stake in (-1.0, math.nan, math.inf):
      with self.assertRaisesRegex(interface.ChainRejectedError, f'got {stake}'):
        chain.register(make_key('b').address, stake, False)
      with self.assertRaisesRegex(interface.ChainRejectedError, f'got {stake}'):
        chain.set_stake(ann.hotkey, stake)
    with self.assertRaisesRegex(
      interface.ChainRejectedError, 'is not registered'
    ):
      chain.set_stake('nobody', 1.0)

  # Pay.

  def test_pay_is_emission(self):
    chain = self.create()
    boss = self.join(chain, 'boss', 6.0, True)
    clerk = self.join(chain, 'clerk', 2.0, True)
    self.join(chain, 'a')
    self.clock.to(1)
    boss.set_weights({2: 1})
    clerk.set_weights({2: 1})
    self.clock.to(4)
    self.assertEqual(chain.earned(4), {0: 0.0, 1: 0.0, 2: 0.0})
    self.clock.to(5)
    # 2 TAO a block for 5 blocks: half to the miner, half by stake.
    got = [chain.earned(5)[uid] for uid in range(3)]
    np.testing.assert_allclose(got, [3.75, 1.25, 5.0], rtol=1e-15)
    # Who sets weights in the epoch's block was not heard in it.
    self.clock.to(9)
    chain.set_stake(clerk.hotkey, 6.0)
    self.clock.to(10)
    # Bonds move by a tenth: from 1/4 to 0.9 * 1/4 + 0.1 * 1/2.
    got = chain.earned(10)
    self.assertAlmostEqual(got[1], 1.25 + 5 * 0.275)
    self.assertAlmostEqual(got[2], 10.0)
    self.clock.to(1000)
    self.assertAlmostEqual(sum(chain.earned(1000).values()), 2.0 * 1000)

  @QUICK
  @hypothesis.given(st.data())
  def test_when_it_is_read_does_not_matter(self, data):
    """Epochs are computed late, by whoever comes, and always the same."""
    clock = Clock()
    eager, lazy = chains = [
      local_chain.LocalChain.create(':memory:', b'', RULES, clock=clock)
      for _ in range(2)
    ]
    with contextlib.closing(eager), contextlib.closing(lazy):
      for chain in chains:
        chain.begin(0.0)
        for i, stake in enumerate((2.0, 1.0, 0.0, 0.0)):
          chain.register(make_key(i).address, stake, stake > 0)
      block = 0
      for _ in range(data.draw(st.integers(1, 6))):
        step = data.draw(st.integers(1, 12))
        for _ in range(step):
          block += 1
          clock.to(block)
          eager.earned(block - 1)
        uid = data.draw(st.integers(0, 1))
        weights = data.draw(
          st.dictionaries(st.integers(0, 3), st.integers(1, 5), min_size=1)
        )
        for chain in chains:
          chain.seen_by(make_key(uid)).set_weights(weights)
          chain.set_stake(make_key(1 - uid).address, float(block % 3))
      clock.to(block + 6)
      self.assertEqual(eager.earned(block + 6), lazy.earned(block + 6))
      for past in range(max(block - 20, 0), block + 1):
        self.assertEqual(eager.earned(past), lazy.earned(past))
        self.assertEqual(eager.peers(past), lazy.peers(past))

  # As on the real chain, by rules that are off by default.

  @parameterized.parameters(0, 1, 2)
  def test_a_worked_epoch_is_paid_once_its_weights_are_revealed(self, epochs):
    """The first epoch of `test_bonds` in subtensor's tests/epoch.rs."""
    chain = self.create(capacity=8, emission=1.0, reveal_epochs=epochs)
    views = [
      self.join(chain, i, stake, stake > 0)
      for i, stake in enumerate([1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0])
    ]
    self.clock.to(2)
    said = {4: 0.25, 5: 0.5, 6: 0.75, 7: 1.0}
    for view in views[:4]:
      view.set_weights(said)
    self.assertEqual(bool(chain.weights()), epochs == 0)
    tempo, paid = RULES.tempo, []
    for end in range(tempo, (epochs + 2) * tempo, tempo):
      self.clock.to(end + 1)
      total = [chain.earned(end)[uid] for uid in range(8)]
      before = [sum(x) for x in zip(*paid, strict=True)] or [0.0] * 8
      paid.append([x - y for x, y in zip(total, before, strict=True)])
    # Until then nobody has said anything, and stake is paid.
    by_stake = [0.1, 0.2, 0.3, 0.4, 0, 0, 0, 0]
    for pay in paid[:epochs]:
      np.testing.assert_allclose(pay, np.multiply(by_stake, tempo), atol=1e-9)
    emission = [49999998, 99999999, 150000000, 200000001]
    emission += [49998779, 100000610, 149996337, 200004272]
    np.testing.assert_allclose(
      np.divide(paid[epochs], tempo), np.divide(emission, 1e9), atol=1e-5
    )

  def test_sealed_weights_are_followed(self):
    chain = self.create(reveal_epochs=1)
    boss = self.join(chain, 'boss', 10.0, True)
    self.join(chain, 'ann')
    self.clock.to(2)
    boss.set_weights({1: 1.0})
    self.clock.to(4)
    self.assertIsNone(boss.check_weights({1: 1.0}, 2))
    self.clock.to(9)
    self.assertIsNone(boss.check_weights({1: 1.0}, 2))
    self.clock.to(12)  # after the epoch in which they are revealed
    self.assertEqual(boss.check_weights({1: 1.0}, 2), '')
    self.assertEqual(chain.subnet().reveal_epochs, 1)

  def test_a_reveal_without_a_permit_is_dropped(self):
    chain = self.create(reveal_epochs=1)
    boss = self.join(chain, 'boss', 10.0, True)
    self.join(chain, 'ann')
    self.clock.to(2)
    boss.set_weights({1: 1.0})
    self.clock.to(4)
    chain.set_permit(boss.hotkey, False)
    self.clock.to(20)
    chain.earned(19)
    self.assertEmpty(chain.weights())
    self.assertRegex(
      boss.check_weights({1: 1.0}, 2), 'not in force.* no validator permit'
    )

  def test_sealed_weights_count_for_the_rate(self):
    chain = self.create(reveal_epochs=1, weights_interval=10)
    boss = self.join(chain, 'boss', 10.0, True)
    self.join(chain, 'ann')
    self.clock.to(2)
    boss.set_weights({1: 1.0})
    self.clock.to(8)
    with self.assertRaisesRegex(interface.ChainRejectedError, 'until block 1'):
      boss.set_weights({1: 1.0})

  def test_a_miner_that_is_paid_gets_a_permit(self):
    """Pay is staked and permits go to the top stakes, as on Bittensor."""
    chain = self.create(permits=2, emission=10.0)
    boss = self.join(chain, 'boss', 1.0, True)
    ann, bob = self.join(chain, 'ann'), self.join(chain, 'bob')
    self.clock.to(2)
    boss.set_weights({1: 1.0})
    self.clock.to(4)
    self.assertEqual([p.permit for p in chain.peers(3)], [True, False, False])
    self.clock.to(RULES.tempo + 1)
    peers = chain.peers(RULES.tempo)
    self.assertEqual([p.permit for p in peers], [True, True, False])
    self.assertAlmostEqual(
      sum(p.stake for p in peers), 1.0 + 10.0 * RULES.tempo
    )
    # A permit is enough to set weights, but it is no role.
    ann.set_weights({2: 1.0})
    with self.assertRaises(interface.ChainRejectedError):
      bob.set_weights({1: 1.0})
    chain.set_permit(ann.hotkey, False)
    self.clock.to(RULES.tempo + 3)
    peers = chain.peers(RULES.tempo + 2)
    self.assertEqual([p.permit for p in peers], [True, False, False])

  # Checkpoints.

  @parameterized.parameters(':memory:', 'file')
  def test_dump(self, path):
    chain = self.create(self.path if path == 'file' else path)
    boss = self.join(chain, 'boss', 6.0, True)
    ann = self.join(chain, 'ann')
    self.clock.to(2)
    boss.set_weights({1: 1})
    ann.commit(b'said')
    self.clock.to(8)
    chain.earned(8)
    image = chain.dump()
    copy = local_chain.LocalChain.load(image, clock=self.clock)
    self.addCleanup(copy.close)
    self.assertEqual(copy.rules, chain.rules)
    self.assertEqual(copy.weights(), {0: {1: 65535}})
    for view in (chain, copy):
      self.clock.to(8)
      view.seen_by(make_key('ann')).commit(b'more')  # 8 was read: in 9
      self.clock.to(400)
    for block in range(400 - chain_storage.HISTORY, 401):
      self.assertEqual(copy.commitments(block), chain.commitments(block))
      self.assertEqual(copy.earned(block), chain.earned(block))
      self.assertEqual(copy.peers(block), chain.peers(block))
    self.assertEqual(copy.block_hash(400), chain.block_hash(400))
    self.assertEqual(copy.commitments(400)[1].block, 9)
    again = local_chain.LocalChain.load(image)
    self.addCleanup(again.close)
    self.assertEqual(again.dump(), image)

  @parameterized.parameters(b'', b'junk', bytes(4096))
  def test_not_a_dump(self, image):
    with self.assertRaisesRegex(interface.ChainError, 'there is no chain'):
      local_chain.LocalChain.load(image)

  # Files.

  def test_no_chain(self):
    with self.assertRaisesRegex(interface.ChainError, 'LocalChain.create'):
      local_chain.LocalChain.open(self.path)
    self.assertFalse(os.path.exists(self.path))
    pathlib.Path(self.path).write_bytes(b'not SQLite, but as long as a page')
    for door in (
      local_chain.LocalChain.open,
      lambda path: local_chain.LocalChain.create(path, b'', RULES),
    ):
      with self.assertRaisesRegex(interface.ChainError, 'chain here'):
        door(self.path)

  def test_create_twice(self):
    chain = self.create(self.path)
    self.join(chain, 'ann')
    with self.assertRaisesRegex(interface.ChainError, 'already exists'):
      local_chain.LocalChain.create(self.path, b'', RULES)
    self.assertLen(chain.peers(0), 1)

  @parameterized.parameters('block_seconds', 'tempo', 'capacity')
  def test_bad_rules(self, name):
    with self.assertRaisesRegex(ValueError, f'{name}: expected more than 0'):
      self.create(self.path, **{name: 0})
    self.assertFalse(os.path.exists(self.path))

  def test_without_a_key(self):
    chain = self.create()
    self.assertEqual(chain.hotkey, '')
    for action in (
      lambda: chain.commit(b''),
      lambda: chain.set_weights({0: 1}),
      lambda: chain.sign(b''),
    ):
      with self.assertRaisesRegex(
        interface.ChainRejectedError, 'without a key'
      ):
        action()

  def test_rate_limits_say_when(self):
    chain = self.create(commit_interval=7)
    ann = self.join(chain, 'ann')
    self.clock.to(3)
    ann.commit(b'one')
    self.clock.to(9)
    with self.assertRaisesRegex(
      interface.ChainRejectedError, 'wait until block 10'
    ):
      ann.commit(b'two')
    self.clock.to(10)
    ann.commit(b'two')

  def test_a_refused_change_changes_nothing(self):
    chain = self.create()
    boss = self.join(chain, 'boss', 1.0, True)
    self.clock.to(12)
    before = chain.dump()
    with self.assertRaisesRegex(interface.ChainRejectedError, r'uids \[3, 9\]'):
      boss.set_weights({0: 1, 9: 1, 3: 1})
    self.assertEqual(chain.dump(), before)

  def test_numpy_weights(self):
    chain = self.create()
    boss = self.join(chain, 'boss', 1.0, True)
    self.join(chain, 'ann')
    boss.set_weights({np.int64(0): np.float32(0.5), np.int64(1): np.float32(1)})
    self.assertEqual(chain.weights(), {0: {0: 32768, 1: 65535}})

  # Many at once.

  def test_threads_share_a_connection(self):
    chain = self.create(capacity=256)
    views = [self.join(chain, i) for i in range(4)]

    def work(view):
      for i in range(25):
        view.commit(f'{i}'.encode())
        view.peers(view.head())

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      list(pool.map(work, views))
    self.clock.to(1)
    self.clock.to(200)
    got = chain.commitments(200)
    self.assertEqual([c.data for c in got.values()], [b'24'] * 4)

  def run_script(self, script, *arguments):
    return subprocess.Popen(
      [sys.executable, '-W', 'error', '-c', script, self.path, *arguments],
      cwd=helpers.ROOT,
      stdout=subprocess.PIPE,
    )

  def test_a_clock_that_is_set_seals_nothing(self):
    """The clock of one process jumps for one read, of all for ever."""
    ann = local_chain.LocalChain.create(self.path, b'', RULES, make_key('ann'))
    bob = local_chain.LocalChain.open(self.path, make_key('bob'))
    now = time.time()
    for chain in ann, bob:
      self.addCleanup(chain.close)
      chain.begin(now - 100)
      chain.register(chain.hotkey, 1.0, True)
    for seconds in (3600.0, -3600.0, 1e9):
      with mock.patch('time.time', lambda s=seconds: now + s):
        block = ann.head()
        ann.peers(block)
        ann.commit(b'ahead')
        late = local_chain.LocalChain.open(self.path, make_key('cid'))
        self.addCleanup(late.close)
        self.assertLessEqual(late.head() - block, 100)
      bob.peers(bob.head())
      bob.commit(b'in time')
      self.assertLessEqual(bob.head() - block, 100)
      self.assertGreaterEqual(bob.head(), block)

  def test_after_a_restart_of_the_machine_time_goes_on(self):
    chain = local_chain.LocalChain.create(self.path, b'', RULES)
    self.addCleanup(chain.close)
    chain.begin(time.time() - 100)
    before = chain.head()
    boot = pathlib.Path(self.create_tempfile(content='another').full_path)
    with (
      mock.patch.object(clock_lib, '_BOOT', boot),
      mock.patch.object(clock_lib, '_since_start', time.monotonic),
    ):
      again = local_chain.LocalChain.open(self.path)
      self.addCleanup(again.close)
      self.assertBetween(again.head(), before, before + 100)

  @pytest.mark.network
  def test_processes(self):
    # Rounds of work, not time, end this; blocks pass meanwhile, few enough
    # that none is forgotten.
    chain = local_chain.LocalChain.create(
      self.path, b'', RULES._replace(block_seconds=0.1, capacity=9)
    )
    self.addCleanup(chain.close)
    chain.begin(time.time())
    script = """
import json, sys
from covenant.chain import keys, local_chain
path, number = sys.argv[1:]
key = keys.Key.from_seed(bytes([int(number)]) * 32)
chain = local_chain.LocalChain.open(path, key, timeout=60.0)
chain.register(key.address, 1.0, True)
seen = []
for i in range(30):
  chain.commit(f'{number}: {i}'.encode())
  chain.set_weights({j: j + 1 for j in range(len(chain.peers(chain.head())))})
  block = chain.head()
  there = chain.commitments(block)
  seen.append([block, [(c.block, c.data.decode()) for c in there.values()]])
print(json.dumps(seen))
"""
    workers = [self.run_script(script, f'{i}') for i in range(3)]
    views = {}
    for worker in workers:
      out, _ = worker.communicate(timeout=120)
      self.assertEqual(worker.returncode, 0)
      for block, there in json.loads(out):
        self.assertEqual(views.setdefault(block, there), there)
    with contextlib.closing(sqlite3.connect(self.path)) as file:
      rows = file.execute('SELECT data FROM commitments').fetchall()
    want = [f'{i}: {j}'.encode() for i in range(3) for j in range(30)]
    self.assertCountEqual([data for (data,) in rows], want)

  @pytest.mark.network
  def test_a_process_killed_while_it_writes(self):
    chain = self.create(self.path)
    script = """
import os, signal, sys
from covenant.chain import keys, local_chain
def clock():
  if armed:
    os.kill(os.getpid(), signal.SIGKILL)
  return 0.0
armed = False
key = keys.Key.from_seed(bytes(32))
chain = local_chain.LocalChain.open(sys.argv[1], key, clock)
chain.register(key.address, 1.0, True)
chain.commit(b'acknowledged')
armed = True
chain.commit(b'not')
"""
    worker = self.run_script(script)
    worker.communicate(timeout=120)
    self.assertEqual(worker.returncode, -signal.SIGKILL)
    self.assertEqual(
      chain.commitments(0), {0: interface.CommittedData(0, b'acknowledged')}
    )
    chain.register(make_key('ann').address, 0.0, False)  # nothing is locked


if __name__ == '__main__':
  absltest.main()
