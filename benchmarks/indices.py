"""Measures the bits per index of real deltas, by codec and by ideal model.

  python -m benchmarks.indices               half a minute
  python -m benchmarks.indices --width 256   larger matrices, some minutes

Four peers train the model of configs/shakespeare.py, made wider, by
SparseLoCo. The coded indices are those of the deltas of the last rounds, with
error feedback: k = 64 of 64 x 64 blocks, whole blocks only. The line of a codec
has the length of its output and its times for 4096 blocks (4096 x 4096
elements). An ideal is the entropy under a model, given that every block has k
ones. An adaptive arithmetic coder that learns the shares of each matrix would
come near to it, at a cost in time.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import pack12
from covenant import config as config_lib
from covenant.data import dataset
from covenant.models import llama
from covenant.models import loss
from covenant.optim import compression as compression_lib
from covenant.optim import inner as inner_lib
from covenant.optim import sparseloco as sl
from covenant.wire import codec
from covenant.wire import rice

_SIDE, _K = 64, 64
_SIZE = _SIDE * _SIDE
_CODECS = {'12-bit pairs': pack12, 'Elias-Fano': codec, 'Rice': rice}
_SETS = ('optim.inner.learning_rate=5e-3', 'optim.inner.warmup_steps=20')


Indices = dict[str, np.ndarray]  # of one message: a matrix's blocks_NxK


def train(width: int, rounds: int, peers: int) -> Iterator[list[Indices]]:
  """Returns the indices of each peer in each round."""
  sizes = f'model.width={width}', f'model.ffn_width={3 * width}'
  config = config_lib.load('configs/shakespeare.py', [*_SETS, *sizes])
  split, context = dataset.load(config).train, config.data.context
  tx = inner_lib.make(config.optim.inner)
  schedule = inner_lib.schedule(config.optim.inner, 1000)
  compression, outer = compression_lib.TopK(_K), sl.nesterov(0.7)

  @jax.jit
  def step(params: Any, state: Any, tokens: jax.Array, i: jax.Array) -> Any:
    _, gradient = loss.next_token_gradient(config.model, params, tokens, None)
    updates, state = tx.update(gradient, state, params)
    updates = jax.tree.map(lambda u: schedule(i) * u, updates)
    return optax.apply_updates(params, updates), state

  @jax.jit
  def send(start: Any, end: Any, error: Any) -> Any:
    delta = sl.pseudo_gradient(start, end)
    return sl.compress(delta, error, compression, 0.95)

  @jax.jit
  def receive(params: Any, messages: Any) -> Any:
    mean = sl.aggregate(messages, params, compression)
    return sl.outer_update(outer, mean, outer.init(params), params)[0]

  params = jax.jit(lambda key: llama.init(config.model, key))(jax.random.key(0))
  states = [tx.init(params)] * peers
  errors = [sl.init_error(params)] * peers
  rng = np.random.default_rng(0)
  for round_index in range(rounds):
    messages = []
    for peer in range(peers):
      local = params
      for h in range(config.optim.inner_steps):
        ids = rng.integers(
          0, split.num_sequences(context), config.optim.inner.batch_size
        )
        i = np.int32(round_index * config.optim.inner_steps + h)
        local, states[peer] = step(
          local, states[peer], split.read(ids, context), i
        )
      message, errors[peer] = send(params, local, errors[peer])
      messages.append(message)
    params = receive(params, messages)
    yield [whole_blocks(params, message) for message in messages]


def whole_blocks(params: Any, message: Any) -> Indices:
  treedef = jax.tree.structure(params)
  paths = jax.tree_util.tree_leaves_with_path(params)
  return {
    jax.tree_util.keystr(path): np.asarray(part[0].indices, np.int64)
    for (path, x), part in zip(
      paths, treedef.flatten_up_to(message), strict=True
    )
    if x.ndim == 2 and not (x.shape[0] % _SIDE or x.shape[1] % _SIDE)
  }


def mask(indices_NxK: np.ndarray) -> np.ndarray:
  ones_NxL = np.zeros((len(indices_NxK), _SIZE), bool)
  np.put_along_axis(ones_NxL, indices_NxK, True, axis=1)
  return ones_NxL


def in_classes(ones_NxL: np.ndarray, class_NxL: np.ndarray) -> float:
  """Returns the bits of a coder that learns the share of ones in each class.

  Krichevsky and Trofimov, 1981: Beta(1/2, 1/2) before the first.
  """
  total = np.bincount(class_NxL.ravel())
  ones = np.bincount(class_NxL.ravel(), ones_NxL.ravel(), len(total))
  nats = sum(
    _log_beta(0.5, 0.5) - _log_beta(o + 0.5, t - o + 0.5)
    for o, t in zip(ones, total, strict=True)
  )
  return nats / math.log(2)


def _log_beta(a: float, b: float) -> float:
  return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def given_k() -> float:
  """Returns the bits per block saved by knowing that k elements are ones."""
  share = _K / _SIZE
  ways = math.comb(_SIZE, _K) * share**_K * (1 - share) ** (_SIZE - _K)
  return -math.log2(ways)


def ideals(
  now: list[Indices], before: list[Indices]
) -> Iterator[tuple[str, float, int]]:
  """(model, bits, indices) of each matrix of a round."""
  saved = given_k()
  for peer, indices in enumerate(now):
    for name, indices_NxK in indices.items():
      n = len(indices_NxK)
      ones = mask(indices_NxK)
      last = [mask(b[name]).astype(int) for b in before]
      everyone = np.sum(last, axis=0)
      tiles = np.pad(ones.reshape(n, _SIDE, _SIDE), ((0, 0), (1, 0), (1, 0)))
      near = 2 * tiles[:, :-1, 1:] + tiles[:, 1:, :-1]
      models = {
        'neighbors above and left': near.reshape(n, _SIZE).astype(int),
        "the miner's last round": last[peer],
        "all miners' last round": everyone,
        # How often its row, and its column, were sent in the last round.
        'rows and columns of the last round': _popularity(everyone),
      }
      if n > 1:
        yield (
          'the block before',
          in_classes(ones[1:], ones[:-1].astype(int)) - saved * (n - 1),
          ones[1:].sum(),
        )
      for model, classes in models.items():
        yield model, in_classes(ones, classes) - saved * n, n * _K


def _popularity(sent_NxL: np.ndarray) -> np.ndarray:
  """Returns 16 classes of elements: quartiles of row sums and column sums."""
  tiles = sent_NxL.reshape(-1, _SIDE, _SIDE)
  sums = tiles.sum(axis=2, keepdims=True), tiles.sum(axis=1, keepdims=True)
  row, column = (
    np.searchsorted(np.quantile(x, [0.25, 0.5, 0.75]), x) for x in sums
  )
  return (4 * row + column).reshape(len(sent_NxL), _SIZE)


def report_codecs(blocks_NxK: np.ndarray, turns: int) -> None:
  repeats = -(-4096 // len(blocks_NxK))
  timed_NxK = np.tile(blocks_NxK, (repeats, 1))[:4096]
  for name, module in _CODECS.items():
    none = np.zeros_like(blocks_NxK, np.uint8)
    bits = 8 * len(module.pack(blocks_NxK, none, _SIZE, 0)) / blocks_NxK.size
    codes = np.zeros_like(timed_NxK, np.uint8)
    seconds: dict[str, list[float]] = {'pack': [], 'unpack': []}
    for _ in range(turns):
      start = time.perf_counter()
      data = module.pack(timed_NxK, codes, _SIZE, 1)
      middle = time.perf_counter()
      module.unpack(data, len(timed_NxK), _SIZE, _K, 1)
      seconds['pack'].append(middle - start)
      seconds['unpack'].append(time.perf_counter() - middle)
    times = '  '.join(
      f'{name} {statistics.median(s) * 1e3:.2f} ms'
      for name, s in seconds.items()
    )
    print(f'{name:45}{bits:7.3f}   {times}')


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--width', type=int, default=128)
  parser.add_argument('--rounds', type=int, default=12)
  parser.add_argument('--peers', type=int, default=4)
  parser.add_argument('--turns', type=int, default=11)
  args = parser.parse_args()
  history = list(train(args.width, args.rounds, args.peers))
  used = history[args.rounds // 2 :]
  blocks_NxK = np.concatenate([b for r in used for p in r for b in p.values()])
  print(f'{len(blocks_NxK)} blocks, {blocks_NxK.size} indices: bits an index')
  report_codecs(blocks_NxK, args.turns)

  low = rice.low_bits(_SIZE, _K)
  gaps_NxK = np.diff(blocks_NxK, axis=1, prepend=-1) - 1
  best = min(
    sum(_K * (bits + 1) + (row >> bits).sum() for row in gaps_NxK)
    for bits in range(8)
  )
  by_block = sum(
    min(_K * (bits + 1) + (row >> bits).sum() for bits in range(8))
    for row in gaps_NxK
  )
  share = np.bincount((gaps_NxK >> low).ravel()) / gaps_NxK.size
  quotient = -sum(p * math.log2(p) for p in share if p)
  rows = mask(blocks_NxK).reshape(-1, _SIDE).sum(axis=1)
  counts = np.bincount(rows)
  by_row = sum(
    c * (math.log2(math.comb(_SIDE, i)) - math.log2(c / len(rows)))
    for i, c in enumerate(counts)
    if c
  )
  size = blocks_NxK.size
  lines = {
    'Rice, best l for all': best / size,
    'Rice, best l for each block (3 bits)': by_block / size + 3 / _K,
    'ideal: gaps >> l by their frequencies': low + quotient,
    'ideal: number in each row, then where': (by_row / size - given_k() / _K),
    'bound for uniform indices (enumerative)': (
      math.log2(math.comb(_SIZE, _K)) / _K
    ),
  }
  total: dict[str, list[float]] = {}
  for before, now in zip(history, history[1:], strict=False):
    if any(now is one for one in used):
      for model, bits, count in ideals(now, before):
        entry = total.setdefault(model, [0.0, 0.0])
        entry[0], entry[1] = entry[0] + bits, entry[1] + count
  for model, (bits, count) in total.items():
    lines[f'ideal: given {model}'] = bits / count
  for name, bits in lines.items():
    print(f'{name:45}{bits:7.3f}')


if __name__ == '__main__':
  main()
