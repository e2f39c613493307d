"""Measures the stages of a message of one matrix, and the sum of 20 peers.

  python -m benchmarks.compress              4096 x 4096, k = 64 of 4096
  python -m benchmarks.compress --turns 31   on a machine with other load

The stages take turns in one process; times are medians over the turns, with
the minimum beside them. Elements are those of the dense float32 matrix. The
target is 150 M elements/s for select + quantize + pack + unpack + decompress.
'pack' and 'unpack' are of whole payloads: header, indices, codes, scales,
digest, and all checks of the strict decoder except that of the signature.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from covenant.optim import blocks
from covenant.optim import compression as compression_lib
from covenant.optim import quantize
from covenant.optim import reduce
from covenant.optim import sparseloco
from covenant.optim import topk
from covenant.wire import payload

_BAR = 150e6  # elements/s
_MESSAGE = ('select', 'quantize', 'pack', 'unpack', 'decompress')
_CASES = {
  '2 bits, SignMagnitude per block': (quantize.SignMagnitude(), 'elias-fano'),
  '1 bit, Sign per block': (quantize.Sign(), 'elias-fano'),
  '1 bit, Sign per block, Rice-coded gaps': (quantize.Sign(), 'rice'),
}
_HEADER = payload.Header(
  payload.run_id('benchmark'),
  round=0,
  uid=0,
  root=bytes(16),
  receipt=bytes(16),
  sequences=0,
)

Times = dict[str, list[float]]  # seconds, one a turn


def take_turns(stages: dict[str, Callable[[], Any]], turns: int) -> Times:
  times: Times = {name: [] for name in stages}
  for run in stages.values():
    jax.block_until_ready(run())  # compiles
  for _ in range(turns):
    for name, run in stages.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      times[name].append(time.perf_counter() - start)
  return times


def sign(digest: bytes) -> bytes:
  return 2 * digest


def verify(digest: bytes, signature: bytes) -> bool:
  return signature == sign(digest)


def matrix(size: int, seed: int) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), (size, size))


def plain_select(x_NxL: jax.Array, k: int) -> jax.Array:
  """Selects as `topk.select` does, without the groups."""
  return jnp.sort(jax.lax.top_k(jnp.abs(x_NxL), k)[1], axis=1)


def memory_seconds(x: jax.Array, turns: int) -> tuple[float, float]:
  """Reads and writes `x` in place, and writes as much new memory."""
  scale = jax.jit(lambda x: x * 1.5, donate_argnums=0)
  buffer = [x + 0.0]

  def in_place() -> jax.Array:
    buffer[0] = scale(buffer[0])
    return buffer[0]

  times = take_turns(
    {'in place': in_place, 'new': jax.jit(lambda: jnp.zeros_like(x))}, turns
  )
  return statistics.median(times['in place']), statistics.median(times['new'])


def report_message(
  compression: compression_lib.TopK,
  codec: str,
  size: int,
  turns: int,
  limit: float,
) -> None:
  """Prints the stages of one message; `limit` in seconds."""
  x = matrix(size, 0)
  like = jax.ShapeDtypeStruct(x.shape, x.dtype)
  spec = payload.make_spec(like, compression, codec)
  k, block, quantizer = compression.k, compression.block, compression.quantizer

  @jax.jit
  def select(x):
    (x_NxL,) = blocks.cut(x, block)
    indices_NxK = topk.select(x_NxL, k)
    return indices_NxK, jnp.take_along_axis(x_NxL, indices_NxK, axis=1)

  encode = jax.jit(quantizer.encode)
  compress = jax.jit(compression.compress)
  decompress = jax.jit(lambda part: compression.decompress(part, x.shape))
  with_feedback = jax.jit(
    lambda x, error: sparseloco.compress(x, error, compression, 0.95),
    donate_argnums=1,
  )
  _, values = select(x)
  message = compress(x)

  def pack() -> bytes:
    return payload.encode(_HEADER, message, like, spec, sign)

  def unpack() -> Any:
    return payload.decode(data, _HEADER, like, spec, verify).message

  data = pack()
  received = unpack()
  error = [jnp.zeros_like(x)]

  def feedback() -> Any:
    sent, error[0] = with_feedback(x, error[0])
    return sent, error[0]

  times = take_turns(
    {
      'select': lambda: select(x),
      'quantize': lambda: encode(values),
      'pack': pack,
      'unpack': unpack,
      'decompress': lambda: decompress(received),
      'compress': lambda: compress(x),
      'compress + feedback': feedback,
    },
    turns,
  )
  medians = {name: statistics.median(t) for name, t in times.items()}
  total = sum(medians[name] for name in _MESSAGE)
  least = sum(min(times[name]) for name in _MESSAGE)

  def line(name: str, median: float, minimum: float) -> None:
    print(
      f'  {name:32}{median * 1e3:9.2f}{minimum * 1e3:9.2f}'
      f'{median / total:8.0%}{x.size / median / 1e6:11,.0f}'
    )

  print(f'{"  stage":34}median ms   min ms   share  M elem/s')
  for name in _MESSAGE:
    line(name, medians[name], min(times[name]))
  line('total', total, least)
  extra = [
    f - c
    for f, c in zip(
      times['compress + feedback'], times['compress'], strict=True
    )
  ]
  line('+ error feedback', statistics.median(extra), min(extra))
  line(
    'total with error feedback',
    total + statistics.median(extra),
    least + min(extra),
  )
  # The sender must read the matrix, and the receiver write it, once.
  line('memory limit of the total', limit, limit)
  print(
    f'  {x.size / total / _BAR:.2f} x the bar of {_BAR / 1e6:.0f} M elem/s '
    f'({x.size / least / _BAR:.2f} x by the minima); payload of '
    f'{len(data):,} bytes, {x.nbytes / len(data):.1f} x smaller than float32\n'
  )


def report_selection(size: int, block: int, k: int, turns: int) -> None:
  (x_NxL,) = blocks.cut(matrix(size, 0), (block, block))
  ways = {
    'lax.top_k, sorted': jax.jit(lambda x: plain_select(x, k)),
    'topk.select': jax.jit(lambda x: topk.select(x, k)),
  }
  plain, ours = (np.asarray(way(x_NxL)) for way in ways.values())
  times = take_turns(
    {name: (lambda way=way: way(x_NxL)) for name, way in ways.items()}, turns
  )
  for name, seconds in times.items():
    print(
      f'  {name:32}{statistics.median(seconds) * 1e3:9.2f}'
      f'{min(seconds) * 1e3:9.2f}'
    )
  ratios = [p / o for p, o in zip(*times.values(), strict=True)]
  print(
    f"  {statistics.median(ratios):.2f} x faster (median of each turn's "
    f'ratio); same indices: {np.array_equal(plain, ours)}\n'
  )


def report_aggregation(
  compression: compression_lib.TopK, size: int, peers: int
) -> None:
  """Adds received messages one at a time, as a node does."""
  like = jax.ShapeDtypeStruct((size, size), jnp.float32)
  spec = payload.make_spec(like, compression)
  compress = jax.jit(compression.compress)
  datas = [
    payload.encode(_HEADER, compress(matrix(size, p)), like, spec, sign)
    for p in range(peers)
  ]

  def unpack(data: bytes) -> Any:
    return payload.decode(data, _HEADER, like, spec, verify).message

  factor = np.float32(1)
  sums = compression.start(like.shape)
  message = unpack(datas[0])
  step = jax.jit(
    lambda sums, message: reduce.add(sums, message, factor, compression),
    donate_argnums=0,
  )
  plan: Any = step.lower(sums, message).compile().memory_analysis()
  before = sum(x.nbytes for x in jax.live_arrays())
  dense = size * size * 4
  seconds, live = [], []
  for data in [datas[0], *datas]:  # the first compiles
    start = time.perf_counter()
    message = unpack(data)
    sums = jax.block_until_ready(step(sums, message))
    seconds.append(time.perf_counter() - start)
    live.append(sum(x.nbytes for x in jax.live_arrays()) - before)
  seconds = seconds[1:]
  half = peers // 2
  first, second = (
    statistics.median(part) for part in (seconds[:half], seconds[half:])
  )
  print(
    f'  a peer, unpack and add: {statistics.median(seconds) * 1e3:.2f} ms; '
    f'median of the last {peers - half} over the first {half}: '
    f'{second / first:.2f} (1 is linear)'
  )
  received = sum(x.nbytes for x in jax.tree.leaves(message))
  print(
    f'  memory, in dense leaves of {dense / 1e6:.0f} MB: sum and count '
    f'{sum(x.nbytes for x in jax.tree.leaves(sums)) / dense:.2f}, one message '
    f'{received / dense:.3f}, '
    f'XLA temporaries {plan.temp_size_in_bytes / dense:.3f}; growth of live '
    f'buffers over {peers} peers {max(live) / dense:.3f}'
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--size', type=int, default=4096, help='of the matrix')
  parser.add_argument('--block', type=int, default=64, help='side of a block')
  parser.add_argument('--k', type=int, default=64, help='values a block')
  parser.add_argument('--turns', type=int, default=11)
  parser.add_argument('--peers', type=int, default=20)
  args = parser.parse_args()
  if args.size % args.block:
    parser.error(f'--size: expected a multiple of {args.block}')

  device = jax.devices()[0]
  size = args.size
  nbytes = 4 * size**2
  in_place, new = memory_seconds(matrix(size, 0), args.turns)
  print(
    f'jax {jax.__version__}, {device.platform} {device.device_kind}\n'
    f'{size} x {size} float32: {size**2 / 1e6:.1f} M elements, '
    f'{nbytes / 1e6:.0f} MB; {args.k} of each {args.block} x {args.block}\n'
    f'memory: read and written in place at {2 * nbytes / in_place / 1e9:.1f} '
    f'GB/s ({in_place * 1e3:.2f} ms);\n'
    f'  written new at {nbytes / new / 1e9:.1f} GB/s ({new * 1e3:.2f} ms), '
    f'which decompress does, page faults included\n'
  )
  for name, (quantizer, codec) in _CASES.items():
    compression = compression_lib.TopK(
      args.k, (args.block, args.block), quantizer
    )
    print(name)
    report_message(compression, codec, size, args.turns, in_place)
  print(f'{"selection alone, blocks cut":34}median ms   min ms')
  report_selection(size, args.block, args.k, args.turns)
  (name, (quantizer, _)), *_ = _CASES.items()
  print(f'aggregation of {args.peers} peers, {name}')
  report_aggregation(
    compression_lib.TopK(args.k, (args.block, args.block), quantizer),
    size,
    args.peers,
  )


if __name__ == '__main__':
  main()
