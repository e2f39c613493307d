"""Checks that the rules of a subnet allow what a run will do on it.

Forbidden actions would show hours later, as a refusal of every commitment of
an epoch, or as weights that are never in force. docs/operating.md has a remedy
for each finding.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from covenant import config as config_lib
from covenant.chain import interface as chain_lib

# What the chain counts for a commitment, and how often a node makes one per
# round: a validator may replace its vote twice.
_LEAST_BYTES = 100
_PER_ROUND = {'validator': 3}
_SPARE_ROUNDS = 2  # of a newcomer's immunity: to catch up and to be paid
# Blocks from the newest final one, which a node goes by, to the one that has
# what the node sends then.
_INCLUSION = 4


class Situation(NamedTuple):
  """The subnet and the node that wants to join it."""

  config: config_lib.Config
  rules: chain_lib.Subnet
  peer: chain_lib.Peer | None  # None: an evaluator
  role: str  # 'miner', 'pool', 'validator', 'evaluator' or empty
  block_seconds: float


class SubnetFinding(NamedTuple):
  """The result of one check."""

  name: str
  well: bool
  text: str


def oldest_needed(config: config_lib.Config) -> int:
  """Returns how many blocks old the state is that a node may ask for.

  That is the put window of a round until the next one ends, or, to catch up,
  the votes on the round before the last one.
  """
  phases = config.phases
  votes = phases.select_blocks + phases.takeover_blocks
  return phases.round_blocks + max(
    phases.put_blocks, phases.round_blocks - votes
  )


def examine(situation: Situation) -> Iterator[SubnetFinding]:
  """Yields a finding per rule of the subnet that the chain has."""
  for name, check in _CHECKS.items():
    found = check(situation)
    if found is not None:
      well, text = found
      yield SubnetFinding(name, well, text)


_Found = tuple[bool, str] | None


def _is_others_matter(at: Situation) -> bool:
  """Returns whether the node follows what the validators of a run settle."""
  return at.role in ('miner', 'pool', 'evaluator')


def _runtime(at: Situation) -> _Found:
  rules = at.rules
  if rules.runtime is None:
    return None
  text = f'spec {rules.runtime}, read by {rules.sdk}'
  if not rules.weights_error:
    return True, text
  text += f', which cannot compose weights for it: {rules.weights_error}'
  if at.role == 'validator':
    text += '; install another release of bittensor'
  return at.role != 'validator', text


def _space(at: Situation) -> _Found:
  rules, phases = at.rules, at.config.phases
  if rules.commitment_bytes is None or rules.tempo is None:
    return None
  size = max(_LEAST_BYTES, chain_lib.MAX_COMMITMENT)
  fit = rules.commitment_bytes // size
  rounds = math.ceil(rules.tempo / phases.round_blocks) + 1
  needed = rounds * _PER_ROUND.get(at.role, 1)
  text = (
    f'{fit} commitments of {size} bytes fit an epoch of {rules.tempo:,} '
    f'blocks, in which this node makes up to {needed}'
  )
  if needed <= fit:
    return True, text
  return False, (
    f'{text}: the others are refused. The owner must lower the tempo to '
    f'{(fit // _PER_ROUND.get(at.role, 1) - 1) * phases.round_blocks:,} '
    'blocks, or the run needs longer rounds (phases.round_blocks)'
  )


def _state(at: Situation) -> _Found:
  needed = oldest_needed(at.config)
  if at.rules.runtime is None:
    return None
  if at.rules.oldest is not None:
    return True, f'the state of {needed} blocks ago can be read'
  return False, (
    f'this endpoint does not have the state of {needed} blocks ago, which a '
    'node that is late reads; name an archive node (network.name), or the '
    'network itself, which has public archives'
  )


def _window(at: Situation) -> _Found:
  if at.rules.runtime is None:
    return None
  phases = at.config.phases
  # A proposal in the first half, and votes for it in the second one.
  needed = 2 * (_INCLUSION + phases.confirmations)
  text = (
    f'phases.takeover_blocks={phases.takeover_blocks}; {needed} are needed for '
    'a proposal and the votes for it to become final'
  )
  if phases.takeover_blocks >= needed:
    return True, text
  return _is_others_matter(at), (
    f'{text}: a round whose leader is silent is lost; set it for the whole run'
  )


def _interval(at: Situation) -> _Found:
  rules, config = at.rules, at.config
  if not rules.weights_interval:
    return None
  every = config.gauntlet.weights_every * config.phases.round_blocks
  text = (
    f'once in {rules.weights_interval} blocks at most; this run sets them '
    f'every {every} blocks'
  )
  if at.role != 'validator' or every >= rules.weights_interval:
    return True, text
  rounds = math.ceil(rules.weights_interval / config.phases.round_blocks)
  return False, (
    f'{text}: set gauntlet.weights_every to {rounds} or more on all validators'
  )


def _count(at: Situation) -> _Found:
  least, gauntlet = at.rules.min_weights, at.config.gauntlet
  if least is None:
    return None
  paid = at.config.miners + bool(gauntlet.burn)
  text = f'at least {least}'
  if at.role != 'validator' or paid >= least:
    return True, text
  return False, (
    f'{text} that are not 0, and a run of {at.config.miners} miners pays '
    f'{paid}: the owner must lower MinAllowedWeights'
  )


def _stake(at: Situation) -> _Found:
  threshold = at.rules.stake_threshold
  if threshold is None or at.peer is None or at.role != 'validator':
    return None
  text = (
    f'{at.peer.stake:,.1f}; {threshold:,.1f} are needed for a permit and '
    'for weights'
  )
  if at.peer.stake >= threshold:
    return True, text
  return False, (
    f'{text}: stake {threshold - at.peer.stake:,.1f} more on this hotkey. '
    'Alpha counts fully, TAO on the root network in part'
  )


def _version(at: Situation) -> _Found:
  version = at.rules.version_key
  if version is None:
    return None
  return True, f'{version} is required, and sent with the weights'


def _sealing(at: Situation) -> _Found:
  rules = at.rules
  if not rules.sealed:
    return None
  epochs = rules.reveal_epochs or 1
  after = (epochs + 1) * (rules.tempo or 0)
  hours = after * at.block_seconds / 3600
  return True, (
    f'weights are revealed {epochs} epoch(s) later, so pay follows them '
    f'within {after:,} blocks ({hours:.1f} h); a validator reports whether '
    'they came into force'
  )


def _mechanism(at: Situation) -> _Found:
  count, chosen = at.rules.mechanisms, at.config.network.mechanism
  if count is None or (count <= 1 and not chosen):
    return None
  text = f'{count} of them; weights are for number {chosen}'
  if chosen < count:
    return True, f'{text}, and the pay of the others goes by their own'
  return False, f'{text}: set network.mechanism to {count - 1} or less'


def _burn(at: Situation) -> _Found:
  gauntlet, owners = at.config.gauntlet, at.rules.owner_uids
  if not gauntlet.burn or owners is None:
    return None
  if gauntlet.burn_uid in owners:
    return True, f'uid {gauntlet.burn_uid} is the owner, whose pay is burned'
  known = f'uid {owners[0]}' if owners else 'not registered'
  return _is_others_matter(at), (
    f'gauntlet.burn_uid={gauntlet.burn_uid} would be paid: only the pay of '
    f"the owner's hotkey is burned, which is {known}"
  )


def _immunity(at: Situation) -> _Found:
  blocks = at.rules.immunity
  if blocks is None:
    return None
  rounds = blocks // at.config.phases.round_blocks
  text = (
    f'a newcomer is not replaced for {blocks:,} blocks '
    f'({blocks * at.block_seconds / 3600:.1f} h, {rounds} rounds)'
  )
  if rounds >= _SPARE_ROUNDS:
    return True, text
  return False, (
    f'{text}: too short to catch up and be paid. Register once the node has '
    'caught up as an evaluator, or ask the owner for a longer period'
  )


_CHECKS: dict[str, Callable[[Situation], _Found]] = {
  'runtime': _runtime,
  'space': _space,
  'state': _state,
  'window': _window,
  'interval': _interval,
  'weights': _count,
  'stake': _stake,
  'version': _version,
  'sealing': _sealing,
  'mechanism': _mechanism,
  'burn': _burn,
  'immunity': _immunity,
}
