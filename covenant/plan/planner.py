"""The search for islands: from an inventory and a config to a partition.

A host that holds the model and exchanges in time is an island of its own;
hosts that do not hold it form pipelines; if there are more islands than
contributors in a round (`plan.peers`), hosts are pooled. A local search from
several starts maximizes the weighted tokens of the network: a token weighs by
how it is trained (covenant/plan/worth.py).
"""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from covenant import config as config_lib
from covenant.plan import hardware
from covenant.plan import island_costs
from covenant.plan import partition
from covenant.plan import worth
from covenant.train import island as island_lib

Hosts = tuple[int, ...]  # count per group
_STARTS = 6  # best starts that the search improves
_FEW = 5  # groups up to which all subsets are tried
_TIE = 1e-6  # relative preference for more islands
_MOVES = 1000  # limit of a search


class NetworkPlan(NamedTuple):
  """The islands of a network and the hosts that stay idle."""

  terms: island_costs.Terms
  groups: tuple[hardware.HostGroup, ...]
  works: tuple[island_costs.Work, ...]  # most weighted tokens first
  idle: Hosts  # hosts in no island

  @property
  def islands(self) -> tuple[island_lib.Island, ...]:
    return tuple(work.island for work in self.works)

  @property
  def value(self) -> float:
    """Weighted tokens of a round."""
    return sum(work.value for work in self.works)

  @property
  def busy(self) -> float:
    """The average share of the window in which devices do arithmetic."""
    whole = zip([sum(n) for n in self._counts()], self.groups, strict=True)
    tokens = sum(work.tokens for work in self.works)
    return island_costs.busy(self.terms, tokens, whole)

  @property
  def equal(self) -> float:
    """Weighted tokens if all participating islands trained equally.

    The slowest participant sets the pace; slower islands are left out where
    that gives more tokens.
    """
    works = sorted(self.works, key=lambda work: work.tokens)
    of_batch = functools.partial(worth.of_batch, self.terms.config)

    def value(low: island_costs.Work, work: island_costs.Work) -> float:
      """Returns the weighted tokens of an island that does another's work."""
      share = of_batch(low.island.batch) / of_batch(work.island.batch)
      return low.tokens * work.value / work.tokens * share

    return max(
      (
        sum(value(low, work) for work in works[i:])
        for i, low in enumerate(works)
      ),
      default=0.0,
    )

  def _counts(self) -> Iterator[tuple[int, ...]]:
    """Yields, per group, its hosts in each island and the idle ones."""
    return zip(*(work.hosts for work in self.works), self.idle, strict=True)


@functools.lru_cache(16)
def plan(config: config_lib.Config) -> NetworkPlan:
  """Plans the islands of `config.plan.inventory`.

  Raises:
    ConfigError: the inventory is malformed or the round leaves no time.
  """
  groups = hardware.parse_inventory(config.plan.inventory, config.plan)
  search = _Search(island_costs.terms(config), groups)
  islands = search.run()
  works = [search.work(hosts) for hosts in islands]
  ordered = sorted(
    (work for work in works if work), key=lambda w: (-w.value, w.hosts)
  )
  return NetworkPlan(search.terms, groups, tuple(ordered), search.idle(islands))


class _Search:
  """A search over partitions of hosts; each is a sorted tuple of islands."""

  def __init__(
    self, terms: island_costs.Terms, groups: tuple[hardware.HostGroup, ...]
  ):
    self.terms = terms
    self.groups = groups
    self.most = terms.others + 1  # islands
    self.all = tuple(group.hosts for group in groups)
    self._works: dict[Hosts, island_costs.Work | None] = {}

  def work(self, hosts: Hosts) -> island_costs.Work | None:
    """Returns the best work of hosts as one island, or None."""
    if hosts not in self._works:
      self._works[hosts] = self._work(hosts)
    return self._works[hosts]

  def _work(self, hosts: Hosts) -> island_costs.Work | None:
    if sum(hosts) == 1:
      return island_costs.alone(self.terms, self.groups, hosts.index(1))
    ways = (
      island_costs.pool(self.terms, self.groups, hosts),
      partition.pipeline(self.terms, self.groups, hosts),
    )
    return max((w for w in ways if w), key=lambda w: w.value, default=None)

  def value(self, hosts: Hosts) -> float:
    work = self.work(hosts) if any(hosts) else None
    return work.value if work else 0.0

  def total(self, islands: tuple[Hosts, ...]) -> float:
    """Returns the weighted tokens; ties go to more islands."""
    values = sorted(map(self.value, islands), reverse=True)[: self.most]
    return sum(values) * (1 + _TIE * len(values))

  def idle(self, islands: tuple[Hosts, ...]) -> Hosts:
    if not islands:
      return self.all
    used = [sum(n) for n in zip(*islands, strict=True)]
    return tuple(a - u for a, u in zip(self.all, used, strict=True))

  def run(self) -> tuple[Hosts, ...]:
    # The best of each kind of start, to explore several local optima.
    best = {
      max(starts, key=lambda start: (self.total(start), start))
      for starts in self._starts()
    }
    ordered = sorted(best, key=lambda start: (-self.total(start), start))
    found = [self._climb(start) for start in ordered[:_STARTS]]
    return max(found, key=lambda islands: (self.total(islands), islands))

  def _kept(self, islands: list[Hosts]) -> tuple[Hosts, ...]:
    """Drops islands without work and those beyond the limit."""
    useful = sorted(
      (i for i in islands if self.value(i)),
      key=lambda i: (self.value(i), i),
      reverse=True,
    )
    return tuple(sorted(useful[: self.most]))

  def _starts(self) -> Iterator[list[tuple[Hosts, ...]]]:
    """Yields, for each subset of groups, partitions into 1, 2, ... islands.

    The other groups are replicas of their own, or pooled.
    """
    one = [_put((0,) * len(self.all), g, 1) for g in range(len(self.all))]
    strong = [g for g, hosts in enumerate(one) if self.value(hosts)]
    singles = sorted(
      (one[g] for g in strong for _ in range(self.all[g])),
      key=self.value,
      reverse=True,
    )
    yield [self._with([], singles)]
    for some in _subsets(len(self.groups)):
      there = _only(self.all, [g in some for g in range(len(self.all))])
      left = [hosts for hosts in singles if not any(map(min, hosts, there))]
      # Hosts outside the subset that cannot work alone form islands too.
      weak = [not (g in some or g in strong) for g in range(len(self.all))]
      others = max(
        self._divided(_only(self.all, weak)),
        key=lambda islands: self.total(tuple(islands)),
        default=[],
      )
      yield [
        self._with([*islands, *extra], left)
        for islands in self._divided(there)
        for extra in ([], others)
      ]

  def _divided(self, hosts: Hosts) -> list[list[Hosts]]:
    """Splits hosts evenly into 1, 2, 3, ... islands.

    Tries more islands than may count, since long pipelines may not fit.
    """
    most = min(2 * self.most + 2, sum(hosts))
    return [_even(hosts, count) for count in range(1, most + 1)]

  def _with(
    self, islands: list[Hosts], singles: list[Hosts]
  ) -> tuple[Hosts, ...]:
    """Adds replicas, pooling the weaker ones if there are too many."""
    places = self.most - len(islands)
    if len(singles) <= places or places <= 0:
      return self._kept([*islands, *singles])
    ways = []
    for first in {0, places // 2, places - 1}:
      rest = tuple(sum(n) for n in zip(*singles[first:], strict=True))
      pools = _even(rest, places - first)
      ways.append(self._kept([*islands, *singles[:first], *pools]))
    return max(ways, key=lambda way: (self.total(way), way))

  def _climb(self, islands: tuple[Hosts, ...]) -> tuple[Hosts, ...]:
    """Applies improving moves until none is left."""
    for _ in range(_MOVES):
      before = self.total(islands)
      for islands_after in self._moves(islands):
        if self.total(islands_after) > before * (1 + _TIE / 2):
          islands = islands_after
          break
      else:
        break
    return islands

  def _moves(self, islands: tuple[Hosts, ...]) -> Iterator[tuple[Hosts, ...]]:
    """Yields the partitions one move away."""
    none = (0,) * len(self.groups)
    idle = self.idle(islands)
    kinds = sorted(set(islands))
    for source in [idle, *kinds]:
      for target in [*kinds, none]:
        twice = source == target and islands.count(source) < 2
        if not any(source) or twice:
          continue
        rest = list(islands)
        if source is not idle:
          rest.remove(source)
        if target != none:
          rest.remove(target)
        for moved in _shares(source):
          left = _minus(source, moved)
          grown = _plus(target, moved)
          kept = [] if source is idle else [left]
          if any(moved) and (any(left) or target != none):
            yield self._kept([*rest, *kept, grown])
            if target == none and kept and any(idle):
              yield self._kept([*rest, *kept, _plus(grown, idle)])
    for i, first in enumerate(kinds):
      for second in [idle, *kinds[i:]]:
        twice = first is second and islands.count(first) < 2
        if not any(second) or twice:
          continue
        rest = list(islands)
        rest.remove(first)
        if second is not idle:
          rest.remove(second)
          yield self._kept([*rest, *_even(_plus(first, second), 2)])
        for g, n in enumerate(first):
          for h, m in enumerate(second):
            if n and m and g != h:  # one for one
              mine = _put(_put(first, g, -1), h, 1)
              theirs = _put(_put(second, h, -1), g, 1)
              kept = [] if second is idle else [theirs]
              yield self._kept([*rest, mine, *kept])


def _shares(source: Hosts) -> Iterator[Hosts]:
  """Yields parts of `source`: 1, 2, 4, ... hosts of a group, all, half."""
  none = (0,) * len(source)
  for g, there in enumerate(source):
    count = 1
    while count < there:
      yield _put(none, g, count)
      count *= 2
    if there:
      yield _put(none, g, there)
  yield source
  yield tuple(n // 2 for n in source)


def _even(hosts: Hosts, count: int) -> list[Hosts]:
  """Splits hosts into `count` islands as evenly as possible."""
  made, turn = [[0] * len(hosts) for _ in range(count)], 0
  for g, n in enumerate(hosts):
    for i in range(count):
      made[i][g] = n // count
    for _ in range(n % count):
      made[turn % count][g] += 1
      turn += 1
  return [tuple(island) for island in made]


def _subsets(count: int) -> Iterator[tuple[int, ...]]:
  """Yields subsets of groups; of many groups only sizes 1, 2 and all."""
  for size in range(1, count + 1):
    if size <= 2 or size == count or count <= _FEW:
      yield from itertools.combinations(range(count), size)


def _put(hosts: Hosts, g: int, count: int) -> Hosts:
  return (*hosts[:g], hosts[g] + count, *hosts[g + 1 :])


def _plus(a: Hosts, b: Hosts) -> Hosts:
  return tuple(x + y for x, y in zip(a, b, strict=True))


def _minus(a: Hosts, b: Hosts) -> Hosts:
  return tuple(x - y for x, y in zip(a, b, strict=True))


def _only(hosts: Hosts, chosen: list[bool]) -> Hosts:
  return tuple(n * c for n, c in zip(hosts, chosen, strict=True))
