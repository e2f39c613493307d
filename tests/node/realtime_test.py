"""Real time and real sockets: nothing that a stranger controls costs a round.

Miners and validators run in threads against the clock, with short blocks.
Strangers commit in every round, to buckets that are dead, slow or endless.
"""

import dataclasses
import os
import threading
import time

import pytest
from absl.testing import absltest

from covenant import config as config_lib
from covenant.adversaries import base as adversary
from covenant.chain import keys
from covenant.node import base as node_lib
from covenant.node import miner as miner_lib
from covenant.node import validator as validator_lib
from covenant.protocol import round as round_lib
from covenant.store import location as location_lib
from covenant.train import local as local_lib
from covenant.wire import commitment as commitment_lib
from experiments.chaos import hostile
from tests.node import network as network_lib

BLOCK_SECONDS = 1.5
ROUNDS = 3
PHASES = config_lib.Phases(
  round_blocks=20, put_blocks=6, select_blocks=4, takeover_blocks=4
)
CONFIG = dataclasses.replace(network_lib.CONFIG, phases=PHASES, rounds=ROUNDS)
SCHEDULE = round_lib.Schedule(PHASES)


def train(node, task, params, batches):
  """Makes up a message at once; its receipt is right."""
  del params, batches
  message = network_lib.message(1000 * task.round + node.role.slot.uid)
  work = local_lib.TrainedRound(message, b'', 0, 2.5, 0.25)
  return node_lib.Future.done(adversary.pretended(node, task, work))


MINER = miner_lib.HONEST._replace(train=train, batches=lambda node, task: [])
VALIDATOR = validator_lib.HONEST._replace(
  score=lambda node, command, head: None
)


class RealTimeTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    clock = time.time
    self.network = network_lib.Network(self, clock, BLOCK_SECONDS)
    changes = {'config': CONFIG, 'virtual': False}
    self.nodes = [
      *(self.network.miner(u, MINER, **changes) for u in network_lib.MINERS),
      *(
        self.network.validator(u, VALIDATOR, **changes)
        for u in network_lib.STAKES
      ),
    ]
    self.counted = {}
    # Programs are compiled before the clock runs.
    honest = {u: network_lib.message(u) for u in network_lib.MINERS}
    shared = network_lib.start().shared
    network_lib.shared_model().apply_round(shared, honest)

  def strangers(self, count, kinds):
    """Registers miners whose buckets are of these kinds."""
    servers = [hostile.HostileServer(kind) for kind in kinds]
    found = []
    for server in servers:
      self.enterContext(server)
    for i in range(count):
      key = keys.Key.from_seed(bytes([100, i]) * 16)
      self.network.chain.register(key.address, 0.0, False)
      endpoint = servers[i % len(servers)].endpoint
      text = f's3://bucket-{i}?endpoint={endpoint}'
      found.append((key, location_lib.Location.parse(text).to_bytes()))
    return found

  def commit(self, strangers, round_index):
    for key, location in strangers:
      commitment = commitment_lib.Commitment(
        commitment_lib.Role.MINER, location, round_index, os.urandom(32)
      )
      chain = self.network.chain.seen_by(key)
      chain.commit(commitment_lib.encode(commitment))

  def follow(self, node, over):
    while not over.is_set():
      head = node.chain.head()
      before = node.state.round
      wake = node.poll(head)
      if node.state.round > before:
        self.counted.setdefault(before, []).append(sorted(node.messages))
      if wake > head:
        time.sleep(BLOCK_SECONDS / 4)

  def run_rounds(self, strangers):
    """Runs all nodes; returns who counted in each round, by node."""
    over = threading.Event()
    self.network.chain.begin(time.time())
    threads = [
      threading.Thread(target=self.follow, args=(node, over))
      for node in self.nodes
    ]
    for thread in threads:
      thread.start()
    done = set()
    end = SCHEDULE.last_decision_block(ROUNDS - 1) + 6
    while (head := self.network.chain.head()) < end:
      r = SCHEDULE.round_at(head)
      if r not in done and head >= SCHEDULE.put_opens(r):
        self.commit(strangers, r)
        done.add(r)
      time.sleep(BLOCK_SECONDS / 4)
    over.set()
    for thread in threads:
      thread.join()
    return self.counted

  def check(self, strangers):
    counted = self.run_rounds(strangers)
    everybody = [list(network_lib.MINERS)] * len(self.nodes)
    for r in range(ROUNDS):
      self.assertEqual(counted.get(r), everybody, f'round {r}')
    phases = {event.what for event in self.network.events}
    self.assertNotIn(round_lib.Phase.CATCH_UP.value, phases)

  @pytest.mark.network
  @pytest.mark.thorough
  def test_one_dead_bucket(self):
    self.check(self.strangers(1, ['silent']))

  @pytest.mark.network
  def test_fifty_dead_slow_and_endless_buckets(self):
    self.check(self.strangers(50, hostile.KINDS))


if __name__ == '__main__':
  absltest.main()
