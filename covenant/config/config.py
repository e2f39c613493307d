"""A whole experiment: its sections, and how files and flags become one.

A file under `configs/` defines `get_config(variant='') -> Config`. `load`
reads one, applies overrides such as `--config.optim.inner_steps=20` and checks
the result. Nothing else in the project sees an invalid config.
"""

import dataclasses
import difflib
import importlib.util
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping

from covenant.config import network as network_lib
from covenant.config import schema
from covenant.config import telemetry as telemetry_lib
from covenant.config import training

ConfigError = schema.ConfigError


@dataclasses.dataclass(frozen=True)
class Eval(schema.Section):
  """Evaluation on held-out text."""

  every: int = schema.positive(10)  # rounds between evaluations
  sequences: int = schema.positive(512)  # held-out sequences per evaluation
  samples: int = schema.bounded(0, low=0)  # rounds between samples; 0: none
  prompt: str = '\n'  # text that samples continue
  sample_tokens: int = schema.positive(100)  # tokens per sample


@dataclasses.dataclass(frozen=True)
class Checkpoint(schema.Section):
  """Saved state: a node's own, and the one that validators publish."""

  every: int = schema.positive(10)  # rounds between own checkpoints
  keep: int = schema.positive(2)  # newest checkpoints kept, of either kind
  publish: int = schema.positive(10)  # rounds between published checkpoints


@dataclasses.dataclass(frozen=True)
class Config(schema.Section):
  """One experiment, as `configs/*.py` make them."""

  name: str = 'unnamed'
  seed: int = schema.bounded(0, low=0, high=2**31 - 1)
  rounds: int = schema.positive(100)
  miners: int = schema.positive(8)
  validators: int = schema.positive(1)
  # Names of emulated adversaries (covenant/adversaries/registry.py): those of
  # miners are the last miners, those of validators the last validators.
  adversaries: tuple[str, ...] = schema.names()
  # Hardware of the miners, in the order of uids (covenant/train/island.py);
  # one entry alone is everybody's; empty: all are equal.
  islands: tuple[network_lib.Island, ...] = schema.listed(
    network_lib.read_islands, network_lib.show_islands
  )
  # Folder in Hugging Face's format of the model that the run begins with
  # (covenant/models/hf.py); empty: a random one.
  pretrained: str = ''
  # The first round. Above 0, `pretrained` is an export of another run after so
  # many rounds, with its state (--role=export --state), and the run goes on.
  first_round: int = schema.bounded(0, low=0)
  # S3 servers besides Amazon's and Cloudflare's whose buckets nodes open, as
  # HOST or HOST:PORT.
  store_hosts: tuple[str, ...] = schema.names()
  model: training.Model = training.Model()
  data: training.Data = training.Data()
  optim: training.Optim = training.Optim()
  gauntlet: training.Gauntlet = training.Gauntlet()
  eval: Eval = Eval()
  checkpoint: Checkpoint = Checkpoint()
  phases: network_lib.Phases = network_lib.Phases()
  network: network_lib.Network = network_lib.Network()
  devices: network_lib.Devices = network_lib.Devices()
  pool: network_lib.Pool = network_lib.Pool()
  plan: network_lib.Plan = network_lib.Plan()
  telemetry: telemetry_lib.Telemetry = telemetry_lib.Telemetry()
  alerts: telemetry_lib.Alerts = telemetry_lib.Alerts()

  @property
  def decoder(self) -> training.Model:
    """The model, with attention as `data.packing` says."""
    if self.data.packing == 'concatenate':
      return self.model
    return training.PackedModel(**vars(self.model))

  def check(self) -> None:
    for place in self.data.places:
      schema.require(
        bool(_PLACE.fullmatch(place)),
        'data.places',
        f'expected DIGEST=PATH with 64 hex digits, got {place!r}',
      )
    for host in self.store_hosts:
      schema.require(
        bool(_HOST.fullmatch(host)),
        'store_hosts',
        f'expected HOST or HOST:PORT such as s3.example.org, got {host!r}',
      )
    schema.require(
      not self.first_round or bool(self.pretrained),
      'pretrained',
      f'expected the export of the run that goes on from round '
      f'{self.first_round} (first_round), got none',
    )
    schema.require(
      self.first_round < self.rounds,
      'first_round',
      f'expected less than rounds = {self.rounds}, got {self.first_round}',
    )
    inner = self.optim.inner
    steps = inner.decay_steps or self.rounds * self.optim.inner_steps
    schema.require(
      inner.warmup_steps < steps,
      'optim.inner.warmup_steps',
      f'expected fewer than the {steps} steps of the schedule, '
      f'got {inner.warmup_steps}',
    )


_HOST = re.compile(r'[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?(:\d{1,5})?')
# Fields of earlier releases, with the values that had no effect.
_RETIRED = {
  'optim.staleness': 0,
  'optim.staleness_discount': 0.5,
  'plan.compression_cost': 0.1,
}
_PLACE = re.compile(r'[0-9a-f]{64}=.+')
# The version of the rules that all nodes of a run follow.
PROTOCOL = 1
# Sections and fields that nodes of one run may have otherwise: where a node
# finds the others, its devices and kernels, how often it evaluates and saves
# the model, how many take part and for how long, the assumptions of a plan.
_OWN = (
  'name',
  'rounds',
  'miners',
  'validators',
  'adversaries',
  'islands',
  'pretrained',
  'eval.',
  'checkpoint.',
  'network.',
  'devices.',
  'pool.',
  'plan.',
  'telemetry.',
  'alerts.',
  'model.remat',
  'model.attention',
  'model.loss_chunk',
  'data.cache_gb',
  'data.places',
)


def load(source: str, overrides: Iterable[str] = ()) -> Config:
  """Loads a config from a file and applies overrides.

  Args:
    source: a name such as `shakespeare` of the configs that come with the
      package, or a file such as `configs/shakespeare.py`, both also with a
      variant as in `shakespeare:smoke`; or the `config.json` of a workdir.
    overrides: such as `optim.inner_steps=20`.

  Raises:
    ConfigError: names the file or the field, and what is allowed.
  """
  name, _, variant = source.partition(':')
  path = _find(name)
  if path.suffix == '.json':
    config = from_json(path.read_text(encoding='utf-8'))
  else:
    config = _execute(path, variant)
  return edit(config, overrides)


def _find(name: str) -> pathlib.Path:
  """Returns the file of a config that comes with the package, or any file."""
  here = pathlib.Path(name)
  packaged = {file.stem: file for file in _packaged().glob('*.py')}
  if here.is_file() and here.suffix:
    return here
  if name in packaged:
    return packaged[name]
  known = {stem: stem for stem in packaged}
  known |= {file.stem: str(file) for file in here.parent.glob('*.py')}
  near = difflib.get_close_matches(here.stem, known, n=1)
  hint = f'did you mean {known[near[0]]}? ' if near else ''
  raise ConfigError(
    f'--config: there is no file {name!r}; {hint}expected a .py or .json file, '
    f'or one of: {", ".join(sorted(packaged))}'
  )


def _packaged() -> pathlib.Path:
  """Returns the folder configs/: in the package, or beside it in a checkout."""
  package = pathlib.Path(__file__).resolve().parents[1]
  inside = package / 'configs'
  return inside if inside.is_dir() else package.parent / 'configs'


def _execute(path: pathlib.Path, variant: str) -> Config:
  """Calls `get_config` of a file."""
  spec = importlib.util.spec_from_file_location('experiment_config', path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config(variant)
  except ConfigError:
    raise
  except Exception as e:  # a config file is code and may raise anything
    raise ConfigError(f'{path}: {type(e).__name__}: {e}') from e
  if not isinstance(config, Config):
    raise ConfigError(
      f'{path}: get_config must return a Config, got {type(config).__name__}'
    )
  return config


def choose(variant: str, variants: Mapping[str, Config]) -> Config:
  """Returns the variant that `get_config` was asked for; '' is the plain one.

  Raises:
    ConfigError: there is no such variant; names those that exist.
  """
  if variant not in variants:
    known = ', '.join(repr(name) for name in variants if name) or 'none'
    raise ConfigError(
      f'--config: there is no variant {variant!r}; expected one of: {known}'
    )
  return variants[variant]


def parse(raw: Mapping[str, object]) -> Config:
  """Returns the typed and checked config of nested mappings.

  Raises:
    ConfigError: names the first invalid field and what is allowed.
  """
  return schema.build(Config, raw, '', flatten(Config()))


def edit(config: Config, overrides: Iterable[str]) -> Config:
  """Returns a checked copy with some fields set, as flags set them.

  Args:
    config: the config to copy.
    overrides: such as `optim.inner_steps=20`.

  Raises:
    ConfigError: names the first invalid field and what is allowed.
  """
  raw = dataclasses.asdict(config)
  for override in overrides:
    schema.override(raw, override, Config())
  made = dataclasses.asdict(parse(raw))
  return parse(_expanded(made, dataclasses.asdict(Config())))


def _expanded(raw: schema.Value, default: schema.Value) -> schema.Value:
  """Returns values with the home folder in place of a leading ~.

  Shells do not expand it in --config.data.path=~/text. Defaults stay as they
  are, for who uses them expands them.
  """
  if isinstance(raw, Mapping):
    known = default if isinstance(default, Mapping) else {}
    return {k: _expanded(v, known.get(k)) for k, v in raw.items()}
  if isinstance(raw, list | tuple):
    return type(raw)(_expanded(x, None) for x in raw)
  if isinstance(raw, str) and raw.startswith('~') and raw != default:
    return os.path.expanduser(raw)
  return raw


def to_json(config: Config) -> str:
  return json.dumps(dataclasses.asdict(config), indent=2) + '\n'


def from_json(text: str) -> Config:
  """Returns the config that `to_json` wrote.

  Raises:
    ConfigError: the text is not JSON, or names the first invalid field.
  """
  try:
    raw = json.loads(text)
  except ValueError as e:
    raise ConfigError(f'not a config in JSON: {e}') from e
  if isinstance(raw, dict):
    _drop_retired(raw)
  return parse(raw)


def _drop_retired(raw: dict[str, schema.Value]) -> None:
  """Removes fields that only earlier releases had, at their defaults."""
  for path, value in _RETIRED.items():
    section, _, name = path.partition('.')
    found = raw.get(section)
    if not isinstance(found, dict) or name not in found:
      continue
    if found[name] != value and not path.startswith(_OWN):
      raise ConfigError(
        f'{path}: this release has no such field; expected {value!r}, without '
        f'effect, got {found[name]!r}: the run needs an earlier release'
      )
    del found[name]


def identity(config: Config) -> str:
  """Returns, as text, the genesis of a run: what all its nodes have in common.

  That is the version of the protocol, and every field that is not a node's own
  and not at its default. So a node whose release has more fields is in the same
  run, as long as these have their defaults; therefore the default of a field
  never changes (tests/golden/identity.json).
  """
  data = _identity_of_data(config.data)
  raw = {
    leaf.path: leaf.value
    for leaf in schema.leaves(dataclasses.replace(config, data=data))
    if not leaf.path.startswith(_OWN)
  }
  defaults = flatten(Config())
  changed = {k: v for k, v in raw.items() if v != defaults[k]}
  # The folder may lie anywhere; manifests compare its contents (fingerprint).
  changed |= {'pretrained': True} if config.pretrained else {}
  changed |= {'protocol': PROTOCOL}
  return json.dumps(changed, sort_keys=True, default=_changed)


def _changed(section: schema.Section) -> dict[str, schema.Value]:
  """Returns the fields of an element of a list that are not at defaults."""
  default = {leaf.path: leaf.value for leaf in schema.leaves(type(section)())}
  found = {leaf.path: leaf.value for leaf in schema.leaves(section)}
  return {k: v for k, v in found.items() if v != default[k]}


def _identity_of_data(data: training.Data) -> training.Data:
  """Returns the data without what a digest stands for."""

  def located(share: training.DataShare) -> training.DataShare:
    return dataclasses.replace(share, path='') if share.digest else share

  phases = tuple(
    dataclasses.replace(phase, mixture=tuple(map(located, phase.mixture)))
    for phase in data.phases
  )
  changes: dict[str, schema.Value] = {'phases': phases}
  if data.digest:  # of the same tokens, wherever they lie
    changes |= {'path': '', 'tokenizer_path': ''}
  if data.source == 'shards':  # whose digests have the tokenizer
    changes |= {
      name: getattr(training.Data(), name)
      for name in (
        'field',
        'tokenizer',
        'tokenizer_path',
        'end_of_text',
        'heldout_fraction',
        'synthetic_tokens',
      )
    }
  return dataclasses.replace(data, **changes)


def flatten(config: Config) -> dict[str, schema.Value]:
  """Returns all fields by path: `{'optim.inner_steps': 10, ...}`."""
  return {leaf.path: leaf.value for leaf in schema.leaves(config)}


def differences(old: Config, new: Config) -> list[str]:
  """Returns a line per field that differs: `rounds: 100 there, 200 here`."""
  return [
    f'{there.path}: {there.shown} there, {here.shown} here'
    for there, here in zip(schema.leaves(old), schema.leaves(new), strict=True)
    if there.value != here.value
  ]
