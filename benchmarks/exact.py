"""Compares the outer step in exact arithmetic with one in plain floats.

  python -m benchmarks.exact              a 4096 x 4096 matrix, 20 peers
  python -m benchmarks.exact --size 1024  in seconds

Both apply the same messages of one matrix: norms, clip factors, the weighted
sums and Nesterov momentum. They take turns in one process; the ratio is the
median over the turns of exact / plain, and its target is 1.2. The plain step is
the same code with the operations of `covenant/optim/exact.py` replaced by those
that XLA may contract and reorder.
"""

import argparse
import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from covenant.optim import compression as compression_lib
from covenant.optim import exact
from covenant.optim import outer_step
from covenant.optim import quantize
from covenant.optim import reduce
from covenant.optim import sparseloco
from covenant.optim import weight

_TARGET = 1.2


@functools.partial(jax.jit, static_argnames=('compression',))
def _plain_norms(
  parts: Any, compression: compression_lib.Compression
) -> jax.Array:
  squares = [
    sum(jnp.sum(jnp.square(x)) for x in compression.values(part))
    for part in parts
  ]
  return jnp.sqrt(jnp.stack(squares))


def _plain_finish(
  sums: reduce.Sums,
  totals: weight.Totals,
  shape: Any,
  compression: compression_lib.Compression,
  mean_over: str = 'senders',
) -> jax.Array:
  del mean_over  # over the senders
  average = weight.WHOLE / totals.of_senders[0]
  regions = [
    total * weight.WHOLE / jnp.maximum(senders.astype(jnp.float32), average)
    for total, senders in zip(sums.total, sums.senders, strict=True)
  ]
  return compression.join(regions, shape)


@contextlib.contextmanager
def plain() -> Iterator[None]:
  """Replaces the exact operations in what is traced and called meanwhile."""
  with (
    mock.patch.object(exact, 'product', lambda a, b: a * b),
    mock.patch.object(
      exact, 'quotient', lambda a, b: np.minimum(1, a / (b + 1e-8))
    ),
    mock.patch.object(reduce, 'part_norms', _plain_norms),
    mock.patch.object(reduce, 'finish', _plain_finish),
  ):
    yield


def make_step(
  size: int, compression: compression_lib.Compression, peers: int
) -> Callable[[], Any]:
  """Returns a function that applies a round's messages in place."""
  outer = reduce.nesterov(0.7, 0.9)
  shape = jax.ShapeDtypeStruct((size, size), jnp.float32)
  step = outer_step.OuterStep(shape, compression, outer)
  params = jax.random.normal(jax.random.key(0), shape.shape)
  state: list[Any] = [params, outer.init(params)]
  compress = jax.jit(compression.compress)
  messages = [
    jax.device_get(compress(jax.random.normal(jax.random.key(p), shape.shape)))
    for p in range(peers)
  ]
  weights = [weight.Weight(1 + p % 64) for p in range(peers)]

  def apply() -> Any:
    new = step.apply(state[0], state[1], messages, True, weights)
    state[:] = new.params, new.outer
    return state

  return apply


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--size', type=int, default=4096, help='of the matrix')
  parser.add_argument('--turns', type=int, default=11)
  parser.add_argument('--peers', type=int, default=20)
  args = parser.parse_args()
  for quantizer in quantize.SignMagnitude(), quantize.Sign():
    compression = sparseloco.TopK(64, (64, 64), quantizer)
    steps = (
      make_step(args.size, compression, args.peers),
      make_step(args.size, compression, args.peers),
    )
    jax.block_until_ready(steps[0]())  # compiles
    with plain():
      jax.block_until_ready(steps[1]())
    seconds: tuple[list[float], list[float]] = [], []
    for turn in range(args.turns):
      for which in (0, 1) if turn % 2 else (1, 0):
        start = time.perf_counter()
        with plain() if which else contextlib.nullcontext():
          jax.block_until_ready(steps[which]())
        seconds[which].append(time.perf_counter() - start)
    ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
    print(
      f'{type(quantizer).__name__}, {args.peers} peers, {args.size} x '
      f'{args.size}: exact {statistics.median(seconds[0]) * 1e3:.1f} ms, plain '
      f'{statistics.median(seconds[1]) * 1e3:.1f} ms, ratio {ratio:.2f}, '
      f'by the minima {min(seconds[0]) / min(seconds[1]):.2f} (target '
      f'{_TARGET})'
    )


if __name__ == '__main__':
  main()
