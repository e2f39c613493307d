"""The SparseLoCo paper's 512 M experiment: 8 peers, H = 15, k = 128 of 4096.

Source: the authors' final sweep (SparseLoCo, arXiv 2508.15706): a Llama of
512,398,848 parameters, 256 sequences of 2048 tokens per peer and inner step,
163 rounds = 10.26 B tokens (20 per parameter), DCLM-baseline in the LLaMA-2
vocabulary. The final loss is not published as a number.

Their data does not come with this project. Tokenize yours, then train:

  python run.py --role=tokenize --config=configs/512m.py \
      --config.data.source=text --config.data.path=TEXT \
      --config.data.tokenizer=sentencepiece \
      --config.data.tokenizer_path=llama2.model --workdir=data/dclm
  python run.py --config=configs/512m.py

The emulator holds all eight peers: about 64 GB beside activations. Phases are
what 20 peers keep on 500 MB/s down and 110 up: a round is 36 blocks of 12 s.
`:diloco` is their tuned baseline.
"""

import dataclasses

from covenant import config as config_lib


def get_config(variant: str = '') -> config_lib.Config:
  base = config_lib.Config(
    name='512m',
    seed=42,
    rounds=163,
    miners=8,
    model=config_lib.Model(
      vocab_size=32_000,
      width=1536,
      layers=12,
      heads=12,
      kv_heads=12,
      ffn_width=5440,
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
        learning_rate=1e-3, warmup_steps=500, batch_size=256, microbatch_size=8
      ),
      compression=config_lib.Compression(k=128, quantizer='statistical'),
    ),
    eval=config_lib.Eval(every=10, sequences=1024),
    phases=config_lib.Phases(
      round_blocks=36, put_blocks=8, select_blocks=12, takeover_blocks=12
    ),
    devices=config_lib.Devices(peers=0),  # one peer per device
  )
  diloco = dataclasses.replace(
    base.optim,
    method='diloco',
    inner=dataclasses.replace(base.optim.inner, learning_rate=8e-4),
    outer=config_lib.Outer(learning_rate=0.6, momentum=0.9),
  )
  return config_lib.choose(
    variant,
    {
      '': base,
      'diloco': dataclasses.replace(base, name='512m-diloco', optim=diloco),
    },
  )
