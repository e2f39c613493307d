"""The state of a run beside its exported parameters, for a run that goes on.

An export in Hugging Face's format has the parameters alone. This file beside it
has the rest of the shared state, which the outer optimizer needs, and the round
of both.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import numpy as np

from covenant import config as config_lib
from covenant import extras
from covenant import typing as ct

FILE = 'covenant_state.safetensors'
_PARAMS = 'params.'

State = TypeVar('State')


def encode(
  completed: int, leaves: Mapping[str, ct.Array], fingerprint: str
) -> bytes:
  """Returns the content of the file of a state after some rounds.

  Args:
    completed: the number of rounds.
    leaves: the tensors of the state (`shared_state.named_leaves`).
    fingerprint: of the state.
  """
  with extras.needed('hf'):
    from safetensors import numpy as safetensors

  rest = {name: np.ascontiguousarray(x) for name, x in _rest(leaves).items()}
  metadata = {'round': str(completed), 'fingerprint': fingerprint}
  return safetensors.save(rest, metadata)


def go_on(
  config: config_lib.Config,
  shared: State,
  fingerprint: Callable[[State], str],
) -> State:
  """Returns the state that was exported beside `config.pretrained`.

  Args:
    config: of the run that goes on with it.
    shared: the state of a run that begins with the exported parameters.
    fingerprint: returns that of a state.

  Raises:
    ConfigError: there is no such file, or it is of another round or state.
  """
  path = pathlib.Path(config.pretrained, FILE)
  found, metadata = _read(path)
  if metadata.get('round') != str(config.first_round):
    raise config_lib.ConfigError(
      f'first_round: expected {metadata.get("round")}, the round of {path}, '
      f'got {config.first_round}'
    )
  leaves = {
    jax.tree_util.keystr(key, simple=True, separator='.'): x
    for key, x in jax.tree_util.tree_leaves_with_path(shared)
  }
  if _shapes(_rest(leaves)) != _shapes(found):
    raise config_lib.ConfigError(
      f'optim.outer: {path} has the state of another optimizer: expected '
      f'{sorted(_rest(leaves))}, got {sorted(found)}'
    )
  for name, x in found.items():
    leaves[name] = jax.device_put(x, leaves[name].sharding)
  made = jax.tree.unflatten(jax.tree.structure(shared), leaves.values())
  if (got := fingerprint(made)) != metadata.get('fingerprint'):
    raise config_lib.ConfigError(
      f'pretrained: {config.pretrained} is not the state that was exported: '
      f'expected the fingerprint {metadata.get("fingerprint")}, got {got}'
    )
  return made


def _read(
  path: pathlib.Path,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Returns the tensors and the metadata of a file; raises ConfigError."""
  with extras.needed('hf'):
    import safetensors

  try:
    with safetensors.safe_open(path, 'np') as file:
      names = list(file.keys())
      return {n: file.get_tensor(n) for n in names}, file.metadata() or {}
  except (OSError, safetensors.SafetensorError) as e:
    raise config_lib.ConfigError(
      f'first_round: expected {path}, of --role=export --state, beside the '
      f'model to go on with: {e}'
    ) from None


def _rest(leaves: Mapping[str, ct.Array]) -> dict[str, ct.Array]:
  return {n: x for n, x in leaves.items() if not n.startswith(_PARAMS)}


def _shapes(leaves: Mapping[str, ct.Array]) -> dict[str, tuple[int, ...]]:
  return {name: tuple(x.shape) for name, x in leaves.items()}
