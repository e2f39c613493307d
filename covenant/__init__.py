"""Open, trustless pre-training of language models over the internet, in JAX.

The optimizer's names are here, as in `from covenant import sparseloco, TopK`.
They load on first use, so that other parts of the package stay light.
`covenant.optim.sparseloco` is the module, `covenant.sparseloco` its function.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

__version__ = '0.1.0'

__all__ = [
  'Compression',
  'DCTTopK',
  'Dense',
  'Exact',
  'Linear',
  'Quantizer',
  'RandomK',
  'Sign',
  'SignMagnitude',
  'Statistical',
  'TopK',
  'Weight',
  '__version__',
  'aggregate',
  'compress',
  'decompress',
  'demo',
  'diloco',
  'flush',
  'nesterov',
  'outer_update',
  'pseudo_gradient',
  'sparseloco',
  'sparta',
  'state_axes',
  'streaming_diloco',
]

# The names of each module below covenant.optim.
_NAMES = {
  'baselines.demo': 'demo',
  'diloco': 'diloco streaming_diloco',
  'baselines.sparta': 'sparta',
  'compression': 'Compression Dense TopK',
  'quantize': 'Exact Linear Quantizer Sign SignMagnitude Statistical',
  'reduce': 'aggregate nesterov outer_update',
  'sparseloco': 'compress decompress flush pseudo_gradient sparseloco '
  'state_axes',
  'topk_variants': 'DCTTopK RandomK',
  'weight': 'Weight',
}
_MODULES = {n: m for m, names in _NAMES.items() for n in names.split()}


def __getattr__(name: str) -> object:
  if name not in _MODULES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module = importlib.import_module(f'{__name__}.optim.{_MODULES[name]}')
  value = getattr(module, name)
  globals()[name] = value  # from now on without this function
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
