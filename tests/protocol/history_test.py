"""The history of a run, proven from the chain backwards."""

import itertools
import types

import hypothesis
import pytest
from absl.testing import absltest
from absl.testing import parameterized
from hypothesis import strategies as st

from covenant.chain import interface as chain_lib
from covenant.config import network as network_config
from covenant.protocol import history as history_lib
from covenant.protocol import membership as membership_lib
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import bucket as bucket_lib
from covenant.store import interface as store_lib
from covenant.store import location as location_lib
from covenant.wire import commitment as commitment_lib
from covenant.wire import manifest as manifest_lib

RUN = b'r' * 16
_NUMBERS = itertools.count()
ROUND = 20  # blocks
SCHEDULE = round_lib.Schedule(
  network_config.Phases(
    round_blocks=ROUND,
    put_blocks=4,
    select_blocks=4,
    takeover_blocks=4,
    confirmations=0,
  )
)


def made(rounds, empty=(), hotkey='v'):
  """Returns the manifest of each round, and the root before each and after."""
  root, roots, manifests = manifest_lib.genesis(RUN), [], []
  for r in range(rounds):
    roots.append(root)
    manifest = manifest_lib.Manifest(RUN, r, root, f'{r:032x}', hotkey, ())
    data = manifest_lib.encode(manifest, lambda _: bytes(64))
    data = b'' if r in empty else data
    digest = run_storage_lib.digest(data) if data else None
    manifests.append(data)
    root = manifest_lib.extend(root, r, digest)
  return manifests, [*roots, root]


def new_storage():
  location = location_lib.Location.parse(f'memory://history-{next(_NUMBERS)}')
  return run_storage_lib.RunStorage(
    RUN,
    bucket_lib.open_bucket(location),
    location.to_bytes(),
    lambda data: bucket_lib.open_for_reading(
      location_lib.Location.from_bytes(data), allow_local=True
    ),
  )


class HistoryTest(parameterized.TestCase):
  def source(self, name, manifests):
    storage = new_storage()
    for r, data in enumerate(manifests):
      if data is not None:
        key = storage.key('history', r)
        storage.bucket.put(key, data, replace=True)
    return history_lib.Source(name, storage.bucket)

  def history(self, manifests, roots, *sources):
    """Returns a history whose anchor is the last manifest of all."""
    rounds = len(manifests)
    last = max((r for r in range(rounds) if manifests[r]), default=0)
    view = history_lib.View(
      types.SimpleNamespace(verify=lambda *_: True),
      new_storage(),
      SCHEDULE,
      RUN,
      membership_lib.Membership(0, 0, 9, {}, {}, {}, {}),
      sources,
      rounds,
    )
    anchor = history_lib.Anchor(last, roots[last], manifests[last])
    return history_lib.History(view, anchor)

  @parameterized.parameters(
    (), (0,), (3,), (3, 4, 5), (0, 1, 2), (8, 9), (0, 1, 5, 8, 9)
  )
  @pytest.mark.rows(1)
  def test_empty_rounds_are_no_obstacle(self, *empty):
    manifests, roots = made(10, empty)
    for kept in ([b''] * 10, [None] * 10):
      of_empty = dict(enumerate(kept))
      there = [x or of_empty[r] for r, x in enumerate(manifests)]
      for start in range(11):
        history = self.history(manifests, roots, self.source('v', there))
        self.assertTrue(history.leads_from(start, roots[start]), start)
        self.assertEqual(history.manifests(start, 10), manifests[start:])
        self.assertEqual(history.root(start), roots[start])
        following = [r for r in range(start, 10) if manifests[r]]
        want = f'{following[0]:032x}' if following else None
        self.assertEqual(history.fingerprint(start), want)
      for start in range(11):
        history = self.history(manifests, roots, self.source('v', there))
        self.assertFalse(history.leads_from(start, b'?' * 32))

  def test_liars_delay_nobody(self):
    """Others' manifests, of other rounds, and no manifests at all."""
    manifests, roots = made(10)
    others, _ = made(10, hotkey='w')
    for lie in (
      others,
      [b''] * 10,
      [b'?'] * 10,
      [b'[' * 9999] * 10,
      [None] * 10,
      manifests[1:] + manifests[:1],
    ):
      liars = [self.source(f'liar {i}', lie) for i in range(3)]
      honest = self.source('honest', manifests)
      history = self.history(manifests, roots, *liars, honest)
      self.assertTrue(history.leads_from(0, roots[0]))
      self.assertEqual(history.manifests(0, 10), manifests)

  def test_each_may_have_a_part(self):
    manifests, roots = made(10)
    parts = [
      self.source(
        f'{i}', [x if r % 3 == i else None for r, x in enumerate(manifests)]
      )
      for i in range(3)
    ]
    history = self.history(manifests, roots, *parts)
    self.assertTrue(history.leads_from(0, roots[0]))

  def test_a_gap_ends_a_proof(self):
    manifests, roots = made(10)
    there = [None if r == 4 else x for r, x in enumerate(manifests)]
    history = self.history(manifests, roots, self.source('v', there))
    self.assertFalse(history.leads_from(4, roots[4]))
    self.assertTrue(history.leads_from(5, roots[5]))
    self.assertEmpty(history.unavailable)
    self.assertIsNone(history.root(4))

  def test_liars_do_not_lead_back_to_the_beginning(self):
    manifests, roots = made(200)
    there = [b'' if r < 190 else x for r, x in enumerate(manifests)]
    source = self.source('v', there)
    asked = []
    get = source.bucket.get

    class Watched:
      location = source.bucket.location

      def get(self, key, limit):
        asked.append(key)
        return get(key, limit)

    source = source._replace(bucket=Watched())
    history = self.history(manifests, roots, source)
    self.assertFalse(history.leads_from(0, roots[0]))
    self.assertLess(len(asked), 80)

  def test_who_is_down_is_told_apart(self):
    class Down:
      location = 'memory://down'

      def get(self, key, limit):
        raise store_lib.StoreUnavailableError('down')

    manifests, roots = made(3)
    source = history_lib.Source('v', Down())
    history = self.history(manifests, roots, source)
    self.assertFalse(history.leads_from(0, roots[0]))
    self.assertNotEmpty(history.unavailable)

  @hypothesis.settings(deadline=None, max_examples=100, database=None)
  @hypothesis.given(
    st.lists(
      st.tuples(st.integers(0, 4), st.integers(0, 4), st.booleans()),
      max_size=12,
    )
  )
  def test_no_mixture_of_lies_changes_a_proof(self, lies):
    """Whatever a liar puts where, the proof is of the truth or fails."""
    manifests, roots = made(5, empty=(2,))
    others, _ = made(5, hotkey='w')
    there = list(manifests)
    for to, origin, own in lies:
      there[to] = (others if own else manifests)[origin]
    history = self.history(manifests, roots, self.source('v', there))
    if history.leads_from(0, roots[0]):
      self.assertEqual(history.manifests(0, 5), manifests)
    honest = self.source('honest', manifests)
    liar = self.source('v', there)
    history = self.history(manifests, roots, liar, honest)
    self.assertTrue(history.leads_from(0, roots[0]))
    self.assertEqual(history.manifests(0, 5), manifests)


class AnchorsTest(absltest.TestCase):
  """Three validators, whose votes a fake chain has at every block."""

  STAKES = (30.0, 31.0, 39.0)

  def setUp(self):
    super().setUp()
    self.manifests, self.roots = made(4)
    self.votes = {}  # (uid, round) -> (block, digest)
    self.kept = new_storage()
    self.liar = b'?' * 32

  def put(self, data):
    r = manifest_lib.decode(data, lambda *_: True).round
    digest = run_storage_lib.digest(data)
    self.kept.put_once(self.kept.key('proposals', r, digest), data)
    return digest

  def vote(self, uid, r, data, late=False):
    block = SCHEDULE.start(r + 1) + (10 if late else 1)
    self.votes[uid, r] = block, self.put(data)

  def forged(self, r):
    manifest = manifest_lib.Manifest(RUN, r, b'?' * 32, f'{7:032x}', 'liar', ())
    return manifest_lib.encode(manifest, lambda _: bytes(64))

  def anchors(self, head, forgotten=-1):
    peers = tuple(
      chain_lib.Peer(uid, f'v{uid}', stake, True, 0)
      for uid, stake in enumerate(self.STAKES)
    )

    class Chain:
      verify = staticmethod(lambda *_: True)

      def peers(chain, block):
        if block <= forgotten:
          raise chain_lib.ChainRejectedError('forgotten')
        return peers

      def commitments(chain, block):
        last = {}
        for (uid, r), (at, digest) in sorted(self.votes.items()):
          if at <= block:
            encoded = commitment_lib.encode(
              commitment_lib.Commitment(
                commitment_lib.Role.VALIDATOR, self.kept.location, r, digest
              )
            )
            last[uid] = chain_lib.CommittedData(at, encoded)
        return last

    self.view = view = history_lib.view(
      Chain(), new_storage(), SCHEDULE, RUN, head, 100
    )
    return view.target, history_lib.anchors(view)

  def test_the_beginning_before_any_vote(self):
    target, (anchor,) = self.anchors(ROUND + 10)
    self.assertEqual(target, 0)
    self.assertEqual((anchor.round, anchor.root), (0, self.roots[0]))

  def test_the_last_majority(self):
    for r in range(3):
      for uid in range(3):
        self.vote(uid, r, self.manifests[r])
    target, (anchor,) = self.anchors(4 * ROUND + 2)
    self.assertEqual(target, 3)
    want = history_lib.Anchor(2, self.roots[2], self.manifests[2])
    self.assertEqual(anchor, want)

  def test_the_vote_of_now_names_the_newest_state(self):
    for r in range(3):
      for uid in range(3):
        self.vote(uid, r, self.manifests[r])
    for uids, want in (((2,), None), ((0, 2), f'{3:032x}')):
      for uid in uids:
        self.vote(uid, 3, self.manifests[3])
      _, (anchor,) = self.anchors(4 * ROUND + 2)
      history = history_lib.History(self.view, anchor)
      self.assertEqual(history.fingerprint(3), want)
    for uid in 0, 1:
      self.vote(uid, 3, self.forged(3))  # another history
    _, (anchor,) = self.anchors(4 * ROUND + 2)
    history = history_lib.History(self.view, anchor)
    self.assertIsNone(history.fingerprint(3))

  def test_a_minority_that_was_late_anchors_nothing(self):
    for r in range(2):
      for uid in range(3):
        self.vote(uid, r, self.manifests[r])
    self.vote(2, 2, self.forged(2), late=True)
    _, (anchor,) = self.anchors(4 * ROUND + 2)
    want = history_lib.Anchor(1, self.roots[1], self.manifests[1])
    self.assertEqual(anchor, want)

  def test_a_majority_that_was_late_names_its_history(self):
    """On a chain that remembers nothing older."""
    for r in range(2):
      for uid in range(3):
        self.vote(uid, r, self.manifests[r])
    for uid in range(3):
      self.vote(uid, 2, self.manifests[2], late=True)
    _, (anchor,) = self.anchors(4 * ROUND + 2)
    want = history_lib.Anchor(1, self.roots[1], self.manifests[1])
    self.assertEqual(anchor, want)
    forgotten = SCHEDULE.last_decision_block(2)
    _, (anchor,) = self.anchors(4 * ROUND + 2, forgotten)
    self.assertEqual(anchor, history_lib.Anchor(2, self.roots[2], b''))

  def test_a_chain_that_forgot_has_the_last_votes(self):
    for uid in range(3):
      self.vote(uid, 0, self.manifests[0])
    last = SCHEDULE.last_decision_block(3)
    _, (anchor,) = self.anchors(5 * ROUND + 2, forgotten=last)
    want = history_lib.Anchor(0, self.roots[0], self.manifests[0])
    self.assertEqual(anchor, want)

  def test_a_manifest_that_nobody_has_is_waited_for(self):
    for uid in range(3):
      self.vote(uid, 0, self.manifests[0])
    self.kept.delete_before('proposals', 9)
    with self.assertRaises(store_lib.StoreError):
      self.anchors(2 * ROUND + 2)


if __name__ == '__main__':
  absltest.main()
