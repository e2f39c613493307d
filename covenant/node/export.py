"""A run's model for Hugging Face's transformers, and with it for lm-eval."""

import importlib.util
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from covenant import config as config_lib
from covenant.data import pretrained
from covenant.models import hf

_FOLDER = 'hf'
# What the evaluator says where it does not export.
WITHOUT = (
  'checkpoints are not exported for lm-eval, which is not installed: '
  "pip install 'covenant[lm-eval]'"
)


def wanted() -> bool:
  """Whether lm-eval is here."""
  return importlib.util.find_spec('lm_eval') is not None


class Exporter:
  """Exports of one run: hf/ROUND in a folder, each whole or not there."""

  def __init__(
    self, config: config_lib.Config, workdir: str | os.PathLike[str]
  ):
    self._config = config
    self._folder = pathlib.Path(workdir, _FOLDER)
    tokenizer = pretrained.of(config)
    self._files = pretrained.files(tokenizer, config.data.context)
    self._end_of_text = tokenizer.end_of_text

  def write(self, completed: int, params: Any) -> pathlib.Path:
    """Exports parameters after some rounds.

    Returns:
      The folder. That of an earlier export of this round is left as it is.

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
    """Deletes all but the newest `checkpoint.keep`, and what a kill left."""
    rounds = []
    for path in self._folder.iterdir():
      if path.name.isdecimal():
        rounds.append(int(path.name))
      elif path.name.endswith('.partial'):
        shutil.rmtree(path)
    for completed in sorted(rounds)[: -self._config.checkpoint.keep]:
      shutil.rmtree(self._folder / str(completed))


def newest(workdir: str | os.PathLike[str]) -> tuple[int, Any]:
  """The newest checkpoint of the emulator, a miner or a validator.

  Returns:
    Its round, and the shared parameters alone, as NumPy arrays.

  Raises:
    ConfigError: there is none.
  """
  folder = pathlib.Path(workdir, 'checkpoints').absolute()
  if not folder.is_dir():
    raise config_lib.ConfigError(
      f'there is no {folder}; expected the --workdir of a run'
    )
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  with ocp.training.Checkpointer(str(folder)) as checkpoints:
    latest = checkpoints.latest
    if latest is None:
      raise config_lib.ConfigError(f'{folder} has no checkpoint yet')
    # What is there, not what a config expects: Orbax would make up the rest.
    stored: Any = checkpoints.metadata(latest).metadata
    like = jax.tree.map(
      lambda x: np.empty(x.shape, x.dtype), stored['shared']['params']
    )
    with context:
      tree: Any = checkpoints.load(
        latest, abstract_state={'shared': {'params': like}}
      )
  return latest.step, tree['shared']['params']
