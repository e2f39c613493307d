"""The curves of one run: losses on their axes, and each miner's."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from covenant import config as config_lib
from covenant import metrics
from covenant.plan import wallclock
from covenant.report import chart
from covenant.report import folder
from covenant.report import markup
from covenant.report import scale

_POINTS = 400  # of a curve, at most
_CELLS = 12_000  # of a figure of all miners, at most
_HEADROOM = 2.0  # losses are shown up to this times the last one

_NATS = chart.Axis('nats a token')
_ROUNDS = chart.Axis('rounds completed', show='{:.0f}'.format, whole=True)
TOKENS = chart.Axis('tokens trained, all miners', show='{:,.0f}'.format)
BYTES = chart.Axis(
  'payload bytes sent, all miners',
  tick=scale.short_bytes,
  show='{:,.0f}'.format,
  log=True,
)

Position = Callable[[metrics.Record], float]


def tokens(record: metrics.Record) -> float:
  return record.tokens


def bytes_up(record: metrics.Record) -> float:
  return record.bytes_up


def simulated_seconds(run: folder.Run) -> Position:
  """Time on the chain of the emulation; nan if no config says it."""
  blocks = run.get('phases.round_blocks') or math.nan
  return lambda record: run.seconds(blocks * record.round)


def linked_seconds(run: folder.Run) -> Position | None:
  """Time by the model of the links that the config says; None: none."""
  if run.linked is None:
    return None
  try:
    seconds = wallclock.clock(run.linked, run.rounds)
  except config_lib.ConfigError:  # an inventory that cannot be planned
    return None
  sums = itertools.accumulate(seconds)
  until = {r.round: s for r, s in zip(run.rounds, sums, strict=True)}
  return lambda record: until.get(record.round, 0.0)


def measured_seconds(run: folder.Run) -> Position:
  """What this host has worked until then, evaluations included."""
  ordered = sorted([*run.rounds, *run.evaluations], key=lambda r: r.round)
  sums = itertools.accumulate(r.seconds for r in ordered)
  until = {r.round: s for r, s in zip(ordered, sums, strict=True)}
  return lambda record: until[record.round]


def time_axis(word: str, most: float) -> tuple[chart.Axis, float]:
  """An axis for up to `most` seconds, and the seconds of its unit."""
  unit = scale.time_unit(most)
  return chart.Axis(f'{word} {unit.name}', show='{:,.3f}'.format), unit.seconds


def published(run: folder.Run) -> list[markup.Html]:
  """What an evaluator found of the checkpoints that validators publish."""
  if not run.published:
    return []
  points = [(e['round'], e['nats_per_byte']) for e in run.published]
  kept = scale.thin(points, _POINTS)
  return [
    chart.draw(
      'loss-published',
      'Held-out loss of published checkpoints',
      thinned(kept, points),
      _ROUNDS,
      chart.Axis('nats a byte'),
      [chart.Series('held-out', kept, 1)],
    )
  ]


def losses(run: folder.Run) -> list[markup.Html]:
  """Training and held-out loss, on every axis there is."""
  if not run.rounds and not run.evaluations:
    return []
  end = (run.rounds or run.evaluations)[-1]
  axes: list[tuple[str, str, chart.Axis, Position]] = [
    ('tokens', '', TOKENS, tokens),
    ('bytes', '', BYTES, bytes_up),
  ]
  times: list[tuple[str, Position | None, str]] = [
    (
      'simulated',
      simulated_seconds(run),
      'Rounds times blocks a round times seconds a block: what a real network '
      'with these phases would take.',
    ),
    (
      'links-simulated',
      linked_seconds(run),
      'What rounds would take on the devices and links of plan.inventory, '
      'simulated (covenant/plan/wallclock.py).',
    ),
    (
      'measured',
      measured_seconds(run),
      'What this host took for all miners together, evaluations included.',
    ),
  ]
  for word, position, note in times:
    if position is not None:
      axis, unit = time_axis(word, position(end))
      axes.append(
        (f'{word} time', note, axis, lambda r, p=position, u=unit: p(r) / u)
      )
  rounds = scale.thin(run.rounds, _POINTS)
  evaluations = scale.thin(run.evaluations, _POINTS)
  last = (run.evaluations or run.rounds)[-1].loss
  return [
    chart.draw(
      f'loss-{against.split()[0]}',
      f'Loss against {against}',
      ' '.join(filter(None, (note, thinned(rounds, run.rounds)))),
      axis,
      _NATS,
      [
        chart.Series(
          'held-out', [(position(e), e.loss) for e in evaluations], 1
        ),
        chart.Series(
          'training, mean of miners',
          [(position(r), r.loss) for r in rounds],
          0,
          marks=False,
        ),
      ],
      top=_HEADROOM * last,
    )
    for against, note, axis, position in axes
  ]


def miners(run: folder.Run) -> list[markup.Html]:
  """Each miner's training loss, weight and score over the rounds."""
  cast = run.cast
  loss = {
    r.round: dict(zip(r.uids, r.miner_losses, strict=True)) for r in run.rounds
  }
  weight = {r.round: dict(enumerate(r.weights)) for r in run.rounds}
  score: dict[int, dict[int, float]] = {}
  paid: dict[int, dict[int, float]] = {}
  for index, verdict in run.verdicts.items():
    decisions = verdict['decisions']
    score[index + 1] = {d['uid']: d['after']['score'] for d in decisions}
    paid[index + 1] = {d['uid']: d.get('weight') or 0.0 for d in decisions}
  if not any(weight.values()):
    weight = paid
  whose = 'as the first validator would pay.'
  figures = (
    ('miner-losses', 'Training loss of each miner', 'nats a token', loss, ''),
    ('weights', 'Weights', 'share of all pay', weight, f'Shares {whose}'),
    (
      'scores',
      'Scores',
      'score',
      score,
      'Average gain of the median peer, times penalties, times proof of work '
      '(docs/gauntlet.md).',
    ),
  )
  return [
    _each(key, title, note, chart.Axis(label), values, cast)
    for key, title, label, values, note in figures
    if any(values.values())
  ]


def _each(
  key: str,
  title: str,
  note: str,
  y: chart.Axis,
  values: Mapping[int, Mapping[int, float]],
  cast: Mapping[int, str],
) -> markup.Html:
  """A curve a miner, of values by round and uid; gaps where one was away."""
  uids = sorted({uid for of_round in values.values() for uid in of_round})
  most = max(20, min(_POINTS, _CELLS // max(1, len(uids))))
  kept = scale.thin(sorted(values), most)
  # A handful are told apart; of more, only those that the config names.
  few = not cast and len(uids) <= 2 * chart.LOOKS
  looks = {uid: i for i, uid in enumerate(uids if few else sorted(cast))}
  told = [uid for uid in uids if uid in looks]
  series = [
    chart.Series(
      f'{uid}: {cast[uid]}' if uid in cast else str(uid),
      [(number, values[number].get(uid)) for number in kept],
      looks.get(uid),
    )
    for uid in [*told, *(u for u in uids if u not in looks)]
  ]
  note = ' '.join(filter(None, (note, thinned(kept, list(values)))))
  top = None
  if key == 'miner-losses' and (last := values[kept[-1]]):
    top = _HEADROOM * max(last.values())
  return chart.draw(key, title, note, _ROUNDS, y, series, top)


def thinned(kept: Sequence[object], there: Sequence[object]) -> str:
  """What there is to say of points that were left out."""
  if len(kept) == len(there):
    return ''
  return (
    f'{len(kept)} of {len(there):,} rounds are drawn and listed, evenly spaced.'
  )
