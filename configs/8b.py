"""8 B parameters: the run before Covenant-72B, known by one row of a table.

Source: the 8B row of Covenant's table of times (arXiv 2603.08163, section 4.3):
15 peers, H = 30, eight H200 per peer, 4.5 minutes of computing and 12 s of
transfers per round, 95.7 % of the time spent computing; about 200 B tokens.

Chosen, because it is not published: Llama 3's 8B layers (width 4096, 32 layers,
32 and 8 heads, FFN 14,336); the vocabulary and tied embeddings of
configs/72b.py, so that both read the same token shards and eight devices hold
whole blocks of it (Llama 3's 128,256 tokens are 2004 blocks of 64, which eight
do not divide). Together 8,053,329,920 parameters. Batch and compression are
those of 72b; the peak rate is that of Llama models of this size, 3e-4. 1,130
rounds of 15 peers are 200 B tokens. The plan's share of the peak, 0.285,
corresponds to 4.5 minutes.

  python run.py --config=configs/8b.py --role=plan
  python run.py --config=configs/8b.py --role=miner     docs/operating.md
"""

from covenant import config as config_lib


def get_config(variant: str = '') -> config_lib.Config:
  base = config_lib.Config(
    name='8b',
    rounds=1_130,
    miners=1,
    model=config_lib.Model(
      vocab_size=262_144,
      width=4096,
      layers=32,
      heads=32,
      kv_heads=8,
      ffn_width=14_336,
      rope_theta=500_000.0,
      scan_layers=True,
      remat='block',
      loss_chunk=512,
      attention='auto',
      compute_dtype='bfloat16',
    ),
    data=config_lib.Data(source='shards', path='data/dclm', context=2048),
    optim=config_lib.Optim(
      inner_steps=30,
      inner=config_lib.Inner(
        learning_rate=3e-4,
        warmup_steps=1500,
        batch_size=192,
        microbatch_size=4,
      ),
      compression=config_lib.Compression(quantizer='statistical'),
    ),
    eval=config_lib.Eval(every=10, sequences=1024),
    # 8.4 minutes: the steps, and two in which commitments become final.
    phases=config_lib.Phases(
      round_blocks=46, put_blocks=8, select_blocks=12, takeover_blocks=12
    ),
    devices=config_lib.Devices(fsdp=8),
    plan=config_lib.Plan(
      hardware='8xH200', compute_minutes=4.5, peers=15, peak_fraction=0.285
    ),
  )
  return config_lib.choose(variant, {'': base})
