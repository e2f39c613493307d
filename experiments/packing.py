"""Attention within documents against attention over all of a sequence.

  python -m experiments.packing            10 core minutes
  python -m experiments.packing --quick    a minute

Documents are the scenes of Shakespeare's plays; whole plays are held out, as in
the main job. Two miners train the byte-level model of configs/shakespeare.py on
sequences of 256 bytes, which a scene of 7 KB rarely ends in; one in 27 has a
boundary. Only `data.packing` differs. Each model is evaluated on the held-out
scenes as it was trained: a packed one never sees the scene before.

Criterion, written before the runs: none; the difference is measured, with its
range over seeds.
"""

import dataclasses
import json
import pathlib
import re
import sys
import tempfile

from covenant import config as config_lib
from covenant.data import corpus
from covenant.data import dataset
from covenant.emulate import emulation

SEEDS = (0, 1, 2)
_SCENE = re.compile(r'^#+ .*scene.*$', re.MULTILINE | re.IGNORECASE)


def scenes(text: str) -> list[str]:
  """Returns the scenes of a play; what is before the first is a document."""
  starts = [0, *(match.start() for match in _SCENE.finditer(text)), len(text)]
  parts = [
    text[first:last]
    for first, last in zip(starts[:-1], starts[1:], strict=True)
  ]
  return [part for part in parts if part.strip()]


def write(folder: pathlib.Path) -> None:
  """Writes the scenes of both splits as JSON lines."""
  plays = corpus.load(config_lib.Data(), seed=0)
  for name, documents in (('train', plays.train), ('val', plays.heldout)):
    rows = [
      json.dumps({'text': scene}) + '\n'
      for play in documents
      for scene in scenes(play.text)
    ]
    (folder / f'{name}.jsonl').write_text(''.join(rows), encoding='utf-8')


def make_config(
  path: pathlib.Path, packing: str, seed: int, rounds: int
) -> config_lib.Config:
  """Returns the config of one run."""
  sets = [f'seed={seed}', 'optim.compression.error_decay=0.95']
  base = config_lib.load('configs/shakespeare.py', sets)
  data = config_lib.Data(
    source='text', path=str(path), context=256, packing=packing
  )
  inner = dataclasses.replace(base.optim.inner, batch_size=2, warmup_steps=10)
  return dataclasses.replace(
    base,
    rounds=rounds,
    miners=2,
    adversaries=(),
    data=data,
    optim=dataclasses.replace(base.optim, inner=inner),
    gauntlet=dataclasses.replace(base.gauntlet, evaluate=0),
    eval=config_lib.Eval(every=rounds, sequences=512),
  )


def loss(config: config_lib.Config) -> float:
  """Returns the held-out nats per byte at the end of a run."""
  with tempfile.TemporaryDirectory() as folder:
    emulation.run(config, folder)
    lines = pathlib.Path(folder, 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  return [r['nats_per_byte'] for r in rows if 'nats_per_byte' in r][-1]


def main() -> None:
  quick = '--quick' in sys.argv
  rounds, seeds = (5, SEEDS[:1]) if quick else (60, SEEDS)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder)
    write(path)
    data = dataset.load(make_config(path, 'documents', 0, rounds))
    print(f'{data.train.num_tokens:,} tokens to train on')
    gaps = []
    for seed in seeds:
      plain, packed = (
        loss(make_config(path, packing, seed, rounds))
        for packing in ('concatenate', 'documents')
      )
      gaps.append(packed - plain)
      print(
        f'seed {seed}: concatenate {plain:.4f}, documents {packed:.4f} nats '
        f'per byte, difference {gaps[-1]:+.4f}',
        flush=True,
      )
  print(
    f'documents - concatenate: {sum(gaps) / len(gaps):+.4f} '
    f'({min(gaps):+.4f} to {max(gaps):+.4f} over {len(gaps)} seeds)'
  )


if __name__ == '__main__':
  main()
