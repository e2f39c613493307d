# %% [markdown]
# # Reproducing the loss curves
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/covenant/blob/main/notebooks/02_loss_curves.ipynb)
#
# One model, one text, the same number of tokens: which loss does each method
# reach, and how many bytes does each peer send? First come the curves of the
# committed studies, with three seeds and the best rates of each method, then a
# small rerun.

# %%
import os
import pathlib
import subprocess
import sys
import tempfile

if not os.path.exists('notebooks.mplstyle'):  # in Colab: there is no checkout
  subprocess.run(
    'git clone -q https://github.com/OWNER/covenant && '
    "pip install -q './covenant[run]'",
    shell=True,
    check=True,
  )
  os.chdir('covenant/notebooks')

import matplotlib.pyplot as plt
from IPython.display import Image
from IPython.display import display

sys.path.insert(0, str(pathlib.Path('..').resolve()))  # for experiments/

from covenant import startup
from experiments import charts
from experiments import study
from experiments import transformations

QUICK = 'QUICK' in os.environ  # set by tests, not for the stored outputs
plt.style.use('notebooks.mplstyle')
startup.keep_compilations()

# %% [markdown]
# ## The studies
#
# 115,008 parameters, eight peers, 2.3 million tokens. Lines are means over
# seeds, and bands are one standard deviation. The docstrings of the modules
# have the sweeps and the criteria, which were written before the runs;
# `docs/results.md` has the verdicts.

# %%
STUDIES = {
  'methods': ['SparseLoCo', 'DiLoCo', 'AdamW'],
  'transformations': ['SparseLoCo', *transformations.METHODS],
  'muon': ['AdamW inside', 'Muon inside'],
}
for name, cells in STUDIES.items():
  path = study.RESULTS / f'{name}.csv'
  if not path.exists():
    print(f'no results yet: run python -m experiments.{name}')
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
# transformations in one loop (`experiments/transformations.py`) with peers
# along an axis of `jax.vmap` and the same data in the same order. The rates are
# the best ones of the longer studies; they are not swept here.
#
# | method | message of a peer |
# | --- | --- |
# | AdamW, data-parallel | its gradient, every step |
# | DiLoCo | its delta, every 15 steps |
# | Streaming DiLoCo | a fifth of its delta, every third step, two steps late |
# | SparseLoCo | a bit and an index for one in 64 values of its delta |
# | DeMo | 32 of 4096 cosine coefficients of its momentum, every step |
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
    f'{name:20} {last.nats_per_byte:.3f} nats per byte, '
    f'{last.bytes_up // config.miners:12,} bytes per peer'
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
  xlabel='tokens trained, all peers', ylabel='held-out loss (nats per byte)'
)
right.set(xlabel='bytes sent per peer', xscale='log')
left.legend(fontsize=8)
plt.show()

# %% [markdown]
# In SPARTA, and within a round of Streaming DiLoCo, the parameters of the peers
# differ; the loss is that of their mean. Bytes are uploads of whole payloads.
# Each peer also downloads the payloads of all others; for dense ones, an
# all-reduce takes less.
