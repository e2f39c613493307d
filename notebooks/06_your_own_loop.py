# %% [markdown]
# # SparseLoCo in your own loop
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/covenant/blob/main/notebooks/06_your_own_loop.ipynb)
#
# A training loop in JAX and optax, and three ways to use SparseLoCo in it: on
# one device, with peers along an axis of `jax.vmap`, and with one device per
# peer under `jax.shard_map`. Only `covenant.optim` is needed.

# %%
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
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

from covenant.optim.sparseloco import sparseloco

QUICK = 'QUICK' in os.environ  # set by tests, not for the stored outputs
PEERS, STEPS, INNER_STEPS = (2, 20, 10) if QUICK else (4, 600, 10)
jax.config.update('jax_num_cpu_devices', PEERS)  # before JAX starts
plt.style.use('notebooks.mplstyle')

# %% [markdown]
# ## The original loop
#
# A small network learns the function of a larger, fixed one. Every step has a
# new batch of noise.


# %%
def network(params, x_BxD):
  for w in params[:-1]:
    x_BxD = jnp.tanh(x_BxD @ w)
  return x_BxD @ params[-1]


def init(key, widths):
  keys = jax.random.split(key, len(widths) - 1)
  return [
    jax.random.normal(k, (m, n)) / m**0.5
    for k, m, n in zip(keys, widths[:-1], widths[1:], strict=True)
  ]


teacher = init(jax.random.key(0), (32, 256, 8))
student = init(jax.random.key(1), (32, 128, 128, 8))


def batch(key):
  return jax.random.normal(key, (64, 32))


def loss(params, x_BxD):
  wrong = network(params, x_BxD) - network(teacher, x_BxD)
  return jnp.mean(jnp.square(wrong))


heldout = batch(jax.random.key(2))
keys = jax.random.split(jax.random.key(3), STEPS)

# %%
tx = optax.adam(2e-3)


@jax.jit
def step(params, state, key):
  grads = jax.grad(loss)(params, batch(key))
  updates, state = tx.update(grads, state, params)
  return optax.apply_updates(params, updates), state


def run(step, params, state, keys):
  """Returns the held-out loss after every `INNER_STEPS` steps."""
  losses = []
  for i, key in enumerate(keys, 1):
    params, state = step(params, state, key)
    if i % INNER_STEPS == 0:
      losses.append(float(loss(params, heldout)))
  return losses


losses = {'Adam, one peer': run(step, student, tx.init(student), keys)}
print(f'{losses["Adam, one peer"][-1]:.4f}')

# %% [markdown]
# ## One device
#
# Only the import and the line of the optimizer change. Every tenth update moves
# the parameters by the decoded message; the rest stays in `state.error`. One
# peer gains nothing from this, but it is enough to try rates, compressors and
# error feedback.

# %%
tx = sparseloco(optax.adam(2e-3), inner_steps=INNER_STEPS)


@jax.jit
def step(params, state, key):
  grads = jax.grad(loss)(params, batch(key))
  updates, state = tx.update(grads, state, params)
  return optax.apply_updates(params, updates), state


losses['SparseLoCo, one peer'] = run(step, student, tx.init(student), keys)
print(f'{losses["SparseLoCo, one peer"][-1]:.4f}')

# %% [markdown]
# ## Peers along an axis of vmap
#
# `axis_name` names the axis of the peers. Each has its own data, Adam state and
# error feedback. Data-parallel Adam, which averages the gradient in every step,
# is the comparison.
#
# Under `vmap` the step number is an array with one entry per peer, so the
# exchange is computed in every step and dropped in nine of ten. For a small
# model this does not matter; `experiments/transformations.py` keeps the step
# number out of the map.

# %%
AXIS = 'peers'
keys_TxR = jax.vmap(lambda key: jax.random.split(key, PEERS))(keys)


def on_peers(tx, mean):
  """Trains all peers; returns the held-out losses of the first, and states."""

  def one(params, state, key):
    grads = jax.grad(loss)(params, batch(key))
    if mean:
      grads = jax.lax.pmean(grads, AXIS)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  step = jax.jit(jax.vmap(one, axis_name=AXIS))
  params, state = jax.vmap(
    lambda _: (student, tx.init(student)), axis_name=AXIS
  )(jnp.arange(PEERS))
  losses = []
  for i, keys_R in enumerate(keys_TxR, 1):
    params, state = step(params, state, keys_R)
    if i % INNER_STEPS == 0:
      losses.append(float(loss([w[0] for w in params], heldout)))
  return losses, state


losses[f'Adam, {PEERS} peers'], _ = on_peers(optax.adam(2e-3), mean=True)
tx = sparseloco(optax.adam(2e-3), inner_steps=INNER_STEPS, axis_name=AXIS)
losses[f'SparseLoCo, {PEERS} peers'], state = on_peers(tx, mean=False)
for name, curve in losses.items():
  print(f'{name:20} {curve[-1]:.4f}')

# %% [markdown]
# `state.stats` describes the last exchange of each peer.

# %%
stats = state.stats
print('share of the energy sent:  ', stats.energy_kept.round(3))
print('norm of the error feedback:', stats.error_norm.round(3))
print('number of each code sent:\n', stats.code_counts)

# %% [markdown]
# ## A device for each peer
#
# The same transformation under `jax.shard_map`: only the compressed messages
# cross the mesh axis, in an all-gather. Here the devices are four CPU devices.

# %%
mesh = jax.make_mesh((PEERS,), (AXIS,), (jax.sharding.AxisType.Auto,))


def mapped(f):
  """Maps `f` over peers, along a leading axis of all arrays."""

  def g(*trees):
    mine = jax.tree.map(lambda x: x[0], trees)
    return jax.tree.map(lambda x: x[None], f(*mine))

  spec = jax.P(AXIS)
  return jax.jit(jax.shard_map(g, mesh=mesh, in_specs=spec, out_specs=spec))


@mapped
def train(params, state, key):
  grads = jax.grad(loss)(params, batch(key))
  updates, state = tx.update(grads, state, params)
  return optax.apply_updates(params, updates), state


params = [jnp.stack([w] * PEERS) for w in student]
state = mapped(tx.init)(params)
compiled = train.lower(params, state, keys_TxR[0]).compile()
curve = []
for i, keys_R in enumerate(keys_TxR, 1):
  params, state = compiled(params, state, keys_R)
  if i % INNER_STEPS == 0:
    curve.append(float(loss([w[0] for w in params], heldout)))
print('devices:', len(params[0].sharding.device_set))
print(f'held-out loss {curve[-1]:.4f}')

# %% [markdown]
# The compiled program shows what crosses: all collectives, with the shapes of
# their results.

# %%
shapes = [
  line.split(' = ')[1].split(' all-gather(')[0].split('{')[0]
  for line in compiled.as_text().splitlines()
  if ' all-gather(' in line
]
elements = sum(w[0].size for w in params)
print(f'{elements} parameters per peer; gathered from {PEERS} peers:')
for shape in shapes:
  print(' ', shape)

# %%
fig, ax = plt.subplots()
losses[f'the same, {PEERS} devices'] = curve
styles = ['C0--', 'C1--', 'C0', 'C1', 'k:']
for (name, curve), style in zip(losses.items(), styles, strict=True):
  steps = [INNER_STEPS * (i + 1) for i in range(len(curve))]
  ax.plot(steps, curve, style, label=name)
ax.set(xlabel='inner steps', ylabel='held-out squared error', yscale='log')
ax.legend()
plt.show()
