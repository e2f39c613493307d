"""Open, trustless pre-training of language models over the internet, in JAX.

The optimizer's names are here, as in `from covenant import sparseloco, TopK`,
and runs of the emulator: `run`, `emulate`, `read_results`. They load on first
use, so that other parts of the package stay light.
`covenant.optim.sparseloco` is the module, `covenant.sparseloco` its function;
`covenant.emulate` is a package that may be called.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from covenant.emulate.results import Results as Results
  from covenant.emulate.results import emulate as emulate
  from covenant.emulate.results import read_results as read_results
  from covenant.optim.baselines.demo import demo
  from covenant.optim.baselines.sparta import sparta
  from covenant.optim.compression import Compression
  from covenant.optim.compression import Dense
  from covenant.optim.compression import TopK
  from covenant.optim.diloco import diloco
  from covenant.optim.diloco import streaming_diloco
  from covenant.optim.quantize import Exact
  from covenant.optim.quantize import Linear
  from covenant.optim.quantize import Quantizer
  from covenant.optim.quantize import Sign
  from covenant.optim.quantize import SignMagnitude
  from covenant.optim.quantize import Statistical
  from covenant.optim.reduce import aggregate
  from covenant.optim.reduce import nesterov
  from covenant.optim.reduce import outer_update
  from covenant.optim.sparseloco import compress
  from covenant.optim.sparseloco import decompress
  from covenant.optim.sparseloco import flush
  from covenant.optim.sparseloco import pseudo_gradient
  from covenant.optim.sparseloco import sparseloco
  from covenant.optim.sparseloco import state_axes
  from covenant.optim.topk_variants import DCTTopK
  from covenant.optim.topk_variants import RandomK
  from covenant.optim.weight import Weight
  from covenant.report.watch import run as run

__version__ = '0.1.0'

# Without runs: `import *` must not need the extra `run`.
__all__ = [
  'Compression', 'DCTTopK', 'Dense', 'Exact', 'Linear', 'Quantizer', 'RandomK',
  'Sign', 'SignMagnitude', 'Statistical', 'TopK', 'Weight', '__version__',
  'aggregate', 'compress', 'decompress', 'demo', 'diloco', 'flush', 'nesterov',
  'outer_update', 'pseudo_gradient', 'sparseloco', 'sparta', 'state_axes',
  'streaming_diloco',
]  # fmt: skip

# The names of each module.
_NAMES = {
  'emulate.results': 'Results emulate read_results',
  'optim.baselines.demo': 'demo',
  'optim.diloco': 'diloco streaming_diloco',
  'optim.baselines.sparta': 'sparta',
  'optim.compression': 'Compression Dense TopK',
  'optim.quantize': 'Exact Linear Quantizer Sign SignMagnitude Statistical',
  'optim.reduce': 'aggregate nesterov outer_update',
  'optim.sparseloco': 'compress decompress flush pseudo_gradient sparseloco '
  'state_axes',
  'optim.topk_variants': 'DCTTopK RandomK',
  'optim.weight': 'Weight',
  'report.watch': 'run',
}
_MODULES = {n: m for m, names in _NAMES.items() for n in names.split()}


def __getattr__(name: str) -> object:
  if name not in _MODULES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  if name == 'emulate':  # the package itself, as `import covenant.emulate`
    return importlib.import_module(f'{__name__}.{name}')
  module = importlib.import_module(f'{__name__}.{_MODULES[name]}')
  value = getattr(module, name)
  globals()[name] = value  # from now on without this function
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *_MODULES})
