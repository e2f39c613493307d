from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.config import amend
from covenant.protocol import amendments
from covenant.wire import amendment as amendment_lib
from tests import helpers

RUN = b'r' * 16


def genesis(*changes):
  return config_lib.load(f'{helpers.CONFIGS}/tiny.py', ['rounds=20', *changes])


def made(round_index, *edits):
  return amendment_lib.make(RUN, round_index, amend.parse(edits))


class AmendmentsTest(parameterized.TestCase):
  def test_each_round_has_the_values_that_hold(self):
    adopted = (
      made(9, 'optim.outer.learning_rate=0.5'),
      made(4, 'optim.outer.learning_rate=0.7', 'rounds=30'),
    )
    rates = [
      amendments.config_at(genesis(), adopted, r).optim.outer.learning_rate
      for r in (0, 3, 4, 8, 9, 20)
    ]
    self.assertEqual(rates, [1.0, 1.0, 0.7, 0.7, 0.5, 0.5])
    self.assertEqual(amendments.last_config(genesis(), adopted).rounds, 30)
    self.assertEqual(amendments.config_at(genesis(), adopted, 3), genesis())

  def test_rounds_of_other_lengths(self):
    config = genesis()
    plan = amendments.schedule(config, ())
    adopted = made(4, 'phases.round_blocks=140'), made(6, 'rounds=25')
    later = amendments.schedule(config, adopted)
    length = config.phases.round_blocks
    self.assertNotEqual(length, 140)
    for r in range(5):
      self.assertEqual(later.start(r), plan.start(r))
    self.assertEqual(later.start(6) - later.start(5), 140)
    for r in range(12):
      for block in (later.start(r), later.start(r + 1) - 1):
        self.assertEqual(later.round_at(block), r)
    self.assertEqual(later.decision_block(3), plan.decision_block(3))

  @parameterized.parameters(
    (6, 'optim.outer.learning_rate=-1', 'expected more than 0'),
    (6, 'gauntlet.contributors=5000', 'expected at most 1023'),
    (6, 'optim.outer.momentum=0.5', 'may not change from or to 0'),
    (6, 'phases.round_blocks=9', 'phases.round_blocks: expected more than'),
    (6, 'rounds=5', 'expected at least 6'),
    (6, 'data.phases=[{"start": 6, "mixture": [{"path": "a"}]}]', 'data'),
    (6, 'protocol=1', 'expected a version above 1'),
    (6, 'protocol=2', 'expected the release that has protocol 2'),
    (5, 'optim.outer.learning_rate=0.5', 'round 5: expected 6 to'),
    (25, 'optim.outer.learning_rate=0.5', 'the run ends before it'),
  )
  def test_illegal_ones(self, round_index, edit, error):
    with self.assertRaisesRegex(amendments.AmendmentError, error):
      amendments.check(genesis(), (), made(round_index, edit), 4)

  def test_it_is_adopted_once_and_fits_those_before(self):
    first = made(9, 'phases.put_blocks=60')
    amendments.check(genesis(), (), first, 4)
    with self.assertRaisesRegex(amendments.AmendmentError, 'has adopted it'):
      amendments.check(genesis(), (first,), first, 4)
    shorter = made(12, 'phases.round_blocks=50')
    amendments.check(genesis(), (), shorter, 4)
    with self.assertRaisesRegex(amendments.AmendmentError, 'round_blocks'):
      amendments.check(genesis(), (first,), shorter, 4)

  def test_a_new_protocol_needs_a_release(self):
    one = made(9, 'protocol=2', 'release=3.1.0')
    amendments.check(genesis(), (), one, 4)
    needed = 'release 3.1.0 or newer is needed from round 9 on'
    self.assertIn(needed, amendments.record(genesis(), (), one, 5)['needed'])
    self.assertEqual(amendments.config_at(genesis(), [one], 8), genesis())
    with self.assertRaisesRegex(amendments.ReleaseNeededError, needed):
      amendments.config_at(genesis(), [one], 9)

  def test_values_of_a_later_release_are_no_fork(self):
    one = amendment_lib.make(RUN, 9, {'optim.outer.warp': 9})
    self.assertEqual(amendments.config_at(genesis(), [one], 8), genesis())
    with self.assertRaisesRegex(amendments.ReleaseNeededError, 'round 9'):
      amendments.config_at(genesis(), [one], 9)
    with self.assertRaisesRegex(amendments.AmendmentError, 'may not change'):
      amendments.check(genesis(), (), one, 4)

  def test_record(self):
    one = made(4, 'optim.outer.learning_rate=0.7', 'rounds=30')
    found = amendments.record(genesis(), (), one, 3)
    self.assertEqual(
      amendments.describe(found),
      'amendment: from round 4 on rounds = 30 (before: 20), '
      'optim.outer.learning_rate = 0.7 (before: 1.0)',
    )

  @parameterized.parameters(
    ({'protocol': [2]},),
    ({'protocol': {}, 'release': ['x']},),
    ({'protocol': True},),
    ({'restore': 5},),
    ({'rounds': [2]},),
    ({'phases.put_blocks': {'a': 1}},),
    ({'gauntlet.burn': 'much'},),
    ({'data.phases': 5},),
    ({'data.phases': [[5]]},),
    ({'optim.inner.learning_rate': None},),
  )
  def test_values_of_other_types_are_refused(self, values):
    one = amendment_lib.make(RUN, 9, values)
    with self.assertRaises(amendments.AmendmentError):
      amendments.check(genesis(), (), one, 4)
    text = amendments.describe(amendments.record(genesis(), (), one, 4))
    self.assertIn('is needed from round 9 on', text)

  def test_values_of_strangers_are_cut_and_escaped(self):
    release = '\x1b[2J' + 'x' * 10_000
    one = amendment_lib.make(RUN, 9, {'protocol': 2, 'release': release})
    text = amendments.describe(amendments.record(genesis(), (), one, 4))
    self.assertTrue(text.isprintable())
    self.assertLess(len(text), 1500)

  def test_a_run_adopts_so_many(self):
    adopted = [
      amendment_lib.make(RUN, 9, {'rounds': 20 + i})
      for i in range(amendment_lib.MAX_ADOPTED)
    ]
    one = made(9, 'optim.outer.learning_rate=0.5')
    amendments.check(genesis(), adopted[1:], one, 4)
    with self.assertRaisesRegex(amendments.AmendmentError, 'at most 256'):
      amendments.check(genesis(), adopted, one, 4)


class DataPhasesTest(absltest.TestCase):
  def test_the_past_stays_and_the_new_has_digests(self):
    phase = '{"start": %d, "mixture": [{"path": "%s", "digest": "%s"}]}'
    old = phase % (0, 'web', 'a' * 64)
    new = phase % (9, 'books', 'b' * 64)
    config = genesis('data.source=shards', f'data.phases=[{old}]')
    one = made(9, f'data.phases=[{old}, {new}]')
    amendments.check(config, (), one, 4)
    found = amendments.config_at(config, [one], 9).data
    self.assertEqual(found.paths, ('web', 'books'))
    # Another operator has the same data elsewhere.
    there = made(9, f'data.phases=[{old.replace("web", "/mnt/web")}, {new}]')
    found = amendments.config_at(config, [there], 9).data
    self.assertEqual(found.paths, ('web', 'books'))
    # So has this one of the new data.
    places = config_lib.edit(config, [f'data.places={"b" * 64}=/mnt/books'])
    found = amendments.config_at(places, [one], 9).data
    self.assertEqual(found.paths, ('web', '/mnt/books'))
    for edit in (
      f'[{new.replace("9", "0", 1)}]',
      f'[{old}, {new.replace("b" * 64, "")}]',
      f'[{old}, {new.replace("9", "8", 1)}]',
    ):
      with self.assertRaisesRegex(amendments.AmendmentError, 'data.phases'):
        amendments.check(config, (), made(9, f'data.phases={edit}'), 4)


if __name__ == '__main__':
  absltest.main()
