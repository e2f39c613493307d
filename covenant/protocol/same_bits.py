"""The scenario by which a machine shows that it computes the run's bits.

Initial parameters, then five outer steps of seven peers with another quantizer
each, weights, clipping and momentum; one peer sends zeros for a tensor, one has
tiny scales. Messages are made of Philox's raw bits, which are integers and the
same everywhere. `EXPECTED` is what `tests/reference/protocol.py` computes.
"""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

from covenant import typing as ct
from covenant.models import initial
from covenant.optim import compression as compression_lib
from covenant.optim import outer_step
from covenant.optim import quantize
from covenant.optim import reduce
from covenant.optim import weight

SHAPES = {'embedding': (128, 40), 'gain': (70,), 'layers': (2, 40, 24)}
BLOCK, K = (8, 8), 4
RATE, MOMENTUM = 0.7, 0.9
PEERS = 7
WEIGHTS = (64, 64, 16, 64, 1, 33, 64)  # parts
QUANTIZERS: tuple[tuple[str, quantize.Quantizer], ...] = (
  ('sign', quantize.Sign()),
  ('sign-magnitude', quantize.SignMagnitude()),
  ('statistical', quantize.Statistical()),
  ('linear', quantize.Linear()),
  ('none', quantize.Exact()),
)


STEPS = (
  'initial parameters',
  *(f'round {r}, {name}' for r, (name, _) in enumerate(QUANTIZERS)),
)


EXPECTED = (
  'f3dba29a8ce9be6f2853048a57822d5a',
  '2644697643e266365731c082f6e0bdfb',
  '97ca77dba33db9390dfebbd9d73d53e7',
  '5768ec7eb82a338ae0bf2ae438919cc2',
  '4db091c17b9d0648fd4c90aa5caee96c',
  '36603a3ad20ec6ad03fbf9535a87179c',
)


class Step(NamedTuple):
  """The state after one step of the scenario."""

  name: str
  params: dict[str, ct.Array]
  traces: dict[str, ct.Array]


def run(
  mesh: jax.sharding.Mesh | None = None,
  specs: ct.PyTree = None,
  budget: int = 1 << 20,
) -> Iterator[Step]:
  """Yields the state after each step.

  Args:
    mesh: of the node; None is one device.
    specs: how each tensor is sharded on it.
    budget: elements of a slice (optim/sharded_leaf.py).
  """
  seed = np.array([0, 7], np.uint32)
  params = jax.jit(lambda: _initial(seed))()
  if mesh is not None:
    placed = jax.tree.map(lambda s: jax.NamedSharding(mesh, s), specs)
    params = jax.device_put(params, placed)
  outer = reduce.nesterov(RATE, MOMENTUM)
  state = outer.init(params)
  yield Step(STEPS[0], params, optax.tree.get(state, 'trace'))
  for r, (_, quantizer) in enumerate(QUANTIZERS):
    compression = compression_lib.TopK(K, BLOCK, quantizer)
    step = outer_step.OuterStep(
      params, compression, outer, mesh=mesh, specs=specs, budget=budget
    )
    messages = [message(r, peer, quantizer) for peer in range(PEERS)]
    weights = [weight.Weight(parts) for parts in WEIGHTS]
    params, state, _ = step.apply(params, state, messages, weights=weights)
    trace: ct.PyTree = optax.tree.get(state, 'trace')
    yield Step(STEPS[1 + r], params, trace)


def first_difference() -> str:
  """Returns the name of the first step with unexpected bits; '' for none."""
  for step, expected in zip(run(), EXPECTED, strict=True):
    if fingerprint(step) != expected:
      return step.name
  return ''


def mesh(devices: int) -> tuple[jax.sharding.Mesh, ct.PyTree]:
  """Returns a mesh of up to 8 devices, and how it shards the tensors."""
  kinds = (jax.sharding.AxisType.Explicit,)
  made = jax.make_mesh((devices,), ('fsdp',), kinds)
  specs = {name: jax.P(*[None] * len(x)) for name, x in SHAPES.items()}
  return made, specs | {'embedding': jax.P('fsdp', None)}


def fingerprint(step: Step) -> str:
  """Returns a digest of the bits of parameters and momentum."""
  arrays = jax.device_get(jax.tree.leaves((step.params, step.traces)))
  data = b''.join(np.asarray(x, '<f4').tobytes() for x in arrays)
  return hashlib.blake2b(data, digest_size=16).hexdigest()


def message(
  round_index: int, peer: int, quantizer: quantize.Quantizer
) -> dict[str, Any]:
  """Returns the message of a peer, of NumPy arrays."""
  raw = np.random.Philox(key=1000 * round_index + peer)
  return {
    name: tuple(
      _packet(raw, region, quantizer, peer, name == 'gain')
      for region in compression_lib.TopK(K, BLOCK, quantizer).regions(shape)
    )
    for name, shape in SHAPES.items()
  }


def _packet(
  raw: np.random.Philox,
  region: Any,
  quantizer: quantize.Quantizer,
  peer: int,
  small: bool,
) -> compression_lib.Packet:
  compression = compression_lib.TopK(K, BLOCK, quantizer)
  n, size = region.num_blocks, region.block_size
  k = compression.block_k(size)
  order_NxL = raw.random_raw(n * size).reshape(n, size).argsort(axis=1)
  indices_NxK = np.sort(order_NxL[:, :k], axis=1).astype(np.uint16)
  codes_NxK = (raw.random_raw(n * k) >> 62).reshape(n, k)
  scales = _floats(raw, quantizer.scale_shape(n))
  factor = np.float32(2.0**-90 if peer == 5 else 2.0**-10)
  scales = scales * np.float32(0 if peer == 3 and small else factor)
  if quantizer.bits == 32:
    codes = _floats(raw, (n, k)) * factor
    return compression_lib.Packet(indices_NxK, codes, scales)
  codes = (codes_NxK & (2**quantizer.bits - 1)).astype(np.uint8)
  dtype = quantizer.scale_dtype
  if dtype == ml_dtypes.bfloat16:
    scales = np.abs(scales)
  return compression_lib.Packet(indices_NxK, codes, scales.astype(dtype))


def _floats(raw: np.random.Philox, shape: tuple[int, ...]) -> np.ndarray:
  """Returns float32 numbers in [-1, 1) with 24 bits, from integers."""
  bits = raw.random_raw(int(np.prod(shape))) >> np.uint64(39)
  whole = bits.astype(np.int64) - 2**24
  return (whole.astype(np.float32) * np.float32(2.0**-24)).reshape(shape)


def _initial(seed: np.ndarray) -> dict[str, jax.Array]:
  return {
    name: initial.normal(jnp.asarray(seed), name, shape, 0.02)
    for name, shape in SHAPES.items()
  }
