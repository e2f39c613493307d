"""The command of every machine of a plan.

Machines with the same command share an entry. CONFIG stands for the run's
config and HEAD-3 for the address of the head of uid 3. What an owner adds to
the command of a uid are its `network` fields, such as the hotkey and the
bucket.
"""

import itertools
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from covenant import config as config_lib
from covenant.plan import hardware
from covenant.plan import island_costs
from covenant.plan import planner

_PORT = 8470


class Command(NamedTuple):
  """A command, and the machines that run it."""

  uid: int
  machine: str  # such as 4090, or the head
  flags: tuple[str, ...]  # of run.py
  device: int | None = None  # the only one that it sees; None: all
  count: int = 1  # machines

  @property
  def words(self) -> tuple[str, ...]:
    """The command line, word by word."""
    return 'python', 'run.py', '--config=CONFIG', *self.flags

  def lines(self) -> Iterator[str]:
    """Yields what to print, where each but the last goes on."""
    many = f' (each of {self.count})' if self.count > 1 else ''
    yield f'# uid {self.uid}: {self.machine}{many}'
    one = '' if self.device is None else f'CUDA_VISIBLE_DEVICES={self.device} '
    *words, last = map(shlex.quote, self.words)
    yield f'{one}{" ".join(words[:4])} \\'
    yield from (f'  {word} \\' for word in words[4:])
    yield f'  {last}'


def of_plan(
  config: config_lib.Config, plan: planner.NetworkPlan
) -> list[Command]:
  """Returns the commands of all machines, by uid.

  Islands that are alike have equal commands, with a uid each.
  """
  most = max(
    (island.steps * island.batch for island in plan.islands), default=0
  )
  shared = [f'--config.optim.most_sequences={most}']
  if any(work.kind == 'pipeline' for work in plan.works):
    shared.append('--config.model.scan_layers=false')
  found = []
  for uid, work in enumerate(plan.works):
    make = {'replica': _replica, 'pool': _pool, 'pipeline': _pipeline}
    for command in make[work.kind](config, plan, uid, work):
      found.append(command._replace(flags=(*command.flags, *shared)))
  return [
    first._replace(count=first.count + sum(c.count for c in more))
    for first, *more in (
      list(alike)
      for _, alike in itertools.groupby(found, lambda c: c._replace(count=1))
    )
  ]


def _islands(work: island_costs.Work) -> str:
  return f'--config.islands={config_lib.show_islands((work.island,))}'


def _members(
  plan: planner.NetworkPlan, work: island_costs.Work
) -> Iterator[tuple[int, int, str]]:
  """Yields hosts as group, count and name; the head comes last."""
  for g, n in enumerate(work.hosts):
    if count := n - (g == work.head):
      yield g, count, plan.groups[g].name
  yield work.head, 1, f'{plan.groups[work.head].name}, the head'


def _replica(
  config: config_lib.Config,
  plan: planner.NetworkPlan,
  uid: int,
  work: island_costs.Work,
) -> Iterator[Command]:
  group = plan.groups[work.hosts.index(1)]
  flags = ('--role=miner', _islands(work), *_mesh(config, group))
  yield Command(uid, group.name, flags)


def _mesh(
  config: config_lib.Config, group: hardware.HostGroup
) -> tuple[str, ...]:
  """Returns the flags of a host's devices."""
  placed = island_costs.shared_model(config, group)
  assert placed is not None
  return (
    f'--config.devices.data={placed.copies}',
    f'--config.devices.fsdp={placed.fsdp}',
    '--config.devices.offload=true',
    f'--config.optim.inner.microbatch_size={placed.microbatch}',
  )


def _pool(
  config: config_lib.Config,
  plan: planner.NetworkPlan,
  uid: int,
  work: island_costs.Work,
) -> Iterator[Command]:
  yield _head(plan, uid, work)
  there = [g for g, n in enumerate(work.hosts) if n]
  batches = dict(zip(there, work.of_groups, strict=True))
  for g, count, name in _members(plan, work):
    flags = (
      '--role=worker',
      f'--config.pool.url=http://HEAD-{uid}:{_PORT}',
      f'--config.pool.batch={batches[g]}',
      *_mesh(config, plan.groups[g]),
    )
    yield Command(uid, name, flags, None, count)


def _head(
  plan: planner.NetworkPlan, uid: int, work: island_costs.Work
) -> Command:
  listen = f'--config.pool.listen=0.0.0.0:{_PORT}'
  name = f'{plan.groups[work.head].name}, the head'
  return Command(uid, name, ('--role=pool', _islands(work), listen))


def _pipeline(
  config: config_lib.Config,
  plan: planner.NetworkPlan,
  uid: int,
  work: island_costs.Work,
) -> Iterator[Command]:
  """Yields the head, and then the stages in the order of their layers."""
  del config
  yield _head(plan, uid, work)
  flags = (
    '--role=stage',
    _islands(work),
    f'--config.pool.url=http://HEAD-{uid}:{_PORT}',
  )
  for g, stages in enumerate(work.of_groups):
    group = plan.groups[g]
    # The last device of the last host of its group holds the embeddings.
    stages += g == work.head
    for device in range(group.size):
      count = -(-(stages - device) // group.size)
      if count > 0 and group.size == 1:
        yield Command(uid, group.name, flags, None, count)
      elif count > 0:
        key = f'--config.pool.key=~/.covenant/stage-{device}.key'
        yield Command(uid, group.name, (*flags, key), device, count)


def text(config: config_lib.Config, plan: planner.NetworkPlan) -> Iterator[str]:
  """Yields the lines of all commands."""
  yield (
    'commands; CONFIG is that of this plan, HEAD-n the address of the head of '
    'uid n;'
  )
  yield (
    'stages are given out in the order in which they connect, so start them in '
    'this order'
  )
  for command in of_plan(config, plan):
    yield from command.lines()
