"""The zoo: every adversary by name, and who of a run is one.

`Config.adversaries` names them, as often as wanted: ('copier', 'scaled') makes
the last two miners adversaries, in this order. Names of validators take the
last validators.
"""

from covenant import config as config_lib
from covenant.adversaries import base as adversary
from covenant.adversaries import free_riding
from covenant.adversaries import honest_but_slow
from covenant.adversaries import poisoning
from covenant.adversaries import protocol_violations
from covenant.adversaries import validators as dishonest_validators

MINERS: dict[str, type[adversary.Adversary]] = {
  # They harm the model.
  'noise': poisoning.Noise,
  'zeros': poisoning.Zeros,
  'tiny': poisoning.Tiny,
  'scaled': poisoning.Scaled,
  'flipped': poisoning.Flipped,
  'flipped-tenfold': poisoning.FlippedTenfold,
  'intermittent': poisoning.Intermittent,
  'sleeper': poisoning.Sleeper,
  'colluder': poisoning.Colluder,
  'little': poisoning.Little,
  'inner-product': poisoning.InnerProduct,
  'label-flip': poisoning.LabelFlip,
  'backdoor': poisoning.Backdoor,
  # They want to be paid for nothing.
  'copier': free_riding.Copier,
  'copier-exact': free_riding.ExactCopier,
  'copier-perturbed': free_riding.PerturbedCopier,
  'copier-hidden': free_riding.HiddenCopier,
  'copier-fast': free_riding.FastCopier,
  'copier-previous': free_riding.PreviousCopier,
  'mixer': free_riding.Mixer,
  'replayer': free_riding.Replayer,
  'repeater': free_riding.Repeater,
  'unassigned': free_riding.Unassigned,
  'easy': free_riding.Easy,
  'desynchronized': free_riding.Desynchronized,
  'outdated': free_riding.Outdated,
  'sybil': free_riding.Sybil,
  # They break the rules of the exchange.
  'late': protocol_violations.Late,
  'early': protocol_violations.Early,
  'twice': protocol_violations.Twice,
  'absent': protocol_violations.Absent,
  'swapped': protocol_violations.Swapped,
  'two-faced': protocol_violations.TwoFaced,
  'malformed': protocol_violations.ManifestError,
  # Honest.
  'slow': honest_but_slow.Slow,
  'joiner': honest_but_slow.Joiner,
  'missed-one': honest_but_slow.MissedOne,
  'small-batch': honest_but_slow.SmallBatch,
  'straggler': honest_but_slow.Straggler,
  'little-data': honest_but_slow.LittleData,
  'churner': honest_but_slow.Churner,
}
VALIDATORS: dict[str, type[dishonest_validators.Corrupt]] = {
  'lazy': dishonest_validators.Lazy,
  'bribed': dishonest_validators.Bribed,
  'omitting': dishonest_validators.Omitting,
}


def names(config: config_lib.Config) -> dict[int, str]:
  """Uid -> name, of those of a run who are in the zoo; honest ones too.

  Raises:
    ConfigError: a name that is not known, or more of them than nodes.
  """
  listed = config.adversaries
  for name in listed:
    if name not in MINERS and name not in VALIDATORS:
      known = ', '.join([*MINERS, *VALIDATORS])
      raise config_lib.ConfigError(
        f'adversaries: there is no {name!r}; expected some of: {known}'
      )
  cast = {}
  for registry, role, first, count in (
    (MINERS, 'miners', 0, config.miners),
    (VALIDATORS, 'validators', config.miners, config.validators),
  ):
    of_role = [n for n in listed if n in registry]
    if len(of_role) > count:
      raise config_lib.ConfigError(
        f'adversaries: {len(of_role)} of them are {role}, and there are '
        f'{role}={count} only'
      )
    last = first + count
    cast |= dict(zip(range(last - len(of_role), last), of_role, strict=True))
  return cast


def dishonest(config: config_lib.Config) -> dict[int, str]:
  """As `names`, without the honest."""
  return {
    uid: name
    for uid, name in names(config).items()
    if name in VALIDATORS or not MINERS[name].honest
  }
