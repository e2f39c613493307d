"""Methods that no node runs, against SparseLoCo: a loop over peers in one jit.

  python -m experiments.transformations             about 20 core minutes
  python -m experiments.transformations --quick     some minutes

SPARTA and Streaming DiLoCo exchange inside a round and leave peers with unequal
parameters, so they are optax transformations only. Here they, DeMo and
SparseLoCo train the same model on the same data in one plain loop, with peers
along an axis of `jax.vmap`. The held-out loss is that of the mean of all peers'
parameters, which is any peer's own where a method ends a round with equal ones.

Every method sees the same tokens (experiments/study.py). DeMo and SPARTA have
five learning rates, swept with seed 0; Streaming DiLoCo has three inner and
three outer ones, with Nesterov momentum 0.9; SparseLoCo has those of
experiments/methods.py. DeMo sends 32 of 4096 coefficients, SPARTA 0.5 % of the
parameters, each in every step; Streaming DiLoCo sends five fragments, each
every 15 steps, applied two steps late and mixed half and half.

Bytes are those of whole payloads with headers and signatures, and with float32
values for methods that send dense values. SPARTA needs no indices, because all
peers draw the same ones. Each peer fetches all other peers' payloads, as nodes
do; an all-reduce of dense values would fetch less.

Criterion, written before the runs; n = 3 seeds, compared seed by seed:
SparseLoCo's final held-out loss minus the other's is at most 0; two standard
errors decide.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from covenant import config as config_lib
from covenant import metrics
from covenant.data import dataset
from covenant.data import tokens as tokens_lib
from covenant.models import llama
from covenant.models import loss as loss_lib
from covenant.node import evaluator as evaluator_lib
from covenant.optim import algorithm as algorithm_lib
from covenant.optim import compression as compression_lib
from covenant.optim import diloco
from covenant.optim import inner as inner_lib
from covenant.optim import sparseloco
from covenant.optim.baselines import demo
from covenant.optim.baselines import sparta
from covenant.train import local
from covenant.wire import payload
from experiments import charts
from experiments import runner
from experiments import study

AXIS = 'peers'
Sent = Callable[[int], int]  # inner steps so far -> bytes sent by a peer


def train(
  tx: optax.GradientTransformation,
  config: config_lib.Config,
  sent: Sent = lambda step: 0,
) -> list[metrics.Evaluation]:
  """Trains `config.miners` peers side by side; returns held-out losses.

  Args:
    tx: a transformation that exchanges along the axis `AXIS`. Its state is per
      peer, but for scalar counts of steps, which are equal on all peers.
    config: the model, the data, the numbers of steps, and the evaluation; all
      else of `config.optim` is ignored.
    sent: the bytes to report in the evaluations.
  """
  data = dataset.load(config)
  evaluator = evaluator_lib.Evaluator(config, data)
  params = jax.jit(lambda key: llama.init(config.model, key))(
    jax.random.key(config.seed)
  )
  state = tx.init(params)
  # With mapped counts, each `lax.cond` on them would compute both branches.
  axes = jax.tree.map(lambda x: None if _is_count(x) else 0, state)

  def everywhere(x: jax.Array) -> jax.Array:
    if _is_count(x):
      return x
    return jnp.broadcast_to(x, (config.miners, *x.shape)).copy()

  def step(params: Any, state: Any, tokens_BxL1: jax.Array) -> tuple[Any, Any]:
    _, grads = loss_lib.next_token_gradient(config.model, params, tokens_BxL1)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  step = jax.jit(
    jax.vmap(step, in_axes=(0, axes, 0), out_axes=(0, axes), axis_name=AXIS),
    donate_argnums=(0, 1),
  )
  mean = jax.jit(lambda peers: jax.tree.map(lambda x: x.mean(0), peers))
  peers, state = jax.tree.map(everywhere, (params, state))
  steps, evaluations = config.optim.inner_steps, []
  for r in range(config.rounds + 1):
    if r % config.eval.every == 0 or r == config.rounds:
      found = evaluator.evaluate(mean(peers))
      evaluations.append(
        metrics.Evaluation(
          round=r,
          tokens=r * steps * _tokens(config),
          bytes_up=config.miners * sent(r * steps),
          loss=found.nats_per_token,
          nats_per_byte=found.nats_per_byte,
          bits_per_byte=found.nats_per_byte / np.log(2),
          sequences=found.sequences,
          seconds=0.0,
        )
      )
    for tokens_RxBxL1 in _batches(config, data, r) if r < config.rounds else ():
      peers, state = step(peers, state, tokens_RxBxL1)
  return evaluations


def _is_count(x: jax.Array) -> bool:
  return x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer)


def _tokens(config: config_lib.Config) -> int:
  """The number of tokens of all peers in one inner step."""
  batch = config.optim.inner.batch_size
  return config.miners * batch * config.data.context


def _batches(
  config: config_lib.Config, data: tokens_lib.TokenData, round_index: int
) -> Iterator[np.ndarray]:
  """Yields the tokens of every inner step of a round: int32 [R, B, L + 1]."""
  tasks = [
    local.Task(uid, round_index, config.seed, b'')
    for uid in range(config.miners)
  ]
  ids_RxHxB = np.stack([local.batch_ids(config, t, data.train) for t in tasks])
  ids_HxN = np.moveaxis(ids_RxHxB, 1, 0).reshape(config.optim.inner_steps, -1)
  for tokens_NxL1 in tokens_lib.prefetch(
    data.train, ids_HxN, config.data.context
  ):
    yield tokens_NxL1.reshape(config.miners, -1, tokens_NxL1.shape[1])


def inner(config: config_lib.Config) -> optax.GradientTransformation:
  """Returns the inner optimizer with its learning rate schedule."""
  optim = config.optim
  total = config.rounds * optim.inner_steps
  schedule = inner_lib.schedule(optim.inner, total_steps=total)
  return optax.chain(
    inner_lib.make(optim.inner), optax.scale_by_schedule(schedule)
  )


def dense_bytes(values: int) -> int:
  """Bytes of a payload of float32 values in an order that all know."""
  one = jax.ShapeDtypeStruct((values,), jnp.float32)
  spec = payload.make_spec({'values': one}, compression_lib.Dense())
  return spec.payload_bytes


@dataclasses.dataclass(frozen=True)
class Configured:
  """The method that `optim.method` names, as a transformation."""

  def transformation(
    self, config: config_lib.Config
  ) -> optax.GradientTransformation:
    method, optim = algorithm_lib.make(config), config.optim
    if optim.method == 'ddp':
      mean = optax.stateless(lambda grads, _: jax.lax.pmean(grads, AXIS))
      return optax.chain(mean, inner(config))
    if optim.method == 'demo':
      decay = optim.compression.error_decay
      return demo.demo(
        method.schedule,
        compression=method.compression,
        error_decay=decay,
        axis_name=AXIS,
      )
    return sparseloco.sparseloco(
      inner(config),
      outer=method.outer,
      inner_steps=optim.inner_steps,
      compression=method.compression,
      error_decay=method.error_decay,
      axis_name=AXIS,
      mean_over=method.mean_over,
      clip=method.clip,
    )

  def sent(self, config: config_lib.Config) -> Sent:
    spec = payload.make_spec(
      llama.abstract(config.model),
      algorithm_lib.make(config).compression,
      config.optim.compression.codec,
    )
    return lambda step: step // config.optim.inner_steps * spec.payload_bytes

  def run(self, config: config_lib.Config) -> list[metrics.Evaluation]:
    return train(self.transformation(config), config, self.sent(config))


@dataclasses.dataclass(frozen=True)
class Sparta(Configured):
  """The inner optimizer, with a share of parameters averaged every step."""

  p: float = 0.005

  def transformation(
    self, config: config_lib.Config
  ) -> optax.GradientTransformation:
    return sparta.sparta(
      inner(config), p=self.p, axis_name=AXIS, seed=config.seed
    )

  def sent(self, config: config_lib.Config) -> Sent:
    leaves = jax.tree.leaves(llama.abstract(config.model))
    values = sum(max(1, round(self.p * x.size)) for x in leaves)
    return lambda step: step * dense_bytes(values)


@dataclasses.dataclass(frozen=True)
class Streaming(Configured):
  """DiLoCo in fragments that are applied `overlap` steps late."""

  fragments: int = 5
  overlap: int = 2
  mixing: float = 0.5

  def transformation(
    self, config: config_lib.Config
  ) -> optax.GradientTransformation:
    return diloco.streaming_diloco(
      inner(config),
      outer=algorithm_lib.make(config).outer,
      inner_steps=config.optim.inner_steps,
      fragments=self.fragments,
      overlap=self.overlap,
      mixing=self.mixing,
      axis_name=AXIS,
    )

  def sent(self, config: config_lib.Config) -> Sent:
    parts = diloco.split(llama.abstract(config.model), self.fragments)
    sizes = [
      dense_bytes(sum(x.size for x in jax.tree.leaves(part))) for part in parts
    ]
    steps = config.optim.inner_steps

    def times(step: int, p: int) -> int:
      """The number of times that fragment p was sent; 0 at step 0."""
      offset = p * steps // self.fragments
      return (step - offset) // steps + (offset > 0)

    return lambda step: sum(
      times(step, p) * size for p, size in enumerate(sizes)
    )


INNER = (3e-3, 6e-3, 1.2e-2)
DEMO = (
  'optim.method=demo',
  'optim.inner_steps=1',
  'rounds=1500',
  'eval.every=150',
  'optim.compression.kind=dct',
  'optim.compression.k=32',
  'optim.compression.quantizer=none',
  'optim.compression.error_decay=0.999',
)
# Name -> program, overrides, inner and outer learning rates.
METHODS: dict[str, tuple[Configured, tuple[str, ...], Any, Any]] = {
  'DeMo': (Configured(), DEMO, (4e-4, 8e-4, 1.5e-3, 3e-3, 6e-3), (None,)),
  'SPARTA': (Sparta(), (), (1.5e-3, *INNER, 2.4e-2), (None,)),
  'Streaming DiLoCo': (
    Streaming(),
    ('optim.outer.momentum=0.9',),
    INNER,
    study.OUTER,
  ),
}


def sweep(method: str) -> Iterator[study.Cell]:
  """Yields the cells of a method at all its rates, with seed 0."""
  program, sets, inners, outers = METHODS[method]
  for rate in inners:
    for outer in outers:
      own = (*sets, f'optim.inner.learning_rate={rate:g}')
      name = f'{method}, {rate:g}'
      if outer is not None:
        own = (*own, f'optim.outer.learning_rate={outer:g}')
        name += f' and {outer:g}'
      yield study.Cell(name, 0, own, program)


def plan(runs: Sequence[study.Run], seeds: int) -> Iterator[study.Cell]:
  done = {run.cell for run in runs}
  for seed in range(seeds):
    yield study.Cell('SparseLoCo', seed, (), Configured())
  for method in METHODS:
    cells = {cell.name: cell for cell in sweep(method)}
    yield from cells.values()
    if cells.keys() <= done:
      best = cells[study.best(runs, cells)]
      for seed in range(seeds):
        yield best._replace(name=method, seed=seed)


def judge(
  runs: Sequence[study.Run], results: pathlib.Path
) -> Iterator[study.Verdict]:
  del results
  bytes_up = {run.cell: run.bytes_up for run in runs}
  for method in METHODS:
    gap = study.gap(runs, 'SparseLoCo', method)
    ratio = bytes_up[method] / bytes_up['SparseLoCo']
    yield study.Verdict(
      f'C8, {method}',
      f'SparseLoCo is at least as good as {method}, which sends more',
      'SparseLoCo, tables' if method == 'DeMo' else 'ours',
      'loss minus the other’s at most 0',
      f'{gap}; the other sends {ratio:.0f} times the bytes',
      study.at_most(gap),
      ('SparseLoCo', method),
    )


def draw(runs: Sequence[study.Run], path: pathlib.Path) -> None:
  """Draws all methods of the README: these, and those that nodes run."""
  cells = ['SparseLoCo', *METHODS]
  if path.parent == study.RESULTS:
    runs = [run for run in runs if run.cell in METHODS]
    for name, found in (
      ('methods', ['SparseLoCo', 'DiLoCo', 'AdamW']),
      ('muon', ['Muon inside']),
    ):
      nodes = study.read_csv(study.RESULTS / f'{name}.csv', study.Run)
      runs += [run for run in nodes if run.cell in found]
    cells = [
      'AdamW', 'DeMo', 'Muon inside', 'SparseLoCo', 'DiLoCo',
      'Streaming DiLoCo', 'SPARTA',
    ]  # fmt: skip
  charts.curves(
    runs, cells, path, names={'Muon inside': 'SparseLoCo, inner Muon'}
  )


STUDY = study.Study('transformations', plan, judge, draw)

if __name__ == '__main__':
  runner.main(STUDY, __doc__)
