"""The charts of one run: its losses, and curves of each miner."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from covenant import config as config_lib
from covenant import metrics
from covenant.plan import wallclock
from covenant.report import folder
from covenant.report import markup

_POINTS = 400  # points of a curve, at most
_CELLS = 12_000  # numbers of a chart of all miners, at most
_HEADROOM = 2.0  # losses are shown up to this multiple of the last one
_UNITS = (('days', 86_400), ('hours', 3600), ('minutes', 60), ('seconds', 1))

_NATS = markup.Axis('nats per token')
ROUNDS = markup.Axis('rounds completed', '{:.0f}'.format, whole=True)
TOKENS = markup.Axis('tokens trained, all miners', '{:,.0f}'.format)
BYTES = markup.Axis(
  'payload bytes sent, all miners', '{:,.0f}'.format, unit='B', log=True
)

Position = Callable[[metrics.Record], float]


def tokens(record: metrics.Record) -> float:
  return record.tokens


def rounds_completed(record: metrics.Record) -> float:
  return record.round


def bytes_up(record: metrics.Record) -> float:
  return record.bytes_up


def simulated_seconds(run: folder.Run) -> Position:
  """Returns chain time at a record; NaN without a config that tells it."""
  blocks = run.get('phases.round_blocks') or math.nan
  second = run.block_seconds or math.nan
  return lambda record: second * blocks * record.round


def linked_seconds(run: folder.Run) -> Position | None:
  """Returns time by the config's model of links; None without a model."""
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
  """Returns the working time of this host at a record, with evaluations."""
  ordered = sorted([*run.rounds, *run.evaluations], key=lambda r: r.round)
  sums = itertools.accumulate(r.seconds for r in ordered)
  until = {r.round: s for r, s in zip(ordered, sums, strict=True)}
  return lambda record: until[record.round]


def time_axis(kind: str, most: float) -> tuple[markup.Axis, float]:
  """Returns an axis for up to `most` seconds, and the seconds of its unit.

  >>> time_axis('measured', 7200)[0].label, time_axis('measured', 90)[0].label
  ('measured hours', 'measured seconds')
  """
  name, size = next((u for u in _UNITS if most >= 2 * u[1]), _UNITS[-1])
  return markup.Axis(f'{kind} {name}', '{:,.3f}'.format), size


def published(run: folder.Run) -> list[markup.Html]:
  """Returns the chart of an evaluator's losses of published checkpoints."""
  if not run.published:
    return []
  points = [(e['round'], e['nats_per_byte']) for e in run.published]
  kept = markup.thin(points, _POINTS)
  return [
    markup.chart(
      'loss-published',
      'Held-out loss of published checkpoints',
      thinned(kept, points),
      ROUNDS,
      markup.Axis('nats per byte'),
      [markup.Series('held-out', kept, 1)],
    )
  ]


def losses(run: folder.Run) -> list[markup.Html]:
  """Returns the chart of training and held-out loss, against any axis."""
  if not run.rounds and not run.evaluations:
    return []
  rounds = markup.thin(run.rounds, _POINTS)
  evaluations = markup.thin(run.evaluations, _POINTS)
  remark = thinned(rounds, run.rounds)
  views = [
    markup.View(
      against,
      f'{note} {remark}',
      axis,
      [
        markup.Series(
          'held-out', [(position(e), e.loss) for e in evaluations], 1
        ),
        markup.Series(
          'training, mean of miners', [(position(r), r.loss) for r in rounds], 0
        ),
      ],
    )
    for against, note, axis, position in positions(run)
  ]
  top = _HEADROOM * (run.evaluations or run.rounds)[-1].loss
  return [markup.views('run-loss', 'Loss', _NATS, views, top)]


def positions(
  run: folder.Run,
) -> list[tuple[str, str, markup.Axis, Position]]:
  """Returns the horizontal axes: name, note, axis, position of a record."""
  end = (run.rounds or run.evaluations)[-1]
  found: list[tuple[str, str, markup.Axis, Position]] = [
    ('tokens', '', TOKENS, tokens),
    ('rounds', '', ROUNDS, rounds_completed),
    ('bytes', '', BYTES, bytes_up),
  ]
  for kind, (clock, note) in CLOCKS.items():
    position = clock(run)
    if position is not None:
      axis, unit = time_axis(kind, position(end))
      found.append(
        (f'{kind} time', note, axis, lambda r, p=position, u=unit: p(r) / u)
      )
  return found


# The times of a run, and what each is.
CLOCKS: dict[str, tuple[Callable[[folder.Run], Position | None], str]] = {
  'simulated': (
    simulated_seconds,
    'Rounds times blocks per round times seconds per block: the time of a real '
    'network with these phases.',
  ),
  'links-simulated': (
    linked_seconds,
    'The time of these rounds on the devices and links of plan.inventory, '
    'simulated (covenant/plan/wallclock.py).',
  ),
  'measured': (
    measured_seconds,
    'The time of this host for all miners together, with evaluations.',
  ),
}


def miners(run: folder.Run) -> list[markup.Html]:
  """Returns charts of each miner's training loss, weight and score."""
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
  figures = (
    ('miner-losses', 'Training loss of each miner', 'nats per token', loss, ''),
    (
      'weights',
      'Weights',
      'share of all pay',
      weight,
      'Shares that the first validator would pay.',
    ),
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
    _each(key, title, note, markup.Axis(label), values, run.cast)
    for key, title, label, values, note in figures
    if any(values.values())
  ]


def _each(
  key: str,
  title: str,
  note: str,
  y: markup.Axis,
  values: Mapping[int, Mapping[int, float]],
  cast: Mapping[int, str],
) -> markup.Html:
  """Returns a chart with a curve per miner, with gaps where it was absent.

  Args:
    key: id of the figure.
    title: title of the figure.
    note: explanation below it.
    y: vertical axis.
    values: values by round and uid.
    cast: uid -> name, of the miners that the config names.
  """
  uids = sorted({uid for of_round in values.values() for uid in of_round})
  most = max(20, min(_POINTS, _CELLS // max(1, len(uids))))
  kept = markup.thin(sorted(values), most)
  # A few miners have colors; among many, only those that the config names.
  few = not cast and len(uids) <= 2 * markup.LOOKS
  looks = {uid: i for i, uid in enumerate(uids if few else sorted(cast))}
  colored = [uid for uid in uids if uid in looks]
  series = [
    markup.Series(
      f'{uid}: {cast[uid]}' if uid in cast else str(uid),
      [(number, values[number].get(uid)) for number in kept],
      looks.get(uid),
    )
    for uid in [*colored, *(u for u in uids if u not in looks)]
  ]
  note = f'{note} {thinned(kept, list(values))}'
  top = None
  if key == 'miner-losses' and (last := values[kept[-1]]):
    top = _HEADROOM * max(last.values())
  return markup.chart(key, title, note, ROUNDS, y, series, top, joined=False)


def thinned(kept: Sequence[object], there: Sequence[object]) -> str:
  """Returns the remark about points that were left out, or ''."""
  if len(kept) == len(there):
    return ''
  return (
    f'{len(kept)} of {len(there):,} rounds are drawn and listed, evenly spaced.'
  )
