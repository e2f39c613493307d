# %% [markdown]
# # SparseLoCo in ten minutes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/covenant/blob/main/notebooks/01_sparseloco_in_ten_minutes.ipynb)
#
# Peers train one model over the internet. Each trains alone for a while (H
# inner steps of AdamW) and then sends a small part of its change: the 64
# largest values of every 64 x 64 block, each as a sign. The rest waits and is
# added to the change of the next round. A round of the model below costs a peer
# 2 kB instead of the 460 kB of its parameters.
#
# This notebook does one round by hand, then a whole run through the code of
# `python run.py`.

# %%
import os
import pathlib
import subprocess
import tempfile

if not os.path.exists('notebooks.mplstyle'):  # in Colab: there is no checkout
  subprocess.run(
    'git clone -q https://github.com/OWNER/covenant && '
    "pip install -q './covenant[run]'",
    shell=True,
    check=True,
  )
  os.chdir('covenant/notebooks')

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import covenant
from covenant import config as config_lib
from covenant import startup
from covenant.data import dataset
from covenant.models import generate
from covenant.models import llama
from covenant.models import loss as loss_lib
from covenant.optim import sparseloco

QUICK = 'QUICK' in os.environ  # set by tests, not for the stored outputs
plt.style.use('notebooks.mplstyle')
startup.keep_compilations()
config = config_lib.load(
  '../configs/shakespeare.py:smoke',
  ['adversaries=', f'miners={2 if QUICK else 3}']
  + [f'model.layers={1 if QUICK else 2}']
  + [f'rounds={2 if QUICK else 40}', f'eval.every={1 if QUICK else 5}']
  + [f'optim.inner_steps={2 if QUICK else 10}']
  + [f'optim.inner.warmup_steps={1 if QUICK else 40}'],
)

# %% [markdown]
# ## One round by hand
#
# The parameters are a plain pytree, and the model is a pure function. Two peers
# start from the same parameters, and each trains on its own text.

# %%
data = dataset.load(config)
params = llama.init(config.model, jax.random.key(0))
adamw = optax.adamw(3e-3)


@jax.jit
def train(params, state, tokens):
  _, grads = loss_lib.next_token_gradient(config.model, params, tokens)
  updates, state = adamw.update(grads, state, params)
  return optax.apply_updates(params, updates), state


trained = []
for peer in range(2):
  local, state = params, adamw.init(params)
  for step in range(config.optim.inner_steps):
    ids = 8 * (config.optim.inner_steps * peer + step) + np.arange(8)
    local, state = train(local, state, data.train.read(ids, 64))
  trained.append(local)

# %% [markdown]
# Each peer's change is its pseudo-gradient. `compress` adds the error feedback
# of earlier rounds (nothing yet) and returns a message and the new error
# feedback: everything that the message leaves out.

# %%
topk = sparseloco.TopK(k=64, block=(64, 64), quantizer=sparseloco.Sign())
deltas = [sparseloco.pseudo_gradient(params, local) for local in trained]
messages, errors = [], []
for delta in deltas:
  message, error = sparseloco.compress(
    delta, sparseloco.init_error(params), topk, error_decay=0.95
  )
  messages.append(message)
  errors.append(error)
sent = [sparseloco.decompress(m, params, topk) for m in messages]

fig, panels = plt.subplots(2, 3, figsize=(9, 6), sharex=True, sharey=True)
pick = [
  [tree['layers_0']['attention']['query'] for tree in trees]
  for trees in (deltas, sent, errors)
]
largest = float(jnp.abs(pick[0][0]).max())
for row in range(2):
  for ax, trees in zip(panels[row], pick, strict=True):
    image = ax.imshow(trees[row], cmap='PuOr', vmin=-largest, vmax=largest)
    ax.grid(visible=False)
  panels[row][0].set(ylabel=f'peer {row}: row')
for ax, name in zip(panels[1], ('trained', 'sent', 'left'), strict=True):
  ax.set(xlabel=f'column ({name})')
fig.colorbar(image, ax=panels, label='change of a parameter', shrink=0.8)
plt.show()

# %% [markdown]
# The outer step moves all peers to the same new parameters, by the mean of
# their messages.

# %%
outer = sparseloco.nesterov(1.0)
mean = sparseloco.aggregate(messages, params, topk)
new, _ = sparseloco.outer_update(outer, mean, outer.init(params), params)

heldout = data.heldout.read(np.arange(16), 64)
for name, tree in (
  ('before', params),
  ('peer 0 alone, after its steps', trained[0]),
  ('all, after the exchange', new),
):
  nats = loss_lib.next_token_loss(config.model, tree, heldout).nats
  print(f'{name:30} {nats:.3f} nats per token')

# %% [markdown]
# One message carries little of a peer's change, but nothing is lost: the rest
# is sent in later rounds.
#
# ## A whole run
#
# Miners, validators, chain and store are emulated in this process. A run has
# its own folder, with figures and `report.html`; a second call would find that
# it is finished.

# %%
results = covenant.run(config, workdir=pathlib.Path(tempfile.mkdtemp()))

# %% [markdown]
# The results are tables: dicts of columns, which `pandas.DataFrame` takes as
# they are. `covenant/metrics.py` documents every column.

# %%
rounds, evaluations = results.rounds, results.evaluations
peers = len(rounds['uids'][-1])
print(
  f'{peers} peers send {rounds["bytes_round"][-1]:,} bytes per round, '
  f'{rounds["compression_ratio"][-1]:.0f} times less than float32'
)

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
left.plot(np.array(rounds['tokens']) / 1000, rounds['loss'], label='training')
left.plot(
  np.array(evaluations['tokens']) / 1000,
  evaluations['loss'],
  'o--',
  ms=4,
  label='held out',
)
left.set(
  xlabel='thousand tokens trained, all peers', ylabel='loss (nats per token)'
)
left.legend()
sends = np.array(evaluations['bytes_up']) / 1000 / peers
right.plot(sends[1:], evaluations['loss'][1:], 'C1o--', ms=4)
right.set(xlabel='kB sent per peer')
plt.show()

# %% [markdown]
# ## Text from the trained model
#
# `generate` keeps the keys and values of the tokens before and draws one token
# after another. Temperature 0 takes the likeliest, `top_k` and `top_p` leave
# out the unlikely ones, and one seed gives one text. `covenant --role=sample`
# does it with a workdir, an export or a folder in Hugging Face's format
# (`docs/huggingface.md`).

# %%
prompt = b'ROMEO:'
for sampling in (
  generate.Sampling(temperature=0.0),
  generate.Sampling(temperature=0.8, top_p=0.95, seed=0),
  generate.Sampling(temperature=1.0, top_k=5, seed=0),
):
  ids = generate.generate(
    config.model, results.params, list(prompt), 8 if QUICK else 120, sampling
  )
  print(f'--- {sampling}')
  print((prompt + bytes(ids)).decode(errors='replace'))

# %% [markdown]
# Next: `docs/sparseloco.md` describes the algorithm and its variants, notebook
# 3 the compressor, and notebook 6 uses SparseLoCo in your own loop.
