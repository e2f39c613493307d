"""The learning rate of a run that is made longer or shorter."""

import numpy as np

from covenant import config as config_lib
from covenant.optim import inner as inner_lib

_DECAY = 'optim.inner.decay_steps'


def describe(
  old: config_lib.Config,
  new: config_lib.Config,
  completed: int,
  amended: int | None = None,
) -> str:
  """Returns a line about a change of `rounds`; empty if there is none.

  Args:
    old: the config that the run had.
    new: the config that it goes on with.
    completed: rounds completed.
    amended: the rounds by all amendments; None if there are none.
  """
  if old.rounds == new.rounds:
    return ''
  if amended not in (None, new.rounds):
    return (
      f'rounds: an amendment made them {amended}, which holds for all; '
      f'--config.rounds={new.rounds} changes nothing. Amend them before the '
      'end of the run; after it, begin a new run from its state (--role=export '
      '--state=true)'
    )
  text = f'rounds: {old.rounds} before, {new.rounds} now; '
  if old.optim.inner.decay_steps:
    return text + f'the learning rate is as before, set by {_DECAY}'
  step = completed * new.optim.inner_steps
  was, now, last = (
    _rate(config, at)
    for config, at in ((old, step), (new, step), (new, _length(new) - 1))
  )
  return text + (
    f'the learning rate falls over {_length(new):,} inner steps in place of '
    f'{_length(old):,}: at step {step:,} it is {now:.3g}, not {was:.3g}, and '
    f'at the end {last:.3g}. A run that is to keep its schedule sets {_DECAY} '
    'from its beginning'
  )


def _length(config: config_lib.Config) -> int:
  steps = config.rounds * config.optim.inner_steps
  return config.optim.inner.decay_steps or steps


def _rate(config: config_lib.Config, step: int) -> float:
  schedule = inner_lib.schedule(
    config.optim.inner, config.rounds * config.optim.inner_steps
  )
  return float(np.asarray(schedule(step)))
