"""SparseLoCo on the plays of Shakespeare: the first run, and the default.

Eight emulated miners train one byte-level Llama; each sends one bit and one
index for every 64th value of its delta. Two more are adversaries: one copies
the best paid miner as soon as it can read its payload, the other is honest
until it is well paid and then flips the signs of its delta. Gauntlet finds both
(docs/gauntlet.md). On two cores:

  python run.py --config=configs/shakespeare.py           5 minutes, 1.52
  python run.py --config=configs/shakespeare.py:smoke     20 seconds
  python run.py --config=configs/shakespeare.py:diloco    4 minutes, 1.58
  python run.py --config=configs/shakespeare.py:ddp       6 minutes, 1.58

The numbers are held-out losses in nats per byte. `:diloco` sends every delta
dense (202 times the bytes), `:ddp` every gradient (2019 times); both have the
eight honest miners only.
"""

import dataclasses

from covenant import config as config_lib


def get_config(variant: str = '') -> config_lib.Config:
  base = config_lib.Config(
    name='shakespeare',
    rounds=400,
    miners=10,
    adversaries=('copier-fast', 'sleeper'),
    model=config_lib.Model(width=64, layers=2, heads=4, kv_heads=2),
    data=config_lib.Data(source='shakespeare', context=64),
    optim=config_lib.Optim(
      inner_steps=10,
      inner=config_lib.Inner(learning_rate=1e-2, warmup_steps=50),
      outer=config_lib.Outer(learning_rate=0.7),
      # 0.95 is published; 0.8 ends lower here, and pay needs it
      # (docs/results.md, docs/gauntlet.md).
      compression=config_lib.Compression(error_decay=0.8),
    ),
    # Sequences per round and validator: 208 forward passes; training has 2400.
    gauntlet=config_lib.Gauntlet(evaluate=4),
    checkpoint=config_lib.Checkpoint(publish=50),
  )
  honest = dataclasses.replace(base, miners=8, adversaries=())
  inner = base.optim.inner
  smoke = dataclasses.replace(
    base,
    name='shakespeare-smoke',
    rounds=8,
    optim=dataclasses.replace(
      base.optim, inner=dataclasses.replace(inner, warmup_steps=10)
    ),
    eval=config_lib.Eval(every=4),
    checkpoint=config_lib.Checkpoint(every=4),
  )
  diloco = dataclasses.replace(
    honest,
    name='shakespeare-diloco',
    optim=config_lib.Optim(
      method='diloco',
      inner_steps=base.optim.inner_steps,
      inner=inner,
      outer=config_lib.Outer(learning_rate=0.7, momentum=0.9),
    ),
  )
  ddp = dataclasses.replace(
    honest,
    name='shakespeare-ddp',
    rounds=base.rounds * base.optim.inner_steps,
    optim=config_lib.Optim(method='ddp', inner_steps=1, inner=inner),
    eval=config_lib.Eval(every=100),
    checkpoint=config_lib.Checkpoint(every=100),
  )
  return config_lib.choose(
    variant, {'': base, 'smoke': smoke, 'diloco': diloco, 'ddp': ddp}
  )
