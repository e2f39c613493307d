"""The text of `--role=explain`: the weight of a miner, and amendments."""

import pathlib

from covenant import config as config_lib
from covenant.gauntlet import ratings
from covenant.report import amendments


def text(workdir: str, uid: int | None) -> str:
  """Returns the amendments of a run, and the findings about a uid.

  Args:
    workdir: of a validator, or of an emulated run.
    uid: the uid; None explains the amendments alone.

  Raises:
    ConfigError: there is nothing to explain.
  """
  path, lines = pathlib.Path(workdir, 'verdicts.jsonl'), []
  if uid is None:
    lines = amendments.lines(workdir)
    if not lines:
      raise config_lib.ConfigError('--uid: expected the uid to explain')
    return '\n'.join(lines)
  if not path.exists():
    raise config_lib.ConfigError(
      '--workdir: expected that of a validator or of an emulated run; there is '
      f'no {path}'
    )
  found = ratings.explain(ratings.read_decisions(path), uid)
  whole = '\n'.join([*amendments.lines(workdir), found])
  # A terminal obeys nothing that a peer or a store has said.
  return ''.join(c if c.isprintable() or c == '\n' else '?' for c in whole)
