"""The contract of covenant/chain/interface.py, for every chain."""

import contextlib
import hashlib
import math
import os
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

from absl.testing import absltest
from absl.testing import parameterized

from covenant.chain import interface
from covenant.chain import keys
from covenant.chain import local_chain
from covenant.chain import storage as chain_storage
from tests.chain import control


class LocalControl:
  """The control that a test has over a chain; here over the embedded one.

  Each view is a connection of its own, as each process has one.
  """

  tempo = 10  # blocks from one pay to the next

  def __init__(
    self,
    test: absltest.TestCase,
    commit_interval: int = 0,
    weights_interval: int = 0,
  ):
    self._test = test
    self._path = os.path.join(test.create_tempdir().full_path, 'chain.sqlite')
    self._now = 1e9
    rules = chain_storage.ChainRules(
      block_seconds=12.0,
      tempo=self.tempo,
      commit_interval=commit_interval,
      weights_interval=weights_interval,
    )
    self._admin = local_chain.LocalChain.create(
      self._path, b'seed', rules, clock=lambda: self._now
    )
    test.addCleanup(self._admin.close)
    self._admin.begin(self._now)
    self.advance(3)

  def view(self, name: str) -> interface.Chain:
    """The chain for the hotkey of that name, registered or not."""
    seed = hashlib.blake2b(name.encode(), digest_size=32).digest()
    chain = local_chain.LocalChain.open(
      self._path, keys.Key.from_seed(seed), lambda: self._now, timeout=0.001
    )
    self._test.addCleanup(chain.close)
    return chain

  def advance(self, blocks: int = 1) -> None:
    """Time passes; what was submitted is in a block afterwards."""
    self._now += 12.0 * blocks

  def register(self, hotkey: str, stake: float, validator: bool) -> int:
    """Returns the lowest free uid, from 0 on."""
    return self._admin.register(hotkey, stake, validator)

  def set_stake(self, hotkey: str, stake: float) -> None:
    self._admin.set_stake(hotkey, stake)

  def deregister(self, hotkey: str) -> None:
    self._admin.deregister(hotkey)

  def weights(self, uid: int) -> dict[int, int]:
    """Returns the stored weights of a validator, as u16."""
    return self._admin.weights().get(uid, {})

  @contextlib.contextmanager
  def outage(self) -> Iterator[None]:
    """Nothing can be asked that was not known before."""
    other = sqlite3.connect(self._path, isolation_level=None)
    with contextlib.closing(other):
      other.execute('BEGIN IMMEDIATE')  # as a process that was stopped
      yield


# Another implementation is one more entry: control(test, commit_interval=0,
# weights_interval=0), with the methods of LocalControl.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
  'local': LocalControl,
  'bittensor': control.BittensorControl,
}
on_each = parameterized.named_parameters(
  *((name, name) for name in IMPLEMENTATIONS)
)


class ContractTest(parameterized.TestCase):
  def start(self, name, **options):
    """Two validators of 300 and 100 TAO, uids 0 and 1, and two miners."""
    self.control = IMPLEMENTATIONS[name](self, **options)
    self.boss, self.clerk, self.ann, self.bob = (
      self.control.view(n) for n in ('boss', 'clerk', 'ann', 'bob')
    )
    uids = (
      self.control.register(self.boss.hotkey, 300.0, True),
      self.control.register(self.clerk.hotkey, 100.0, True),
      self.control.register(self.ann.hotkey, 0.0, False),
      self.control.register(self.bob.hotkey, 0.0, False),
    )
    self.assertEqual(uids, (0, 1, 2, 3))
    self.control.advance()

  @on_each
  def test_blocks_pass(self, name):
    self.start(name)
    heads, hashes = [], {}
    for _ in range(4):
      head = self.ann.head()
      self.assertEqual(self.boss.head(), head)
      heads.append(head)
      hashes[head] = self.ann.block_hash(head)
      self.control.advance(2)
    self.assertEqual(heads, list(range(heads[0], heads[0] + 8, 2)))
    self.assertLen(set(hashes.values()), 4)
    for head, value in hashes.items():
      self.assertLen(value, 32)
      self.assertEqual(self.ann.block_hash(head), value)
      self.assertEqual(self.boss.block_hash(head), value)

  @on_each
  def test_timestamps(self, name):
    self.start(name)
    self.control.advance(3)
    head = self.ann.head()
    times = [self.ann.timestamp(n) for n in range(head - 3, head + 1)]
    for before, after in zip(times, times[1:], strict=False):
      self.assertAlmostEqual(after - before, self.ann.block_seconds)
    self.assertEqual(self.boss.timestamp(head), times[-1])

  @on_each
  def test_the_future_is_refused(self, name):
    self.start(name)
    for read in (
      self.ann.block_hash,
      self.ann.timestamp,
      self.ann.peers,
      self.ann.commitments,
      self.ann.earned,
    ):
      read(self.ann.head())
      for block in (self.ann.head() + 1, self.ann.head() + 1000, -1):
        with self.assertRaisesRegex(interface.ChainRejectedError, f'{block}'):
          read(block)

  @on_each
  def test_peers(self, name):
    self.start(name)
    before = self.ann.head()
    peers = self.ann.peers(before)
    self.assertEqual([p.uid for p in peers], [0, 1, 2, 3])
    self.assertEqual(
      [p.hotkey for p in peers],
      [c.hotkey for c in (self.boss, self.clerk, self.ann, self.bob)],
    )
    self.assertEqual([p.stake for p in peers], [300.0, 100.0, 0.0, 0.0])
    self.assertEqual([p.permit for p in peers], [True, True, False, False])
    for peer in peers:
      self.assertIs(type(peer.permit), bool)
      self.assertBetween(peer.registered, 0, before)
    # What was true stays true.
    eve = self.control.view('eve')
    self.control.set_stake(self.clerk.hotkey, 500.0)
    self.assertEqual(self.control.register(eve.hotkey, 0.0, False), 4)
    self.control.advance()
    for chain in (self.ann, self.boss, eve):
      self.assertEqual(chain.peers(before), peers)
      after = chain.peers(chain.head())
      self.assertLen(after, 5)
      self.assertEqual(after[1], peers[1]._replace(stake=500.0))
      self.assertGreater(after[4].registered, before)

  @on_each
  def test_a_uid_that_changes_hands_is_another_peer(self, name):
    self.start(name)
    self.ann.commit(b'of ann')
    self.control.advance()
    before = self.boss.head()
    peers, said = self.boss.peers(before), self.boss.commitments(before)
    self.assertEqual(said[2].data, b'of ann')
    self.control.deregister(self.ann.hotkey)
    self.control.advance()
    gone = self.boss.head()
    # Bittensor leaves no gap: somebody else is there at once.
    self.assertNotIn(self.ann.hotkey, [p.hotkey for p in self.boss.peers(gone)])
    self.assertEqual(self.boss.commitments(gone), {})
    with self.assertRaises(interface.ChainRejectedError):
      self.ann.commit(b'still there')
    eve = self.control.view('eve')
    self.assertEqual(self.control.register(eve.hotkey, 0.0, False), 2)
    self.control.advance()
    now = self.boss.head()
    (peer,) = (p for p in self.boss.peers(now) if p.uid == 2)
    self.assertEqual(peer.hotkey, eve.hotkey)
    self.assertGreater(peer.registered, peers[2].registered)
    self.assertEqual(self.boss.commitments(now), {})
    self.assertEqual(self.boss.peers(before), peers)
    self.assertEqual(self.boss.commitments(before), said)

  @on_each
  def test_commitments_at_every_block(self, name):
    self.start(name)
    start = self.bob.head()
    seen = {start: self.bob.commitments(start)}
    self.assertEqual(seen[start], {})
    for i in range(4):
      (self.ann, self.bob)[i % 2].commit(f'number {i}'.encode())
      self.control.advance(2)
      head = self.bob.head()
      seen[head] = self.bob.commitments(head)
      self.assertEqual(seen[head][2 + i % 2].data, f'number {i}'.encode())
      self.assertBetween(seen[head][2 + i % 2].block, head - 2, head)
    last = seen[self.bob.head()]
    self.assertEqual(
      {uid: c.data for uid, c in last.items()},
      {2: b'number 2', 3: b'number 3'},
    )
    for block, there in seen.items():
      self.assertEqual(self.boss.commitments(block), there)
    # From its block on, not before.
    first = last[3].block
    self.assertEqual(self.boss.commitments(first)[3], last[3])
    self.assertNotEqual(self.boss.commitments(first - 1).get(3), last[3])

  @on_each
  def test_the_size_of_a_commitment(self, name):
    self.start(name)
    longest = bytes(range(interface.MAX_COMMITMENT))
    self.ann.commit(longest)
    self.control.advance()
    with self.assertRaisesRegex(interface.ChainRejectedError, '128 .*129'):
      self.ann.commit(longest + b'x')
    self.control.advance()
    got = self.boss.commitments(self.boss.head())
    self.assertEqual({u: c.data for u, c in got.items()}, {2: longest})

  @on_each
  def test_strangers_are_refused(self, name):
    self.start(name)
    eve = self.control.view('eve')
    for action in (lambda: eve.commit(b'hi'), lambda: eve.set_weights({2: 1})):
      with self.assertRaises(interface.ChainRejectedError):
        action()
    self.control.advance()
    self.assertEqual(eve.commitments(eve.head()), {})
    self.assertLen(eve.peers(eve.head()), 4)  # but may read

  @on_each
  def test_weights_are_those_of_bittensor(self, name):
    self.start(name)
    self.boss.set_weights({0: 0.0, 2: 1 / 7, 3: 1.0})
    self.clerk.set_weights({2: 5.0, 3: 1e-9})
    self.control.advance()
    self.assertEqual(self.control.weights(0), {2: 9362, 3: 65535})
    self.assertEqual(self.control.weights(1), {2: 65535})
    self.boss.set_weights({2: 2.0, 3: 2.0})
    self.control.advance()
    self.assertEqual(self.control.weights(0), {2: 65535, 3: 65535})

  @on_each
  def test_bad_weights_are_refused(self, name):
    self.start(name)
    for weights in (
      {2: -1.0, 3: 1.0},
      {2: math.nan, 3: 1.0},
      {2: math.inf},
      {2: 0.0},
      {},
      {2: 1.0, 200: 1.0},
    ):
      with self.assertRaises(interface.ChainRejectedError, msg=weights):
        self.boss.set_weights(weights)
    self.control.advance()
    self.assertEqual(self.control.weights(0), {})

  @on_each
  def test_miners_set_no_weights(self, name):
    self.start(name)
    with self.assertRaisesRegex(interface.ChainRejectedError, 'validator'):
      self.ann.set_weights({3: 1.0})
    self.control.advance()
    self.assertEqual(self.control.weights(2), {})

  @on_each
  def test_too_often_is_refused(self, name):
    self.start(name, commit_interval=10, weights_interval=10)
    # Bittensor counts a registration as having set weights.
    self.control.advance(12)
    actions = (
      lambda: self.ann.commit(b'hi'),
      lambda: self.boss.set_weights({2: 1.0}),
    )
    for action in actions:
      action()
    self.control.advance(3)
    for action in actions:
      with self.assertRaises(interface.ChainRejectedError):
        action()
    self.bob.commit(b'hi')  # the limit is each hotkey's own
    self.control.advance(12)
    for action in actions:
      action()

  @on_each
  def test_pay(self, name):
    self.start(name)
    self.boss.set_weights({2: 3.0, 3: 1.0})
    self.clerk.set_weights({2: 3.0, 3: 1.0})
    self.control.advance(2 * self.control.tempo)
    head = self.ann.head()
    earned = self.ann.earned(head)
    self.assertEqual(self.bob.earned(head), earned)
    self.assertCountEqual(earned, (0, 1, 2, 3))
    for tao in earned.values():
      self.assertGreaterEqual(tao, 0.0)
    self.assertGreater(earned[2], earned[3])
    self.assertGreater(earned[0], earned[1])
    self.control.advance(self.control.tempo)
    self.assertEqual(self.ann.earned(head), earned)

  @on_each
  def test_signatures(self, name):
    self.start(name)
    data = b'a manifest'
    signature = self.ann.sign(data)
    self.assertLen(signature, 64)
    self.assertTrue(self.boss.verify(self.ann.hotkey, data, signature))
    for hotkey, what, proof in (
      (self.bob.hotkey, data, signature),
      (self.ann.hotkey, data + b'!', signature),
      (self.ann.hotkey, data, signature[:-1]),
      (self.ann.hotkey, data, signature + b'!'),
      (self.ann.hotkey, data, bytes(64)),
      (self.ann.hotkey, data, b''),
      (self.ann.hotkey, data, None),
      (self.ann.hotkey[:-1], data, signature),
      ('', data, signature),
      ('\ud800', data, signature),
      (None, data, signature),
      (self.ann.hotkey, None, signature),
    ):
      self.assertIs(self.boss.verify(hotkey, what, proof), False)

  @on_each
  def test_an_outage(self, name):
    self.start(name)
    before = self.ann.head()
    peers = self.ann.peers(before)
    self.control.advance()
    if name == 'bittensor':
      for chain in (self.ann, self.boss):
        self.control.make_impatient(chain)
    with self.control.outage():
      for action in (
        lambda: self.ann.peers(self.ann.head()),
        lambda: self.ann.commit(b'hi'),
        lambda: self.boss.set_weights({2: 1.0}),
      ):
        with self.assertRaises(interface.ChainUnreachableError):
          action()
    # And then it is as if nothing had been asked.
    if name == 'bittensor':
      for chain in (self.ann, self.boss):
        self.control.make_patient(chain)
    self.assertEqual(self.ann.peers(before), peers)
    self.assertEqual(self.ann.peers(self.ann.head()), peers)
    self.assertEqual(self.ann.commitments(self.ann.head()), {})
    self.ann.commit(b'hi')
    self.control.advance()
    self.assertIn(2, self.ann.commitments(self.ann.head()))


if __name__ == '__main__':
  absltest.main()
