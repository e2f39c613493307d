"""A trillion parameters: the plan of a run that nobody has published.

The shape scales configs/72b.py up as Llama's family does: FFN 3.5 x width,
heads of 128, 12 queries per key, the vocabulary and the data of 72b. Width and
depth grow together: 130 layers, near the 126 of Llama 3's 405B, of width 24,576
= 384 blocks of 64, which 8, 16, 32, 64 and 128 devices divide.
1,001,002,229,760 parameters, with tied embeddings.

One peer is 64 hosts of eight B200: heads and FFN are split over the eight of a
host, whose link is 18 times as fast as the link between hosts; FSDP goes over
the hosts. 16 hosts would hold the state, but every microbatch gathers all
weights over the slow link, so a device needs eight sequences at once to hide
the gather behind arithmetic, and memory for their activations.

The recipe is 72b's, adapted to the size: 512 sequences per peer and step, H =
100 (as INTELLECT-1), so that a round spends its time computing, one bit per
value, links of 10 Gbit/s both ways (1250 MB/s), and half the peak learning
rate, 6e-5. It is not trained and not tuned. docs/scale.md has the plan's
tables, all that changes at this size, and the command of each host.

  python run.py --config=configs/1t.py --role=plan
"""

from covenant import config as config_lib


def get_config(variant: str = '') -> config_lib.Config:
  base = config_lib.Config(
    name='1t',
    rounds=6_190,
    miners=1,
    model=config_lib.Model(
      vocab_size=262_144,
      width=24_576,
      layers=130,
      heads=192,
      kv_heads=16,
      ffn_width=86_016,
      rope_theta=500_000.0,
      scan_layers=True,
      remat='block',
      loss_chunk=128,
      attention='auto',
      compute_dtype='bfloat16',
    ),
    data=config_lib.Data(source='shards', path='data/dclm', context=2048),
    optim=config_lib.Optim(
      inner_steps=100,
      inner=config_lib.Inner(
        learning_rate=6e-5,
        warmup_steps=1500,
        batch_size=512,
      ),
    ),
    eval=config_lib.Eval(every=10, sequences=1024),
    phases=config_lib.Phases(
      round_blocks=290, put_blocks=16, select_blocks=52, takeover_blocks=14
    ),
    devices=config_lib.Devices(fsdp=64, tensor=8, offload=True),
    plan=config_lib.Plan(hardware='512xB200', upload=1250.0, download=1250.0),
  )
  return config_lib.choose(variant, {'': base})
