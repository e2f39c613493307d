"""The plan of an inventory as a page of text, at most 100 columns wide.

'~' marks assumptions, as in covenant/plan/table.py.
"""

import itertools
import textwrap
from collections.abc import Iterator

from covenant import config as config_lib
from covenant.models import llama
from covenant.plan import commands
from covenant.plan import costs
from covenant.plan import planner
from covenant.plan import table
from covenant.plan import timing

_WIDTH = 99


def text(config: config_lib.Config, plan: planner.NetworkPlan) -> str:
  """Returns the page of a plan."""
  sections = [_groups(config, plan), _islands(plan), _network(config, plan)]
  if plan.works:
    sections.append(commands.text(config, plan))
  return '\n\n'.join('\n'.join(section) for section in sections)


def _groups(
  config: config_lib.Config, plan: planner.NetworkPlan
) -> Iterator[str]:
  terms, count = plan.terms, llama.num_params(config.model)
  yield (
    f'{config.name}: {count:,} parameters, {terms.window / 60:g} min of a '
    f'round for inner steps, {terms.others + 1} islands count'
  )
  yield (
    '  hosts  of           memory    ~FLOP/s   ~up         ~down       ~latency'
  )
  fraction = config.plan.peak_fraction
  for group in plan.groups:
    device = group.device
    yield (
      f'  {group.hosts:5}  {group.name:10}{table.size_text(device.memory):>9}'
      f'{table.metric(fraction * device.peak):>11}   '
      f'{table.metric(8 * group.upload, "b/s"):12}'
      f'{table.metric(8 * group.download, "b/s"):12}'
      f'{1e3 * group.latency:.0f} ms'
    )
  yield (
    f'  memory and arithmetic of one device, ~{fraction:g} of its peak; links '
    'of a host, in megabits'
  )


def _islands(plan: planner.NetworkPlan) -> Iterator[str]:
  window = plan.terms.window
  yield (
    '  islands         steps  batch   rank    tokens  count as       up      '
    'down    inside    idle  busy'
  )
  for work, alike in itertools.groupby(plan.works):
    many = len(list(alike))
    kind = work.kind + 's' * (many > 1)
    inside = table.size_text(work.inside) if work.inside else '-'
    yield (
      f'{many:4} {kind:11}{work.island.steps:6}{work.island.batch:7}'
      f'{work.island.rank or "-":>7}'
      f'{table.metric(work.tokens):>10}{table.metric(work.value):>10}'
      f'{table.size_text(work.uploaded):>9}'
      f'{table.size_text(work.downloaded):>10}'
      f'{inside:>10}{window - work.computing:>6.0f} s{100 * work.busy:4.0f} %'
    )
    yield from textwrap.wrap(
      f'{_hosts(plan, work.hosts)}: {work.split}',
      _WIDTH,
      initial_indent=' ' * 5,
      subsequent_indent=' ' * 7,
    )
  if any(plan.idle):
    yield f'     in no island: {_hosts(plan, plan.idle)}'
  yield from textwrap.wrap(
    'Each, in a round: inner steps, and sequences a step; numbers a position '
    'that pass between its hosts; tokens, and what they count for; bytes to '
    'the store, from it, and between its hosts; seconds from its last step to '
    'the end of the window; the share of the window in which its devices do '
    'arithmetic. E: holds the embeddings.',
    _WIDTH,
    initial_indent='  ',
    subsequent_indent='  ',
  )


def _cost(
  config: config_lib.Config, plan: planner.NetworkPlan, exchange: float
) -> str:
  """Returns the costs of all hosts, idle ones included; '' without prices."""
  hourly = sum(g.price * g.hosts * g.size for g in plan.groups)
  if not hourly and not config.plan.egress_price:
    return ''
  chain = config.phases.round_blocks * config.network.block_seconds
  if plan.terms.config.optim.overlap:  # beside the training
    exchange = 0.0
  hours = max(chain, plan.terms.window + exchange) / 3600
  cost = costs.of_round(
    config.plan,
    hours,
    sum(work.downloaded for work in plan.works),
    sum(work.tokens for work in plan.works),
    hourly,
  )
  return (
    f'~${cost.devices:,.2f} of devices and ~${cost.egress:,.2f} of egress a '
    f'round: ~${cost.per_million:,.4f} per million tokens'
  )


def _network(
  config: config_lib.Config, plan: planner.NetworkPlan
) -> Iterator[str]:
  works, window = plan.works, plan.terms.window
  yield f'all {len(works)} islands'
  if not works:
    yield '  none of these hosts can take part: see docs/islands.md'
    return
  upload = max(work.upload for work in works)
  gather = max(work.gather for work in works)
  share = timing.utilization(window, upload + gather)
  tokens = sum(work.tokens for work in works)
  yield (
    f'  tokens       {table.metric(tokens)} a round, which count as '
    f'{table.metric(plan.value)}; all devices busy ~{100 * plan.busy:.0f} %'
  )
  yield (
    f'  equal work   {table.metric(plan.equal)}, if all islands that take '
    'part did as much as the slowest of them'
  )
  yield (
    f'  a round      {window:.0f} s of steps, {upload:.0f} s up, {gather:.0f} '
    f's down: ~{100 * share:.1f} % of it are for steps'
  )
  if cost := _cost(config, plan, upload + gather):
    yield f'  costs        {cost}'
  most = max(island.steps * island.batch for island in plan.islands)
  yield from textwrap.wrap(
    f'--config.optim.most_sequences={most} '
    f'--config.islands={config_lib.show_islands(plan.islands)!r}',
    _WIDTH,
    initial_indent='  ',
    subsequent_indent='    ',
    break_on_hyphens=False,
  )


def _hosts(plan: planner.NetworkPlan, hosts: planner.Hosts) -> str:
  """Names hosts, such as 8xH100 + 51 x 4090."""
  return ' + '.join(
    f'{n} x {group.name}' if n > 1 else group.name
    for n, group in zip(hosts, plan.groups, strict=True)
    if n
  )
