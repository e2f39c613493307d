"""Compilation of a node's programs for devices that are not present.

A subprocess compiles them for a mesh of virtual CPU devices, because the number
of devices must be set before JAX starts. The size of arguments is the same on
every backend; temporary memory is not, and is reported only by the TPU compiler
(`plan.tpu_topology`, extra 'plan-tpu'), which needs no TPU.
"""

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import topologies

from covenant import config as config_lib
from covenant import typing as ct
from covenant.models import evaluation
from covenant.models import llama
from covenant.models import sharding
from covenant.optim import algorithm as algorithm_lib
from covenant.optim import compressor as compressor_lib
from covenant.optim import outer_step as outer_step_lib
from covenant.optim import trial_step
from covenant.plan import table
from covenant.train import step as step_lib

# Programs for the largest leaf, or for all leaves of a small model.
_SENDING = ('compress', 'subtract sent')
_RECEIVING = ('add a message', 'outer step')
_TRYING = ('try a message', 'take it back')
_CONFIG_ERROR = 3  # exit status of the subprocess
_COLLECTIVE = re.compile(
  r'= (.*?) (all-gather|all-reduce|all-to-all|collective-permute'
  r'|reduce-scatter|collective-broadcast)(?:-start)?\('
)


def lower(
  config: config_lib.Config, mesh: jax.sharding.Mesh | None
) -> Iterator[tuple[str, jax.stages.Lowered]]:
  """Yields the name and the lowered form of each program of a round.

  Args:
    config: the config of the run.
    mesh: the mesh of one miner; None is one device.

  Raises:
    ConfigError: the mesh cannot shard the model or the batch.
  """
  method = algorithm_lib.make(config)
  if method.inner is not None:
    step = step_lib.inner_step(config, mesh)
    yield 'inner step', step.lower(*step_lib.arguments(config, mesh))
  like = llama.abstract(config.model)
  specs = None if mesh is None else sharding.specs(like, mesh)
  compressor = compressor_lib.Compressor(
    like, method.compression, method.error_decay, mesh, specs
  )
  sending = compressor.lower(of_gradients=method.inner is None)
  yield from zip(_SENDING, sending, strict=False)
  outer_step = outer_step_lib.OuterStep(
    like,
    method.compression,
    method.outer,
    method.mean_over,
    method.clip,
    mesh,
    specs,
  )
  yield from zip(_RECEIVING, outer_step.lower(), strict=True)
  if config.optim.method in ('sparseloco', 'diloco'):
    yield from _scoring(config, method, mesh)


def _scoring(
  config: config_lib.Config,
  method: algorithm_lib.Algorithm,
  mesh: jax.sharding.Mesh | None,
) -> Iterator[tuple[str, jax.stages.Lowered]]:
  """Yields the programs with which a validator scores a message."""
  like = llama.abstract(config.model)
  losses = evaluation.SequenceLosses(config, mesh)
  rows = -(-config.gauntlet.sequences // losses.devices) * losses.devices
  shape = rows, config.data.context + 1
  specs, placed = None, {}
  if mesh is not None:
    specs = sharding.specs(like, mesh)
    where = sharding.shardings(like, mesh)
    like = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      like,
      where,
    )
    placed['sharding'] = jax.NamedSharding(mesh, sharding.batch_spec(mesh))
  tokens_NxL1 = jax.ShapeDtypeStruct(shape, np.int32, **placed)
  yield 'losses of sequences', losses.program.lower(like, tokens_NxL1)
  rate = config.gauntlet.step_fraction * config.optim.outer.learning_rate
  trial = trial_step.TrialStep(like, method.compression, rate, mesh, specs)
  yield from zip(_TRYING, trial.lower(), strict=True)


def collectives(text: str) -> dict[str, tuple[int, int]]:
  """Counts the collectives in compiled HLO, by kind.

  A collective inside a loop counts once.

  Returns:
    For each kind, the number of operations and the elements of the largest.

  >>> collectives('%x = (f32[4,2], f32[3]) all-gather(...)')
  {'all-gather': (1, 8)}
  """
  found: dict[str, tuple[int, int]] = {}
  for match in _COLLECTIVE.finditer(text):
    shapes = re.findall(r'\w+\[([\d,]*)\]', match[1])
    sizes = [math.prod(int(n) for n in s.split(',') if n) for s in shapes]
    count, most = found.get(match[2], (0, 0))
    found[match[2]] = count + 1, max(most, *sizes)
  return found


def measure(config: config_lib.Config) -> list[table.Program]:
  """Lowers and compiles every program of a round in a subprocess.

  Args:
    config: the config of the plan, with `devices.data` above 0.

  Raises:
    ConfigError: the mesh cannot shard the model, or the compiler is missing.
  """
  topology = config.plan.tpu_topology
  if topology and importlib.util.find_spec('libtpu') is None:
    raise config_lib.ConfigError(
      'plan.tpu_topology: needs the compiler of TPUs, which is not installed: '
      "pip install 'covenant[plan-tpu]'"
    )
  child = subprocess.run(
    [sys.executable, '-m', __name__],
    input=config_lib.to_json(config),
    env=os.environ | _environment(bool(topology)),
    capture_output=True,
    text=True,
    check=False,
  )
  if child.returncode == _CONFIG_ERROR:
    raise config_lib.ConfigError(child.stdout.splitlines()[-1])
  if child.returncode:
    raise RuntimeError(f'compiling the plan failed:\n{child.stderr}')
  return [_read(line) for line in child.stdout.splitlines()]


def _read(line: str) -> table.Program:
  """Parses a program that the subprocess printed as JSON."""
  raw: dict[str, ct.Json] = json.loads(line)
  moved = raw.pop('collectives')
  pairs = {kind: (count, most) for kind, (count, most) in moved.items()}
  return table.Program(collectives=pairs, **raw)


def _environment(tpu: bool) -> dict[str, str]:
  """Returns the subprocess's environment; libtpu must not look for a TPU."""
  path = os.pathsep.join(filter(None, sys.path))
  environment = {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': path}
  if tpu:
    environment |= {
      'TPU_SKIP_MDS_QUERY': '1',
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
      'TPU_LOG_DIR': 'disabled',
    }
  return environment


def _child() -> Iterator[table.Program]:
  config = config_lib.from_json(sys.stdin.read())
  # cuDNN kernels exist on GPUs only; all other operations are the same.
  model = dataclasses.replace(config.model, attention='portable')
  config = dataclasses.replace(config, model=model)
  devices = config.devices
  count = devices.data * devices.fsdp * devices.tensor
  jax.config.update('jax_num_cpu_devices', count)
  mesh = sharding.mesh(devices, jax.devices())
  yield from _measured(config, mesh, 'cpu' if config.plan.compile else '')
  if config.plan.tpu_topology:
    yield from _measured(config, _tpu_mesh(config), 'tpu')


def _tpu_mesh(config: config_lib.Config) -> jax.sharding.Mesh:
  name, devices = config.plan.tpu_topology, config.devices
  shape = devices.data, devices.fsdp, devices.tensor
  try:
    topology = topologies.get_topology_desc(platform='tpu', topology_name=name)
  except Exception as e:  # libtpu raises many types for unknown names
    text = str(e).splitlines()[0]
    raise config_lib.ConfigError(f'plan.tpu_topology: {name!r}: {text}') from e
  chips = topology.devices
  if len(chips) != math.prod(shape):
    raise config_lib.ConfigError(
      f'plan.tpu_topology: {name!r} has {len(chips)} devices, and the mesh '
      f'devices.data * devices.fsdp * devices.tensor = {math.prod(shape)}'
    )
  kinds = (jax.sharding.AxisType.Explicit,) * len(shape)
  grid = np.array(chips).reshape(shape)
  return jax.sharding.Mesh(grid, sharding.MESH_AXES, kinds)


def _measured(
  config: config_lib.Config, mesh: jax.sharding.Mesh, platform: str
) -> Iterator[table.Program]:
  """Yields every program, compiled if a platform is given."""
  start = time.monotonic()
  several = mesh if mesh.size > 1 else None  # as nodes do
  for name, lowered in lower(config, several):
    program = table.Program(name, platform, time.monotonic() - start)
    if platform:
      program = _compiled(program, lowered)
    yield program
    start = time.monotonic()


def _compiled(
  program: table.Program, lowered: jax.stages.Lowered
) -> table.Program:
  start = time.monotonic()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    if program.platform != 'tpu':
      raise
    reason = str(e).splitlines()[0]
    seconds = time.monotonic() - start
    return program._replace(compile_seconds=seconds, error=reason)
  program = program._replace(compile_seconds=time.monotonic() - start)
  sizes = compiled.memory_analysis()
  assert sizes is not None
  program = program._replace(argument_bytes=sizes.argument_size_in_bytes)
  if program.platform == 'tpu':  # JAX may be unable to read its text
    return program._replace(temporary_bytes=sizes.temp_size_in_bytes)
  return program._replace(collectives=collectives(compiled.as_text() or ''))


def main() -> None:
  try:
    for program in _child():
      print(json.dumps(program._asdict()), flush=True)
  except config_lib.ConfigError as e:
    print(e)
    sys.exit(_CONFIG_ERROR)


if __name__ == '__main__':
  main()
