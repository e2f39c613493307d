"""Prints a fingerprint of each step of the same-bits scenario.

python -m experiments.same_bits                # as nodes compute it
python -m experiments.same_bits --reference    # by the NumPy specification
python -m experiments.same_bits --devices=8    # sharded over a mesh
python -m experiments.same_bits --budget=64    # in slices of 64 elements
python -m experiments.same_bits --no-jit       # operation by operation

The last line is the fingerprint of the last step alone. All machines, flags,
meshes and releases print the same lines (docs/protocol.md, "Exact arithmetic").
"""

import argparse
import contextlib
from collections.abc import Iterator

import jax

from covenant.protocol import same_bits


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  parser.add_argument('--reference', action='store_true')
  parser.add_argument('--devices', type=int, default=1)
  parser.add_argument('--budget', type=int, default=1 << 20)
  parser.add_argument('--no-jit', action='store_true')
  options = parser.parse_args(argv)
  if options.reference:
    from tests.protocol import same_bits_test

    steps = same_bits_test.by_reference()
  else:
    steps = _by_nodes(options)
  with jax.disable_jit() if options.no_jit else contextlib.nullcontext():
    last = ''
    for name, last in zip(same_bits.STEPS, steps, strict=True):
      print(f'{name:24} {last}', flush=True)
  print(last)


def _by_nodes(options: argparse.Namespace) -> Iterator[str]:
  mesh = specs = None
  if options.devices > 1:
    jax.config.update('jax_num_cpu_devices', options.devices)
    mesh, specs = same_bits.mesh(options.devices)
  for step in same_bits.run(mesh, specs, options.budget):
    yield same_bits.fingerprint(step)


if __name__ == '__main__':
  main()
