"""The data of an amendment, which must be on the machine of every node.

An amendment names shards by their digests. A node reads them where its own
config says that they are (`data.phases`, `data.places`), else at the path that
the amendment has. A URL of an amendment is contacted only if its server is one
of the node's own config: requests are signed with the operator's credentials,
and may reach what only this machine can.
"""

import ast
import urllib.parse
from collections.abc import Iterable

from covenant import config as config_lib
from covenant import errors
from covenant import typing as ct
from covenant.config import training
from covenant.data import dataset
from covenant.data import remote
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


def server(path: str) -> tuple[str, ...] | None:
  """Returns what identifies the server of a URL; None for a path.

  >>> server('s3://bucket/folder?endpoint=https://host')
  ('s3', '', 'endpoint=https://host')
  >>> server('r2://account/bucket/folder'), server('/folder')
  (('r2', 'account', ''), None)
  """
  if not remote.is_url(path):
    return None
  url = urllib.parse.urlsplit(path)
  return url.scheme, '' if url.scheme == 's3' else url.netloc, url.query


def check_servers(own: config_lib.Config, paths: Iterable[str]) -> None:
  """Raises ConfigError for a URL whose server the own config does not name."""
  places = [place.split('=', 1)[1] for place in own.data.places]
  known = {None, *map(server, [*own.data.paths, *places])}
  for path in paths:
    if server(path) not in known:
      raise config_lib.ConfigError(
        f'{path!r} is not contacted: an amendment names it, and the config of '
        'this node has no data on that server; if you trust it, name it in '
        'data.places'
      )


def missing(record: dict[str, ct.Json], own: config_lib.Config) -> str:
  """Returns which data of an amendment are not here; empty if all are.

  Args:
    record: of the amendment (`amendments.record`).
    own: the config of this node.
  """
  if record['needed'] or _PATH not in record['changes']:
    return ''
  text = record['changes'][_PATH][1]
  lacks = []
  for phase in training.read_phases(ast.literal_eval(text)):
    for share in phase['mixture']:
      try:
        check_servers(own, [share['path']])
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


def adopted(
  workdir: workdir_lib.Workdir,
  own: config_lib.Config,
  record: dict[str, ct.Json],
) -> None:
  """Writes down an amendment that the run adopted, and what it lacks here."""
  workdir.adopted(record, missing(record, own))


def load(
  config: config_lib.Config, own: config_lib.Config
) -> tokens_lib.TokenData:
  """Opens the data of an amended config.

  Args:
    config: the amended one.
    own: the config of this node, as it began.

  Raises:
    ConfigError: they are not here; it says what to do.
  """
  try:
    check_servers(own, config.data.paths)
    return dataset.load(config)
  except config_lib.ConfigError as e:
    raise config_lib.ConfigError(
      f'an amendment has changed the data of the run: {e}. {_HOW}'
    ) from None
