"""A network of real processes on this machine, in real time.

Four miners, two validators and an evaluator share an embedded chain and a
folder of buckets, and nothing else. On two cores:

  python run.py --config=configs/localnet.py --role=localnet        6 minutes
  python run.py --config=configs/localnet.py:smoke --role=localnet  1 minute

`:smoke` has three rounds. Both end with a line, and an exit status, that say if
all members hold the same history and the same parameters. --role=emulate does
the same run in virtual time, with the same parameters bit for bit.
"""

import dataclasses

from covenant import config as config_lib


def get_config(variant: str = '') -> config_lib.Config:
  base = config_lib.Config(
    name='localnet',
    rounds=20,
    miners=4,
    validators=2,
    model=config_lib.Model(width=64, layers=2, heads=4, kv_heads=2),
    data=config_lib.Data(source='shakespeare', context=64),
    optim=config_lib.Optim(
      inner_steps=10,
      inner=config_lib.Inner(learning_rate=1e-2, warmup_steps=20),
      outer=config_lib.Outer(learning_rate=0.7),
    ),
    gauntlet=config_lib.Gauntlet(evaluate=4, sequences=8, weights_every=1),
    eval=config_lib.Eval(every=1),
    checkpoint=config_lib.Checkpoint(every=1, publish=1),
    phases=config_lib.Phases(
      round_blocks=32, put_blocks=8, select_blocks=8, takeover_blocks=6
    ),
    network=config_lib.Network(block_seconds=0.5),
  )
  smoke = dataclasses.replace(base, name='localnet-smoke', rounds=3)
  return config_lib.choose(variant, {'': base, 'smoke': smoke})
