"""Packages that only an extra of setup.py installs."""

import contextlib
import importlib.util
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
    raise _missing(package, extra) from None


def require(extra: str, package: str) -> None:
  """Names the extra of a package that is imported later, if it is missing.

  Raises:
    MissingExtraError: the package is missing.
  """
  if importlib.util.find_spec(package) is None:
    raise _missing(package, extra)


def _missing(package: str, extra: str) -> MissingExtraError:
  return MissingExtraError(
    f"{package} is not installed; run: pip install 'covenant[{extra}]'",
    name=package,
  )
