"""Measures tokens per second of the inner step and the use of the device.

  python -m benchmarks.train_step                        150m, 512m and 1b
  python -m benchmarks.train_step --models=150m --tokens=512
  python -m benchmarks.train_step --models=72b:smoke     a quick look
  python -m benchmarks.train_step --start-up             the first step, twice

It takes turns in one process with a plain step of the same model: a decoder
written here in `jax.numpy`, `optax.adamw`, one `jax.jit`. The target is at
least 0.97 of the plain step. FLOPs are those of the model
(covenant/plan/timing.py) without recomputation. The peak is that of the data
sheet for a known device, and for any other the measured rate of a product of
two large matrices.

A GPU trains on the sequences of the config. Other devices train on sequences
cut to `--tokens`, two per batch, or a step would take minutes. A model that
does not fit is reported and skipped.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from covenant import config as config_lib
from covenant.models import llama
from covenant.optim import algorithm as algorithm_lib
from covenant.plan import hardware
from covenant.plan import timing
from covenant.telemetry import machine
from covenant.train import step as step_lib

_BYTES = 28  # a parameter: itself, two moments, gradient, update, two copies


def plain_step(config: config_lib.Config) -> tuple[Callable[..., Any], Any]:
  """Returns a plain jitted step and its optimizer."""
  m, inner = config.model, config.optim.inner
  K = m.width // m.heads
  dtype = jnp.dtype(m.compute_dtype)
  tx = optax.chain(
    optax.clip_by_global_norm(inner.clip_norm),
    optax.adamw(
      inner.learning_rate, inner.b1, inner.b2, weight_decay=inner.weight_decay
    ),
  )

  def norm(x, gain):
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + m.norm_eps)
    return (wide * scale * gain).astype(dtype)

  def rotate(x):
    angles = jnp.outer(
      jnp.arange(x.shape[1]),
      m.rope_theta ** (-jnp.arange(K // 2, dtype=jnp.float32) / (K // 2)),
    )[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return y.astype(dtype)

  def layer(x, p):
    B, L, D = x.shape
    w = jax.tree.map(lambda v: v.astype(dtype), p)
    y, a = norm(x, p['attention_norm']['gain']), w['attention']
    q = rotate((y @ a['query']).reshape(B, L, m.heads, K))
    k = rotate((y @ a['key']).reshape(B, L, m.kv_heads, K))
    v = (y @ a['value']).reshape(B, L, m.kv_heads, K)
    fused = 'cudnn' if m.attention == 'cudnn' else 'xla'
    y = jax.nn.dot_product_attention(
      q, k, v, is_causal=True, implementation=fused
    )
    x = x + y.reshape(B, L, D) @ a['output']
    y, f = norm(x, p['ffn_norm']['gain']), w['ffn']
    x = x + (jax.nn.silu(y @ f['gate']) * (y @ f['up'])) @ f['down']
    return x, None

  def loss(params, tokens):
    x = params['embedding'][tokens[:, :-1]].astype(dtype)
    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params['layers'])
    x = norm(x, params['final_norm']['gain'])
    table = params['embedding'].T if m.tie_embeddings else params['unembedding']
    logits = jnp.matmul(
      x, table.astype(dtype), preferred_element_type=jnp.float32
    )
    each = optax.softmax_cross_entropy_with_integer_labels(
      logits, tokens[:, 1:]
    )
    return each.mean()

  def step(params, state, tokens):
    value, grads = jax.value_and_grad(loss)(params, tokens)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  return jax.jit(step, donate_argnums=(0, 1)), tx


def our_step(config: config_lib.Config) -> tuple[Callable[..., Any], Any]:
  """Returns the step of a miner (covenant/train/step.py), like `plain_step`."""
  method = algorithm_lib.make(config)
  step = step_lib.inner_step(config)
  number, joined = np.int32(1), np.int32(0)
  return lambda p, s, t: step(p, s, t, number, joined), method.inner


class Timed:
  """Steps of one kind on one batch; the first call makes their state."""

  def __init__(
    self, make: Callable[..., Any], config: config_lib.Config, batch: Any
  ):
    self._step, self._tx = make(config)
    self._init = jax.jit(functools.partial(llama.init, config.model))
    self._batch = batch
    self._state: tuple[Any, ...] = ()

  def seconds(self, steps: int) -> float:
    """Returns the seconds per step over some steps."""
    if not self._state:
      params = self._init(jax.random.key(0))
      self._state = params, jax.jit(self._tx.init)(params)
      self._run(1)
    began = time.perf_counter()
    self._run(steps)
    return (time.perf_counter() - began) / steps

  def free(self) -> None:
    self._state = ()

  def _run(self, steps: int) -> None:
    value = None
    for _ in range(steps):
      *state, value = self._step(*self._state, self._batch)
      self._state = tuple(state)
    jax.block_until_ready(value)


def peak() -> tuple[float, str]:
  """Returns FLOP/s of the first device in bfloat16, and the source."""
  device = jax.devices()[0]
  for name, known in hardware.DEVICES.items():
    if device.platform == 'gpu' and name in device.device_kind:
      return known.peak, known.source
  n = 2048
  a = jnp.ones((n, n), jnp.float32)
  product = jax.jit(jnp.matmul)
  jax.block_until_ready(product(a, a))
  seconds = []
  for _ in range(10):
    began = time.perf_counter()
    jax.block_until_ready(product(a, a))
    seconds.append(time.perf_counter() - began)
  seconds = min(seconds)
  return 2 * n**3 / seconds, f'a product of two {n} x {n} float32 matrices'


def make_config(name: str, tokens: int) -> config_lib.Config:
  file, _, variant = name.partition(':')
  config = config_lib.load(f'configs/{file}.py:{variant}')
  gpu = jax.devices()[0].platform == 'gpu'
  model = dataclasses.replace(
    config.model,
    compute_dtype='bfloat16' if gpu else 'float32',
    attention='cudnn' if gpu else 'portable',
  )
  inner = config.optim.inner
  size = (inner.microbatch_size or inner.batch_size) if gpu else 2
  return dataclasses.replace(
    config,
    model=model,
    data=dataclasses.replace(
      config.data, context=config.data.context if gpu else tokens
    ),
    optim=dataclasses.replace(
      config.optim,
      inner=dataclasses.replace(inner, batch_size=size, microbatch_size=0),
    ),
  )


def memory() -> float:
  stats = jax.devices()[0].memory_stats()
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit']
  return machine.memory_bytes()


def measure(
  name: str, tokens: int, steps: int, turns: int, limit: float
) -> str:
  config = make_config(name, tokens)
  num_params = llama.num_params(config.model)
  if num_params * _BYTES > memory():
    return f'{name} | {num_params:,} | does not fit this memory | | | | '
  shape = (config.optim.inner.batch_size, config.data.context + 1)
  batch = np.random.default_rng(0).integers(
    0, config.model.vocab_size, shape, dtype=np.int32
  )
  trained = shape[0] * config.data.context
  seconds: dict[str, list[float]] = {'ours': [], 'plain': []}
  kinds = {
    'ours': Timed(our_step, config, batch),
    'plain': Timed(plain_step, config, batch),
  }
  room_for_both = 2 * num_params * _BYTES < memory()
  for _ in range(turns):
    for kind, timed in kinds.items():
      seconds[kind].append(timed.seconds(steps))
      if not room_for_both:
        timed.free()
  ratios = [
    p / o for p, o in zip(seconds['plain'], seconds['ours'], strict=True)
  ]
  best = statistics.median(seconds['ours'])
  flops = timing.flops(config).total
  return (
    f'{name} | {num_params:,} | {shape[0]} x {config.data.context} | '
    f'{trained / best:,.0f} | {flops / best / 1e12:.3g} | '
    f'{flops / best / limit:.1%} | {statistics.median(ratios):.3f} '
    f'({min(ratios):.3f} to {max(ratios):.3f})'
  )


def start_up() -> None:
  """Prints the seconds of a run of one round, without a cache and with it."""
  command = [sys.executable, 'run.py', '--config=configs/tiny.py']
  command += ['--config.rounds=1']
  with tempfile.TemporaryDirectory() as folder:
    environment = os.environ | {'XDG_CACHE_HOME': folder}
    for i, what in enumerate(('without a cache', 'with what that compiled')):
      began = time.perf_counter()
      subprocess.run(
        [*command, f'--workdir={folder}/{i}'],
        env=environment,
        check=True,
        capture_output=True,
      )
      print(f'{what}: {time.perf_counter() - began:.1f} s')


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--models', default='150m,512m,1b')
  parser.add_argument('--tokens', type=int, default=128)
  parser.add_argument('--steps', type=int, default=3)
  parser.add_argument('--turns', type=int, default=5)
  parser.add_argument('--start-up', action='store_true')
  arguments = parser.parse_args()
  if arguments.start_up:
    start_up()
    return
  limit, source = peak()
  device = jax.devices()[0]
  print(f'{device.device_kind}, peak {limit / 1e12:.3g} TFLOP/s: {source}')
  print(
    'model | parameters | sequences | tokens/s | TFLOP/s | of the peak | '
    'plain seconds / ours'
  )
  for name in arguments.models.split(','):
    print(
      measure(name, arguments.tokens, arguments.steps, arguments.turns, limit),
      flush=True,
    )


if __name__ == '__main__':
  main()
