"""Covenant-72B: 80 layers, width 8192, H = 30, k = 64 of 4096, 2 bits.

Source: arXiv 2603.08163 (reference numbers in papers.md 2, templar.md 1 and
6): 70,599,843,840 parameters with tied embeddings over 262,144 tokens; 192
sequences of 2048 a peer and inner step, AdamW at 1.2e-4 down to 1.2e-5 with
1500 steps of warm-up, error decay 0.95, 6,100 rounds, about 17 peers a round
and 1.1 T tokens; 94.5 % of the time went into computing.

  python run.py --config=configs/72b.py

on an ordinary machine says what is missing. One peer of the published run was
a node of eight B200. With --role=miner or validator it is the recipe of a node
of a network (docs/operating.md); sharding one peer over eight devices is still
to come.
"""

from covenant import config as config_lib


def get_config(variant: str = '') -> config_lib.Config:
  base = config_lib.Config(
    name='72b',
    rounds=6_100,
    miners=1,
    model=config_lib.Model(
      vocab_size=262_144,
      width=8192,
      layers=80,
      heads=64,
      kv_heads=8,
      ffn_width=28_672,
      rope_theta=500_000.0,
      scan_layers=True,
      remat='block',
      compute_dtype='bfloat16',
    ),
    data=config_lib.Data(source='shards', path='data/dclm', context=2048),
    optim=config_lib.Optim(
      inner_steps=30,
      inner=config_lib.Inner(
        learning_rate=1.2e-4,
        warmup_steps=1500,
        batch_size=192,
        microbatch_size=8,
      ),
      compression=config_lib.Compression(quantizer='statistical'),
    ),
    eval=config_lib.Eval(every=10, sequences=1024),
    # Of 115 blocks of 12 s: a commitment is final after about one minute, a
    # payload of 1.8 GB takes one at 250 Mbit/s.
    phases=config_lib.Phases(put_blocks=12, select_blocks=8, takeover_blocks=6),
  )
  return config_lib.choose(variant, {'': base})
