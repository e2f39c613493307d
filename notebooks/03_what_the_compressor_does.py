# %% [markdown]
# # What the compressor does to a delta
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/covenant/blob/main/notebooks/03_what_the_compressor_does.ipynb)
#
# Four peers train the model of `configs/shakespeare.py`, twice as wide, for
# a few rounds. Then we look at one tensor: the input of the compressor, the
# message, the quantizers, the agreement between peers, and the bits.

# %%
import itertools
import os
import subprocess

if not os.path.exists('notebooks.mplstyle'):  # in Colab: there is no checkout
  subprocess.run(
    'git clone -q https://github.com/OWNER/covenant && '
    "pip install -q './covenant[run]'",
    shell=True,
    check=True,
  )
  os.chdir('covenant/notebooks')

import jax
import matplotlib.pyplot as plt
import numpy as np

from covenant import config as config_lib
from covenant.data import dataset
from covenant.optim import quantize
from covenant.optim import sparseloco
from covenant.train import local as local_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train import trainer as trainer_lib
from covenant.wire import codec
from covenant.wire import payload
from covenant.wire import rice

QUICK = 'QUICK' in os.environ  # set by tests, not for the stored outputs
PEERS, ROUNDS = (2, 2) if QUICK else (4, 12)
plt.style.use('notebooks.mplstyle')
config = config_lib.load(
  '../configs/shakespeare.py',
  [
    f'rounds={ROUNDS}',
    f'model.width={64 if QUICK else 128}',
    f'model.layers={1 if QUICK else 2}',
    f'optim.inner_steps={2 if QUICK else 10}',
    f'optim.inner.warmup_steps={2 if QUICK else 20}',
    'optim.inner.decay_steps=4000',  # as if the run were longer
  ],
)

# %% [markdown]
# ## A few rounds
#
# In a round, a peer takes inner steps and compresses its delta. The input of
# the compressor is the delta plus the decayed error feedback; it equals the
# decoded message plus the new error feedback. The outer step applies the mean
# of all messages.

# %%
shared_model = shared_state_lib.SharedModel(config)
trainer = trainer_lib.Trainer(config, shared_model, dataset.load(config))
method = shared_model.method
params, outer, _ = shared_model.init()
private = [trainer.init(params) for _ in range(PEERS)]


@jax.jit
def outer_step(params, outer, messages):
  delta = sparseloco.aggregate(messages, params, method.compression)
  return sparseloco.outer_update(method.outer, delta, outer, params)


@jax.jit
def send(message, error):
  """Returns the decoded message and the input of the compressor."""
  sent = sparseloco.decompress(message, error, method.compression)
  return sent, jax.tree.map(lambda s, e: s + e, sent, error)


history = []  # messages of all peers, per round
for r in range(ROUNDS):
  messages, before = [], jax.device_get(private[0].error)
  for uid in range(PEERS):
    task = local_lib.Task(uid, r, config.seed, b'')
    done, private[uid] = trainer.train(
      params, private[uid], task, trainer.batches(task)
    )
    messages.append(done.message)
  history.append(messages)
  params, outer = outer_step(params, outer, messages)
sent, offered = jax.device_get(send(messages[0], private[0].error))
delta = jax.tree.map(
  lambda o, e: o - config.optim.compression.error_decay * e, offered, before
)
names = [
  jax.tree_util.keystr(path, simple=True, separator='.')
  for path, _ in jax.tree_util.tree_leaves_with_path(offered)
]
leaves = [jax.tree.leaves(tree) for tree in (delta, offered, sent)]
sizes = [x.size for x in leaves[0]]
LEAF = names.index(f'layers_{config.model.layers - 1}.ffn.up')
print(f'{sum(sizes):,} parameters, {sizes[LEAF]:,} in {names[LEAF]}')

# %% [markdown]
# ## Input and message
#
# The 64 largest values of each 64 x 64 block are sent, one in 64. They are not
# the largest of the tensor, since each block has its own threshold.

# %%
flat = [of[LEAF].ravel() for of in leaves]
chosen = flat[2] != 0
fig, ax = plt.subplots()
edges = np.linspace(*np.quantile(flat[1], (1e-4, 1 - 1e-4)), 121)
for x, label in zip(
  (flat[0], flat[1], flat[1][chosen]),
  ('delta of the round', 'with error feedback', 'chosen values of it'),
  strict=True,
):
  ax.hist(x, edges, histtype='step', lw=1.5, label=label)
ax.set(
  xlabel='change of a parameter', ylabel='parameters', yscale='log', ylim=0.8
)
ax.legend()
plt.show()

energy = np.square(flat[1][chosen]).sum() / np.square(flat[1]).sum()
print(f'{chosen.mean():.2%} of the values have {energy:.0%} of the energy')
norms = [float(np.linalg.norm(x)) for x in flat]
print('norm of the delta, with error feedback, of the message:')
print('  ' + ', '.join(f'{norm:.3f}' for norm in norms))

# %% [markdown]
# The first block of the tensor: input, message and new error feedback.

# %%
corner = [of[LEAF][:64, :64] for of in leaves[1:]]
largest = np.abs(corner[0]).max()
fig, panels = plt.subplots(1, 3, figsize=(9, 3.2))
for ax, x, title in zip(
  panels,
  (corner[0], corner[1], corner[0] - corner[1]),
  ('input', 'message', 'new error feedback'),
  strict=True,
):
  image = ax.imshow(x, cmap='PuOr', vmin=-largest, vmax=largest)
  ax.set(xlabel=f'column ({title})')
  ax.grid(visible=False)
panels[0].set(ylabel='row')
fig.colorbar(image, ax=panels, label='change of a parameter')
plt.show()

# %% [markdown]
# ## Codebooks
#
# The chosen values of this tensor under each quantizer. Lines are the decoded
# values. Two of the quantizers have one magnitude per block, so all values are
# shown relative to the mean magnitude of their block. For the other two, with
# one codebook per tensor, a line is the mean over the blocks.

# %%
kept, *_ = sparseloco.TopK().keep(leaves[1][LEAF])
values_NxK = np.asarray(kept.values)
scale_Nx1 = np.abs(values_NxK).mean(1, keepdims=True)
fig, panels = plt.subplots(2, 2, figsize=(9, 5), sharex=True, sharey=True)
for ax, quantizer in zip(
  panels.flat,
  (
    quantize.Sign(),
    quantize.SignMagnitude(),
    quantize.Statistical(),
    quantize.Linear(),
  ),
  strict=True,
):
  codes, scales = jax.jit(quantizer.encode)(values_NxK)
  decoded_NxK = np.asarray(quantizer.decode(codes, scales))
  lost = np.square(decoded_NxK - values_NxK).sum() / np.square(values_NxK).sum()
  ax.hist(
    (values_NxK / scale_Nx1).ravel(), np.linspace(-2, 2, 81), color='#BBBBBB'
  )
  used = []
  for code in range(2**quantizer.bits):
    here = np.asarray(codes) == code
    used.append(f'{here.mean():.0%}')
    if here.any():
      ax.axvline((decoded_NxK / scale_Nx1)[here].mean(), color='C1')
  name = type(quantizer).__name__
  text = f'{name}\n{lost:.1%} of energy lost\ncodes:\n{", ".join(used)}'
  ax.text(0, 0.4, text, ha='center', size=8, transform=ax.get_xaxis_transform())
for ax in panels[1]:
  ax.set(xlabel='value / mean magnitude of its block')
for ax in panels[:, 0]:
  ax.set(ylabel='chosen values')
plt.show()

# %% [markdown]
# ## Agreement between peers
#
# The share of the indices of a block that two peers have in common, over all
# blocks of matrices. Peers that chose at random would share one in 64. The
# deployed system treats an overlap of 0.4 or more as a sign of copying; honest
# peers stay far below.


# %%
def overlap(one, other):
  """Returns the share of common indices of two messages, over whole blocks."""
  shared = [
    np.mean(
      [np.isin(i, j).mean() for i, j in zip(a.indices, b.indices, strict=True)]
    )
    for x, y in zip(one, other, strict=True)
    for a, b in zip(x, y, strict=True)
    if a.indices.shape[1] == config.optim.compression.k
  ]
  return float(np.mean(shared))


treedef = jax.tree.structure(offered)
parts = [[treedef.flatten_up_to(m) for m in messages] for messages in history]
between = [
  [overlap(a, b) for a, b in itertools.combinations(messages, 2)]
  for messages in parts
]
with_last = [
  [overlap(a, b) for a, b in zip(now, last, strict=True)]
  for last, now in itertools.pairwise(parts)
]
fig, ax = plt.subplots()
rounds = np.arange(1, ROUNDS + 1)
for x, found, label, marker in (
  (rounds, between, 'two peers, one round', 'o'),
  (rounds[1:], with_last, 'one peer, this round and the last', 's'),
):
  low, mean, high = (f(found, axis=1) for f in (np.min, np.mean, np.max))
  ax.plot(x, mean, marker=marker, ms=4, label=label)
  ax.fill_between(x, low, high, alpha=0.2, lw=0)
ax.axhline(
  0.4, color='k', ls='--', lw=1, label='threshold of the deployed system'
)
ax.axhline(1 / 64, color='grey', ls=':', lw=1, label='by chance')
ax.set(xlabel='round', ylabel='share of indices in common', ylim=(0, 0.5))
ax.legend(fontsize=8)
plt.show()
print('two peers, round by round (mean, largest):')
for r, found in zip(rounds, between, strict=True):
  print(f'  {r:2} {np.mean(found):.3f} {max(found):.3f}')

# %% [markdown]
# ## The bits of one block
#
# 64 sorted indices below 4096 in Elias-Fano code: the low six bits of each,
# then a bitmap of 128 bits, in which the j-th one, at position p, means that
# the high bits of index j are p - j. Then one bit per value. These are the bits
# of the payload, dark for a one. Each block takes 576 bits and can be located
# and decoded alone.

# %%
indices_K = np.asarray(kept.indices[0])
codes_K, _ = quantize.Sign().encode(values_NxK[:1])
data = codec.pack(indices_K[None], np.asarray(codes_K), 4096, 1)
bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder='little')
low, bitmap, signs = np.split(bits[:576], (384, 512))
fig, axes = plt.subplots(
  4, 1, figsize=(9, 5.4), height_ratios=(2.2, 6, 2, 1), sharex=False
)
axes[0].vlines(indices_K, 0, 1, lw=1)
axes[0].set(xlim=(0, 4096), yticks=[], xlabel='index in the block')
axes[0].set_xticks(range(0, 4097, 512))
for ax, x, label in (
  (axes[1], low.reshape(64, 6).T, 'low bits'),
  (axes[2], bitmap.reshape(2, 64), 'bitmap'),
  (axes[3], signs.reshape(1, 64), 'signs'),
):
  ax.pcolormesh(x, cmap='Greys', vmin=-0.15, vmax=1.3, edgecolor='w', lw=0.8)
  ax.invert_yaxis()
  ax.set(yticks=[], xticks=[], ylabel=label)
  ax.grid(visible=False)
axes[1].set(xlabel='the 64 indices, in order; the lowest bit above')
axes[2].set(xlabel='positions 0 to 63, then 64 to 127')
axes[3].set(xlabel='the 64 values, in order')
plt.show()

ones = np.flatnonzero(bitmap)
for j in (0, 1, 63):
  high, rest = ones[j] - j, low.reshape(64, 6)[j] @ 2 ** np.arange(6)
  print(
    f'index {j:2}: one at {ones[j]:3}, high {high:2}, low {rest:2}: '
    f'{high} * 64 + {rest} = {high * 64 + rest}, is {indices_K[j]}'
  )

# %% [markdown]
# Rice-coded gaps between indices (`optim.compression.codec=rice`) take fewer
# bits, but not a fixed number. The bound is the entropy of uniform indices.

# %%
one = np.zeros((len(kept.indices), 64), np.uint8)
gaps = rice.pack(np.asarray(kept.indices), one, 4096, 1)
bound = sum(np.log2((4096 - i) / (64 - i)) for i in range(64)) / 64
print(f'Elias-Fano {codec.index_bits(4096, 64) / 64:.2f} bits per index')
print(f'Rice       {8 * len(gaps) / one.size - 1:.2f}')
print(f'bound      {bound:.2f}')
spec = payload.make_spec(shared_model.abstract_params, method.compression)
print(
  f'the whole payload: {spec.payload_bytes:,} bytes, 1/'
  f'{4 * sum(sizes) / spec.payload_bytes:.0f} of float32'
)
