"""Dollars per million tokens, from prices that the user gives.

The devices of a peer are paid for the whole round, waits included, and for what
stores charge for the bytes that it fetches from them.
"""

from collections.abc import Iterator
from typing import NamedTuple

from covenant import config as config_lib
from covenant.plan import timing

# Dollars per million tokens of an 8B model, as Templar's Crucible published
# them on 2026-09-03 (tplr.ai/publications/blog/introducing-crucible).
PUBLISHED = {
  '8B on GPUs of the internet': 0.1202,
  '8B on a cluster of A100': 0.169,
}


class Cost(NamedTuple):
  """The cost of some tokens, in dollars."""

  tokens: float
  devices: float
  egress: float

  @property
  def per_million(self) -> float:
    """Dollars per million tokens."""
    return 1e6 * (self.devices + self.egress) / self.tokens


def of_round(
  plan: config_lib.Plan,
  device_hours: float,
  fetched: float,
  tokens: float,
  price: float | None = None,
) -> Cost:
  """Returns the cost of a round.

  Args:
    plan: the prices.
    device_hours: of all devices together.
    fetched: bytes from stores.
    tokens: trained on.
    price: dollars per device-hour; None: that of the plan.
  """
  price = plan.device_price if price is None else price
  return Cost(tokens, price * device_hours, plan.egress_price * fetched / 1e9)


def rows(
  config: config_lib.Config,
  devices: int,
  times: timing.RoundSeconds,
  fetched: float,
) -> Iterator[tuple[str, str]]:
  """Yields the lines of a peer's costs; none without a price.

  Args:
    config: the config.
    devices: of a peer.
    times: the seconds of its round.
    fetched: bytes that it fetches in a round.
  """
  plan = config.plan
  if not plan.device_price and not plan.egress_price:
    return
  tokens = config.optim.inner_steps * timing.tokens(config)
  chain = config.phases.round_blocks * config.network.block_seconds
  length = max(chain, times.total)
  paid = of_round(plan, devices * length / 3600, fetched, tokens)
  least = of_round(plan, devices * times.compute / 3600, 0.0, tokens)
  yield 'tokens', f'{tokens / 1e6:,.2f} M a round'
  yield (
    'devices',
    f'{devices} x {length / 60:.1f} min at ${plan.device_price:g} an hour: '
    f'${paid.devices:,.2f}',
  )
  yield (
    'egress',
    f'{fetched / 1e9:,.2f} GB from stores at ${plan.egress_price:g} a GB: '
    f'${paid.egress:,.2f}',
  )
  yield 'a million', f'~${paid.per_million:,.4f} per million tokens'
  yield '', f'~${least.per_million:,.4f} of it for the inner steps alone'
  for name, dollars in PUBLISHED.items():
    yield 'published', f'${dollars:g}: {name}'
