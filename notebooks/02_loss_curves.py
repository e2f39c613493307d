# %% [markdown]
# # Reproducing the loss curves
#
# One model, one text, as many tokens for all: what do the methods reach, and
# what does each peer send for it? First the curves of the committed studies,
# each method at its best rates, three seeds; then a small rerun here.

# %%
import os
import pathlib
import sys
import tempfile

import matplotlib.pyplot as plt
from IPython.display import Image
from IPython.display import display

sys.path.insert(0, str(pathlib.Path('..').resolve()))  # experiments/ is there

from covenant import cli
from experiments import charts
from experiments import study
from experiments import transformations

QUICK = 'QUICK' in os.environ  # tests are; what is stored here was not
plt.style.use('notebooks.mplstyle')
cli.keep_compilations()

# %% [markdown]
# ## What the studies found
#
# 115,136 parameters, eight peers, 2.3 million tokens. Lines are means over
# seeds, bands a standard deviation. What was swept, and the criteria that were
# written before the runs, are in the modules' docstrings; `docs/results.md` has
# all verdicts.

# %%
STUDIES = {
  'methods': ['SparseLoCo', 'DiLoCo', 'AdamW'],
  'transformations': ['SparseLoCo', *transformations.METHODS],
  'muon': ['AdamW inside', 'Muon inside'],
}
for name, cells in STUDIES.items():
  path = study.RESULTS / f'{name}.csv'
  if not path.exists():
    print(f'no results here yet: python -m experiments.{name} makes them')
    continue
  runs = study.read_csv(path, study.Run)
  with tempfile.TemporaryDirectory() as folder:
    picture = pathlib.Path(folder, f'{name}.png')
    charts.curves(runs, cells, picture, study.RESULTS)
    display(Image(picture.read_bytes(), width=900))
  print(study.table([run for run in runs if run.cell in cells]))

# %% [markdown]
# ## A rerun
#
# Four peers and few steps, so that it takes minutes. All methods are optax
# transformations in one loop (`experiments/transformations.py`): peers along
# an axis of `jax.vmap`, the same data in the same order. The rates are those
# that suit each at the length of the studies, not swept here.
#
# | method | what a peer sends, when |
# | --- | --- |
# | AdamW, data-parallel | its gradient, every step |
# | DiLoCo | the delta of 15 steps |
# | Streaming DiLoCo | a fifth of the delta every third step, two steps late |
# | SparseLoCo | a bit and an index for every 64th value of such a delta |
# | DeMo | 32 of 4096 cosine coefficients of a local momentum, every step |
# | SPARTA | 0.5 % of its parameters, to be averaged, every step |

# %%
SIZE = (
  f'miners={2 if QUICK else 4}',
  f'optim.inner.warmup_steps={2 if QUICK else 30}',
  *(('data.context=16', 'model.layers=1', 'eval.sequences=8') if QUICK else ()),
)
ROUNDS, STEPS = (2, 3) if QUICK else (24, 15)
EVERY = max(ROUNDS // 12, 1)
IN_ROUNDS = (
  f'rounds={ROUNDS}',
  f'optim.inner_steps={STEPS}',
  f'eval.every={EVERY}',
)
IN_STEPS = (
  f'rounds={ROUNDS * STEPS}',
  'optim.inner_steps=1',
  f'eval.every={EVERY * STEPS}',
)
NESTEROV = ('optim.outer.momentum=0.9', 'optim.outer.learning_rate=0.7')
as_configured = transformations.Configured()
METHODS = {
  'AdamW, data-parallel': (as_configured, ('optim.method=ddp', *IN_STEPS)),
  'DiLoCo': (
    as_configured,
    ('optim.method=diloco', *NESTEROV, *IN_ROUNDS),
  ),
  'Streaming DiLoCo': (
    transformations.Streaming(),
    (*NESTEROV, *IN_ROUNDS),
  ),
  'SparseLoCo': (as_configured, IN_ROUNDS),
  'DeMo': (
    as_configured,
    (*transformations.DEMO, 'optim.inner.learning_rate=1.5e-3', *IN_STEPS),
  ),
  'SPARTA': (transformations.Sparta(), IN_ROUNDS),
}
curves = {}
for name in list(METHODS)[-3 if QUICK else 0 :]:
  program, sets = METHODS[name]
  config = study.make_config(study.Cell(name, 0, sets, program), SIZE)
  curves[name] = program.run(config)
  last = curves[name][-1]
  print(
    f'{name:20} {last.nats_per_byte:.3f} nats a byte, '
    f'{last.bytes_up // config.miners:12,} bytes a peer'
  )

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
for (name, curve), marker in zip(curves.items(), charts.MARKERS, strict=False):
  losses = [e.nats_per_byte for e in curve]
  left.plot([e.tokens for e in curve], losses, marker=marker, ms=4, label=name)
  right.plot(
    [e.bytes_up / config.miners for e in curve[1:]],
    losses[1:],
    marker=marker,
    ms=4,
  )
left.set(
  xlabel='tokens trained, all peers', ylabel='held-out loss (nats a byte)'
)
right.set(xlabel='bytes that a peer sends', xscale='log')
left.legend(fontsize=8)
plt.show()

# %% [markdown]
# SPARTA, and Streaming DiLoCo within a round, have other parameters at each
# peer; the loss is that of their mean. Bytes are those of whole payloads, up.
# Down, each peer fetches what all others send, or an all-reduce does better for
# what is dense.
