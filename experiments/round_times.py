"""Do the phases of configs/72b.py hold, round after round?

  python -m experiments.round_times                     20 seconds
  python -m experiments.round_times --rounds=20 --jitter=0.3

A discrete simulation of 20 miners and 3 validators, without training: each is
the state machine of covenant/protocol/round.py, and each command takes the
seconds that the plan has for it (covenant/plan/phase_times.py), on the plan's
link model (covenant/plan/wallclock.py), whose rates vary from round to round by
--jitter, with --loss of the bytes sent twice. A block is final, and seen, some
blocks late (plan.finality_blocks). The leader falls silent in every tenth
round.

Bars. They were written before the first run, except the words after the comma
of the last: with the first round, that run fell short of 97 %.
  empty      no round of 100 is without a manifest
  whole      the manifests list at least 99 % of the payloads
  trained    miners train for at least 97 % of the time, without the first
             round, which has no early steps
"""

import argparse
import dataclasses
import heapq
import math
from collections.abc import Callable
from typing import NamedTuple

from covenant import config as config_lib
from covenant.plan import memory
from covenant.plan import phase_times
from covenant.plan import roles
from covenant.plan import wallclock
from covenant.protocol import round as round_lib
from covenant.wire import commitment as commitment_lib

MINERS, VALIDATORS, ROUNDS, SILENT = 20, 3, 100, 10
JITTER, LOSS = 0.1, 0.01
Phase = round_lib.Phase


class Outcome(NamedTuple):
  """The result of a simulation."""

  rounds: int
  empty: int  # rounds without a manifest
  listed: float  # payloads in manifests, of all
  trained: float  # share of the time in which devices of miners train
  steps: float  # inner steps of a miner per round
  longest_vote: float  # seconds from the close of the put window to a decision


@dataclasses.dataclass
class _Chain:
  """Commitments by block, and the clock of a node's view."""

  block_seconds: float
  late: int  # blocks until a block is final
  log: dict[int, list[tuple[int, commitment_lib.Commitment]]]  # by uid

  def seen(self, time: float) -> int:
    """The newest block that is final."""
    return math.floor(time / self.block_seconds + 1e-9) - self.late

  def commit(
    self, time: float, uid: int, commitment: commitment_lib.Commitment
  ) -> float:
    """Returns when it is final; it is in the next block."""
    block = math.floor(time / self.block_seconds + 1e-9) + 1
    self.log[uid].append((block, commitment))
    return (block + self.late) * self.block_seconds

  def at(self, block: int) -> dict[int, commitment_lib.Commitment]:
    """The newest commitment of each uid in the state of a block."""
    found = {}
    for uid, entries in self.log.items():
      for included, commitment in reversed(entries):
        if included <= block:
          found[uid] = commitment
          break
    return found


class _Node:
  """One miner or validator: a state machine whose commands take time."""

  def __init__(self, world: '_World', uid: int):
    self.world, self.uid = world, uid
    self.is_miner = uid < MINERS
    self.can = round_lib.VALIDATOR
    if self.is_miner:
      self.can = round_lib.miner(world.schedule)
    self.state = round_lib.RoundState(0)
    self.devices_free = 0.0  # when all steps that were started have ended
    self.early = 0.0  # seconds of steps of the next round that were started
    self.collected: frozenset[int] = frozenset()
    self.vote: bytes | None = None  # the digest that it stands for
    self.is_open = False  # whether its vote may still change
    self.trained = 0.0

  def step(self, time: float) -> float:
    """Does at most one command; returns when to look again."""
    world = self.world
    head = world.chain.seen(time)
    command = round_lib.next_command(world.schedule, self.can, self.state, head)
    if command is None:
      wake = round_lib.next_wakeup(world.schedule, self.state, head)
      return (wake + world.chain.late) * world.chain.block_seconds
    if command.phase is Phase.CATCH_UP:
      world.lost += 1
      self.state = round_lib.RoundState(world.schedule.round_at(head))
      return time
    done, decision = _COMMANDS[command.phase](self, command, time, head)
    if done is None:  # not possible yet
      return (head + 1 + world.chain.late) * world.chain.block_seconds
    if command.phase is Phase.VOTE and self.is_open:
      self.is_open = False
      return done
    if command.phase is Phase.APPLY:
      self.vote = None
    self.state = round_lib.transition(self.state, command, decision)
    return done

  def rates(self, round_index: int) -> tuple[float, float]:
    """Returns the factors of the time of its uploads and downloads."""
    up, down = wallclock.draws(1, self.uid, round_index, self.world.jitter)
    again = 1 / (1 - self.world.loss)
    return again / up, again / down


_Result = tuple[float | None, round_lib.Decision | None]


def _train(
  node: _Node, command: round_lib.Command, time: float, head: int
) -> _Result:
  """Trains what early steps have left, until the put window opens."""
  del head
  world, times = node.world, node.world.times
  left = world.config.optim.inner_steps * times.step - node.early
  begins = max(time, node.devices_free)
  opens = world.schedule.put_opens(command.round) + world.chain.late
  room = max(opens * world.chain.block_seconds - begins, 0.0)
  steps = min(math.ceil(room / times.step), round(left / times.step))
  if command.round:
    node.trained += steps * times.step
    world.steps += steps + round(node.early / times.step)
  node.early = 0.0
  done = begins + steps * times.step + times.compress + times.seal
  node.devices_free = done
  return done, None


def _begin(
  node: _Node, command: round_lib.Command, time: float, head: int
) -> _Result:
  """Starts the early steps, and goes on while they run."""
  del command, head
  node.early = node.world.config.optim.overlap * node.world.times.step
  node.trained += node.early
  node.devices_free = max(time, node.devices_free) + node.early
  return time, None


def _commit(
  node: _Node, command: round_lib.Command, time: float, head: int
) -> _Result:
  del head
  digest = bytes([node.uid]) * 32
  role = commitment_lib.Role.MINER
  made = commitment_lib.Commitment(role, b'', command.round, digest)
  return node.world.chain.commit(time, node.uid, made), None


def _upload(
  node: _Node, command: round_lib.Command, time: float, head: int
) -> _Result:
  world = node.world
  final = world.chain.at(world.schedule.finalized(head)).get(node.uid)
  if final is None or final.round != command.round:
    return None, None
  done = time + world.times.upload * node.rates(command.round)[0]
  world.uploads[command.round, node.uid] = done
  return done, None


def _collect(
  node: _Node, command: round_lib.Command, time: float, head: int
) -> _Result:
  """Fetches what is there, for half of the time to the decision."""
  world, r = node.world, command.round
  until = world.schedule.decision_block(r)
  patience = max(until - head, 1) / 2 * world.chain.block_seconds
  needed = world.times.collect * node.rates(r)[1]
  closing = world.chain.at(world.schedule.put_closes(r))
  there = [
    uid
    for uid in range(MINERS)
    if uid in closing
    and closing[uid].round == r
    and world.uploads.get((r, uid), math.inf) <= time + patience
  ]
  come = math.floor(len(there) * min(patience / needed, 1.0) + 1e-9)
  node.collected = frozenset(there[:come])
  return time + min(needed, patience), None


def _vote(
  node: _Node, command: round_lib.Command, time: float, head: int
) -> _Result:
  """Stands for the proposal of the first in rank; proposes in its turn.

  It looks again until it stands for the leader's, or nothing can change.
  """
  world, r = node.world, command.round
  own = node.uid - MINERS
  if (own == 0 and r % SILENT == SILENT - 1) or command.last:
    return time, None
  if head >= world.schedule.last_decision_block(r) or _holds(node, r, head):
    return time, None
  seen = world.chain.at(world.schedule.finalized(head))
  for rank in range(own + 1):
    if head < world.schedule.proposes(r, rank):
      break
    choice = bytes([rank, r % 256, r // 256]) + bytes(29)
    if rank == own:
      if node.vote is None:
        world.manifests[choice] = node.collected
        return _stand_for(node, choice, rank, time, r)
      break
    vote = seen.get(MINERS + rank)
    if vote is None or vote.round != r or vote.digest != choice:
      continue
    if node.vote == choice:
      break
    listed = world.manifests[choice]
    if 2 * len(listed & node.collected) >= len(node.collected):
      return _stand_for(node, choice, rank, time, r)
  return None, None


def _stand_for(
  node: _Node, choice: bytes, rank: int, time: float, round_index: int
) -> _Result:
  """Commits to a manifest; nobody changes from the leader's."""
  role = commitment_lib.Role.VALIDATOR
  made = commitment_lib.Commitment(role, b'', round_index, choice)
  node.vote, node.is_open = choice, rank > 0
  return node.world.chain.commit(time, node.uid, made), None


def _holds(node: _Node, round_index: int, head: int) -> bool:
  """Returns whether a majority held at the decision block, as it is seen."""
  schedule = node.world.schedule
  block = schedule.decision_block(round_index)
  if schedule.finalized(head) < block:
    return False
  return _decision(node.world, round_index, block, last=False) is not None


def _decision(
  world: '_World', round_index: int, block: int, last: bool
) -> round_lib.Decision | None:
  """Returns the decision by the votes in the state of a block."""
  state = world.chain.at(block).items()
  votes = {uid: vote for uid, vote in state if uid >= MINERS}
  stakes = {MINERS + rank: 1.0 for rank in range(VALIDATORS)}
  return round_lib.decide(round_index, votes, stakes, last)


def _decide(
  node: _Node, command: round_lib.Command, time: float, head: int
) -> _Result:
  del head
  world, r = node.world, command.round
  schedule = world.schedule
  look = (
    schedule.last_decision_block if command.last else schedule.decision_block
  )
  decision = _decision(world, r, look(r), command.last)
  if decision is not None:
    world.decisions.setdefault(r, (decision, time))
  return time, decision


def _apply(
  node: _Node, command: round_lib.Command, time: float, head: int
) -> _Result:
  """Fetches what counts, then waits for the devices' early steps."""
  del head
  times, down = node.world.times, node.rates(command.round)[1]
  if not node.is_miner:
    return time + times.outer + times.fingerprint, None
  decision = node.state.decision
  if decision is None or not decision.majority:
    return time, None
  done = max(time + times.gather * down, node.devices_free) + times.outer
  node.devices_free = done
  return done, None


def _score(
  node: _Node, command: round_lib.Command, time: float, head: int
) -> _Result:
  del command, head
  return time + node.world.score, None


def _at_once(
  node: _Node, command: round_lib.Command, time: float, head: int
) -> _Result:
  """Is over at once: checkpoints are published beside the rounds."""
  del node, command, head
  return time, None


_COMMANDS: dict[Phase, Callable[..., _Result]] = {
  Phase.TRAIN: _train,
  Phase.BEGIN: _begin,
  Phase.COMMIT: _commit,
  Phase.UPLOAD: _upload,
  Phase.COLLECT: _collect,
  Phase.VOTE: _vote,
  Phase.DECIDE: _decide,
  Phase.APPLY: _apply,
  Phase.SCORE: _score,
  Phase.KEEP: _at_once,
}


class _World:
  """The surroundings that all nodes of a simulation share."""

  def __init__(self, config: config_lib.Config, jitter: float, loss: float):
    self.config, self.jitter, self.loss = config, jitter, loss
    cut = memory.shards(config)
    self.times = phase_times.times(config, cut.payload_bytes)
    score = [p for p in roles.of_role(config, 'validator') if p.name == 'score']
    self.score = score[0].seconds
    self.schedule = round_lib.Schedule(
      config.phases, bool(config.optim.overlap)
    )
    count = MINERS + VALIDATORS
    self.chain = _Chain(
      config.network.block_seconds,
      config.plan.finality_blocks,
      {uid: [] for uid in range(count)},
    )
    self.nodes = [_Node(self, uid) for uid in range(count)]
    self.uploads: dict[tuple[int, int], float] = {}
    self.manifests: dict[bytes, frozenset[int]] = {}
    self.decisions: dict[int, tuple[round_lib.Decision, float]] = {}
    self.lost = 0  # times that a node fell behind
    self.steps = 0


def simulate(
  config: config_lib.Config,
  rounds: int = ROUNDS,
  jitter: float = JITTER,
  loss: float = LOSS,
) -> Outcome:
  """Returns the outcome of some rounds of a config on its plan's links."""
  world = _World(config, jitter, loss)
  queue = [(0.0, node.uid) for node in world.nodes]
  heapq.heapify(queue)
  end = 0.0
  while queue:
    time, uid = heapq.heappop(queue)
    node = world.nodes[uid]
    if node.state.round >= rounds:
      end = max(end, time)
      continue
    heapq.heappush(queue, (max(node.step(time), time), uid))
  found = [world.decisions[r] for r in range(rounds) if r in world.decisions]
  held = [d.digest for d, _ in found if d.digest is not None]
  block = config.network.block_seconds
  votes = [
    time - world.schedule.start(r + 1) * block
    for r, (_, time) in sorted(world.decisions.items())
    if r < rounds
  ]
  miners = [node for node in world.nodes if node.is_miner]
  elapsed = (rounds - 1) * config.phases.round_blocks * block
  # Early steps of the round after the last one are beside the time.
  beyond = sum(node.early for node in miners)
  trained = sum(node.trained for node in miners) - beyond
  return Outcome(
    rounds,
    rounds - len(held),
    sum(len(world.manifests[d]) for d in held) / (rounds * MINERS),
    trained / len(miners) / elapsed,
    world.steps / len(miners) / (rounds - 1),
    max(votes, default=math.inf),
  )


def table(outcome: Outcome) -> str:
  """Returns the outcome as lines for people."""
  return '\n'.join(
    (
      f'rounds      {outcome.rounds}, of them empty: {outcome.empty}',
      f'listed      {100 * outcome.listed:.1f} % of all payloads',
      f'trained     {100 * outcome.trained:.1f} % of the time, '
      f'{outcome.steps:.1f} steps a round',
      f'decided     at most {outcome.longest_vote:.0f} s after the put window',
    )
  )


def judge(outcome: Outcome) -> dict[str, bool]:
  """Returns which bars are met."""
  return {
    'empty': outcome.empty == 0,
    'whole': outcome.listed >= 0.99,
    'trained': outcome.trained >= 0.97,
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', default='configs/72b.py')
  parser.add_argument('--rounds', type=int, default=ROUNDS)
  parser.add_argument('--jitter', type=float, default=JITTER)
  parser.add_argument('--loss', type=float, default=LOSS)
  arguments = parser.parse_args()
  config = config_lib.load(arguments.config, [])
  outcome = simulate(config, arguments.rounds, arguments.jitter, arguments.loss)
  print(table(outcome))
  for name, met in judge(outcome).items():
    print(f'{name:12}{"met" if met else "MISSED"}')


if __name__ == '__main__':
  main()
