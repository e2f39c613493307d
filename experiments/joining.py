"""A miner that joins or comes back: what of its state it keeps, and its rate.

  python -m experiments.joining             about 60 core minutes
  python -m experiments.joining --quick     1 minute

AdamW moments and error feedback live on one machine. A miner that joins, or
comes back without its disk, begins with neither; `optim.inner.rejoin_steps`
warms its learning rate up. The stress test does this to all miners after every
round, which is the published protocol (hypertrain's `state_policy.csv`: dense
int8 DiLoCo, 4.3 million parameters, 600 steps, a schedule with a constant
phase; here the rate follows a cosine):

  carry                   nothing is lost
  reset                   moments are, with their bias correction
  re-warm                 so, and the rate warms up over 30 steps
  re-warm, error reset    error feedback is lost too: a joiner as it is now

Both methods have 2, 4 or 8 miners of 3 sequences, and a run 600 inner steps: 20
rounds of 30 or 6 of 100. SparseLoCo sends 128 and 427 of 4096 values of one
bit, as many per step, and its error decay is the published 0.95, which
remembers the longest. Both methods have an inner rate of 0.012 and an outer one
of 0.7, the best that experiments/methods.py found for each at 15 steps and 8
miners; all ways have the same. The warm-up of the run takes 30 steps.

In the likely case every second round one of four miners of SparseLoCo is
replaced by a joiner, nine times in all. Its rate warms up over 30 steps, 10, or
none.

Criteria, written before the runs; n = 3 seeds, and up to 7 while undecided.
Differences are in percent of the other's loss, seed by seed, and in the mean
over the numbers of miners, for each method and number of steps. The 90 %
interval decides (experiments/equivalence.py), but for J4, which two standard
errors do:
  J1  Re-warm costs at most 1 % over carry.
  J2  Re-warm is at most 0.5 % above reset. If not, and if joiners that re-warm
      are more than 0.5 % above those that do not, `rejoin_steps` should be 0.
  J3  Under SparseLoCo, to reset the error as well costs at most 0.5 % over
      re-warm.
  J4  Under DiLoCo reset ends above carry, as published.
  J5  Joiners as they are now cost at most 0.5 % over carry.
"""

import contextlib
import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from matplotlib import axes
from matplotlib import figure

from covenant import config as config_lib
from covenant import metrics
from covenant.data import dataset
from covenant.emulate import host as host_lib
from covenant.node import base as node_lib
from experiments import charts
from experiments import equivalence
from experiments import methods
from experiments import runner
from experiments import study

SPARSELOCO, DILOCO = 'SparseLoCo', 'DiLoCo'
CARRY, RESET, WARM, ALL = 'carry', 'reset', 're-warm', 're-warm, error reset'
PEERS = {SPARSELOCO: (2, 4, 8), DILOCO: (2, 4, 8)}
TOTAL = 600  # inner steps of a miner
STEPS = {30: 128, 100: 427}  # inner steps per round -> values per block
REPLACED, EVERY = 4, 2  # miners of the likely case; rounds between joiners
WARM_UPS = (0, 10, 30)  # rejoin_steps of joiners
# Held-out loss over carry in percent, by inner steps and miners.
PUBLISHED = {
  RESET: {(30, 2): 2.23, (100, 2): 0.33, (100, 4): 0.83},
  WARM: {(30, 2): 0.74, (100, 2): 0.60, (100, 4): 0.47},
}


@dataclasses.dataclass(frozen=True)
class Restarts:
  """Emulated nodes whose miners lose their moments; a `study.Program`.

  Attributes:
    error: True if they lose their error feedback too.
    every: rounds after which one miner does, each in its turn; 0: all miners do
      after every round.
  """

  error: bool
  every: int = 0

  def run(self, config: config_lib.Config) -> list[metrics.Evaluation]:
    host = host_lib.Host(config, dataset.load(config))
    with contextlib.closing(host.tools):
      evaluations = [host.evaluate()]
      for completed in range(1, config.rounds + 1):
        host.round()
        if completed % config.eval.every == 0 or completed == config.rounds:
          evaluations.append(host.evaluate())
        for uid in self.uids(config.miners, completed):
          self.restart(host, uid, completed)
    return evaluations

  def uids(self, miners: int, completed: int) -> list[int]:
    """Returns the miners that lose state after so many rounds."""
    if not self.every:
      return [*range(miners)]
    turn, rest = divmod(completed, self.every)
    return [] if rest else [(turn - 1) % miners]

  def restart(self, host: host_lib.Host, uid: int, completed: int) -> None:
    """Takes from a miner, between two rounds, what it loses."""
    miner = host.miners[uid]
    error = miner.role.miner_state.result().error
    miner.role.restart(miner.shared.params, completed)
    if not self.error:
      fresh = miner.role.miner_state.result()
      kept = node_lib.Future.done(fresh._replace(error=error))
      miner.role.miner_state = kept


class Setting(NamedTuple):
  """The fields that all ways have in common."""

  method: str
  peers: int
  steps: int  # inner steps per round

  def name(self, way: str) -> str:
    return f'{self.method}, {self.peers} miners, {self.steps} steps, {way}'

  def cell(self, way: str, seed: int) -> study.Cell:
    program = None if way == CARRY else Restarts(error=way == ALL)
    rejoin = {RESET: 0}.get(way, 30)
    return self._cell(way, seed, program, rejoin)

  def joiners(self, rejoin_steps: int, seed: int) -> study.Cell:
    program = Restarts(error=True, every=EVERY)
    return self._cell(_joiners(rejoin_steps), seed, program, rejoin_steps)

  def _cell(
    self, way: str, seed: int, program: Restarts | None, rejoin_steps: int
  ) -> study.Cell:
    sets = (
      *methods.SWEPT[self.method],
      *methods.rates(0.012, 0.7),
      f'miners={self.peers}',
      f'optim.inner_steps={self.steps}',
      f'rounds={TOTAL // self.steps}',
      f'eval.every={max(TOTAL // self.steps // 4, 1)}',
      'optim.inner.warmup_steps=30',
      f'optim.inner.rejoin_steps={rejoin_steps}',
    )
    if self.method == SPARSELOCO:
      sets = (*sets, f'optim.compression.k={STEPS[self.steps]}')
    return study.Cell(self.name(way), seed, sets, program)


LIKELY = Setting(SPARSELOCO, REPLACED, 30)


def _joiners(rejoin_steps: int) -> str:
  return f'joiners, re-warm over {rejoin_steps} steps'


def ways(method: str) -> tuple[str, ...]:
  """Returns the ways of a method; DiLoCo has no error feedback."""
  return (
    (CARRY, RESET, WARM, ALL) if method == SPARSELOCO else (CARRY, RESET, WARM)
  )


def plan(
  runs: Sequence[study.Run],
  seeds: int,
  peers: Mapping[str, Sequence[int]] = PEERS,
) -> Iterator[study.Cell]:
  del runs
  for seed in range(seeds):
    for method in peers:
      for steps in STEPS:
        for count in peers[method]:
          for way in ways(method):
            yield Setting(method, count, steps).cell(way, seed)
    if LIKELY.peers in peers[LIKELY.method]:
      for rejoin_steps in WARM_UPS:
        yield LIKELY.joiners(rejoin_steps, seed)


def above(
  runs: Sequence[study.Run], settings: Sequence[Setting], way: str, other: str
) -> study.Gap:
  """Returns the share by which one way's loss is above another's.

  It is compared seed by seed, and averaged over settings.
  """
  pairs = [
    (study.losses(runs, s.name(way)), study.losses(runs, s.name(other)))
    for s in settings
  ]
  seeds = set.intersection(*(set(a) & set(b) for a, b in pairs))
  return study.spread(
    [statistics.mean(a[s] / b[s] - 1 for a, b in pairs) for s in sorted(seeds)]
  )


def _settings(
  runs: Sequence[study.Run], method: str, steps: int
) -> list[Setting]:
  """Returns the settings of a method that have runs."""
  cells = {run.cell for run in runs}
  found = [Setting(method, count, steps) for count in PEERS[method]]
  return [s for s in found if s.name(CARRY) in cells]


def judge(
  runs: Sequence[study.Run], results: pathlib.Path
) -> Iterator[study.Verdict]:
  del results
  for method in PEERS:
    source = 'ours' if method == SPARSELOCO else 'hypertrain, state_policy.csv'
    for steps in STEPS:
      where = f'{method}, H = {steps}'
      of = _settings(runs, method, steps)
      yield _at_most(
        runs, of, f'J1, {where}', 'all may lose their moments after each round',
        source, WARM, CARRY, 0.01,
      )  # fmt: skip
      yield _at_most(
        runs, of, f'J2, {where}', 'a warm-up does no harm', 'ours',
        WARM, RESET, 0.005,
      )  # fmt: skip
      if method == SPARSELOCO:
        yield _at_most(
          runs, of, f'J3, {where}', 'error feedback may be lost too', 'ours',
          ALL, WARM, 0.005,
        )  # fmt: skip
      else:
        found = above(runs, of, RESET, CARRY)
        yield study.Verdict(
          f'J4, {where}',
          'to lose the moments costs something',
          source,
          f'loss of {RESET} above that of {CARRY}',
          describe(found),
          study.more_than(found),
          tuple(s.name(way) for s in of for way in (RESET, CARRY)),
        )
  if LIKELY in _settings(runs, LIKELY.method, LIKELY.steps):
    now = _joiners(30)
    yield _at_most(
      runs, [LIKELY], 'J5', 'joiners cost little', 'ours', now, CARRY, 0.005
    )
    for rejoin_steps in WARM_UPS[1:]:
      yield _at_most(
        runs, [LIKELY], f'J2, joiners, {rejoin_steps} steps',
        'a warm-up does no harm', 'ours',
        _joiners(rejoin_steps), _joiners(0), 0.005,
      )  # fmt: skip


def _at_most(
  runs: Sequence[study.Run],
  settings: Sequence[Setting],
  claim: str,
  says: str,
  source: str,
  way: str,
  other: str,
  share: float,
) -> study.Verdict:
  """Judges that a way's loss is at most so far above another's."""
  found = above(runs, settings, way, other)
  return study.Verdict(
    claim,
    says,
    source,
    f'90 % interval of “{way}” at most {100 * share:g} % above “{other}”',
    describe(found),
    equivalence.not_worse(found, share),
    tuple(s.name(w) for s in settings for w in (way, other)),
  )


def describe(found: study.Gap) -> str:
  """Returns a share as text, with its interval.

  >>> print(describe(study.Gap(0.01, 0.0, 3)))
  +1.00 % ± 0.00 % (n = 3), 90 % [+1.00 %, +1.00 %]
  """
  low, high = equivalence.interval(found)
  return f'{_percent(found)}, 90 % [{100 * low:+.2f} %, {100 * high:+.2f} %]'


def _percent(found: study.Gap) -> str:
  deviation = f'{100 * found.deviation:.2f}'
  return f'{100 * found.mean:+.2f} % ± {deviation} % (n = {found.n})'


def table(runs: Sequence[study.Run]) -> str:
  """Returns Markdown: a row per setting and way, with the published number."""
  lines = [
    '| setting | way | nats per byte | over carry | published, dense int8 |',
    '| --- | --- | ---: | ---: | ---: |',
  ]
  settings = [s for m in PEERS for h in STEPS for s in _settings(runs, m, h)]
  rows = [(s, way) for s in settings for way in ways(s.method)]
  if LIKELY in settings:
    rows += [(LIKELY, _joiners(x)) for x in WARM_UPS]
  for setting, way in rows:
    loss = statistics.mean(study.losses(runs, setting.name(way)).values())
    over = '' if way == CARRY else _percent(above(runs, [setting], way, CARRY))
    known = PUBLISHED.get(way, {}).get((setting.steps, setting.peers))
    beside = ''
    if known is not None and setting.method == DILOCO:
      beside = f'{known:+.2f} %'
    where = f'{setting.method}, {setting.peers} miners, H = {setting.steps}'
    lines.append(f'| {where} | {way} | {loss:.4f} | {over} | {beside} |')
  return '\n'.join(lines)


def draw(runs: Sequence[study.Run], path: pathlib.Path) -> None:
  """Draws the loss over carry, in percent, against the miners."""
  fig = figure.Figure(figsize=(8.4, 6), dpi=150, layout='constrained')
  panels = fig.subplots(2, 2, sharex=True, sharey=True)
  for row, method in zip(panels, PEERS, strict=True):
    for ax, steps in zip(row, STEPS, strict=True):
      _panel(ax, runs, method, steps)
  for ax in panels[-1]:
    ax.set_xlabel('miners')
  for ax in panels[:, 0]:
    ax.set_ylabel('final held-out loss over carry (%)')
  charts.save(fig, *panels.flat, path=path)


def _panel(
  ax: axes.Axes, runs: Sequence[study.Run], method: str, steps: int
) -> None:
  """Draws all ways of a method and a number of steps."""
  settings = _settings(runs, method, steps)
  lines = [(way, settings) for way in ways(method)[1:]]
  if LIKELY in settings:
    lines += [(_joiners(x), [LIKELY]) for x in WARM_UPS]
  for i, (way, of) in enumerate(lines):
    found = [above(runs, [s], way, CARRY) for s in of]
    aside = 1.04 ** (i - (len(lines) - 1) / 2)  # so that bars do not overlap
    ax.errorbar(
      [s.peers * aside for s in of],
      [100 * gap.mean for gap in found],
      [100 * gap.deviation if gap.n > 1 else 0.0 for gap in found],
      label=way, capsize=3, **charts.style(i),
    )  # fmt: skip
    known = PUBLISHED.get(way, {}) if method == DILOCO else {}
    points = [(m, x) for (h, m), x in known.items() if h == steps]
    if points:
      look = charts.style(i) | {'linestyle': 'none', 'ms': 8, 'mfc': 'none'}
      name = f'{way}, published'
      ax.plot(*zip(*points, strict=True), label=name, **look)
  ax.axhline(0, color='#8C8C8C', lw=1)
  ax.set_title(f'{method}, {steps} steps per round', fontsize=9, loc='left')
  ax.set_xscale('log')
  counts = PEERS[SPARSELOCO]
  ax.set_xticks(counts, [str(count) for count in counts])
  ax.set_xlim(counts[0] / 1.2, counts[-1] * 1.2)
  ax.minorticks_off()
  ax.legend(frameon=False, fontsize=7)


STUDY = study.Study(
  'joining',
  plan,
  judge,
  draw,
  table,
  brief=functools.partial(plan, peers=dict.fromkeys(PEERS, (LIKELY.peers,))),
)


if __name__ == '__main__':
  runner.main(STUDY, __doc__)
