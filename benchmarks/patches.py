"""Compares lossless patches of the parameters with the payloads they replace.

  python -m benchmarks.patches                a run of 12 rounds, minutes
  python -m benchmarks.patches --rounds=4     shorter

A joiner goes from a checkpoint to the newest round by the payloads of the
rounds between, or by a patch: which bits of the parameters changed. This
emulates a run, keeps the parameters after every round, and compresses their
differences over 1, 2, 4 and 8 rounds in the ways below; the smallest counts.

  xor       the bits that differ, by planes of bytes, zlib
  integers  differences of the bits as integers, zigzag, by planes, zlib
  changed   a bit per parameter that changed, and the others' planes, zlib

A patch beats replaying where it has fewer bytes than the payloads.
"""

import argparse
import pathlib
import tempfile
import zlib
from unittest import mock

import jax
import numpy as np

from covenant import config as config_lib
from covenant.emulate import emulation
from covenant.train import shared_state as shared_state_lib

_CONFIG = 'configs/shakespeare.py:smoke'


def _planes(x: np.ndarray) -> int:
  """Returns the bytes of 32-bit integers, shuffled by byte and compressed."""
  planes = np.ascontiguousarray(x.view(np.uint8).reshape(-1, 4).T)
  return len(zlib.compress(planes.tobytes(), 9))


def patch_bytes(before: np.ndarray, after: np.ndarray) -> dict[str, int]:
  """Returns the bytes of a patch between float32 arrays, by its form."""
  a, b = before.view(np.uint32), after.view(np.uint32)
  difference = (b.astype(np.int64) - a.astype(np.int64)).astype(np.int32)
  zigzag = ((difference << 1) ^ (difference >> 31)).view(np.uint32)
  changed = a != b
  bits = len(zlib.compress(np.packbits(changed).tobytes(), 9))
  return {
    'xor': _planes(a ^ b),
    'integers': _planes(zigzag),
    'changed': bits + _planes(zigzag[changed]),
  }


def play(rounds: int) -> tuple[list[np.ndarray], list[int]]:
  """Returns the parameters after each round, and the bytes of its payloads."""
  config = config_lib.load(_CONFIG, [f'rounds={rounds}', 'eval.every=1000'])
  states: list[np.ndarray] = []
  sizes: list[int] = []
  real = shared_state_lib.SharedModel.apply_round

  def apply_round(self, shared, messages, *args, **kwargs):
    after = real(self, shared, messages, *args, **kwargs)
    if messages and len(sizes) < rounds:
      leaves = jax.tree.leaves(jax.device_get(after[0].params))
      states.append(np.concatenate([x.reshape(-1) for x in leaves]))
      sizes.append(len(messages) * self.spec.payload_bytes)
    return after

  with (
    tempfile.TemporaryDirectory() as folder,
    mock.patch.object(shared_state_lib.SharedModel, 'apply_round', apply_round),
  ):
    emulation.run(config, pathlib.Path(folder, 'run'))
  return states, sizes


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--rounds', type=int, default=12)
  states, sizes = play(parser.parse_args().rounds)
  count = states[0].size
  print(f'{_CONFIG}: {count:,} parameters, bytes per parameter; all of it is 4')
  for window in (1, 2, 4, 8):
    starts = range(len(states) - window)
    if not starts:
      break
    patches = [patch_bytes(states[i], states[i + window]) for i in starts]
    best = {k: np.mean([p[k] for p in patches]) / count for k in patches[0]}
    changed = [np.mean(states[i] != states[i + window]) for i in starts]
    payloads = [sum(sizes[i + 1 : i + 1 + window]) for i in starts]
    print(
      f'  {window} rounds: payloads {np.mean(payloads) / count:.2f}, patch '
      f'{min(best.values()):.2f} ('
      + ', '.join(f'{k} {x:.2f}' for k, x in best.items())
      + f'), {np.mean(changed):.0%} changed'
    )


if __name__ == '__main__':
  main()
