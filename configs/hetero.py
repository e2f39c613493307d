"""Nine unequal islands train on Shakespeare: full replicas and pipelines.

The devices are fictitious, as slow as the model is small: 5 to 40 MFLOP/s, and
links of some kb/s. Their limits are realistic: a device of 4.2 MB does not hold
the model, which takes 4.4 MB and more, and its link is too slow to pass whole
activations. Half of the arithmetic is in such devices.

  python run.py --config=configs/hetero.py --role=plan    the assignment
  python run.py --config=configs/hetero.py
  python run.py --config=configs/hetero.py:smoke

The plan makes five replicas and four pipelines of two stages, whose boundaries
pass 32 or 13 bytes per position instead of 256: 60 or 22 numbers of four bits
and a step. Their work per round spreads 13:1. Each does as many steps as train
well, on as large a batch, as it can in 18 minutes, and counts by its tokens.
ISLANDS is the output of the plan; a test compares them.
"""

import dataclasses

from covenant import config as config_lib

INVENTORY = (
  '1xany with 40 MFLOP/s with 8 MB on 100 kb/s, '
  '1xany with 20 MFLOP/s with 8 MB on 100 kb/s, '
  '1xany with 10 MFLOP/s with 8 MB on 100 kb/s, '
  '2xany with 5 MFLOP/s with 8 MB on 100 kb/s, '
  '2xany with 20 MFLOP/s with 4.2 MB on 40 kb/s, '
  '2xany with 10 MFLOP/s with 4.2 MB on 20 kb/s, '
  '4xany with 5 MFLOP/s with 4.2 MB on 10 kb/s'
)
_PIPELINE = config_lib.Island(stages=2, rank=60, bits=4)
ISLANDS = (
  config_lib.Island(steps=20, batch=10),
  config_lib.Island(steps=13, batch=8),
  dataclasses.replace(_PIPELINE, steps=13, batch=8),
  config_lib.Island(steps=13, batch=4),
  dataclasses.replace(_PIPELINE, steps=7, batch=6),
  config_lib.Island(count=2, steps=13, batch=2),
  dataclasses.replace(_PIPELINE, count=2, steps=5, batch=3, rank=22),
)


def get_config(variant: str = '') -> config_lib.Config:
  base = config_lib.Config(
    name='hetero',
    rounds=400,
    miners=9,
    islands=ISLANDS,
    model=config_lib.Model(width=64, layers=2, heads=4, kv_heads=2),
    data=config_lib.Data(source='shakespeare', context=64),
    optim=config_lib.Optim(
      inner_steps=10,
      inner=config_lib.Inner(learning_rate=1e-2, warmup_steps=50),
      outer=config_lib.Outer(learning_rate=0.7),
      aggregation=config_lib.Aggregation(weight='tokens'),
      most_sequences=200,  # of the largest island
    ),
    gauntlet=config_lib.Gauntlet(evaluate=4),
    checkpoint=config_lib.Checkpoint(publish=50),
    plan=config_lib.Plan(inventory=INVENTORY, compute_minutes=18.0, peers=9),
  )
  smoke = dataclasses.replace(
    base,
    name='hetero-smoke',
    rounds=8,
    optim=dataclasses.replace(
      base.optim,
      inner=dataclasses.replace(base.optim.inner, warmup_steps=10),
    ),
    eval=config_lib.Eval(every=4),
    checkpoint=config_lib.Checkpoint(every=4),
  )
  return config_lib.choose(variant, {'': base, 'smoke': smoke})
