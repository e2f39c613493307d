"""The zoo: every adversary by name, and who of a run is one.

`Config.adversaries` names them, separated by commas and as often as wanted:
'copier,scaled' makes the last two miners adversaries, in this order. Names of
validators take the last validators.
"""

from covenant import config as config_lib
from covenant.emulate import adversary
from covenant.emulate import corrupt
from covenant.emulate import freeriders
from covenant.emulate import misbehaved
from covenant.emulate import poison
from covenant.emulate import unlucky

MINERS: dict[str, type[adversary.Adversary]] = {
  # They harm the model.
  'noise': poison.Noise,
  'zeros': poison.Zeros,
  'tiny': poison.Tiny,
  'scaled': poison.Scaled,
  'flipped': poison.Flipped,
  'flipped-tenfold': poison.FlippedTenfold,
  'intermittent': poison.Intermittent,
  'sleeper': poison.Sleeper,
  'colluder': poison.Colluder,
  'little': poison.Little,
  'inner-product': poison.InnerProduct,
  'label-flip': poison.LabelFlip,
  'backdoor': poison.Backdoor,
  # They want to be paid for nothing.
  'copier': freeriders.Copier,
  'copier-exact': freeriders.ExactCopier,
  'copier-perturbed': freeriders.PerturbedCopier,
  'copier-hidden': freeriders.HiddenCopier,
  'copier-fast': freeriders.FastCopier,
  'copier-previous': freeriders.PreviousCopier,
  'mixer': freeriders.Mixer,
  'replayer': freeriders.Replayer,
  'repeater': freeriders.Repeater,
  'unassigned': freeriders.Unassigned,
  'easy': freeriders.Easy,
  'desynchronized': freeriders.Desynchronized,
  'outdated': freeriders.Outdated,
  'sybil': freeriders.Sybil,
  # They break the rules of the exchange.
  'late': misbehaved.Late,
  'early': misbehaved.Early,
  'twice': misbehaved.Twice,
  'absent': misbehaved.Absent,
  'swapped': misbehaved.Swapped,
  'two-faced': misbehaved.TwoFaced,
  'malformed': misbehaved.Malformed,
  # Honest.
  'slow': unlucky.Slow,
  'joiner': unlucky.Joiner,
  'missed-one': unlucky.MissedOne,
  'small-batch': unlucky.SmallBatch,
  'straggler': unlucky.Straggler,
  'little-data': unlucky.LittleData,
  'churner': unlucky.Churner,
}
VALIDATORS: dict[str, type[corrupt.Corrupt]] = {
  'lazy': corrupt.Lazy,
  'bribed': corrupt.Bribed,
  'omitting': corrupt.Omitting,
}


def names(config: config_lib.Config) -> dict[int, str]:
  """Uid -> name, of those of a run who are in the zoo; honest ones too.

  Raises:
    ConfigError: a name that is not known, or more of them than nodes.
  """
  listed = [n.strip() for n in config.adversaries.split(',') if n.strip()]
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
