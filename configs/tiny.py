"""The smallest complete run, for tests: a few seconds.

  python run.py --config=configs/tiny.py
  python run.py --config=configs/tiny.py:diloco
  python run.py --config=configs/tiny.py:demo
  python run.py --config=configs/tiny.py:ddp

The text has a known entropy (covenant/data/corpus.py), about 1.6 nats per byte,
so that a loss can be compared with the optimum.
"""

import dataclasses

from covenant import config as config_lib


def get_config(variant: str = '') -> config_lib.Config:
  base = config_lib.Config(
    name='tiny',
    rounds=4,
    miners=3,
    model=config_lib.Model(
      width=32, layers=1, heads=2, kv_heads=1, ffn_width=64
    ),
    data=config_lib.Data(
      source='synthetic', context=16, synthetic_tokens=20_000
    ),
    optim=config_lib.Optim(
      inner_steps=3,
      inner=config_lib.Inner(learning_rate=2e-2, batch_size=4),
      compression=config_lib.Compression(k=16, block=(16, 16)),
    ),
    eval=config_lib.Eval(every=2, sequences=32),
    checkpoint=config_lib.Checkpoint(every=2),
    devices=config_lib.Devices(peers=1),  # each further device compiles anew
  )
  diloco = config_lib.Optim(
    method='diloco',
    inner_steps=3,
    inner=base.optim.inner,
    outer=config_lib.Outer(learning_rate=0.7, momentum=0.9),
  )
  demo = config_lib.Optim(
    method='demo',
    inner_steps=1,
    inner=base.optim.inner,
    compression=config_lib.Compression(
      kind='dct', k=8, block=(16, 16), quantizer='none', error_decay=0.9
    ),
  )
  ddp = dataclasses.replace(base.optim, method='ddp', inner_steps=1)
  return config_lib.choose(
    variant,
    {
      '': base,
      'diloco': dataclasses.replace(base, name='tiny-diloco', optim=diloco),
      'demo': dataclasses.replace(base, name='tiny-demo', optim=demo),
      'ddp': dataclasses.replace(base, name='tiny-ddp', optim=ddp),
    },
  )
