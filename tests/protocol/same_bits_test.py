import os
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.chain import keys
from covenant.optim import compression
from covenant.protocol import same_bits
from covenant.wire import payload
from tests import helpers
from tests import venvs
from tests.reference import protocol

TENSORS = [
  protocol.Tensor(s, same_bits.BLOCK, same_bits.K)
  for s in same_bits.SHAPES.values()
]


def by_reference():
  """Fingerprints of parameters and momentum after each step, by NumPy."""
  params = [
    protocol.initial(7, name, shape, 0.02).ravel()
    for name, shape in same_bits.SHAPES.items()
  ]
  traces = [np.zeros_like(x) for x in params]
  yield protocol.fingerprint(params + traces)
  key = keys.Key.from_seed(bytes(32))
  shapes = {
    n: jax.ShapeDtypeStruct(s, np.float32) for n, s in same_bits.SHAPES.items()
  }
  for r, (name, quantizer) in enumerate(same_bits.QUANTIZERS):
    spec = payload.make_spec(
      shapes, compression.TopK(same_bits.K, same_bits.BLOCK, quantizer)
    )
    header = payload.Header(bytes(16), r, 0, bytes(16), bytes(16), 1)
    data = [
      payload.encode(
        header, same_bits.message(r, p, quantizer), shapes, spec, key.sign
      )
      for p in range(same_bits.PEERS)
    ]
    protocol.outer_step(
      data, same_bits.WEIGHTS, params, traces, TENSORS, name,
      same_bits.RATE, same_bits.MOMENTUM,
    )  # fmt: skip
    yield protocol.fingerprint(params + traces)


class SameBitsTest(parameterized.TestCase):
  def test_nodes_equal_the_reference(self):
    steps = list(same_bits.run())
    self.assertEqual([step.name for step in steps], list(same_bits.STEPS))
    self.assertEqual(
      [same_bits.fingerprint(step) for step in steps], list(by_reference())
    )
    self.assertEqual(list(by_reference()), list(same_bits.EXPECTED))

  @pytest.mark.slow
  def test_a_wrong_step_is_named(self):
    wrong = (*same_bits.EXPECTED[:2], 'x', *same_bits.EXPECTED[3:])
    with mock.patch.object(same_bits, 'EXPECTED', wrong):
      self.assertEqual(same_bits.first_difference(), same_bits.STEPS[2])

  # Those after the first four ask for less of the same.
  @parameterized.parameters(
    '--xla_cpu_max_isa=SSE4_2',
    '--xla_backend_optimization_level=0',
    '--xla_cpu_enable_fast_math=true --xla_cpu_fast_math_honor_nans=false '
    '--xla_cpu_fast_math_honor_infs=false '
    '--xla_cpu_fast_math_honor_division=false',
    '--xla_cpu_enable_fast_min_max=true --xla_allow_excess_precision=true',
    '--xla_cpu_multi_thread_eigen=false',
    '--xla_cpu_max_isa=AVX2',
    '--xla_cpu_max_isa=AVX',
    '',
  )
  @pytest.mark.rows(0, 4)
  def test_under_flags_of_the_compiler(self, flags):
    self.assertEqual(self.program(flags=flags), same_bits.EXPECTED[-1])

  @parameterized.parameters(
    ('--devices=4', '--budget=64'),
    ('--no-jit',),
    ('--reference',),
  )
  @pytest.mark.slow
  def test_the_program_has_arguments(self, *arguments):
    self.assertEqual(self.program(*arguments), same_bits.EXPECTED[-1])

  @parameterized.parameters(
    dict(devices=2), dict(devices=4), dict(devices=8),
    dict(budget=64), dict(budget=1000),
  )  # fmt: skip
  @pytest.mark.slow
  def test_on_meshes_and_in_slices(self, devices=1, budget=1 << 20):
    mesh, specs = same_bits.mesh(devices) if devices > 1 else (None, None)
    steps = same_bits.run(mesh, specs, budget)
    self.assertEqual(
      tuple(map(same_bits.fingerprint, steps)), same_bits.EXPECTED
    )

  @parameterized.parameters('oldest', 'newest')
  @pytest.mark.install
  def test_with_other_releases_of_jax(self, which):
    python = str(venvs.jax_venv(which))
    self.assertEqual(self.program(python=python), same_bits.EXPECTED[-1])

  def program(self, *arguments, flags='', python=sys.executable):
    """The last line that the program prints in a process of its own."""
    # What another flag compiled must not be found again.
    cache = self.create_tempdir().full_path
    done = subprocess.run(
      [python, '-m', 'experiments.same_bits', *arguments],
      cwd=helpers.ROOT,
      env={
        **os.environ,
        'XLA_FLAGS': flags,
        'XDG_CACHE_HOME': cache,
        'JAX_NUM_CPU_DEVICES': '1',
      },
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    return done.stdout.splitlines()[-1]


if __name__ == '__main__':
  absltest.main()
