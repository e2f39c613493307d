"""The charts of what a run measures beside its losses, one per question."""

import statistics
from collections.abc import Sequence

from covenant import metrics
from covenant.report import curves
from covenant.report import folder
from covenant.report import markup

_POINTS = 400  # points of a curve, at most
_STEP = markup.Axis('inner step', '{:,.0f}'.format, whole=True)
# Curves of a chart: name -> y by x.
_Curves = dict[str, Sequence[tuple[float, float | None]]]


def training(run: folder.Run) -> list[markup.Html]:
  """Returns the charts of an emulated run, by round."""
  rounds = markup.thin(run.rounds, _POINTS)
  if not rounds:
    return []
  note = curves.thinned(rounds, run.rounds)

  def field(*names: str) -> _Curves:
    return {
      _NAMES.get(name, name): [(r.round, getattr(r, name)) for r in rounds]
      for name in names
    }

  norms = field('delta_norm', 'error_norm')
  if gradients := _by_round(run.steps):
    kept = {r.round for r in rounds}
    norms |= {'gradient': [p for p in gradients if p[0] in kept]}
  charts: list[tuple[str, str, str, _Curves, str]] = [
    ('learning-rate', 'Learning rate', 'rate', field('learning_rate'), ''),
    (
      'norms', 'Norms', 'L2 norm', norms,
      'Of the aggregated update, of the error feedback (mean of miners), and '
      'of the gradient before it is clipped (mean of the steps of a round).',
    ),
    (
      'speed', 'Speed', 'tokens per second',
      field('tokens_per_second'), 'All miners, in time measured on this host.',
    ),
    (
      'timers', 'Time of a round', 'seconds',
      field(
        'seconds', 'train_seconds', 'exchange_seconds', 'outer_seconds',
        'score_seconds',
      ),
      'Measured on this host, for all nodes together.',
    ),
    (
      'payloads', 'Payloads accepted', 'payloads',
      field('payloads') | {'miners that trained': [
        (r.round, len(r.uids)) for r in rounds
      ]},
      '',
    ),
    (
      'payload-bytes', 'Bytes of a round', 'bytes',
      {
        name: points
        for name, points in field('bytes_round', 'stage_bytes').items()
        if any(y for _, y in points)
      },
      'Payloads of all miners, and what their pipeline stages exchange.',
    ),
  ]  # fmt: skip
  return [
    _chart(key, title, f'{remark} {note}', curves.ROUNDS, label, found)
    for key, title, label, found, remark in charts
  ]


def process(run: folder.Run) -> list[markup.Html]:
  """Returns the charts of one process of a network, by step and round."""
  steps = markup.thin(run.steps, _POINTS) if run.node_rounds else []
  rounds = markup.thin(run.node_rounds, _POINTS)
  charts = []
  if steps:
    for key, title, label, name in (
      ('step-loss', 'Training loss', 'nats per token', 'loss'),
      (
        'step-norm',
        'Gradient norm',
        'L2, before it is clipped',
        'gradient_norm',
      ),
      ('step-rate', 'Learning rate', 'rate', 'learning_rate'),
      ('step-speed', 'Speed', 'tokens per second', 'tokens_per_second'),
      ('step-mfu', 'Utilization', 'share of the peak (MFU)', 'mfu'),
    ):
      points = [(s.step, getattr(s, name)) for s in steps]
      if any(y is not None for _, y in points):
        note = curves.thinned(steps, run.steps).replace('rounds', 'steps')
        charts.append(_chart(key, title, note, _STEP, label, {title: points}))
  if not rounds:
    return charts
  note = curves.thinned(rounds, run.node_rounds)
  timers = [
    name
    for name in metrics.scalars(rounds[0])
    if name.endswith('_seconds') and any(getattr(r, name) for r in rounds)
  ]

  def field(*names: str) -> _Curves:
    return {
      name.removesuffix('_seconds').replace('_', ' '): [
        (r.round, getattr(r, name)) for r in rounds
      ]
      for name in names
    }

  for key, title, label, found in (
    ('phases-of-rounds', 'Time of a round', 'seconds',
     field('seconds', *timers)),
    ('traffic', 'Traffic', 'bytes per round',
     field('bytes_sent', 'bytes_received')),
    ('rates', 'Rates of transfers', 'bytes per second',
     field('send_rate', 'receive_rate')),
    ('failures', 'Failures', 'per round', field('retries', 'failures')),
    ('room', 'Memory and disk', 'bytes',
     field('host_bytes', 'host_free_bytes', 'disk_free_bytes')),
  ):  # fmt: skip
    charts.append(_chart(key, title, note, curves.ROUNDS, label, found))
  return charts


_NAMES = {
  'learning_rate': 'last inner step',
  'delta_norm': 'update',
  'error_norm': 'error feedback',
  'tokens_per_second': 'all miners',
  'seconds': 'whole round',
  'train_seconds': 'training',
  'exchange_seconds': 'exchange',
  'outer_seconds': 'outer step',
  'score_seconds': 'scoring',
  'payloads': 'accepted',
  'bytes_round': 'payloads',
  'stage_bytes': 'between stages',
}


def _by_round(
  steps: Sequence[metrics.Step],
) -> list[tuple[float, float | None]]:
  """Returns the mean norm of the gradients of each round."""
  found: dict[int, list[float]] = {}
  for step in steps:
    if step.gradient_norm is not None:
      found.setdefault(step.round, []).append(step.gradient_norm)
  return [(r, statistics.fmean(norms)) for r, norms in found.items()]


def _chart(
  key: str, title: str, note: str, x: markup.Axis, label: str, found: _Curves
) -> markup.Html:
  series = [
    markup.Series(name, points, i)
    for i, (name, points) in enumerate(found.items())
  ]
  show = '{:,.0f}' if label.startswith('bytes') else '{:.4g}'
  y = markup.Axis(label, show.format)
  return markup.chart(key, title, note.strip(), x, y, series)
