"""1.2 B parameters: the size of CCLoco and of Templar's first public runs.

Source: the CCLoco report and the code of Templar's nodes: width 2048, 16
layers, 8 heads, FFN 8192, LLaMA-2 vocabulary, 1,204,881,408 parameters; 158
rounds of H = 15 (2370 steps, 9.94 B tokens), inner rate 8e-4, k = 32 of 4096
(0.78 %). Error decay and quantizer are those of SparseLoCo, which followed it
(0.95, 2 bits).

  python run.py --config=configs/1b.py       (tokenize first: configs/512m.py)

The emulator holds all eight peers: about 149 GB beside activations. Phases are
what 20 peers keep on 500 MB/s down and 110 up: a round is 46 blocks of 12 s.
"""

from covenant import config as config_lib


def get_config(variant: str = '') -> config_lib.Config:
  base = config_lib.Config(
    name='1b',
    seed=42,
    rounds=158,
    miners=8,
    model=config_lib.Model(
      vocab_size=32_000,
      width=2048,
      layers=16,
      heads=8,
      kv_heads=8,
      ffn_width=8192,
      tie_embeddings=False,
      scan_layers=True,
      remat='block',
      loss_chunk=512,
      attention='auto',
      compute_dtype='bfloat16',
    ),
    data=config_lib.Data(source='shards', path='data/dclm', context=2048),
    optim=config_lib.Optim(
      inner_steps=15,
      inner=config_lib.Inner(
        learning_rate=8e-4, warmup_steps=500, batch_size=256, microbatch_size=8
      ),
      compression=config_lib.Compression(k=32, quantizer='statistical'),
    ),
    eval=config_lib.Eval(every=10, sequences=1024),
    phases=config_lib.Phases(
      round_blocks=46, put_blocks=8, select_blocks=12, takeover_blocks=12
    ),
    devices=config_lib.Devices(peers=0),  # one peer per device
  )
  return config_lib.choose(variant, {'': base})
