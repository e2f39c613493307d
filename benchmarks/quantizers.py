"""Measures the loss of each quantizer after top-k, also at equal bytes.

  python -m benchmarks.quantizers

The deltas are synthetic: 1024 blocks of 4096. 'sent' is the relative squared
error of the values sent, at k = 64. 'left' is the share of the energy of the
delta that is not delivered (not sent, or lost in quantization), at the k that
takes as many bytes as Statistical at k = 64, with Elias-Fano indices, scales
and codebooks. It takes seconds and uses one seed.
"""

import jax.numpy as jnp
import numpy as np
from absl import app

from covenant.optim import quantize
from covenant.optim import topk
from covenant.wire import codec

_BLOCKS, _SIZE, _K = 1024, 4096, 64
_QUANTIZERS = {
  'Exact': quantize.Exact(),
  'Linear': quantize.Linear(),
  'Statistical': quantize.Statistical(),
  'Sign tensor': quantize.Sign('tensor'),
  'Sign block': quantize.Sign('block'),
  'SignMagnitude tensor': quantize.SignMagnitude('tensor'),
  'SignMagnitude block': quantize.SignMagnitude('block'),
}


def deltas() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  gauss = rng.standard_normal((_BLOCKS, _SIZE))
  laplace = rng.laplace(size=(_BLOCKS, _SIZE))
  scale = rng.standard_normal((_BLOCKS, 1))
  return {
    'gauss': gauss,
    'laplace': laplace,
    'gauss, block scales LN(0.3)': gauss * np.exp(0.3 * scale),
    'gauss, block scales LN(1)': gauss * np.exp(scale),
    'laplace, block scales LN(1)': laplace * np.exp(scale),
  }


def bits_of(quantizer: quantize.Quantizer, k: int) -> int:
  """Returns the indices, codes and scales of all blocks."""
  scales = np.prod(quantizer.scale_shape(_BLOCKS))
  block = codec.index_bits(_SIZE, k) + k * quantizer.bits
  return int(_BLOCKS * block + scales * 8 * quantizer.scale_dtype.itemsize)


def largest_k(quantizer: quantize.Quantizer, bits: int) -> int:
  return max(k for k in range(1, _SIZE) if bits_of(quantizer, k) <= bits)


def lost(
  quantizer: quantize.Quantizer, delta_NxL: np.ndarray, k: int
) -> tuple[float, float]:
  """Returns the squared error of the sent values and the energy sent, of 1."""
  x_NxL = jnp.asarray(delta_NxL, jnp.float32)
  values = jnp.take_along_axis(x_NxL, topk.select(x_NxL, k), axis=1)
  error = quantizer.decode(*quantizer.encode(values)) - values
  total = jnp.sum(x_NxL * x_NxL)
  return (
    float(jnp.sum(error * error) / total),
    float(jnp.sum(values * values) / total),
  )


def main(_) -> None:
  budget = bits_of(_QUANTIZERS['Statistical'], _K)
  for name, x_NxL in deltas().items():
    print(f'\n{name:29}bits/value    sent   k at equal bytes    left')
    for label, quantizer in _QUANTIZERS.items():
      error, energy = lost(quantizer, x_NxL, _K)
      k = largest_k(quantizer, budget)
      error_k, energy_k = lost(quantizer, x_NxL, k)
      bits = bits_of(quantizer, _K) / (_BLOCKS * _K)
      print(
        f'  {label:27}{bits:10.2f}{error / energy:8.4f}'
        f'{k:19}{1 - energy_k + error_k:8.4f}'
      )


if __name__ == '__main__':
  app.run(main)
