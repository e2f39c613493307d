"""Robust aggregation of the literature against ours, under four attacks.

  python -m experiments.byzantine             about 40 core minutes
  python -m experiments.byzantine --quick     some minutes

Two of eight peers attack, in the loop of experiments/transformations.py, with
SparseLoCo's compression and error feedback (experiments/study.py). A rule sees
the messages as dense deltas and nothing else: no evaluation, no history, nobody
is refused. The rules:

  mean              the mean over the peers that sent an element
  Krum              the message that is nearest to its neighbors
                    (Blanchard et al., NeurIPS 2017)
  trimmed mean      of each element without the two largest and the two smallest
                    (Yin et al., arXiv 1803.01498)
  geometric median  eight steps of Weiszfeld's algorithm (Pillutla et al.,
                    arXiv 1912.13445)
  ours              the norm of each tensor clipped to the median one, then the
                    mean over senders, as `reduce.aggregate` does

The attackers know all honest messages of the round, and send the same:

  flipped x 10      ten times the negative mean of the honest
  noise x 100       normal noise of a hundred times the usual norm
  little            the mean less one deviation, per element ("a little is
                    enough", arXiv 1902.06156)
  inner product     the negative mean (arXiv 1903.03936)

Each rule has the better of its outer learning rates without an attack. Krum,
the trimmed mean and the geometric median divide by all peers, not by the
senders of an element, and get larger ones.

The rule for undecided claims has taken all but one to seven seeds, the most.

Criterion, written before the runs: under every attack ours loses at most 2 %
against itself without one, and no other rule ends lower under any attack.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from matplotlib import figure

from covenant import config as config_lib
from covenant import metrics
from covenant import typing as ct
from covenant.optim import algorithm as algorithm_lib
from covenant.optim import sparseloco
from experiments import charts
from experiments import runner
from experiments import study
from experiments import transformations

PEERS, BAD = 8, 2
SEEDS = 1  # before any is added for claims that it leaves undecided
AXIS = transformations.AXIS
SETS = (f'miners={PEERS}', 'rounds=40', 'optim.inner.warmup_steps=50')
RATES = {
  'mean': (0.5, 1.0),
  'Krum': (1.0, 3.0),
  'trimmed mean': (1.0, 10.0),
  'geometric median': (1.0, 3.0),
  'ours': (0.5, 1.0),
}
NOBODY = 'no attack'
_TOP = 3.4  # losses above it are numbers at the figure's top
Deltas = jax.Array  # float32 [R, P], all messages of a round


def krum(deltas_RxP: Deltas, starts: Sequence[int]) -> jax.Array:
  """Returns the message with the least distance to its nearest neighbors."""
  del starts
  squares_R = jnp.sum(deltas_RxP**2, axis=1)
  distances_RxR = (
    squares_R[:, None] + squares_R[None] - 2 * deltas_RxP @ deltas_RxP.T
  )
  near_RxR = jnp.sort(distances_RxR, axis=1)[:, 1 : PEERS - BAD - 1]
  return deltas_RxP[jnp.argmin(jnp.sum(near_RxR, axis=1))]


def trimmed_mean(deltas_RxP: Deltas, starts: Sequence[int]) -> jax.Array:
  """Returns the mean of each element without its extremes."""
  del starts
  return jnp.sort(deltas_RxP, axis=0)[BAD:-BAD].mean(0)


def geometric_median(
  deltas_RxP: Deltas, starts: Sequence[int], steps: int = 8
) -> jax.Array:
  """Returns the point of least total distance to all messages."""
  del starts

  def step(_: int, center_P: jax.Array) -> jax.Array:
    away_R = jnp.linalg.norm(deltas_RxP - center_P[None], axis=1)
    weights_R = 1 / jnp.maximum(away_R, 1e-6)
    return weights_R @ deltas_RxP / jnp.sum(weights_R)

  return jax.lax.fori_loop(0, steps, step, deltas_RxP.mean(0))


def mean(deltas_RxP: Deltas, starts: Sequence[int]) -> jax.Array:
  """Returns the mean over the senders of each element."""
  del starts
  senders_P = jnp.sum(deltas_RxP != 0, axis=0, dtype=jnp.float32)
  return jnp.sum(deltas_RxP, axis=0) / jnp.maximum(senders_P, 1.0)


def clipped(deltas_RxP: Deltas, starts: Sequence[int]) -> jax.Array:
  """Returns what `reduce.aggregate` does, with tensors from `starts` on."""
  tensors = []
  for own_RxP in jnp.split(deltas_RxP, starts[1:], axis=1):
    norms_R = jnp.linalg.norm(own_RxP, axis=1)
    median = jnp.sort(norms_R)[(PEERS - 1) // 2]
    factors_R = jnp.minimum(1.0, median / jnp.maximum(norms_R, 1e-30))
    tensors.append(own_RxP * factors_R[:, None])
  return mean(jnp.concatenate(tensors, axis=1), starts)


RULES: dict[str, Callable[[Deltas, Sequence[int]], jax.Array]] = {
  'mean': mean,
  'Krum': krum,
  'trimmed mean': trimmed_mean,
  'geometric median': geometric_median,
  'ours': clipped,
}


def honest(honest_RxP: Deltas, own_P: jax.Array, key: jax.Array) -> jax.Array:
  """Returns what the peer itself has to send."""
  del honest_RxP, key
  return own_P


def flipped(honest_RxP: Deltas, own_P: jax.Array, key: jax.Array) -> jax.Array:
  """Returns ten times the negative mean."""
  del own_P, key
  return -10 * honest_RxP.mean(0)


def noise(honest_RxP: Deltas, own_P: jax.Array, key: jax.Array) -> jax.Array:
  """Returns noise of a hundred times the usual norm."""
  draw_P = jax.random.normal(key, own_P.shape)
  usual = jnp.median(jnp.linalg.norm(honest_RxP, axis=1))
  return 100 * usual * draw_P / jnp.linalg.norm(draw_P)


def little(honest_RxP: Deltas, own_P: jax.Array, key: jax.Array) -> jax.Array:
  """Returns one deviation less than the mean, toward zero and beyond."""
  del own_P, key
  mean_P = honest_RxP.mean(0)
  return mean_P - jnp.sign(mean_P) * honest_RxP.std(0)


def inner_product(
  honest_RxP: Deltas, own_P: jax.Array, key: jax.Array
) -> jax.Array:
  """Returns the negative mean."""
  del own_P, key
  return -honest_RxP.mean(0)


ATTACKS: dict[str, Callable[[Deltas, jax.Array, jax.Array], jax.Array]] = {
  NOBODY: honest,
  'flipped x 10': flipped,
  'noise x 100': noise,
  'little': little,
  'inner product': inner_product,
}


class State(NamedTuple):
  """The state of one peer; all but `error` and `inner` are equal on all.

  Rule and attack are numbers in it, so that all runs are one program.
  """

  count: jax.Array  # int32, inner steps so far
  rule: jax.Array  # int32, of RULES
  attack: jax.Array  # int32, of ATTACKS
  anchor: ct.Params
  error: ct.PyTree
  inner: optax.OptState
  outer: optax.OptState


@dataclasses.dataclass(frozen=True)
class Attacked(transformations.Configured):
  """SparseLoCo among attackers, under a rule of aggregation."""

  rule: str
  attack: str

  def run(self, config: config_lib.Config) -> list[metrics.Evaluation]:
    tx = self.transformation(config)
    return transformations.train(tx, config, self.sent(config))

  def transformation(
    self, config: config_lib.Config
  ) -> optax.GradientTransformation:
    method = algorithm_lib.make(config)
    inner = transformations.inner(config)
    every = config.optim.inner_steps

    def init(params: ct.Params) -> State:
      return State(
        jnp.zeros((), jnp.int32),
        jnp.array(list(RULES).index(self.rule), jnp.int32),
        jnp.array(list(ATTACKS).index(self.attack), jnp.int32),
        jax.tree.map(jnp.copy, params),
        sparseloco.init_error(params), inner.init(params),
        method.outer.init(params),
      )  # fmt: skip

    def exchange(local: ct.Params, state: State) -> tuple[ct.Params, State]:
      delta = sparseloco.pseudo_gradient(state.anchor, local)
      message, error = sparseloco.compress(
        delta, state.error, method.compression, method.error_decay
      )
      mean = _aggregate(message, delta, method, state)
      anchor, outer = sparseloco.outer_update(
        method.outer, mean, state.outer, state.anchor
      )
      return anchor, state._replace(anchor=anchor, error=error, outer=outer)

    def update(
      updates: ct.Grads, state: ct.PyTree, params: ct.Params | None = None
    ) -> tuple[ct.Grads, ct.PyTree]:
      assert params is not None
      updates, inner_state = inner.update(updates, state.inner, params)
      local = optax.apply_updates(params, updates)
      state = state._replace(count=state.count + 1, inner=inner_state)
      new, state = jax.lax.cond(
        state.count % every == 0,
        exchange,
        lambda local, state: (local, state),
        local,
        state,
      )
      return jax.tree.map(lambda n, p: n - p, new, params), state

    return optax.GradientTransformation(init, update)


def _aggregate(
  message: ct.Message,
  like: ct.Delta,
  method: algorithm_lib.Algorithm,
  state: State,
) -> ct.Delta:
  """Returns the delta of a round, the same on all peers."""
  leaves, treedef = jax.tree.flatten(like)
  ends = list(itertools.accumulate([0, *(x.size for x in leaves)]))
  compression = method.compression

  def flat(message: ct.Message) -> jax.Array:
    delta = sparseloco.decompress(message, like, compression)
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(delta)])

  def tree(flat_P: jax.Array) -> ct.Delta:
    return treedef.unflatten(
      flat_P[end - x.size : end].reshape(x.shape)
      for end, x in zip(ends[1:], leaves, strict=True)
    )

  own_P = flat(message)
  honest_RxP = jax.lax.all_gather(own_P, AXIS)[: PEERS - BAD]
  key = jax.random.fold_in(jax.random.key(0), state.count)
  sent_P = jax.lax.switch(
    state.attack, list(ATTACKS.values()), honest_RxP, own_P, key
  )
  spoiled, _ = sparseloco.compress(tree(sent_P), None, compression, None)
  is_bad = jax.lax.axis_index(AXIS) >= PEERS - BAD
  is_bad &= state.attack != list(ATTACKS).index(NOBODY)
  sent_P = jnp.where(is_bad, flat(spoiled), own_P)
  sent_RxP = jax.lax.all_gather(sent_P, AXIS)
  rules = [
    lambda rule=rule: rule(sent_RxP, ends[:-1]) for rule in RULES.values()
  ]
  return tree(jax.lax.switch(state.rule, rules))


def name_of(rule: str, attack: str) -> str:
  return f'{rule}, {attack}'


def plan(runs: Sequence[study.Run], seeds: int) -> Iterator[study.Cell]:
  done = {run.cell for run in runs}
  for rule, rates in RATES.items():
    sweep = {
      f'{rule}, {rate:g}': (*SETS, f'optim.outer.learning_rate={rate:g}')
      for rate in rates
    }
    for cell, sets in sweep.items():
      yield study.Cell(cell, 0, sets, Attacked(rule, NOBODY))
    if sweep.keys() <= done:
      best = sweep[study.best(runs, sweep)]
      for seed in range(min(seeds, SEEDS)):
        for attack in ATTACKS:
          program = Attacked(rule, attack)
          yield study.Cell(name_of(rule, attack), seed, best, program)


def judge(
  runs: Sequence[study.Run], results: pathlib.Path
) -> Iterator[study.Verdict]:
  del results
  calm = name_of('ours', NOBODY)
  level = study.losses(runs, calm)
  bound = 0.02 * sum(level.values()) / len(level)
  for attack in list(ATTACKS)[1:]:
    gap = study.gap(runs, name_of('ours', attack), calm)
    yield study.Verdict(
      f'C20, {attack}',
      'two attackers of eight cost ours little',
      'ours',
      'at most 2 % above ours without an attack',
      str(gap),
      study.at_most(gap, bound),
      (calm, name_of('ours', attack)),
    )
    rivals = [name_of(rule, attack) for rule in RATES if rule != 'ours']
    rival = study.best(runs, rivals)
    gap = study.gap(runs, name_of('ours', attack), rival)
    yield study.Verdict(
      f'C20, {attack}, others',
      'no other rule does better',
      'ours',
      'ours minus the best other at most 0',
      f'{gap} against {rival.partition(",")[0]}',
      study.at_most(gap),
      (name_of('ours', attack), rival),
    )


def draw(runs: Sequence[study.Run], path: pathlib.Path) -> None:
  """Draws the final loss of every rule under every attack."""
  drawing = figure.Figure(figsize=(8, 4), dpi=150, layout='constrained')
  axes = drawing.subplots()
  attacks = list(ATTACKS)
  for i, rule in enumerate(RATES):
    found = [study.losses(runs, name_of(rule, a)).values() for a in attacks]
    points = [
      (x + (i - 2) * 0.13, loss)
      for x, losses in enumerate(found)
      for loss in losses
    ]
    if points:
      axes.plot(
        [x for x, _ in points], [min(y, _TOP) for _, y in points],
        charts.MARKERS[i], ms=5, color=charts.COLORS[i], label=rule,
        clip_on=False,
      )  # fmt: skip
    for x, loss in points:
      if loss > _TOP:
        axes.annotate(
          f'{loss:.0f}', (x, _TOP), xytext=(0, 5), fontsize=8,
          textcoords='offset points', ha='center',
        )  # fmt: skip
  axes.set_xticks(range(len(attacks)), attacks)
  axes.set_ylim(1.9, _TOP)
  axes.set_ylabel('final held-out loss (nats per byte)')
  axes.grid(axis='y', color='#E0E0E0', lw=0.6)
  axes.spines[['top', 'right']].set_visible(False)
  drawing.legend(
    *axes.get_legend_handles_labels(), loc='outside lower center', ncols=5,
    frameon=False, fontsize=8,
  )  # fmt: skip
  path.parent.mkdir(parents=True, exist_ok=True)
  drawing.savefig(path, metadata={'Software': None})


STUDY = study.Study('byzantine', plan, judge, draw)

if __name__ == '__main__':
  runner.main(STUDY, __doc__)
