"""150 M class: the smallest model of Templar's ladder, eight peers on one host.

Source: the code of Templar's nodes (github.com/one-covenant/templar): width
1024, 12 layers, 16 heads, LLaMA-2 vocabulary; the FFN is 2816 (2688 in their
file, rounded up to a multiple of 256 by the code that reads it). That is
219,702,272 parameters, 187 M without one of the two embedding tables. The
recipe is that of configs/512m.py, scaled: 20 tokens per parameter, H = 15,
k = 64 of 4096, 2 bits, error decay 0.95.

  python run.py --config=configs/150m.py     (tokenize first: configs/512m.py)

The emulator holds all eight peers: about 27 GB beside activations. Phases are
what 20 peers keep on 500 MB/s down and 110 up: a round is 36 blocks of 12 s.
"""

from covenant import config as config_lib


def get_config(variant: str = '') -> config_lib.Config:
  base = config_lib.Config(
    name='150m',
    seed=42,
    rounds=140,
    miners=8,
    model=config_lib.Model(
      vocab_size=32_000,
      width=1024,
      layers=12,
      heads=16,
      kv_heads=16,
      ffn_width=2816,
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
        learning_rate=1e-3, warmup_steps=250, batch_size=128, microbatch_size=16
      ),
      compression=config_lib.Compression(k=64, quantizer='statistical'),
    ),
    eval=config_lib.Eval(every=10, sequences=1024),
    phases=config_lib.Phases(
      round_blocks=36, put_blocks=8, select_blocks=12, takeover_blocks=12
    ),
    devices=config_lib.Devices(peers=0),  # one peer per device
  )
  return config_lib.choose(variant, {'': base})
