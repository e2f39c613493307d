import collections
import dataclasses
import functools

import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.adversaries import protocol_violations
from covenant.adversaries import registry
from covenant.data import dataset
from covenant.emulate import host as host_lib
from covenant.emulate import saved
from covenant.protocol import checkpoint
from covenant.train import local as local_lib
from covenant.wire import payload as payload_lib
from tests import helpers

HONEST = 4  # uids 0 to 3
ROUNDS = 4
# The verdicts that a name has from its second round on. Who is not here is
# valid by all that can be checked, and left to be outrated.
VERDICTS = {
  'zeros': {'TINY'},
  'tiny': {'TINY'},
  'scaled': {'HUGE'},
  'copier': {'COPY'},
  'copier-exact': {'REFUSED'},
  'copier-fast': {'COPY'},
  'copier-perturbed': {'COPY'},
  'copier-previous': {'REPLAY'},
  'replayer': {'REFUSED'},
  'outdated': {'UNSYNCHRONIZED'},
  'late': {'LATE'},
  'early': {'EARLY'},
  'twice': {'TWICE'},
  'absent': {'ABSENT'},
  'swapped': {'UNREACHABLE'},
  'malformed': {'REFUSED'},
}
HARMFUL = ('noise', 'flipped', 'little', 'inner-product')


def zoo(names, miners=0, rounds=ROUNDS, **changes):
  config = helpers.tiny()
  return dataclasses.replace(
    config,
    rounds=rounds,
    miners=miners or HONEST + len(names),
    adversaries=tuple(names),
    data=dataclasses.replace(config.data, synthetic_tokens=60_000),
    gauntlet=dataclasses.replace(config.gauntlet, evaluate=64, contributors=64),
    **changes,
  )


def judged(config, rounds=ROUNDS):
  """The host after some rounds, and its verdicts by validator."""
  host = host_lib.Host(config, dataset.load(config))
  verdicts = collections.defaultdict(list)
  host.announce = lambda uid, verdict: verdicts[uid].append(verdict)
  for _ in range(rounds):
    host.round()
  return host, verdicts


@functools.cache
def everybody(names):
  """One run of all these, with two validators."""
  config = zoo(names, validators=2)
  return config, *judged(config)


def decisions(verdicts, uid):
  return [d for v in verdicts for d in v.decisions if d['uid'] == uid]


@pytest.mark.slow
class ZooTest(absltest.TestCase):
  # Who divides the validators is left out: they would not hold the same.
  names = tuple(n for n in registry.MINERS if n != 'two-faced')

  def test_each_is_refused_for_the_right_reason(self):
    config, _, verdicts = everybody(self.names)
    (first, _) = verdicts
    for uid, name in registry.names(config).items():
      if name in VERDICTS:
        found = [d['verdict'] for d in decisions(verdicts[first], uid)]
        self.assertNotEmpty(found[1:], name)
        self.assertEqual(set(found[1:]), VERDICTS[name], name)

  def test_no_honest_one_is_ever_refused_or_punished(self):
    config, _, verdicts = everybody(self.names)
    bad = registry.dishonest(config)
    cast = registry.names(config)
    first = min(verdicts)
    for uid in set(range(config.miners)) - set(bad):
      found = decisions(verdicts[first], uid)
      self.assertLen(found, ROUNDS)
      away = cast.get(uid) in ('joiner', 'churner')
      excused = {'MISSING'} if away else set()
      wrong = {d['verdict'] for d in found} - {'VALID'} - excused
      self.assertEmpty(wrong, cast.get(uid, uid))
      self.assertEqual({d['after']['penalty'] for d in found}, {1.0})

  def test_nobody_disturbs_anothers_payload(self):
    """All that validators counted is what its maker signed, bit for bit."""
    _, host, _ = everybody(self.names)
    self.assertLen({n.root for n in host.nodes}, 1)
    self.assertLen({n.fingerprint() for n in host.nodes}, 1)
    self.assertContainsSubset({0, 1, 2, 3}, host.validators[0].messages)

  def test_two_validators_reach_the_same_scores_bit_for_bit(self):
    _, host, verdicts = everybody(self.names)
    one, two = (v.role.standings for v in host.validators)
    self.assertEqual(one, two)
    first, second = verdicts.values()
    self.assertEqual(first, second)

  def test_who_harms_is_outrated(self):
    config, host, _ = everybody(self.names)
    cast = registry.names(config)
    standings = host.validators[0].role.standings.standings
    least = min(standings[u].raw_score for u in range(HONEST))
    harmful = [u for u, n in cast.items() if n in HARMFUL]
    self.assertNotEmpty(harmful)
    for uid in harmful:
      self.assertLess(standings[uid].raw_score, least, cast[uid])

  def test_a_harmful_message_is_not_heard_again(self):
    config, host, _ = everybody(self.names)
    cast = registry.names(config)
    heard = {cast.get(uid, '') for uid in host.validators[0].messages}
    self.assertNoCommonElements(
      heard, {'noise', 'flipped', 'flipped-tenfold', 'inner-product'}
    )

  def test_has_all_that_are_refused_or_harm(self):
    self.assertContainsSubset(VERDICTS, self.names)
    self.assertContainsSubset(HARMFUL, self.names)


class ChurnerTest(absltest.TestCase):
  @pytest.mark.slow
  def test_any_uid_may_come_and_go_from_the_first_round_on(self):
    config = config_lib.load(
      f'{helpers.CONFIGS}/tiny.py',
      ['miners=4', f'adversaries={",".join(["churner"] * 4)}'],
    )
    host = host_lib.Host(config, dataset.load(config))
    sent = [host.round().payloads for _ in range(8)]
    self.assertLess(min(sent), max(sent))


class MalformedTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    config = zoo(['malformed'])
    cls.host = host_lib.Host(config, dataset.load(config))
    cls.miner = cls.host.miners[-1]

  @parameterized.parameters(*protocol_violations.MALFORMED)
  def test_every_kind_is_refused(self, kind):
    uid = HONEST
    miner, shared_model = self.miner, self.host.shared_model
    task = local_lib.Task(uid, 0, b'', miner.root)
    good = protocol_violations.payload(miner, task)
    expected = payload_lib.Header(
      shared_model.run, 0, uid, miner.root[:16], b'', 0
    )

    def verify(data, signature):
      return miner.chain.verify(miner.chain.hotkey, data, signature)

    shared_model.decode(good, expected, verify)
    with self.assertRaises(payload_lib.PayloadError):
      data = protocol_violations.MALFORMED[kind](miner, good, task)
      shared_model.decode(data, expected, verify)


class CastTest(parameterized.TestCase):
  def test_the_last_miners_and_the_last_validators(self):
    config = zoo(['noise', 'lazy', 'slow'], miners=5, validators=2)
    self.assertEqual(registry.names(config), {3: 'noise', 4: 'slow', 6: 'lazy'})
    self.assertEqual(registry.dishonest(config), {3: 'noise', 6: 'lazy'})

  @parameterized.parameters(
    (
      ['nosie'],
      "no 'nosie'; did you mean noise. Expected some of: noise, zeros",
    ),
    (['noise'] * 6, '6 of them are miners, and there are miners=5 only'),
    (['lazy'] * 2, '2 of them are validators'),
  )
  def test_what_cannot_be_is_an_error(self, names, message):
    config = zoo(names, miners=5)
    with self.assertRaisesRegex(config_lib.ConfigError, message):
      host_lib.Host(config, dataset.load(config))

  def test_is_not_part_of_what_a_run_computes(self):
    self.assertEqual(
      config_lib.identity(zoo(['noise'])), config_lib.identity(zoo([]))
    )


@pytest.mark.slow
class CorruptTest(absltest.TestCase):
  """Two honest validators, and others; among the miners who divides them."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    names = ['zeros', 'two-faced', 'lazy', 'bribed', 'omitting']
    config = zoo(names, miners=HONEST + 2, validators=5)
    cls.host = host_lib.Host(config, dataset.load(config))
    cls.verdicts = collections.defaultdict(list)
    cls.host.announce = lambda u, v: cls.verdicts[u].append(v)
    for _ in range(6):
      cls.host.round()
    cls.weights = cls.host.chain.weights()
    leader = cls.host.validators[-1]
    assert registry.names(config)[10] == 'omitting'
    cls.host.chain.set_stake(leader.chain.hotkey, 1500.0)
    for _ in range(2):
      cls.host.round()

  def test_all_stand_at_the_same_place(self):
    self.assertLen({n.root for n in self.host.nodes}, 1)
    self.assertLen({n.fingerprint() for n in self.host.nodes}, 1)

  def test_a_lazy_one_sets_the_weights_that_the_leader_published(self):
    self.assertNotIn(8, self.verdicts)
    published = self.verdicts[6][4].weights
    largest = max(published, key=published.__getitem__)
    said = self.weights[8]
    self.assertEqual(max(said, key=said.__getitem__), largest)
    self.assertEqual(set(said), {u for u, w in published.items() if w > 1e-4})

  def test_a_bribed_one_does_not_move_what_the_chain_pays(self):
    self.assertGreater(self.weights[9][4], 0)
    self.assertNotIn(4, self.weights[6])
    earned = self.host.chain.earned(self.host.chain.head())
    total = sum(earned[u] for u in range(HONEST + 2))
    self.assertGreater(total, 0)
    self.assertLess(earned[4], 0.01 * total)

  def test_an_omitting_leader_changes_nobodys_score(self):
    self.assertEqual(set(self.host.validators[0].messages), {1, 3, 5})
    standings = self.host.validators[0].role.standings.standings
    for uid in range(HONEST):
      self.assertEqual(standings[uid].evaluations, 8)
      self.assertEmpty(standings[uid].penalties)

  def test_who_shows_two_faces_is_not_paid_by_who_cannot_read_it(self):
    even, odd = (
      [d['verdict'] for d in decisions(self.verdicts[v], 5)] for v in (6, 7)
    )
    self.assertEqual(set(even), {'VALID'})
    self.assertEqual(set(odd), {'UNREACHABLE'})


@pytest.mark.slow
class ResumeTest(absltest.TestCase):
  def test_scores_survive_kill_and_resume(self):
    """Adversaries who build on the last round are there to notice it."""
    names = ['noise', 'copier-previous', 'small-batch']
    config = zoo(names, miners=6)
    host = host_lib.Host(config, dataset.load(config))
    found = []
    host.announce = lambda uid, verdict: found.append(verdict)
    folder = self.create_tempdir().full_path
    with checkpoint.Checkpoints(folder, config.checkpoint) as checkpoints:
      for r in range(ROUNDS):
        if r == 2:
          checkpoints.save(saved.save(host))
        host.round()
      want, standings = found[2:], host.validators[0].role.standings
      self.assertIn('REPLAY', [d['verdict'] for d in decisions(want[:1], 4)])
      found.clear()
      host.init()
      saved.load(host, checkpoints.restore(saved.save(host)))
    for _ in range(2, ROUNDS):
      host.round()
    self.assertEqual(found, want)
    self.assertEqual(host.validators[0].role.standings, standings)

  def test_a_validator_reads_up_what_a_restart_made_it_forget(self):
    config = zoo(['copier-previous'], miners=5, validators=2)
    host = host_lib.Host(config, dataset.load(config))
    for _ in range(3):
      host.round()
      host.validators[1].messages = {}
    one, two = (v.role.standings for v in host.validators)
    self.assertEqual(one, two)
    self.assertEqual([p.reason for p in two.standings[4].penalties], ['REPLAY'])


if __name__ == '__main__':
  absltest.main()
