"""Every adversary by name, and the adversaries of a run.

`Config.adversaries` names them, as often as wanted: ('copier', 'scaled') makes
the last two miners adversaries, in this order. Names of validators take the
last validators. `strategy:error=0+work=0.5` is a strategy by its fields
(strategic.py). Any other name is 'module:attribute' or
'file.py:attribute' and names a function from a `MinerPolicy` to another, or a
`base.Adversary`; docs/extending.md shows one.
"""

import difflib
import functools

from covenant import config as config_lib
from covenant import plugins
from covenant.adversaries import base
from covenant.adversaries import free_riding
from covenant.adversaries import honest_but_slow
from covenant.adversaries import poisoning
from covenant.adversaries import protocol_violations
from covenant.adversaries import strategic
from covenant.adversaries import validators

STRATEGIES = {
  'forgetful': strategic.Strategy(error=0, norm=1),
  'forgetful-masked': strategic.Strategy(error=0, norm=1, mask=0.4),
  'forgetful-half': strategic.Strategy(error=0, norm=1, mask=0.4, work=0.5),
  'half-worker': strategic.Strategy(work=0.5),
  'half-repeater': strategic.Strategy(work=0.5, repeats=2),
  'skipper': strategic.Strategy(error=0, norm=1, mask=0.4, period=2),
  'booster': strategic.Strategy(norm=3),
  'own-mixer': strategic.Strategy(mix=1),
  'shortener': strategic.Strategy(length=0.5),
  'memorizer': strategic.Strategy(rate=2, norm=1),
  'short-mixer': strategic.Strategy(error=0.5, norm=1, mix=0.5, length=0.75),
  'short-forgetful': strategic.Strategy(error=0, norm=1, length=0.75),
  'short-booster': strategic.Strategy(error=0, norm=3, length=0.75),
  'idler': strategic.Strategy(error=0, norm=1, work=0.9),
  # Invented after the rule of pay was final: parts of sequences by lot, and
  # parts of many short pieces of all.
  'by-lot': strategic.Strategy(error=0, norm=1, length=0.75, start=-1),
  'piecemeal': strategic.Strategy(error=0, norm=1, pieces=8, length=0.75),
}
_STRATEGY = 'strategy:'  # before the fields of any other
_WRAPS = {
  # They harm the model.
  'noise': poisoning.noise,
  'zeros': poisoning.zeros,
  'tiny': functools.partial(poisoning.scaled, factor=1e-3),
  'scaled': poisoning.scaled,
  'flipped': functools.partial(poisoning.scaled, factor=-1.0),
  'flipped-tenfold': functools.partial(poisoning.scaled, factor=-10.0),
  'intermittent': poisoning.intermittent,
  'sleeper': poisoning.sleeper,
  'colluder': poisoning.colluder,
  'little': poisoning.little,
  'inner-product': poisoning.inner_product,
  'label-flip': poisoning.label_flip,
  'backdoor': poisoning.backdoor,
  'token-killer': poisoning.token_killer,
  # They want to be paid for nothing.
  'copier': free_riding.copier,
  'copier-exact': free_riding.exact_copier,
  'copier-perturbed': free_riding.perturbed_copier,
  'copier-hidden': functools.partial(free_riding.perturbed_copier, dropped=0.6),
  'copier-fast': free_riding.fast_copier,
  'copier-previous': free_riding.previous_copier,
  'mixer': free_riding.mixer,
  'replayer': free_riding.replayer,
  'repeater': free_riding.repeater,
  'unassigned': free_riding.unassigned,
  'easy': free_riding.easy,
  'desynchronized': free_riding.desynchronized,
  'outdated': functools.partial(free_riding.desynchronized, admits=True),
  'sybil': free_riding.sybil,
  # They want more pay than their work is worth, or others to have less.
  **{
    name: functools.partial(strategic.strategist, strategy=strategy)
    for name, strategy in STRATEGIES.items()
  },
  'shadow': strategic.shadow,
  # They break the rules of the exchange.
  'late': protocol_violations.late,
  'early': protocol_violations.early,
  'twice': protocol_violations.twice,
  'absent': protocol_violations.absent,
  'swapped': protocol_violations.swapped,
  'malformed': protocol_violations.malformed,
}
_HONEST = {
  'slow': honest_but_slow.slow,
  'joiner': honest_but_slow.joiner,
  'missed-one': honest_but_slow.missed_one,
  'small-batch': honest_but_slow.small_batch,
  'straggler': honest_but_slow.straggler,
  'little-data': honest_but_slow.little_data,
  'churner': honest_but_slow.churner,
}
_VALIDATORS = {
  'lazy': validators.lazy,
  'bribed': validators.bribed,
  'omitting': validators.omitting,
}
ADVERSARIES: dict[str, base.Adversary] = {
  **{name: base.Adversary(wrap) for name, wrap in _WRAPS.items()},
  'two-faced': base.Adversary(
    lambda policy: policy, serve=protocol_violations.serve_two_faced
  ),
  **{n: base.Adversary(w, honest=True) for n, w in _HONEST.items()},
  **{n: base.Adversary(w, 'validator') for n, w in _VALIDATORS.items()},
}
MINERS = tuple(n for n, a in ADVERSARIES.items() if a.role == 'miner')
VALIDATORS = tuple(n for n, a in ADVERSARIES.items() if a.role == 'validator')


def find(name: str) -> base.Adversary:
  """Returns the adversary of a name.

  Raises:
    ConfigError: there is none.
  """
  if name in ADVERSARIES:
    return ADVERSARIES[name]
  if name.startswith(_STRATEGY):
    strategy = strategic.Strategy.parse(name.removeprefix(_STRATEGY))
    return base.Adversary(
      functools.partial(strategic.strategist, strategy=strategy)
    )
  if not plugins.is_reference(name):
    known = ', '.join(ADVERSARIES)
    near = difflib.get_close_matches(name, ADVERSARIES, n=1)
    meant = f'did you mean {near[0]}? Expected' if near else 'expected'
    raise config_lib.ConfigError(
      f'adversaries: there is no {name!r}; {meant} some of: {known}, or '
      "'file.py:attribute'"
    )
  try:
    found = plugins.load(name)
  except plugins.PluginError as e:
    raise config_lib.ConfigError(f'adversaries: {e}') from e
  if isinstance(found, base.Adversary):
    return found
  if not callable(found):
    raise config_lib.ConfigError(
      f'adversaries: expected {name!r} to be a function from a policy to a '
      f'policy, got {found!r}'
    )
  return base.Adversary(found)


def names(config: config_lib.Config) -> dict[int, str]:
  """Returns the adversaries of a run by uid, the honest ones among them.

  Raises:
    ConfigError: a name is not known, or they are more than the nodes.
  """
  roles = [find(name).role for name in config.adversaries]
  found = {}
  for role, first, count in (
    ('miner', 0, config.miners),
    ('validator', config.miners, config.validators),
  ):
    of_role = [
      name
      for name, found_role in zip(config.adversaries, roles, strict=True)
      if found_role == role
    ]
    if len(of_role) > count:
      raise config_lib.ConfigError(
        f'adversaries: {len(of_role)} of them are {role}s, and there are '
        f'{role}s={count} only'
      )
    last = first + count
    found |= dict(zip(range(last - len(of_role), last), of_role, strict=True))
  return found


def dishonest(config: config_lib.Config) -> dict[int, str]:
  """Returns those of `names` that may be punished."""
  found = names(config)
  return {uid: name for uid, name in found.items() if not find(name).honest}
