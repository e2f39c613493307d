"""Many miners on one host, through the code that the real network runs.

The package may be called: `covenant.emulate(config)` is `results.emulate`.
"""

import importlib
import sys
import types


class _Package(types.ModuleType):
  """A package that is a function, too, which loads when it is called."""

  def __call__(self, *args: object, **options: object) -> object:
    results = importlib.import_module(f'{__name__}.results')
    return results.emulate(*args, **options)


sys.modules[__name__].__class__ = _Package
