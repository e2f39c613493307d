"""Packages that only an extra of setup.py installs."""

import contextlib
from collections.abc import Generator

from covenant import errors


class MissingExtraError(errors.CovenantError, ImportError):
  """A package is missing; the message names the extra that has it."""


@contextlib.contextmanager
def needed(extra: str) -> Generator[None]:
  """Names the extra where an import in the block finds no package.

    with extras.needed('run'):
      import flax.linen as nn

  Args:
    extra: a key of extras_require in setup.py.

  Raises:
    MissingExtraError: a package of others is missing, in one line.
  """
  try:
    yield
  except ModuleNotFoundError as e:
    package = (e.name or '').partition('.')[0]
    if package in ('', 'covenant'):
      raise  # a fault of ours, which no install mends
    raise MissingExtraError(
      f"{package} is not installed; run: pip install 'covenant[{extra}]'",
      name=e.name,
    ) from None
