"""Exports of a run's model for Hugging Face, each with a model card."""

import dataclasses
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Mapping

import jax
import numpy as np
from absl import flags

import covenant
from covenant import config as config_lib
from covenant import extras
from covenant import metrics as metrics_lib
from covenant import typing as ct
from covenant.data import pretrained
from covenant.models import gguf_file
from covenant.models import hf
from covenant.models import hf_config
from covenant.models import llama
from covenant.models import sharding
from covenant.node import multihost as multihost_lib
from covenant.node import preflight
from covenant.node import sync
from covenant.node import workdir as workdir_lib
from covenant.protocol import checksums
from covenant.telemetry import provenance
from covenant.train import pieces as pieces_lib
from covenant.train import placement as placement_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train import state_file

with extras.needed('run'):
  from orbax.checkpoint import v1 as ocp

_FOLDER = 'hf'

_DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', list(hf.DTYPES), 'export: the type of the parameters.'
)
_STATE = flags.DEFINE_bool(
  'state',
  False,
  "export: also the outer optimizer's state, for a run that goes on from this "
  'round.',
)
_FORMAT = flags.DEFINE_enum(
  'format', 'hf', ['hf', 'gguf'], 'export: the files to write.'
)
_LICENSE = flags.DEFINE_string(
  'license', '', "export: the license's identifier, for the model card."
)


def export(config: config_lib.Config, workdir: str) -> None:
  """Writes the workdir's newest checkpoint in Hugging Face's format, or GGUF.

  The config is that of the run, such as its config.json.
  """
  workdir_lib.Workdir(workdir).check_owner(config)
  mesh = None
  if not preflight.lacking_devices(config):
    network = dataclasses.replace(
      config.network, coordinator='', processes=1, process=0
    )
    mesh = multihost_lib.start(network, config.devices).mesh
  parsed = flags.FLAGS.is_parsed()
  dtype = _DTYPE.value if parsed else 'float32'
  licence = _LICENSE.value if parsed else ''
  if parsed and _FORMAT.value == 'gguf':
    if _STATE.value:
      raise config_lib.ConfigError(
        '--format: expected hf with --state, got gguf'
      )
    completed, params = newest(workdir, mesh)
    _write_gguf(config, workdir, completed, params, dtype, licence)
    return
  exporter = Exporter(config, workdir)
  if parsed and _STATE.value:
    if dtype != 'float32':
      raise config_lib.ConfigError(
        f'--dtype: expected float32 with --state, got {dtype}: a run goes on '
        'from the exact parameters'
      )
    completed, shared = newest_state(config, workdir)
    leaves = shared_state_lib.named_leaves(shared)
    fingerprint = shared_state_lib.state_fingerprint(
      {n: [*pieces_lib.piece_digests(x)] for n, x in leaves.items()}
    )
    content = state_file.encode(completed, leaves, fingerprint)
    exporter.add({state_file.FILE: content})
    params = shared.params
  else:
    completed, params = newest(workdir, mesh)
  folder = exporter.write(completed, params, dtype, licence)
  print(
    f'the model after round {completed} is in {folder}; '
    f'transformers.LlamaForCausalLM.from_pretrained({str(folder)!r}) loads it'
  )


def _write_gguf(
  config: config_lib.Config,
  workdir: str,
  completed: int,
  params: ct.Params,
  dtype: str,
  licence: str,
) -> None:
  path = pathlib.Path(workdir, 'gguf', f'{completed}.gguf')
  files, end_of_text = pretrained.kept(workdir, config)
  gguf_file.export(
    path,
    config.model,
    params,
    name=config.name,
    context=config.data.context,
    end_of_text=end_of_text,
    files=files,
    dtype=dtype,
    licence=licence,
  )
  print(f'the model after round {completed} is in {path}')


class Exporter:
  """Exports of one run: hf/ROUND in a folder, each complete or absent."""

  def __init__(
    self, config: config_lib.Config, workdir: str | os.PathLike[str]
  ):
    self._config = config
    self._workdir = pathlib.Path(workdir)
    self._folder = self._workdir / _FOLDER
    self._files, self._end_of_text = pretrained.kept(workdir, config)

  def add(self, files: Mapping[str, bytes]) -> None:
    """Adds further files, by name, to the exports from now on."""
    self._files = self._files | dict(files)

  def write(
    self,
    completed: int,
    params: ct.Params,
    dtype: str = 'float32',
    licence: str = '',
  ) -> pathlib.Path:
    """Exports parameters after some rounds.

    Args:
      completed: the number of rounds.
      params: the shared parameters.
      dtype: 'float32', or 'bfloat16' for half the size.
      licence: the identifier for the model card; empty: none is named.

    Returns:
      The folder. An earlier export of this round stays unchanged.

    Raises:
      ConfigError: it cannot be written, or the earlier one has another type.
    """
    folder = self._folder / str(completed)
    if folder.exists():
      if lacking := [n for n in self._files if not (folder / n).exists()]:
        raise config_lib.ConfigError(
          f'{folder} is there, without {", ".join(lacking)}; remove it first'
        )
      there = hf_config.read_json(folder / 'config.json').get('torch_dtype')
      if there != dtype:
        raise config_lib.ConfigError(
          f'--dtype: {folder} is there, in {there}; remove it first'
        )
    else:
      text = card(self._config, self._workdir, completed, licence)
      hf.export(
        folder,
        self._config.model,
        params,
        context=self._config.data.context,
        end_of_text=self._end_of_text,
        files=self._files | {'README.md': text.encode()},
        dtype=dtype,
      )
    return folder

  def prune(self) -> None:
    """Deletes all but the newest `checkpoint.keep`, and incomplete exports."""
    rounds = []
    for path in self._folder.iterdir():
      if path.name.isdecimal():
        rounds.append(int(path.name))
      elif path.name.endswith('.partial'):
        shutil.rmtree(path)
    for completed in sorted(rounds)[: -self._config.checkpoint.keep]:
      shutil.rmtree(self._folder / str(completed))


def card(
  config: config_lib.Config,
  workdir: pathlib.Path,
  completed: int,
  licence: str = '',
) -> str:
  """Returns the model card of an export: Markdown with a YAML header.

  Losses and tokens are those of the workdir's metrics, if it has any.
  """
  header = ['---', 'library_name: transformers']
  header += ['pipeline_tag: text-generation']
  header += [f'license: {licence}'] if licence else []
  lines = [
    *(*header, '---', '', f'# {config.name}, round {completed}', ''),
    f'A Llama of {llama.num_params(config.model):,} parameters, trained by '
    f'covenant {covenant.__version__} ({config.optim.method})'
    + (f', commit {commit}.' if (commit := _commit(workdir)) else '.'),
    '',
  ]
  path = workdir / 'metrics.jsonl'
  records = metrics_lib.read(path) if path.exists() else []
  found = [r for r in metrics_lib.evaluations(records) if r.round <= completed]
  if found:
    last = found[-1]
    lines += [
      '| round | tokens | held-out loss, nats per token | bits per byte |',
      '| --- | --- | --- | --- |',
      f'| {last.round} | {last.tokens:,} | {last.loss:.4f} | '
      f'{last.bits_per_byte:.4f} |',
      '',
    ]
  text = json.dumps(dataclasses.asdict(config.model), indent=2)
  lines += ['Architecture:', '', '```json', text, '```', '']
  text = json.dumps(dataclasses.asdict(config.optim), indent=2)
  lines += ['Optimization:', '', '```json', text, '```']
  return '\n'.join(lines) + '\n'


def _commit(workdir: pathlib.Path) -> str:
  """Returns the commit of the code that trained last, or of this process."""
  starts = provenance.read(workdir)
  return str(starts[-1].get('commit', '') if starts else provenance.commit())


def config_of(workdir: str) -> str:
  """Returns the path of the config of a workdir's run; empty if it has none."""
  path = pathlib.Path(workdir, 'config.json').expanduser()
  return str(path) if workdir and path.is_file() else ''


def newest(
  workdir: str | os.PathLike[str], mesh: jax.sharding.Mesh | None = None
) -> tuple[int, ct.Params]:
  """Loads the newest checkpoint of an emulation, a node, or a sync.

  Args:
    workdir: the folder of the node.
    mesh: devices that share the parameters; None leaves them on the host.

  Returns:
    Its round, and the shared parameters alone, as NumPy arrays or on the mesh.

  Raises:
    ConfigError: there is none.
  """
  folder = _checkpoints_of(workdir)

  def like(stored: ct.PyTree) -> ct.PyTree:
    # The stored shapes, not those of a config: Orbax would invent the rest.
    params = stored['params']
    if mesh is None:
      return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), params)
    params = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params
    )
    return jax.tree.map(
      lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
      params,
      sharding.shardings(params, placement_lib.home(mesh)),
    )

  latest, shared = _load(folder, lambda stored: {'params': like(stored)})
  return latest, shared['params']


def newest_state(
  config: config_lib.Config, workdir: str | os.PathLike[str]
) -> tuple[int, shared_state_lib.SharedState]:
  """Loads the whole shared state of the newest checkpoint, as NumPy arrays.

  Raises:
    ConfigError: there is none, or it is of another config.
  """
  expected = shared_state_lib.SharedModel(config).abstract()

  def like(stored: ct.PyTree) -> shared_state_lib.SharedState:
    there, here = (
      sorted(tuple(x.shape) for x in jax.tree.leaves(tree))
      for tree in (stored, expected)
    )
    if there != here:
      raise config_lib.ConfigError(
        f'optim.outer: the checkpoint has tensors of the shapes {there}, the '
        f'config {here}; with amendments in force, set the amended fields'
      )
    return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), expected)

  return _load(_checkpoints_of(workdir), like)


def _checkpoints_of(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the folder of a node's checkpoints, or of what was synced."""
  own = pathlib.Path(workdir, 'checkpoints').absolute()
  synced = own.with_name(sync.FOLDER)
  if synced.is_dir() and not any(own.glob('*')):
    return synced
  if not own.is_dir():
    raise config_lib.ConfigError(
      f'expected the --workdir of a run, got one without {own}'
    )
  return own


def _load(
  folder: pathlib.Path, like: Callable[[ct.PyTree], ct.PyTree]
) -> tuple[int, ct.PyTree]:
  """Loads a part of the newest shared state, as `like` of the stored one."""
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  with ocp.training.Checkpointer(str(folder)) as checkpoints:
    steps = [found.step for found in checkpoints.checkpoints]
    latest, damaged = checksums.newest_sound(folder, steps)
    for why in damaged.values():
      print(f'a checkpoint is damaged: {why}', file=sys.stderr)
    if latest is None:
      raise config_lib.ConfigError(
        f'{folder} has no {"sound " if damaged else ""}checkpoint yet'
      )
    if line := checksums.says_unchecked(folder / str(latest)):
      print(line, file=sys.stderr)
    stored: ct.PyTree = checkpoints.metadata(latest).metadata
    with context:
      tree: ct.PyTree = checkpoints.load(
        latest, abstract_state={'shared': like(stored['shared'])}
      )
  return latest, tree['shared']
