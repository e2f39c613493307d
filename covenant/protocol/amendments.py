"""The rules of a run from each round on, by the amendments that it adopted.

What a node has adopted is part of its position and of the fingerprint of its
state, so nodes with one history root and fingerprint follow the same rules.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from covenant import config as config_lib
from covenant import errors
from covenant import typing as ct
from covenant.config import amend
from covenant.config import config as config_module
from covenant.protocol import round as round_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import amendment as amendment_lib
from covenant.wire import manifest as manifest_lib

Amendment = amendment_lib.Amendment
AmendmentError = amendment_lib.AmendmentError

# Versions of the protocol that this release knows.
KNOWN_PROTOCOLS = frozenset({config_module.PROTOCOL})
_MOST_SHOWN = 300  # characters of a value
_MOST_AHEAD = 100_000  # rounds until an amendment holds
_FINGERPRINT = re.compile(r'[0-9a-f]{32}')
_RELEASE = re.compile(r'[A-Za-z0-9_.+-]{1,40}')


class ReleaseNeededError(errors.CovenantError):
  """A round needs a release that knows other rules than this one."""


def config_at(
  genesis: config_lib.Config, adopted: Sequence[Amendment], round_index: int
) -> config_lib.Config:
  """Returns the config of a round.

  Args:
    genesis: the config that the run began with.
    adopted: the amendments, in the order of their adoption.
    round_index: the round.

  Raises:
    ReleaseNeededError: this release does not know the rules of the round.
  """
  if not adopted:
    return genesis
  return _config_at(genesis, tuple(adopted), round_index)


@functools.lru_cache(maxsize=1024)
def _config_at(
  genesis: config_lib.Config, adopted: tuple[Amendment, ...], round_index: int
) -> config_lib.Config:
  config = genesis
  for amendment in in_order(adopted):
    if amendment.round <= round_index:
      config = _amended(config, amendment)
  return config


def _amended(
  config: config_lib.Config, amendment: Amendment
) -> config_lib.Config:
  if needed := unknown(config, amendment):
    raise ReleaseNeededError(needed)
  return amend.amended(config, amendment.round, amendment.values)


def in_order(adopted: Sequence[Amendment]) -> list[Amendment]:
  """Returns amendments by the rounds from which they hold."""
  return sorted(adopted, key=lambda amendment: amendment.round)


def unknown(config: config_lib.Config, amendment: Amendment) -> str:
  """Returns why this release cannot follow an amendment; empty if it can."""
  values, r = amendment.values, amendment.round
  protocol = values.get(amend.PROTOCOL)
  is_number = type(protocol) is int
  if protocol is not None and not (is_number and protocol in KNOWN_PROTOCOLS):
    release = values.get(amend.RELEASE)
    named = f'release {_shown(release)}' if release else 'a release'
    return (
      f'{named} or newer is needed from round {r} on: it has protocol '
      f'{_shown(protocol)}, this one knows {max(KNOWN_PROTOCOLS)}. Install '
      'it and restart with the same --workdir'
    )
  try:
    restored(amendment)
    amend.amended(config, r, values)
  except (config_lib.ConfigError, AmendmentError) as e:
    return (
      f'a newer release is needed from round {r} on: the validators adopted an '
      f'amendment that this one does not allow ({_shown(e)})'
    )
  return ''


class Target(NamedTuple):
  """The state that a rollback returns to."""

  round: int  # the state before it
  fingerprint: str


def restored(amendment: Amendment) -> Target | None:
  """Returns the state that holds again by an amendment, if any.

  Raises:
    AmendmentError: it is malformed.
  """
  found = amendment.values.get(amend.RESTORE)
  if found is None:
    return None
  try:
    number, fingerprint = found
    if type(number) is not int or not 0 <= number < amendment.round:
      raise ValueError
    if not _FINGERPRINT.fullmatch(fingerprint):
      raise ValueError
  except (ValueError, TypeError):
    raise AmendmentError(
      f'{amend.RESTORE}: expected a round before {amendment.round} and the '
      f'fingerprint of its state, got {str(found)[:100]}'
    ) from None
  return Target(number, fingerprint)


def last_config(
  genesis: config_lib.Config, adopted: Sequence[Amendment]
) -> config_lib.Config:
  """Returns the config after all amendments that this release knows."""
  config = genesis
  for amendment in in_order(adopted):
    if unknown(config, amendment):
      break
    config = _amended(config, amendment)
  return config


def schedule(
  genesis: config_lib.Config, adopted: Sequence[Amendment]
) -> round_lib.Schedule:
  """Returns the blocks of all rounds."""
  found = round_lib.Schedule(
    genesis.phases, bool(genesis.optim.overlap), first=genesis.first_round
  )
  config = genesis
  for amendment in in_order(adopted):
    if unknown(config, amendment):
      break
    config = _amended(config, amendment)
    found = found.amended(amendment.round, config.phases)
  return found


def model(
  shared_model: shared_state_lib.SharedModel,
  adopted: Sequence[Amendment],
  round_index: int,
) -> shared_state_lib.SharedModel:
  """Returns the model under the rules of a round."""
  if not adopted:
    return shared_model
  config = config_at(shared_model.genesis, adopted, round_index)
  return shared_model.amended(config)


def check(
  genesis: config_lib.Config,
  adopted: Sequence[Amendment],
  amendment: Amendment,
  round_index: int,
) -> None:
  """Raises AmendmentError unless a manifest of a round may adopt an amendment.

  Args:
    genesis: the config that the run began with.
    adopted: those adopted before.
    amendment: the new one.
    round_index: the round of the manifest.
  """
  r, values = amendment.round, amendment.values
  first = round_index + manifest_lib.NOTICE
  if not first <= r <= round_index + _MOST_AHEAD:
    raise AmendmentError(
      f'round {r}: expected {first} to {round_index + _MOST_AHEAD}; validators '
      f'decide on round {round_index} now, and everybody must know it before'
    )
  if amendment in adopted:
    raise AmendmentError(f'the run has adopted it, from round {r} on')
  if r > before(genesis, adopted, r).rounds:
    raise AmendmentError(f'round {r}: the run ends before it')
  _check_protocol(values)
  if (target := restored(amendment)) and target.round > round_index:
    raise AmendmentError(
      f'{amend.RESTORE}: expected a round up to {round_index}, got '
      f'{target.round}'
    )
  together = [*adopted, amendment]
  if len(together) > amendment_lib.MAX_ADOPTED:
    raise AmendmentError(
      f'expected at most {amendment_lib.MAX_ADOPTED} amendments in a run'
    )
  size = len(str(amendment_lib.list_to_json(together)))
  if 2 * size > amendment_lib.MAX_ADOPTED_BYTES:
    raise AmendmentError('the run has adopted too many amendments')
  config = genesis
  for one in in_order(together):
    if amend.PROTOCOL in one.values and unknown(config, one):
      break  # what follows is of rules that this release does not know
    try:
      config = amend.amended(config, one.round, one.values)
    except config_lib.ConfigError as e:
      raise AmendmentError(str(e)) from None


def before(
  genesis: config_lib.Config, adopted: Sequence[Amendment], round_index: int
) -> config_lib.Config:
  """Returns the config before a round, as far as this release knows it."""
  earlier = [x for x in adopted if x.round <= round_index]
  return last_config(genesis, earlier)


def _check_protocol(values: dict[str, ct.Json]) -> None:
  protocol, release = values.get(amend.PROTOCOL), values.get(amend.RELEASE)
  if protocol is None and release is None:
    return
  known = config_module.PROTOCOL
  if type(protocol) is not int or not known < protocol < known + 1000:
    raise AmendmentError(
      f'{amend.PROTOCOL}: expected a version above {known}, got {protocol!r}'
    )
  if type(release) is not str or not _RELEASE.fullmatch(release):
    raise AmendmentError(
      f'{amend.RELEASE}: expected the release that has protocol {protocol}, '
      f'such as 1.2.0, got {release!r}'
    )


def record(
  genesis: config_lib.Config,
  adopted: Sequence[Amendment],
  amendment: Amendment,
  decided: int,
) -> dict[str, ct.Json]:
  """Returns what people want to know about an amendment.

  Args:
    genesis: the config that the run began with.
    adopted: the amendments before it.
    amendment: of which the record is.
    decided: rounds that were decided when this node learned of it.
  """
  old = before(genesis, adopted, amendment.round)
  values, needed = amendment.values, unknown(old, amendment)
  changes: dict[str, ct.Json] = {
    path: ['', values[path]] for path in amend.EXTRAS if path in values
  }
  if needed:
    changes |= {p: ['', v] for p, v in values.items() if p not in changes}
  else:
    after = amend.amended(old, amendment.round, values)
    changes |= amend.differences(old, after)
  return {
    'round': amendment.round,
    'decided': decided,
    'digest': amendment.digest.hex(),
    'changes': changes,
    'needed': needed,
  }


def describe(record: Mapping[str, ct.Json]) -> str:
  """Returns a `record` as a line for people."""
  changes = ', '.join(
    f'{path} = {_shown(after)}'
    + (f' (before: {_shown(before)})' if before else '')
    for path, (before, after) in record['changes'].items()
  )
  text = f'amendment: from round {record["round"]} on {changes}'
  return f'{text}; {record["needed"]}' if record['needed'] else text


def _shown(value: object) -> str:
  """Returns a value of a stranger as a text for a terminal."""
  text = str(value)
  text = text[:_MOST_SHOWN] + '...' * (len(text) > _MOST_SHOWN)
  return text if text.isprintable() else repr(text)[1:-1]
