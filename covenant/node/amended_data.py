"""The data of an amendment, which must be on the machine of every node.

An amendment names shards by their digests. A node reads them where its own
config says that they are (`data.phases`, `data.places`), else at the path that
the amendment has.
"""

import ast

from covenant import config as config_lib
from covenant import errors
from covenant import typing as ct
from covenant.config import training
from covenant.data import dataset
from covenant.data import shards
from covenant.data import tokens as tokens_lib
from covenant.node import workdir as workdir_lib

_PATH = 'data.phases'
_HOW = (
  'Get these shards and restart with the same --workdir and '
  '--config.data.places=DIGEST=PATH'
)


def check_places(config: config_lib.Config) -> None:
  """Raises ConfigError unless the shards of `data.places` are there."""
  for place in config.data.places:
    digest, path = place.split('=', 1)
    shards.open_shards(path, digest=digest)


def missing(record: dict[str, ct.Json]) -> str:
  """Returns which data of an amendment are not here; empty if all are."""
  if record['needed'] or _PATH not in record['changes']:
    return ''
  text = record['changes'][_PATH][1]
  lacks = []
  for phase in training.read_phases(ast.literal_eval(text)):
    for share in phase['mixture']:
      try:
        shards.open_shards(share['path'], digest=share['digest'])
      except (errors.CovenantError, OSError) as e:
        lacks.append(f'{share["digest"]} ({e})')
  if not lacks:
    return ''
  first = record['round']
  return (
    f'this node stops before round {first}, which trains on data that are not '
    f'here: {"; ".join(dict.fromkeys(lacks))}. {_HOW}'
  )


def adopted(workdir: workdir_lib.Workdir, record: dict[str, ct.Json]) -> None:
  """Writes down an amendment that the run adopted, and what it lacks here."""
  workdir.adopted(record, missing(record))


def load(config: config_lib.Config) -> tokens_lib.TokenData:
  """Opens the data of an amended config.

  Raises:
    ConfigError: they are not here; it says what to do.
  """
  try:
    return dataset.load(config)
  except config_lib.ConfigError as e:
    raise config_lib.ConfigError(
      f'an amendment has changed the data of the run: {e}. {_HOW}'
    ) from None
