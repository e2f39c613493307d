"""The parts that adversaries are made of, on policies that only take notes."""

import pytest
from absl.testing import absltest

from covenant.adversaries import base
from covenant.data import assignment
from covenant.node import base as node_lib
from covenant.node import miner as miner_lib
from covenant.protocol import round as round_lib
from covenant.train import local as local_lib
from tests import helpers
from tests.node import network as network_lib

Future = node_lib.Future
Phase = round_lib.Phase
WORK = local_lib.TrainedRound('message', b'receipt', 12, 2.5, 0.25)
MADE = local_lib.Contribution(b'payload', 2.5, 192, 0.25, 0)
command = network_lib.command


def policy(work=WORK, calls=None):
  """A policy that trains nothing; notes what it is asked in `calls`."""
  calls = [] if calls is None else calls

  def train(miner, task, params, batches):
    calls.append(('train', list(batches)))
    return Future.done(work)

  def seal(miner, task, work):
    calls.append(('seal', work))
    return MADE._replace(round=task.round)

  return miner_lib.HONEST._replace(
    batches=lambda miner, task: [1, 2, 3],
    train=train,
    seal=seal,
    commit=lambda miner, command, head: calls.append(('commit', head)),
  )


class BaseTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.network = network_lib.Network(self)
    self.network.block = 1
    self.miner = self.network.miner(0, names={0: 'copier', 2: 'copier'})
    self.task = miner_lib.task(self.miner, 0)

  def train(self, policy, batches=(1, 2)):
    return policy.train(self.miner, self.task, None, batches).result()

  def test_accomplices_share_a_note_for_one_time(self):
    made = []
    gang = base.Accomplices({4: 'a', 1: 'b', 2: 'a'}, {})
    self.assertEqual(gang.uids('a'), [2, 4])

    def make():
      made.append(len(made))
      return made[-1]

    self.assertEqual([gang.note('x', 0, make) for _ in range(3)], [0, 0, 0])
    self.assertEqual(gang.note('y', 0, make), 1)
    self.assertEqual(gang.note('x', 1, make), 2)
    self.assertEqual(gang.note('x', 0, make), 3)  # the older one is gone

  def test_spoiled_changes_the_work_and_trains_as_before(self):
    calls = []

    def spoil(miner, task, work):
      return work._replace(message=f'no {work.message}')

    found = self.train(base.spoiled(policy(calls=calls), spoil))
    self.assertEqual(found, WORK._replace(message='no message'))
    self.assertEqual(calls, [('train', [1, 2])])
    self.assertIsNone(self.train(base.spoiled(policy(work=None), spoil)))

  def test_rebatched_changes_the_batches(self):
    changed = base.rebatched(
      policy(), lambda miner, task, batches: [10 * x for x in batches]
    )
    self.assertEqual(changed.batches(self.miner, self.task), [10, 20, 30])

  def test_idle_sends_without_training_and_claims_no_tokens(self):
    calls = []
    idle = base.idle(policy(calls=calls), lambda miner, task: 'made up')
    work = self.train(idle)
    self.assertEqual(work.message, 'made up')
    self.assertNotIn('train', dict(calls))
    split = self.miner.role.slot.trainer.split
    ids = local_lib.assigned_ids(network_lib.CONFIG, self.task, split)
    self.assertEqual(
      work.receipt,
      assignment.receipt_of(split, ids, network_lib.CONFIG.data.context),
    )
    self.assertEqual(work.sequences, len(ids))
    self.assertEqual(idle.seal(self.miner, self.task, work).tokens, 0)
    self.assertIsNone(self.train(base.idle(policy(), lambda *_: None)))

  def test_pretended_may_claim_less(self):
    whole = base.pretended(self.miner, self.task, WORK)
    part = base.pretended(self.miner, self.task, WORK, 3)
    self.assertEqual(part.sequences, 3)
    self.assertNotEqual(part.receipt, whole.receipt)
    self.assertEqual(part.message, WORK.message)

  def test_waiting_makes_its_contribution_once_in_the_put_window(self):
    calls, heads = [], []

    def make(miner, task, head):
      heads.append(head)
      if len(heads) < 2:
        raise node_lib.RetryLaterError
      return MADE

    waiting = base.waiting(policy(calls=calls), make)
    self.assertIsNone(self.train(waiting))
    with self.assertRaises(node_lib.RetryLaterError):
      waiting.commit(self.miner, command(Phase.COMMIT), 7)
    self.assertEmpty(calls)
    for head in (8, 9):
      waiting.commit(self.miner, command(Phase.COMMIT), head)
    self.assertEqual(heads, [7, 8])
    self.assertEqual(calls, [('commit', 8), ('commit', 9)])
    self.assertEqual(self.miner.role.contribution.result(), MADE)

  def test_victims_are_the_others_and_the_best_paid_come_first(self):
    self.miner.chain.earned = lambda block: {1: 5.0, 0: 9.0}
    membership = self.network.read()
    self.assertEqual(base.victims(self.miner, membership), [1])
    stranger = self.network.miner(0, names={0: 'copier'})
    stranger.chain.earned = lambda block: {2: 5.0, 0: 9.0}
    self.assertEqual(base.victims(stranger, membership), [2, 1])

  def test_every_accomplice_begins_with_another_victim(self):
    uids = [5, 6, 7]
    turns = {
      uid: base.in_turn(self.miner, self.task._replace(uid=uid), uids)
      for uid in (0, 2)
    }
    self.assertEqual(turns, {0: [5, 6, 7], 2: [6, 7, 5]})
    self.assertEmpty(base.in_turn(self.miner, self.task, []))

  @pytest.mark.slow
  def test_published_are_the_readable_payloads_of_this_round(self):
    other = self.network.miner(1)
    data = self.network.payload(other)
    self.network.publish(1, 0, data)
    self.network.publish(2, 0, b'no payload')
    self.network.block = 9
    membership = self.network.read()
    found = base.published(self.miner, self.task, membership, [1, 2, 0])
    self.assertEqual(list(found), [1])
    self.assertEqual(
      helpers.bits(found[1]), helpers.bits(network_lib.message(1))
    )
    later = self.task._replace(round=1)
    self.assertEmpty(base.published(self.miner, later, membership, [1, 2]))


if __name__ == '__main__':
  absltest.main()
