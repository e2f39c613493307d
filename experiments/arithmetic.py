"""Claims that need no training: bytes of real payloads, and time.

  python -m experiments.arithmetic     seconds

Criteria, written before the run:
  C10 A tensor at the published settings (12-bit indices in pairs, two bits per
      value, 64 of 4,096 values) takes exactly 14 bits per value beside its
      scales; a payload of ours takes at most 9.25 with a scale per block.
  C12 The compute share of a round equals what the published runs report, to
      the digit.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import pack12
from covenant.optim import compression as compression_lib
from covenant.optim import quantize
from covenant.plan import timing
from covenant.wire import payload
from experiments import study

_SIDE = 1024  # rows and columns of the matrix: 256 blocks


def published_bits() -> float:
  """Bits per value of a region in 12-bit index pairs, with its scales."""
  compression = compression_lib.TopK(64, (64, 64), quantize.Statistical())
  (packet,) = jax.device_get(compression.compress(_matrix()))
  section = pack12.pack(packet.indices, packet.codes, 64 * 64, bits=2)
  return 8 * (len(section) + packet.scales.nbytes) / packet.codes.size


def our_bits() -> float:
  """Bits per value of a payload, less those of an empty one."""
  compression = compression_lib.TopK(64, (64, 64), quantize.Sign())
  like = {'w': _matrix()}
  message = jax.tree.map(compression.compress, like)
  spec = payload.make_spec(like, compression)
  header = payload.Header(bytes(16), 0, 0, bytes(16), bytes(16), 1)
  around = payload.make_spec({}, compression).payload_bytes
  data = payload.encode(header, message, like, spec, lambda _: bytes(64))
  return 8 * (len(data) - around) / (64 * _SIDE**2 / 4096)


def _matrix() -> jax.Array:
  matrix = np.random.default_rng(0).normal(size=(_SIDE, _SIDE))
  return jnp.asarray(matrix, jnp.float32)


def judge() -> Iterator[study.Verdict]:
  published = published_bits()
  values = 64 * _SIDE**2 / 4096
  scales = 8 * 4 * 5 / values  # a shift and four means per tensor, float32
  ours = our_bits()
  yield study.Verdict(
    'C10',
    'bytes are what the formula says',
    'Covenant-72B, 2.1',
    '14 bits per value, five floats per tensor as published; ours at most 9.25',
    f'{published:.4f} with {scales:.4f} for the floats; ours {ours:.4f}',
    'PASS' if published == 14 + scales and ours <= 9.25 else 'FAIL',
  )
  found = {
    name: timing.utilization(run.compute, run.communication)
    for name, run in timing.PUBLISHED.items()
  }
  agree = all(
    round(found[name], 3) == run.utilization
    for name, run in timing.PUBLISHED.items()
  )
  yield study.Verdict(
    'C12',
    'the compute share of a round',
    'Covenant-72B, 4.3',
    'as reported, to the digit',
    ', '.join(f'{name} {share:.1%}' for name, share in found.items()),
    'PASS' if agree else 'FAIL',
  )


if __name__ == '__main__':
  for verdict in judge():
    print(f'{verdict.claim} {verdict.outcome}: {verdict.measured}')
