"""Measures an exchange of `sparseloco`: compilation, collectives, bytes, speed.

  python -m benchmarks.exchange                  144 leaves, 16 peers, and Adam
  python -m benchmarks.exchange --speed          CPU ms per exchange, 4 peers
  python -m benchmarks.exchange --speed --root=X in turns with the checkout X
  python -m benchmarks.exchange --vmap           ms per step under vmap, by H

Tracing, lowering and compiling a step is measured in a process of its own, in
turns with plain Adam, by the clock and in CPU time, which counts less of what
others do on a shared machine; a step of all peers in CPU time. Peers are CPU
devices of one process, which share its cores.
"""

import argparse
import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import optax

from covenant.optim import sparseloco

_TARGET = 4.0
_COLLECTIVE = re.compile(
  r'= (\w+)\[([\d,]*)\]\S* '
  r'(all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\('
)


def layers(count: int, width: int) -> dict[str, jax.Array]:
  """Returns the parameters of `count` layers of 12 leaves."""
  shapes = {
    **{name: (width, width) for name in 'qkvo'},
    'up': (width, 4 * width),
    'down': (4 * width, width),
    'up_bias': (4 * width,),
    **{f'vector{i}': (width,) for i in range(5)},
  }
  return {
    f'{i}/{name}': jnp.zeros(shape)
    for i in range(count)
    for name, shape in shapes.items()
  }


def program(kind: str, peers: int, params: dict[str, jax.Array], steps: int):
  """Returns a jitted training step and its arguments, on a mesh of peers."""
  tx = optax.adamw(1e-3)
  if kind == 'sparseloco':
    tx = sparseloco.sparseloco(tx, inner_steps=steps, axis_name='peers')
  mesh = jax.make_mesh((peers,), ('peers',), (jax.sharding.AxisType.Auto,))

  def on_peers(f):
    def one(*arrays):
      mine = jax.tree.map(lambda x: x[0], arrays)
      return jax.tree.map(lambda x: x[None], f(*mine))

    spec = jax.P('peers')
    return jax.jit(jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec))

  def step(params, state):
    grads = jax.tree.map(lambda x: x - 1, params)
    if kind == 'adam':
      grads = jax.lax.pmean(grads, 'peers')
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  stacked = jax.tree.map(lambda x: jnp.stack([x] * peers), params)
  return on_peers(step), (stacked, on_peers(tx.init)(stacked))


def compiled(kind: str, peers: int) -> dict[str, float]:
  """Returns seconds, and the collectives of the compiled step."""
  params = layers(12, 64)
  step, arguments = program(kind, peers, params, 10)
  start, began = time.process_time(), time.perf_counter()
  made = step.lower(*arguments).compile()
  spent, seconds = time.process_time() - start, time.perf_counter() - began
  text = made.as_text()
  found = _COLLECTIVE.findall(text or '')
  sizes = {'f32': 4, 'u32': 4, 's32': 4, 'u16': 2, 'bf16': 2, 'u8': 1}
  moved = sum(
    sizes.get(kind, 4) * math.prod(int(n) for n in dims.split(',') if n)
    for kind, dims, name in found
    if name == 'all-gather'
  )
  return {
    'seconds': seconds,
    'cpu_seconds': spent,
    'collectives': len(found),
    'bytes': moved / peers,
    'dense': 4 * sum(x.size for x in params.values()),
  }


def speed(peers: int) -> dict[str, float]:
  """Returns CPU milliseconds of a step that exchanges, the least of ten."""
  step, (params, state) = program('sparseloco', peers, layers(2, 512), 1)
  times = []
  for _ in range(11):
    start = time.process_time()
    params, state = jax.block_until_ready(step(params, state))
    times.append(time.process_time() - start)
  return {'ms': 1e3 * min(times[1:])}


def vmapped(peers: int) -> dict[str, float]:
  """Returns milliseconds per step under `jax.vmap`, for H = 1, 10 and 100."""
  params = layers(2, 256)
  stacked = jax.tree.map(lambda x: jnp.stack([x] * peers), params)
  result = {}
  for inner_steps in 1, 10, 100:
    tx = sparseloco.sparseloco(
      optax.adamw(1e-3), inner_steps=inner_steps, axis_name='peers'
    )
    axes = sparseloco.state_axes(jax.eval_shape(tx.init, params), None, 0)

    def step(params, state, tx=tx):
      grads = jax.tree.map(lambda x: x - 1, params)
      updates, state = tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    init = jax.vmap(
      lambda tx=tx: tx.init(params),
      axis_name='peers', axis_size=peers, out_axes=axes,
    )  # fmt: skip
    train = jax.jit(
      jax.vmap(step, axis_name='peers', in_axes=(0, axes), out_axes=(0, axes))
    )
    carry = jax.block_until_ready(train(stacked, init()))
    start = time.perf_counter()
    for _ in range(100):
      carry = train(*carry)
    jax.block_until_ready(carry)
    result[f'H={inner_steps}'] = 10 * (time.perf_counter() - start)
  return result


def child(root: str, task: str, kind: str, peers: int) -> dict[str, float]:
  """Returns what a process of its own measures, with the package of `root`."""
  environment = {**os.environ, 'PYTHONPATH': root, 'JAX_PLATFORMS': 'cpu'}
  # Not from the folder of this file, whose tokenize.py is not Python's.
  command = [sys.executable, '-P', __file__, f'--task={task}', f'--kind={kind}']
  result = subprocess.run(
    [*command, f'--peers={peers}'],
    env=environment, capture_output=True, text=True, check=True,
  )  # fmt: skip
  return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
  here = str(pathlib.Path(__file__).parents[1])
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--speed', action='store_true')
  parser.add_argument('--vmap', action='store_true')
  parser.add_argument('--root', default=here, help='another checkout')
  parser.add_argument('--turns', type=int, default=3)
  parser.add_argument('--peers', type=int)
  parser.add_argument('--task', help=argparse.SUPPRESS)
  parser.add_argument('--kind', default='sparseloco', help=argparse.SUPPRESS)
  args = parser.parse_args()
  peers = args.peers or (4 if args.speed or args.vmap else 16)
  if args.vmap:
    found = vmapped(peers).items()
    print('ms per step: ' + ', '.join(f'{h} {ms:.1f}' for h, ms in found))
    return
  if args.task:
    jax.config.update('jax_num_cpu_devices', peers)
    done = (
      compiled(args.kind, peers) if args.task == 'compile' else speed(peers)
    )
    print(json.dumps(done))
    return
  if args.speed:
    turns = [
      (child(here, 'speed', '', peers), child(args.root, 'speed', '', peers))
      for _ in range(args.turns)
    ]
    own, other = ([t[i]['ms'] for t in turns] for i in (0, 1))
    ratio = statistics.median(a / b for a, b in zip(own, other, strict=True))
    print(
      f'{min(own):.1f} ms here, {min(other):.1f} ms of {args.root}: {ratio:.2f}'
    )
    return
  turns = [
    (child(args.root, 'compile', 'sparseloco', peers),
     child(here, 'compile', 'adam', peers))
    for _ in range(args.turns)
  ]  # fmt: skip
  clock, cpu = (
    statistics.median(a[name] / b[name] for a, b in turns)
    for name in ('seconds', 'cpu_seconds')
  )
  first = turns[0][0]
  print(
    f'{first["seconds"]:.1f} s, {clock:.2f} times plain Adam (bar '
    f'{_TARGET:.0f}); {first["cpu_seconds"]:.1f} s of CPU, {cpu:.2f} times; '
    f'{first["collectives"]:.0f} collectives; '
    f'{first["bytes"]:.0f} bytes per peer, '
    f'{first["dense"] / first["bytes"]:.0f} times fewer than float32'
  )


if __name__ == '__main__':
  main()
