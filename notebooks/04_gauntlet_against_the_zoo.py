# %% [markdown]
# # Gauntlet against the zoo
#
# Anybody may mine, also those who want to be paid for nothing or to spoil the
# model. Validators decide each round whom all hear, and what each deserves.
# First what the study found with 40 % adversaries, then a small run of our
# own: weights over rounds, and why a uid lost its points. `docs/gauntlet.md`
# has every rule and the whole zoo.

# %%
import csv
import json
import os
import pathlib
import sys
import tempfile
import textwrap

import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(pathlib.Path('..').resolve()))  # experiments/ is there

from covenant import cli
from covenant import config as config_lib
from covenant import metrics
from covenant.adversaries import registry
from covenant.emulate import host
from covenant.gauntlet import explain
from experiments import gauntlet
from experiments import study

QUICK = 'QUICK' in os.environ  # tests are; what is stored here was not
plt.style.use('notebooks.mplstyle')
cli.keep_compilations()

# %% [markdown]
# ## The study
#
# `python -m experiments.gauntlet`: 20 uids, 12 honest (five of them unlucky:
# slow, late to join, with a small batch), eight adversaries, 60 rounds, three
# seeds with other adversaries each. `plain mean` averages whatever can be read.

# %%
with open(study.RESULTS / 'gauntlet.csv', newline='') as file:
  rows = list(csv.DictReader(file))
cells = ('honest alone', 'mixed', 'mixed, plain mean')
fig, ax = plt.subplots(figsize=(6.4, 2.6))
for i, cell in enumerate(cells):
  found = [float(r['nats_per_byte']) for r in rows if r['cell'] == cell]
  ax.plot(found, [i] * len(found), 'o', ms=7)
  ax.plot([np.mean(found)], [i], 'k|', ms=22)
ax.set(
  xlabel='final held-out loss (nats a byte); a dot a seed, a line the mean',
  ylim=(2.5, -0.5),
)
ax.set_yticks(
  range(3), ('12 honest alone', 'with 8 adversaries', 'and a plain mean')
)
plt.show()

# %% [markdown]
# Its criteria were written before the runs, and not all hold:

# %%
for verdict in gauntlet.judge(rows):
  print(f'{verdict.outcome:9} {verdict.claim}: {verdict.says}')
  print(f'{"":10}{verdict.criterion}: {verdict.measured}')

# %% [markdown]
# ## A run
#
# Six honest miners and four adversaries: one sends noise, one copies the best
# paid as soon as it can read it, one sends its delta the other way round, and
# one is honest until it is well paid, and turns then.

# %%
ZOO = ('noise', 'copier-fast', 'flipped', 'sleeper')
config = config_lib.load(
  '../configs/shakespeare.py',
  [
    f'rounds={2 if QUICK else 40}',
    f'miners={5 if QUICK else 10}',
    f'adversaries={",".join(ZOO)}',
    f'gauntlet.evaluate={5 if QUICK else 10}',
    f'optim.inner_steps={2 if QUICK else 10}',
    f'optim.inner.warmup_steps={1 if QUICK else 50}',
    'optim.inner.learning_rate=5e-3',
    'optim.outer.learning_rate=0.5',
    f'eval.every={2 if QUICK else 10}',
  ],
)
workdir = pathlib.Path(tempfile.mkdtemp())
host.run(config, workdir)
records = metrics.read(workdir / 'metrics.jsonl')
rounds = [r for r in records if isinstance(r, metrics.Round)]
evaluations = [r for r in records if isinstance(r, metrics.Evaluation)]
print('held-out loss:', ' '.join(f'{e.nats_per_byte:.3f}' for e in evaluations))

# %% [markdown]
# What the validator would pay, round by round; the dotted line is an equal
# share. Until enough uids have proven that they train on their own data, pay is
# by gain alone. Then proof counts as well, and pay swings for some rounds, for
# at first it is certain of few.

# %%
bad = registry.names(config)
fig, ax = plt.subplots(figsize=(7, 4))
styles = iter(('C1-', 'C2--', 'C3:', 'C0-.'))
for uid in range(config.miners):
  weights = [r.weights[uid] if r.weights else np.nan for r in rounds]
  x = [r.round for r in rounds]
  if uid in bad:
    ax.plot(x, weights, next(styles), lw=2, label=f'uid {uid}, {bad[uid]}')
  else:
    ax.plot(
      x, weights, color='#A0A0A0', lw=1, label='honest' if not uid else None
    )
ax.axhline(1 / config.miners, color='k', lw=0.8, ls=':')
ax.set(xlabel='round', ylabel='weight (share of the pay)')
ax.legend()
plt.show()

# %% [markdown]
# ## Why
#
# A validator writes down all it finds. In words, as `--role=explain` says it,
# of an honest miner and of those four, in short:

# %%
verdicts = [
  json.loads(line)
  for line in (workdir / 'verdicts.jsonl').read_text().splitlines()
]
decisions = [d for verdict in verdicts for d in verdict['decisions']]
for uid in (0, *sorted(bad)):
  print(f'--- {bad.get(uid, "honest")}')
  lines = explain.explain(decisions, uid).splitlines()
  for line in lines[:6] + lines[-2:]:
    print(textwrap.fill(line, 79, subsequent_indent='      '))

# %% [markdown]
# What the evaluations saw: how much a message lowers the loss on data that
# nobody was given (gain), and how much more it does on the data that its
# sender was given (proof of work). Means over all rounds; the bars are their
# standard errors.

# %%
fig, ax = plt.subplots(figsize=(7, 4))
markers = dict(zip(sorted(bad), 'sD^v', strict=True))
for uid in range(config.miners):
  seen = [
    d['evaluation'] for d in decisions if d['uid'] == uid and d['evaluation']
  ]
  if not seen:
    print(f'uid {uid}, {bad.get(uid, "honest")}: never evaluated')
    continue
  gains, proofs = (np.array([e[k] for e in seen]) for k in ('gain', 'proof'))
  ax.errorbar(
    gains.mean(),
    proofs.mean(),
    xerr=gains.std() / len(seen) ** 0.5,
    yerr=proofs.std() / len(seen) ** 0.5,
    marker=markers.get(uid, 'o'),
    color='C1' if uid in bad else '#808080',
    ls='',
    label=bad.get(uid, None if uid else 'honest'),
  )
ax.axhline(0, color='k', lw=0.8)
ax.axvline(0, color='k', lw=0.8)
ax.set(xlabel='gain (nats a token)', ylabel='proof of work (nats a token)')
ax.legend()
plt.show()
