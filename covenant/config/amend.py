"""Fields that a live run may change, from a round on.

An amendment (docs/protocol.md) gives fields other values from a round on. All
other fields of the genesis stay as they are: a change of the model, of the
tokenizer or of the size of payloads is another run.
"""

import dataclasses
import functools
import json
import types
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from covenant.config import config as config_lib
from covenant.config import schema
from covenant.config import training

Changes: TypeAlias = Mapping[str, schema.Value]
NOTHING: Changes = types.MappingProxyType({})

# Changes that are no fields: the version of the protocol, and the release that
# knows it.
PROTOCOL, RELEASE = 'protocol', 'release'
# The round whose state holds again, and its fingerprint: a rollback.
RESTORE = 'restore'
EXTRAS = (PROTOCOL, RELEASE, RESTORE)
FIELDS = (
  'rounds',
  'data.phases',
  'optim.outer.learning_rate',
  'optim.outer.momentum',
  'optim.inner.learning_rate',
  'optim.inner.warmup_steps',
  'optim.inner.decay_steps',
  'optim.inner.final_ratio',
  'optim.inner.flat_start',
  'optim.inner.flat_steps',
  'optim.inner.anneal_start',
  'optim.inner.anneal_warmup_steps',
  'optim.inner.anneal_decay_steps',
  'optim.inner.anneal_ratio',
  'optim.inner.weight_decay',
  'optim.inner.clip_norm',
  'optim.inner.rejoin_steps',
  'gauntlet.contributors',
  'gauntlet.probation',
  'gauntlet.evaluate',
  'gauntlet.sequences',
  'gauntlet.step_fraction',
  'gauntlet.memory',
  'gauntlet.copy_similarity',
  'gauntlet.penalty_rounds',
  'gauntlet.incentive',
  'gauntlet.burn',
  'gauntlet.burn_uid',
  'gauntlet.weights_every',
  'gauntlet.rollback_rise',
  'phases.round_blocks',
  'phases.put_blocks',
  'phases.select_blocks',
  'phases.takeover_blocks',
  'phases.active_rounds',
)


def parse(edits: Iterable[str]) -> dict[str, schema.Value]:
  """Returns changes as JSON values, from texts such as `rounds=8`.

  Args:
    edits: texts `path=value`.

  Raises:
    ConfigError: a text cannot be read, or the field may not change.
  """
  default, made = config_lib.Config(), {}
  for edit in edits:
    path, equals, text = edit.partition('=')
    schema.require(bool(equals), '--set', f'expected PATH=VALUE, got {edit!r}')
    schema.require(path not in made, '--set', f'{path} is there twice')
    if path == RELEASE:
      made[path] = text
    elif path in (PROTOCOL, RESTORE):
      schema.require(text.isdecimal(), path, f'expected a number, got {text}')
      made[path] = int(text)
    else:
      _require_amendable(path)
      raw = dataclasses.asdict(default)
      schema.override(raw, edit, default)
      *sections, name = path.split('.')
      for section in sections:
        raw = raw[section]
      made[path] = raw[name]
      if path == 'data.phases':
        phases = training.read_phases(raw[name])
        schema.require(
          isinstance(phases, list), path, f'expected a list, got {raw[name]!r}'
        )
        # One form, whoever wrote it.
        made[path] = [
          dataclasses.asdict(
            schema.build(training.DataPhase, x, f'{path}.', ())
          )
          for x in phases
        ]
      made[path] = json.loads(json.dumps(made[path]))
  schema.require(bool(made), '--set', 'expected a change, got none')
  return made


def amended(
  config: config_lib.Config, round_index: int, changes: Changes
) -> config_lib.Config:
  """Returns a config with the changes of an amendment.

  Args:
    config: in force before the round.
    round_index: the first round with the changes.
    changes: values by path; those that are no fields are left out.

  Raises:
    ConfigError: a field may not change, or not to this value; names it.
  """
  fields = {k: v for k, v in changes.items() if k not in EXTRAS}
  for path in fields:
    _require_amendable(path)
  text = json.dumps([round_index, fields], sort_keys=True)
  return _amended(config, text)


@functools.lru_cache(maxsize=256)
def _amended(config: config_lib.Config, text: str) -> config_lib.Config:
  round_index, fields = json.loads(text)
  raw = dataclasses.asdict(config)
  for path, value in fields.items():
    *sections, name = path.split('.')
    node = raw
    for section in sections:
      node = node[section]
    node[name] = value
  raw['data']['phases'] = _localized(config, raw['data']['phases'])
  made = config_lib.parse(raw)
  _check(config, made, round_index)
  return made


def _localized(config: config_lib.Config, phases: schema.Value) -> schema.Value:
  """Returns phases with this node's own paths of the data that it knows."""
  known = dict(place.split('=', 1) for place in config.data.places)
  known |= {
    share.digest: share.path
    for phase in config.data.phases
    for share in phase.mixture
    if share.digest
  }
  if not known or not isinstance(phases, list | tuple):
    return phases
  made = json.loads(json.dumps(phases))
  try:
    for phase in made:
      for share in phase['mixture']:
        share['path'] = known.get(share['digest'], share['path'])
  except (KeyError, TypeError, AttributeError):
    return phases  # malformed: the check names the field
  return made


def _check(
  old: config_lib.Config, new: config_lib.Config, round_index: int
) -> None:
  """Holds a config against the one before; raises ConfigError."""
  r = round_index
  schema.require(
    new.rounds >= r,
    'rounds',
    f'expected at least {r}, the round of the amendment, got {new.rounds}',
  )
  schema.require(
    bool(old.optim.outer.momentum) == bool(new.optim.outer.momentum),
    'optim.outer.momentum',
    'the outer optimizer has a state only if it is not 0, so it may not change '
    f'from or to 0; got {new.optim.outer.momentum}, it was '
    f'{old.optim.outer.momentum}',
  )
  was, now = old.phases, new.phases
  least = now.put_blocks + was.select_blocks + was.takeover_blocks
  least += 2 * was.confirmations
  schema.require(
    now.round_blocks > least,
    'phases.round_blocks',
    f'expected more than {least}: the round before is decided in the first '
    f'blocks of round {r}; got {now.round_blocks}',
  )
  if new.data.phases != old.data.phases:
    _check_data(old, new, r)


def _check_data(
  old: config_lib.Config, new: config_lib.Config, round_index: int
) -> None:
  """Allows other mixtures from a round on, of data with digests."""
  past = tuple(p for p in old.data.phases if p.start < round_index)
  kept = tuple(p for p in new.data.phases if p.start < round_index)
  schema.require(
    bool(past) and past == kept,
    'data.phases',
    f'expected the phases before round {round_index} as they are; a run that '
    'is to change its data begins with data.phases',
  )
  for phase in new.data.phases[len(kept) :]:
    for share in phase.mixture:
      schema.require(
        bool(share.digest),
        'data.phases',
        f'expected the digest of {share.path!r}, as --role=data prints it, so '
        'that all nodes train on the same data',
      )


def for_stages(
  old: config_lib.Config, new: config_lib.Config
) -> dict[str, schema.Value]:
  """Returns the new values, by path, that change how a pipeline's stage trains.

  These are the optimizers' and the length of the run: a stage has no data.
  """
  return {
    here.path: here.value
    for there, here in zip(schema.leaves(old), schema.leaves(new), strict=True)
    if there.value != here.value
    and here.path in FIELDS
    and (here.path == 'rounds' or here.path.startswith('optim.'))
  }


def _require_amendable(path: str) -> None:
  schema.require(
    path in FIELDS,
    path,
    'may not change in a live run; an amendment may set '
    f'{", ".join((*EXTRAS, *FIELDS))}',
  )


def differences(
  old: config_lib.Config, new: config_lib.Config
) -> dict[str, list[schema.Value]]:
  """Returns the values before and after, as texts, by the paths that differ."""
  return {
    there.path: [there.shown, here.shown]
    for there, here in zip(schema.leaves(old), schema.leaves(new), strict=True)
    if there.value != here.value
  }
