"""Exports of a run's model for Hugging Face's transformers and lm-eval."""

import importlib.util
import os
import pathlib
import shutil

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from covenant import config as config_lib
from covenant import typing as ct
from covenant.data import pretrained
from covenant.models import hf

_FOLDER = 'hf'
# The message of an evaluator that does not export.
WITHOUT = (
  'checkpoints are not exported for lm-eval, which is not installed: '
  "pip install 'covenant[lm-eval]'"
)


def wanted() -> bool:
  """Returns True if lm-eval is installed."""
  return importlib.util.find_spec('lm_eval') is not None


class Exporter:
  """Exports of one run: hf/ROUND in a folder, each complete or absent."""

  def __init__(
    self, config: config_lib.Config, workdir: str | os.PathLike[str]
  ):
    self._config = config
    self._folder = pathlib.Path(workdir, _FOLDER)
    tokenizer = pretrained.of(config)
    self._files = pretrained.files(tokenizer, config.data.context)
    self._end_of_text = tokenizer.end_of_text

  def write(self, completed: int, params: ct.Params) -> pathlib.Path:
    """Exports parameters after some rounds.

    Returns:
      The folder. An earlier export of this round stays unchanged.

    Raises:
      ConfigError: it cannot be written.
    """
    folder = self._folder / str(completed)
    if not folder.exists():
      hf.export(
        folder,
        self._config.model,
        params,
        context=self._config.data.context,
        end_of_text=self._end_of_text,
        files=self._files,
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


def newest(workdir: str | os.PathLike[str]) -> tuple[int, ct.Params]:
  """Loads the newest checkpoint of the emulator, a miner or a validator.

  Returns:
    Its round, and the shared parameters alone, as NumPy arrays.

  Raises:
    ConfigError: there is none.
  """
  folder = pathlib.Path(workdir, 'checkpoints').absolute()
  if not folder.is_dir():
    raise config_lib.ConfigError(
      f'expected the --workdir of a run, got one without {folder}'
    )
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  with ocp.training.Checkpointer(str(folder)) as checkpoints:
    latest = checkpoints.latest
    if latest is None:
      raise config_lib.ConfigError(f'{folder} has no checkpoint yet')
    # The stored shapes, not those of a config: Orbax would invent the rest.
    stored: ct.PyTree = checkpoints.metadata(latest).metadata
    like = jax.tree.map(
      lambda x: np.empty(x.shape, x.dtype), stored['shared']['params']
    )
    with context:
      tree: ct.PyTree = checkpoints.load(
        latest, abstract_state={'shared': {'params': like}}
      )
  return latest.step, tree['shared']['params']
