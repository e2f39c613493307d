"""Compares the fetch and the sum of payloads with what obstore alone reads.

  python -m benchmarks.dataplane              20 payloads of 8 MB
  python -m benchmarks.dataplane --megabytes=2 --turns=1   in seconds

A folder and an S3 server on the loopback (a process of its own) hold the
payloads of 20 peers, of a model of one matrix. Each turn reads all of them:

  obstore    `obstore.get` of whole objects, in threads, the bytes dropped
  digested   the same, with the BLAKE2b of each object, which a node needs
  fetch      `reader.fetch`, which verifies digests
  decode     fetch, and decode with every check while others are read
  all        the same, then add them up and take the outer step
  step       the outer step for one of them: the pass over the dense model

The ratio of rates fetch / obstore has the bar 0.8; the ratio of times
(all - step) / fetch has the bar 1.5; the peak of what `decode` allocates has
the bar of two payloads and one message. A bar that is missed is printed with
the reason. What is called an extrapolation is arithmetic on CPU seconds, which
a machine that others use does not change much.
"""

import argparse
import functools
import hashlib
import math
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import obstore

from covenant import typing as ct
from covenant.optim import compression as compression_lib
from covenant.optim import leaf_group
from covenant.optim import outer_step
from covenant.optim import quantize
from covenant.optim import reduce
from covenant.optim import sparseloco
from covenant.optim import weight as weight_lib
from covenant.protocol import piece_files
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import backend
from covenant.store import bucket as bucket_lib
from covenant.store import location as location_lib
from covenant.store import reader
from covenant.train import pieces as pieces_lib
from covenant.wire import lazy
from covenant.wire import payload as payload_lib

_FETCH_BAR, _ALL_BAR = 0.8, 1.5
_MEMORY_BAR = 4.4  # payloads: two, and a message of 2.4 times the size of one
_PAYLOAD_72B, _PEERS = 1.38e9, 20  # bytes, as `--role=plan` prints
_STATE_72B, _PARAMETERS_72B = 565e9, 70.6e9  # bytes with outer momentum
_HOST_CORES = 128  # of a host of eight accelerators
_ROUND_SECONDS, _AGE = 1236.0, 7  # of 72b; rounds since its checkpoint
_LINKS = {'200 Mb/s': 25e6, '500 Mb/s': 62.5e6, '1 Gb/s': 1.25e8, '4 Gb/s': 5e8}
_BLOCK, _K = 4096, 64


class Round(NamedTuple):
  """The payloads of a round and the model that they move."""

  spec: payload_lib.Spec
  abstract: ct.Params
  header: payload_lib.Header
  digests: list[bytes]
  step: outer_step.OuterStep


def _sign(digest: bytes) -> bytes:
  return 2 * digest


def _verify(digest: bytes, signature: bytes) -> bool:
  return signature == 2 * digest


def make_round(folder: str, megabytes: float, peers: int) -> Round:
  """Writes the payloads of a round to a folder, and returns the round."""
  blocks_ = max(int(megabytes * 1e6 / 82) // 64, 1)  # rows of 64 blocks
  abstract = {'w': jax.ShapeDtypeStruct((blocks_ * 64, 64 * 64), jnp.float32)}
  compression = sparseloco.TopK(_K, (64, 64), quantize.SignMagnitude())
  spec = payload_lib.make_spec(abstract, compression)
  ((region,),) = [tensor.regions for tensor in spec.tensors]
  header = payload_lib.Header(b'r' * 16, 0, 0, b'h' * 16, b'c' * 16, 1)
  digests, n = [], region.num_blocks
  scales = region.num_blocks, compression.quantizer
  for peer in range(peers):
    rng = np.random.default_rng(peer)
    places = rng.integers(0, _BLOCK // _K, (n, _K), np.uint16)
    places += np.arange(0, _BLOCK, _BLOCK // _K, dtype=np.uint16)
    codes = rng.integers(0, 4, (n, _K), np.uint8)
    shape = compression.quantizer.scale_shape(scales[0])
    sizes = rng.random(shape) + 0.5
    packet = compression_lib.Packet(
      places, codes, sizes.astype(compression.quantizer.scale_dtype)
    )
    data = payload_lib.encode(header, {'w': (packet,)}, abstract, spec, _sign)
    pathlib.Path(folder, f'{peer:08d}').write_bytes(data)
    digests.append(hashlib.blake2b(data, digest_size=32).digest())
  outer, budget = reduce.nesterov(1.0), leaf_group.budget_here()
  step = outer_step.OuterStep(abstract, compression, outer, budget=budget)
  return Round(spec, abstract, header, digests, step)


def _reads(
  made: Round, bucket: bucket_lib.ObstoreBucket, params: ct.Params
) -> dict[str, Callable[[], object]]:
  """Returns what each turn times, by name."""
  keys = [f'{i:08d}' for i in range(len(made.digests))]
  limit = made.spec.payload_bytes
  requests = {
    digest: reader.ObjectRequest((bucket,), key, limit, digest)
    for key, digest in zip(keys, made.digests, strict=True)
  }

  def alone(act: Callable[..., object]) -> None:
    store = bucket.open()
    with futures.ThreadPoolExecutor(16) as pool:
      list(pool.map(lambda k: act(obstore.get(store, k).bytes()), keys))

  def fetch(take: Callable[[bytes, bytes], None] = lambda d, x: None) -> None:
    got = reader.fetch(requests, 600, 16, take=take)
    assert all(isinstance(data, bytes) for data in got.values()), got

  norms, packed = {}, {}

  def take(digest: bytes, data: bytes) -> None:
    decoded = payload_lib.decode(
      data, made.header, made.abstract, made.spec, _verify
    )
    norms[digest] = made.step.norms([decoded.message])[0]
    packed[digest] = lazy.reopen(data, made.abstract, made.spec)

  def move(order: list[bytes]) -> None:
    weights = [weight_lib.Weight()] * len(order)
    parts_R, sizes_R = weight_lib.columns(weights)
    norms_RxP = np.stack([norms[digest] for digest in order])
    factors = reduce.clip_factors(norms_RxP, 'median', sizes_R)
    new = made.step.apply_sum(
      params,
      reduce.nesterov(1.0).init(params),
      [packed[digest] for digest in order],
      factors,
      parts_R,
      weight_lib.totals(parts_R),
    )
    jax.block_until_ready(new.params)

  def everything() -> None:
    fetch(take)
    move(made.digests)
    packed.clear()

  def step() -> None:
    move(made.digests[:1])

  digest = functools.partial(hashlib.blake2b, digest_size=32)
  return {
    'obstore': lambda: alone(len),
    'digested': lambda: alone(digest),
    'fetch': fetch,
    'step': step,
    'decode': lambda: fetch(take),
    'all': everything,
  }


class Turns(NamedTuple):
  """The seconds of each turn, by name."""

  wall: dict[str, list[float]]
  cpu: dict[str, list[float]]  # of all threads of this process


def _measure(reads: dict[str, Callable[[], object]], turns: int) -> Turns:
  """Returns the seconds of each turn; the names take turns."""
  found = Turns({name: [] for name in reads}, {name: [] for name in reads})
  for name in ('all', 'decode', 'step', *reads):
    reads[name]()  # compiles, and fills caches
  for turn in range(turns):
    names = list(reads)[:3] if turn % 2 else list(reads)[2::-1]
    for name in (*names, 'decode', 'step', 'all'):
      began, spent = time.perf_counter(), time.process_time()
      reads[name]()
      found.wall[name].append(time.perf_counter() - began)
      found.cpu[name].append(time.process_time() - spent)
  return found


def _ratio(a: list[float], b: list[float]) -> float:
  return statistics.median(x / y for x, y in zip(a, b, strict=True))


def _decode_rates(made: Round, folder: str) -> np.ndarray:
  """Returns the bytes/s of a core that decodes and checks, and of norms."""
  data, seconds = pathlib.Path(folder, '00000000').read_bytes(), []
  args = made.header, made.abstract, made.spec, _verify
  for _ in range(3):
    times = [time.process_time()]
    message = payload_lib.decode(data, *args).message
    times.append(time.process_time())
    made.step.norms([message])
    seconds.append(np.diff([*times, time.process_time()]))
  return len(data) / np.min(seconds, axis=0)


def _places(
  folder: str, server: subprocess.Popen
) -> Iterator[tuple[str, location_lib.Location]]:
  assert server.stdout is not None
  port = int(server.stdout.readline())
  yield 'a folder', location_lib.Location('file', folder)
  endpoint = f'http://127.0.0.1:{port}'
  yield 'S3', location_lib.Location('s3', 'bench', '', endpoint)


def _report(
  name: str, made: Round, reads: dict[str, Callable[[], object]], turns: int
) -> dict[str, float]:
  """Prints the ratios of a place; returns the median CPU seconds by name."""
  total = made.spec.payload_bytes * len(made.digests)
  found = _measure(reads, turns)
  wall = {k: statistics.median(x) for k, x in found.wall.items()}
  cpu = {k: statistics.median(x) for k, x in found.cpu.items()}
  rates = {k: total / x / 1e6 for k, x in wall.items()}
  print(
    f'{name}: obstore {rates["obstore"]:.0f} MB/s, with digests '
    f'{rates["digested"]:.0f}, fetch {rates["fetch"]:.0f}, with decoding '
    f'{rates["decode"]:.0f}'
  )
  fetch, digested = (
    _ratio(found.wall['obstore'], found.wall[x]) for x in ('fetch', 'digested')
  )
  print(
    f'  fetch / obstore {fetch:.2f} (bar {_FETCH_BAR}'
    + _missed(fetch >= _FETCH_BAR, f'with digests obstore has {digested:.2f}')
    + f'); / obstore with digests {fetch / digested:.2f}'
  )
  whole, spent = (
    _ratio(
      [a - b for a, b in zip(x['all'], x['step'], strict=True)], x['fetch']
    )
    for x in found
  )
  decode = _ratio(found.wall['decode'], found.wall['fetch'])
  print(
    f'  (all - step) / fetch {whole:.1f} in time, {spent:.1f} in CPU seconds '
    f'(bar {_ALL_BAR}'
    + _missed(whole <= _ALL_BAR, f'decode / fetch is {decode:.1f}')
    + ')'
  )
  for what, seconds in ('seconds', wall), ('CPU seconds', cpu):
    listed = ', '.join(f'{k} {x:.3f}' for k, x in seconds.items())
    print(f'  {what}: {listed}')
  reads['all']()  # drops its messages
  tracemalloc.start()
  reads['decode']()
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  size = made.spec.payload_bytes
  print(
    f'  memory {peak / size:.1f} payloads of {size / 1e6:.0f} MB (bar '
    f'{_MEMORY_BAR}'
    + _missed(
      peak / size <= _MEMORY_BAR,
      f'{len(made.digests)} are held, as the median of all norms decides about '
      f'each; beside them {(peak - total) / size:.1f}',
    )
    + ')'
  )
  return cpu


def _missed(is_met: bool, reason: str) -> str:
  return '' if is_met else f', missed: {reason}'


def _load_rate(folder: str, pieces: int = 6) -> float:
  """Returns the bytes/s of a core that makes an array of pieces."""
  location = location_lib.Location('file', f'{folder}/pieces')
  own = bucket_lib.open_bucket(location)
  storage = run_storage_lib.RunStorage(b'r' * 16, own, b'', lambda data: own)
  digests, seconds = [], []
  for i in range(pieces):
    data = np.random.default_rng(i).bytes(pieces_lib.PIECE_BYTES)
    digests.append(hashlib.blake2b(data, digest_size=32).hexdigest())
    storage.put_once(storage.chunk_key(bytes.fromhex(digests[-1])), data)
  size = pieces * pieces_lib.PIECE_BYTES
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.ShapeDtypeStruct((size // 4,), jnp.float32, sharding=where)
  for turn in range(3):
    path = pathlib.Path(folder, f'{turn}.tensor')
    began = time.process_time()
    piece_files.fetch(storage, digests, size, [storage.bucket], path)
    piece_files.place(path, abstract)
    seconds.append(time.process_time() - began)
    path.unlink()
  return size / min(seconds)


def _whole_round(made: Round, cpu: dict[str, float]) -> None:
  """Prints the time to fetch, decode and add up a round of 72b.

  Args:
    made: the round that was measured.
    cpu: its CPU seconds.
  """
  whole = _PAYLOAD_72B * _PEERS
  fetch = whole / 5e8
  scale = whole / (made.spec.payload_bytes * len(made.digests)) / _HOST_CORES
  beside, after = cpu['decode'], cpu['all'] - cpu['decode'] - cpu['step']
  ratio = (max(fetch, beside * scale) + after * scale) / fetch
  print(
    f'extrapolation to 72b, 20 payloads of 1.38 GB on {_HOST_CORES} cores, no '
    f'accelerator: at 500 MB/s fetch {fetch:.0f} s, beside it digest, decode '
    f'and norms {beside * scale:.0f} s, then sums {after * scale:.0f} s: '
    f'{ratio:.2f} times the fetch (bar {_ALL_BAR})'
  )


def _join(made: Round, medians: dict[str, float], load: float) -> None:
  """Prints the time to join 72b, from rates that were measured here.

  A joiner loads the newest checkpoint that is vouched for, seven rounds old on
  average, and replays these and the rounds that pass meanwhile, while it
  fetches the payloads of the next one.
  """
  total = made.spec.payload_bytes * len(made.digests)
  (tensor,) = jax.tree.leaves(made.abstract)
  adding = medians['all'] - medians['fetch'] - medians['step']
  cpu = _PAYLOAD_72B * _PEERS / total * max(adding, 0.0)
  cpu += medians['step'] / tensor.size * _PARAMETERS_72B
  cpu += _STATE_72B / load  # at least what its fingerprint takes
  cpu /= _HOST_CORES
  print(
    f'extrapolation: joining 72b (565 GB of state, 20 payloads of 1.38 GB in '
    f'rounds of {_ROUND_SECONDS / 60:.1f} min) on {_HOST_CORES} cores, no '
    f'accelerator: a piece at {load / 1e6:.0f} MB/s and a round in '
    f'{cpu * _HOST_CORES:.0f} s on one core here, divided by their number'
  )
  for name, link in _LINKS.items():
    state = _STATE_72B / link, _STATE_72B / (load * _HOST_CORES)
    replay = _PAYLOAD_72B * _PEERS / link, cpu
    alone, whole = (
      # A node that is slower than the run never catches up.
      (a + _AGE * b) / (1 - b / _ROUND_SECONDS)
      if b < _ROUND_SECONDS
      else math.inf
      for a, b in ((state[0], replay[0]), (max(state), max(replay)))
    )
    rounds = _AGE + whole / _ROUND_SECONDS
    busy = (state[1] + rounds * cpu) / whole
    print(
      f'  {name:>8}  link alone {alone / 3600:5.2f} h  all {whole / 3600:5.2f} '
      f'h  ratio {whole / alone:.2f} (bar 1.3)  cores busy {busy:.0%}'
    )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--megabytes', type=float, default=8, help='a payload')
  parser.add_argument('--peers', type=int, default=_PEERS)
  parser.add_argument('--turns', type=int, default=3)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    made = make_round(folder, args.megabytes, args.peers)
    params = {'w': jnp.zeros(made.abstract['w'].shape)}
    command = [sys.executable, '-m', 'benchmarks.s3_folder', folder]
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE}
    medians: dict[str, float] = {}
    with subprocess.Popen(command, text=True, **pipes) as server:
      for name, where in _places(folder, server):
        bucket = bucket_lib.open_for_reading(
          where, allow_local=True, settings=backend.StoreSettings()
        )
        reads = _reads(made, bucket, params)
        medians = _report(name, made, reads, args.turns)
      server.communicate('')
    (rate, norms), load = _decode_rates(made, folder), _load_rate(folder)
  print(f'decode: {rate / 1e6:.0f} MB/s on a core, norms {norms / 1e6:.0f}')
  _whole_round(made, medians)
  _join(made, medians, load)


if __name__ == '__main__':
  main()
