"""Synthetic workdirs for the tests of the report."""

import dataclasses
import json
import pathlib

from covenant import config as config_lib
from covenant import metrics


def write(
  folder: pathlib.Path,
  rounds: int = 6,
  miners: int = 4,
  planned: int | None = None,
  verdict: str = 'REPLAY',
  detail: str = 'of uid 0',
  hotkey: str = '5Abc',
  **config,
) -> pathlib.Path:
  """Writes a run whose last miner, a copier, is refused every other round."""
  folder.mkdir(parents=True, exist_ok=True)
  whole = dataclasses.replace(
    config_lib.Config(
      name='a-run',
      miners=miners,
      rounds=planned or rounds,
      adversaries=('copier',),
    ),
    **config,
  )
  (folder / 'config.json').write_text(config_lib.to_json(whole))
  verdicts = []
  for number in range(1, rounds + 1):
    found = [
      _decision(
        number - 1, u, verdict if u == miners - 1 and number % 2 else 'VALID',
        detail, hotkey,
      )
      for u in range(miners)
    ]  # fmt: skip
    verdicts.append(
      {'validator': miners, 'round': number - 1, 'decisions': found}
    )
  lines = [metrics.encode(record) for record in records(rounds, miners)]
  (folder / 'metrics.jsonl').write_text('\n'.join([*lines, '']))
  text = ''.join(json.dumps(v) + '\n' for v in verdicts)
  (folder / 'verdicts.jsonl').write_text(text)
  return folder


def records(
  rounds: int, miners: int, joins: int = 0
) -> list[metrics.Round | metrics.Evaluation]:
  """Returns a run with loss ~ 1 / round, whose last miner joins in `joins`."""
  found: list[metrics.Round | metrics.Evaluation] = [_evaluation(0, miners)]
  for number in range(1, rounds + 1):
    present = miners if number >= joins else max(1, miners - 1)
    found.append(_round(number, miners, present))
    if number % 2 == 0:
      found.append(_evaluation(number, miners))
  return found


def events(folder: pathlib.Path, error: str = '') -> pathlib.Path:
  """Writes the events of a process that trained and could not upload."""
  folder.mkdir(parents=True, exist_ok=True)
  lines = [
    {'time': 1e9, 'block': 1, 'round': 0, 'what': 'train', 'error': ''},
    {'time': 1e9 + 9, 'block': 5, 'round': 0, 'what': 'upload', 'error': error},
  ]
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (folder / 'events.jsonl').write_text(text)
  return folder


def _round(number: int, miners: int, present: int) -> metrics.Round:
  loss = 1.5 + 4 / number
  return metrics.Round(
    round=number,
    tokens=512 * number * miners,
    loss=loss,
    miner_losses=[loss + 0.01 * uid for uid in range(present)],
    uids=range(present),
    learning_rate=1e-3,
    bytes_up=1000 * number * miners,
    bytes_round=1000 * miners,
    dense_bytes_round=200_000 * miners,
    compression_ratio=200.0,
    delta_norm=1.0,
    error_norm=1.0,
    payloads=present,
    seconds=2.0,
    tokens_per_second=512.0,
    weights=[1 / miners] * miners if number > 1 else (),
  )


def _evaluation(number: int, miners: int) -> metrics.Evaluation:
  loss = 1.6 + 4 / (number + 1)
  return metrics.Evaluation(
    round=number,
    tokens=512 * number * miners,
    bytes_up=1000 * number * miners,
    loss=loss,
    nats_per_byte=loss / 2,
    bits_per_byte=loss,
    sequences=8,
    seconds=0.5,
  )


def _decision(number: int, uid: int, verdict: str, detail: str, hotkey: str):
  return {
    'round': number,
    'uid': uid,
    'hotkey': hotkey,
    'verdict': verdict,
    'detail': '' if verdict == 'VALID' else detail,
    'reasons': [f'because of {detail}'],
    'after': {'score': 1.0 + uid / 8, 'rating': 20.0, 'penalty': 1.0},
    'weight': 0.125,
  }
