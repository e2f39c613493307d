# %% [markdown]
# # Planning a 72B run
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/covenant/blob/main/notebooks/05_planning_a_72b_run.ipynb)
#
# The needs of `configs/72b.py` on one peer of eight B200: memory in every phase
# of a round, bytes on the links, and the share of the time in which the devices
# train. Nothing is compiled here; `python run.py --config=configs/72b.py
# --role=plan` also compiles, and prints all of this.
#
# A ~ marks numbers that are estimated or assumed.

# %%
import dataclasses
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

import matplotlib.pyplot as plt
import numpy as np

from covenant import config as config_lib
from covenant.models import llama
from covenant.plan import hardware as hardware_lib
from covenant.plan import memory
from covenant.plan import table
from covenant.plan import timing

plt.style.use('notebooks.mplstyle')
config = config_lib.load('../configs/72b.py')
hardware = hardware_lib.check(config)
cut = memory.shards(config)
print(f'{llama.num_params(config.model):,} parameters')
print(f'{cut.params:,} on each of {hardware.count} x {hardware.name}')
print(f'payload {cut.payload_bytes / 1e9:.2f} GB')
print(table.verdict(config))

# %% [markdown]
# ## Memory
#
# Parameters, moments, error feedback and outer momentum are float32 and sharded
# over all devices. State that a phase does not need is offloaded to host
# memory; without that, the inner step would not fit.

# %%
PARTS = {
  'parameters': ('parameters', 'parameters of this round'),
  'AdamW moments': ('AdamW moments',),
  'gradient': ('gradient',),
  '~activations': ('activations',),
  'error feedback': ('error feedback',),
  'outer momentum': ('outer momentum',),
}
HATCHES = ('', '///', '', '...', '', 'xxx')


def bars(ax, config, offload):
  """Draws stacked bars of the phases, in GB per device."""
  phases = list(memory.phases(config, memory.shards(config), offload))
  names = [phase.name for phase in phases]
  left = np.zeros(len(phases))
  for (label, keys), hatch in zip(PARTS.items(), HATCHES, strict=True):
    size = np.array(
      [sum(phase.device.get(key, 0) for key in keys) for phase in phases]
    )
    ax.barh(
      names, size / 1e9, left=left, label=label, hatch=hatch, edgecolor='w'
    )
    left += size / 1e9
  known = {key for keys in PARTS.values() for key in keys}
  rest = [
    sum(v for k, v in phase.device.items() if k not in known)
    for phase in phases
  ]
  ax.barh(names, np.array(rest) / 1e9, left=left, label='other', color='grey')
  ax.axvline(memory.limit(config) / 1e9, color='k', ls='--', lw=1)
  ax.invert_yaxis()
  ax.grid(axis='y', visible=False)


fig, (above, below) = plt.subplots(2, 1, figsize=(8, 5.6), sharex=True)
bars(above, config, offload=False)
above.set_title('all on the device', loc='left', fontsize=10)
bars(below, config, offload=True)
below.set_title('idle state is in host memory', loc='left', fontsize=10)
below.set(
  xlabel='GB per device; dashed: limit for programs, of 192', xlim=(0, 290)
)
handles, labels = above.get_legend_handles_labels()
fig.legend(handles, labels, loc='outside upper center', ncols=4)
plt.show()

# %% [markdown]
# ## Other hardware
#
# Each row is one peer with this many devices and parameters sharded over all of
# them.

# %%
for kind in ('8xB200', '8xB300', '16xH200', '32xH100', '64xA100', '64x4090'):
  count = hardware_lib.parse(kind).count
  other = dataclasses.replace(
    config,
    devices=dataclasses.replace(config.devices, fsdp=count),
    plan=dataclasses.replace(config.plan, hardware=kind),
  )
  try:
    worst = memory.largest_phase(other)
  except config_lib.ConfigError as e:
    print(f'{kind:8} {e}')
    continue
  seconds = timing.step(other, hardware_lib.check(other)).total
  fits = 'fits' if memory.fits(other) else 'does not fit'
  print(
    f'{kind:8} {fits}: {worst.name} ~{worst.total / 1e9:.0f} of '
    f'{memory.limit(other) / 1e9:.0f} GB; ~{seconds:.0f} s per step'
  )

# %% [markdown]
# ## A round
#
# Bandwidths are in megabytes per second, the unit in which the published
# numbers of Covenant-72B agree with each other: 20 minutes of computing, 70 s
# of transfers, 94.5 % utilization. The same formula gives the utilization that
# other runs reported.

# %%
links = timing.links_of(config.plan)
compute = 60 * config.plan.compute_minutes
times = timing.round_time(links, compute, cut.payload_bytes, config.plan.peers)
print(
  f'ours: {times.compute:.0f} s computing, {times.upload:.1f} s up, '
  f'{times.gather:.1f} s down: {times.utilization:.1%}'
)
print('published                computing  transfers  reported  by formula')
for name, run in timing.PUBLISHED.items():
  share = timing.utilization(run.compute, run.communication)
  print(
    f'  {name:20} {run.compute:10.0f} s {run.communication:8.0f} s '
    f'{run.utilization:9.1%} {share:11.1%}'
  )

# %% [markdown]
# Utilization if every gradient (data-parallel) or the dense delta of a round
# (DiLoCo) were exchanged, for the same 20 minutes of steps on the same links,
# with each peer fetching from 19 others. For dense messages an all-reduce would
# fetch less, 2 x 19/20 of one payload each way, so it is shown as well.

# %%
dense = 4.0 * llama.num_params(config.model)
steps = config.optim.inner_steps
peers = config.plan.peers
reduced = 2 * (peers - 1) / peers * dense
slow = reduced / links.upload  # up and down at once: the slower link decides


def share(seconds):
  return timing.utilization(compute, seconds)


direct = timing.direct(links, dense, peers).seconds
WAYS = {
  'gradient, every step, direct': share(steps * direct),
  'gradient, every step, all-reduce': share(steps * slow),
  'dense delta, direct': share(direct),
  'dense delta, all-reduce': share(slow),
  'SparseLoCo': times.utilization,
}
fig, ax = plt.subplots(figsize=(7, 2.6))
drawn = ax.barh(list(WAYS), [100 * x for x in WAYS.values()])
ax.bar_label(drawn, [f' {x:.1%}' for x in WAYS.values()])
ax.set(xlabel='share of the time in which devices train (%)', xlim=(0, 110))
ax.invert_yaxis()
ax.grid(axis='y', visible=False)
plt.show()

# %% [markdown]
# ## More peers, slower links
#
# Every peer fetches the payloads of all others, so its download grows with
# their number. `docs/scale.md` has two remedies.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
counts = np.geomspace(2, 1000, 60).astype(int)
for h, style in zip((30, 60, 120), ('-', '--', ':'), strict=True):
  shares = [
    timing.round_time(
      links, compute * h / steps, cut.payload_bytes, n
    ).utilization
    for n in counts
  ]
  left.plot(counts, 100 * np.array(shares), style, label=f'{h} inner steps')
left.axvline(peers, color='grey', lw=0.8)
left.set(
  xlabel='peers per round',
  ylabel='share of training time (%)',
  xscale='log',
)
left.legend()
speeds = np.geomspace(1, 1000, 60)
for n, style in zip((10, 20, 50), ('-', '--', ':'), strict=True):
  shares = [
    timing.round_time(
      timing.Links(up * 1e6, up * 1e6), compute, cut.payload_bytes, n
    ).utilization
    for up in speeds
  ]
  right.plot(speeds, 100 * np.array(shares), style, label=f'{n} peers')
right.set(xlabel='link of a peer, each way (MB/s)', xscale='log')
right.legend()
plt.show()
