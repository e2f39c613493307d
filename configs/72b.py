"""Covenant-72B: 80 layers, width 8192, H = 30, k = 64 of 4096, 2 bits.

Source: arXiv 2603.08163 and the code of its nodes: 70,599,843,840 parameters
with embeddings tied over 262,144 tokens; 192 sequences of 2048 tokens per peer
and inner step, AdamW, 1500 steps of warm-up, a cosine of 140,000 steps that
pauses at step 82,200 for 13,500 and ends at a tenth of the peak, and an anneal
after round 6,100: up to a quarter in 100 steps, down to zero in 4,500, of which
the published model has seen 90 rounds. The peak is that of the code, 1.17e-4;
the paper says 1.2e-4. Error decay 0.95. About 17 peers per round, 20 at most,
1.1 T tokens, each peer on eight B200: 20 minutes of computing and 70 s of
transfers per round. The data are DCLM; the anneal takes 27 % instruction, 20 %
synthetic web, 15 % code, 13 % math and 25 % replay (docs/data.md).

  python run.py --config=configs/72b.py --role=plan     does it fit; 20 seconds
  python run.py --config=configs/72b.py --role=miner    docs/operating.md
  python run.py --config=configs/72b.py:smoke           15 seconds, here

Without the hardware the plain command prints the plan and what is missing.

Outer Nesterov is the default, at momentum 0.3 and a rate of 0.7, so that a
delta that persists moves the parameters by the published 1.0. On top of error
feedback more momentum harms a small model (experiments/density.py).
`:published` is plain outer SGD at 1.0; that run lowered its rate by hand later,
to 0.65 by the paper, to 0.4 by the code. Without momentum a device holds 35 GB
less.

Chosen by us: the phases, by what --role=plan needs on 500 MB/s down and 110 up
(docs/scale.md). A round is 103 blocks of 12 s (published: 115), 20 minutes and
36 s, as ten early steps of the next round hide the exchange (`overlap`);
`put_blocks` is for a commitment to become final and a payload of 1.4 GB to
arrive, `select_blocks` for validators to fetch, decode and vote.

`:smoke` is the same program at a small size: scan, remat, chunks of the loss,
bfloat16, two-bit messages, the schedule with its pause and its anneal.
"""

import dataclasses

from covenant import config as config_lib


def get_config(variant: str = '') -> config_lib.Config:
  base = config_lib.Config(
    name='72b',
    rounds=6_190,
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
      loss_chunk=512,
      attention='auto',
      compute_dtype='bfloat16',
    ),
    data=config_lib.Data(
      source='shards',
      phases=(
        config_lib.DataPhase(0, (config_lib.DataShare('data/dclm'),)),
        config_lib.DataPhase(
          6_100,
          (
            config_lib.DataShare('data/instruction', 0.27),
            config_lib.DataShare('data/dclm', 0.25),  # replay
            config_lib.DataShare('data/synthetic', 0.20),
            config_lib.DataShare('data/code', 0.15),
            config_lib.DataShare('data/math', 0.13),
          ),
        ),
      ),
      context=2048,
      cache_gb=20.0,
    ),
    optim=config_lib.Optim(
      inner_steps=30,
      overlap=10,
      inner=config_lib.Inner(
        learning_rate=1.17e-4,
        warmup_steps=1500,
        decay_steps=141_500,
        flat_start=82_200,
        flat_steps=13_500,
        anneal_start=183_000,
        anneal_warmup_steps=100,
        anneal_decay_steps=4_500,
        anneal_ratio=0.25,
        batch_size=192,
        microbatch_size=2,
      ),
      outer=config_lib.Outer(learning_rate=0.7, momentum=0.3),
      # The error decay, 0.95, is the published one, too. Fair pay may need 0.8
      # (docs/gauntlet.md), which has not run at this size.
      compression=config_lib.Compression(quantizer='statistical'),
    ),
    eval=config_lib.Eval(every=10, sequences=1024),
    phases=config_lib.Phases(
      round_blocks=103, put_blocks=12, select_blocks=16, takeover_blocks=12
    ),
    devices=config_lib.Devices(fsdp=8, offload=True),
    plan=config_lib.Plan(hardware='8xB200', compute_minutes=20.0),
  )
  published = dataclasses.replace(
    base,
    name='72b-published',
    optim=dataclasses.replace(base.optim, outer=config_lib.Outer()),
  )
  smoke = dataclasses.replace(
    base,
    name='72b-smoke',
    rounds=10,
    miners=3,
    model=dataclasses.replace(
      base.model,
      vocab_size=256,
      width=64,
      layers=3,
      heads=4,
      kv_heads=2,
      ffn_width=192,
      loss_chunk=32,
    ),
    data=config_lib.Data(source='shakespeare', context=64),
    optim=dataclasses.replace(
      base.optim,
      inner_steps=8,
      overlap=2,
      inner=dataclasses.replace(
        base.optim.inner,
        learning_rate=1e-2,
        warmup_steps=8,
        decay_steps=60,
        flat_start=30,
        flat_steps=10,
        anneal_start=64,
        anneal_warmup_steps=3,
        anneal_decay_steps=13,
        rejoin_steps=8,
        batch_size=8,
        microbatch_size=4,
      ),
    ),
    gauntlet=config_lib.Gauntlet(evaluate=3),
    eval=config_lib.Eval(every=5),
    checkpoint=config_lib.Checkpoint(every=5),
    phases=config_lib.Phases(),
    devices=config_lib.Devices(),
    plan=config_lib.Plan(),
  )
  return config_lib.choose(
    variant, {'': base, 'published': published, 'smoke': smoke}
  )
