"""Faults of a node's own files: bits that flip, lines that tear, secrets.

Each case returns how much was tried and how much got through.
"""

import contextlib
import io
import json
import pathlib
import random
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from covenant import config as config_lib
from covenant import files
from covenant import metrics
from covenant.gauntlet import ratings
from covenant.node import workdir as workdir_lib
from covenant.pool import ledger as ledger_lib
from covenant.pool import miner as pool_miner
from covenant.protocol import checkpoint
from covenant.protocol import checksums
from covenant.report import amendments
from covenant.report import page

Config = config_lib.Config
_FLIPS = 24
_TORN = (b'oops', b'\xff', bytes(512), b'{"round":', b'[' * 5000)
_SECRET = 'ab12SECRET34cd'


def rotten_checkpoints(config: Config, folder: pathlib.Path) -> tuple[int, int]:
  """Flips a bit in a file of the newest of two own checkpoints."""
  rng = random.Random(0)
  policy = config_lib.Checkpoint(every=1, keep=2)
  whole = folder / 'whole' / 'checkpoints'
  blank = {'x': np.zeros(1000, np.float32), 'text': ''}
  with checkpoint.Checkpoints(whole, policy) as kept:
    for r in (1, 2):
      tree = {'x': np.full(1000, r, np.float32), 'text': f'round {r}'}
      kept.save_tree(r, tree)

  def restored(directory: pathlib.Path, said: list[str]) -> str:
    with checkpoint.Checkpoints(directory, policy, said.append) as kept:
      tree = kept.restore_tree(blank)
    same = tree and (tree['x'] == int(tree['text'][-1])).all()
    return tree['text'] if tree and same else 'other values'

  assert restored(whole, []) == 'round 2', 'a sound checkpoint was refused'
  through = 0
  paths = [p for p in sorted((whole / '2').rglob('*')) if p.is_file()]
  paths = [p.relative_to(whole) for p in paths if p.stat().st_size]
  for n in range(_FLIPS):
    directory, said = folder / str(n) / 'checkpoints', []
    shutil.copytree(whole, directory)
    path = directory / paths[n % len(paths)]
    path.write_bytes(_flipped(path.read_bytes(), rng))
    found = restored(directory, said)
    through += (found, len(said)) != ('round 1', 1)
    shutil.rmtree(folder / str(n))
  return _FLIPS, through


def rotten_seals(config: Config, folder: pathlib.Path) -> tuple[int, int]:
  """Flips each bit of a file that is sealed, one at a time."""
  path, data = folder / 'state', bytes(range(64))
  path.write_bytes(checksums.seal(data))
  assert checksums.unseal(path) == data, 'a sound file was refused'
  whole, through = path.read_bytes(), 0
  for bit in range(8 * len(whole)):
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    with contextlib.suppress(checksums.ChecksumError):
      checksums.unseal(path)
      through += 1
  return 8 * len(whole), through


def _flipped(data: bytes, rng: random.Random) -> bytes:
  """Returns bytes of which one bit is another."""
  bit, changed = rng.randrange(8 * len(data)), bytearray(data)
  changed[bit // 8] ^= 1 << bit % 8
  return bytes(changed)


def torn_lines(config: Config, folder: pathlib.Path) -> tuple[int, int]:
  """Tears lines at each place of the files that a node reads again."""
  whole = [{'round': r, 'decisions': [{'uid': r}]} for r in range(4)]
  fields = {'decided': 1, 'changes': {}, 'needed': '', 'digest': 'x'}
  evaluation = metrics.Evaluation(1, 1, 1, 1.0, 1.0, 1.0, 1, 1.0)
  lines_of: dict[str, tuple[list[str], Callable[[], Sequence[Any]]]] = {
    'verdicts.jsonl': (
      [json.dumps(x) for x in whole],
      lambda: ratings.read_decisions(folder / 'verdicts.jsonl'),
    ),
    'amendments.jsonl': (
      [json.dumps(x | fields) for x in whole],
      lambda: amendments.read(folder),
    ),
    'metrics.jsonl': (
      [metrics.encode(evaluation)] * len(whole),
      lambda: metrics.read(folder / 'metrics.jsonl'),
    ),
  }
  tried = lost = 0
  for name, (lines, read) in lines_of.items():
    path = folder / name
    for torn in _TORN:
      for at in range(len(lines) + 1):
        some = [line.encode() for line in lines]
        files.write_lines(path, [*some[:at], torn, *some[at:]])
        with contextlib.redirect_stderr(io.StringIO()):
          lost += abs(len(lines) - len(read()))
        tried += 1
    with open(path, 'ab') as file:  # and a line that never ended
      file.write(_TORN[-1])
    files.append_jsonl(path, json.loads(lines[0]))
    with contextlib.redirect_stderr(io.StringIO()):
      lost += abs(len(lines) + 1 - len(read()))
    tried += 1
  return tried, lost


def torn_payouts(config: Config, folder: pathlib.Path) -> tuple[int, int]:
  """Tears lines of a pool's payment orders, which are then written again."""
  policy = ledger_lib.PaymentPolicy(threshold=1, deposit=1)
  path = folder / 'payouts.jsonl'
  with contextlib.closing(ledger_lib.Ledger(folder / 'l', policy)) as ledger:
    for r in range(6):
      ledger.settle(r, 10**9 * (r + 1), {'a': 3, 'b': 4}, {'a', 'b'}, set())
    orders = [order._asdict() for order in ledger.orders()]
    assert len(orders) > 3, f'{len(orders)} orders were made'
    pool_miner.write_payouts(ledger, path)
    whole, tried, wrong = path.read_bytes(), 0, 0
    lines = whole.splitlines()
    for torn in _TORN:
      for at in range(len(lines) + 1):
        files.write_lines(path, [*lines[:at], torn, *lines[at:]])
        pool_miner.write_payouts(ledger, path)
        wrong += path.read_bytes() != whole
        path.write_bytes(b'\n'.join(lines[:at]) + torn)
        pool_miner.write_payouts(ledger, path)
        wrong += path.read_bytes() != whole
        tried += 2
  return tried, wrong


def secrets(config: Config, folder: pathlib.Path) -> tuple[int, int]:
  """Plants secrets in configs, and looks for them in the files of runs."""
  places = {
    'network.name': f'wss://rpc.example.org/v1/{_SECRET}',
    'network.bucket': f's3://runs?key_id={_SECRET}&secret={_SECRET}',
    'network.coordinator': f'http://user:{_SECRET}@10.0.0.1:1',
    'pool.url': f'https://pool.example.org/?token={_SECRET}',
    'alerts.command': f'curl https://hook.example.org/{_SECRET}',
  }
  raw = json.loads(config_lib.to_json(config))
  for path, text in places.items():
    section, _, name = path.partition('.')
    raw[section][name] = text
  planted = config_lib.parse(raw)
  evaluation = metrics.Evaluation(1, 1, 1, 1.0, 1.0, 1.0, 1, 1.0)
  with workdir_lib.Workdir(folder / 'run') as workdir:
    workdir.open_run(planted, None, lambda record: None)
    workdir.log(evaluation)
  by_hand = folder / 'by hand'
  shutil.copytree(folder / 'run', by_hand)
  (by_hand / 'config.json').write_text(json.dumps(raw))
  written = [page.write(folder / 'run'), page.write(by_hand)]
  written += (folder / 'run').rglob('*')
  found = 0
  for path in {p for p in written if p.is_file()}:
    found += path.read_bytes().count(_SECRET.encode())
  text = written[0].read_text()
  assert 'rpc.example.org/hidden' in text, 'the page lacks the config'
  return sum(text.count(_SECRET) for text in places.values()), found
