"""Helpers of many tests: paths, the tiny config, and every bit of a state."""

import base64
import contextlib
import hashlib
import json
import logging
import pathlib
import re
import sqlite3
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from covenant import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = ROOT / 'configs'
GOLDEN = ROOT / 'tests' / 'golden'

# Fields of metrics.jsonl that a clock wrote.
TIMES = (
  'seconds', 'tokens_per_second', 'train_seconds', 'exchange_seconds',
  'outer_seconds', 'score_seconds',
)  # fmt: skip
# 'emulated-12-', as SQLite writes bytes.
_BUCKET = re.compile(b'emulated-'.hex().upper() + '(3[0-9])+2D')


def tiny(*overrides: str, variant: str = '') -> config_lib.Config:
  """Returns configs/tiny.py with overrides, as `optim.inner_steps=3`."""
  path = f'{CONFIGS}/tiny.py:{variant}'.rstrip(':')
  return config_lib.load(path, overrides)


def bits(tree: Any) -> list[tuple[str, bytes]]:
  """Digests of every bit of a tree; a difference is shown by its leaf."""
  return [
    (jax.tree_util.keystr(p), hashlib.sha256(np.asarray(x).tobytes()).digest())
    for p, x in jax.tree_util.tree_leaves_with_path(tree)
  ]


class _Compilations(logging.Handler):
  """Keeps the names of the programs that JAX compiles."""

  def __init__(self):
    super().__init__()
    self.names: list[str] = []

  def emit(self, record: logging.LogRecord) -> None:
    text = record.getMessage()
    if text.startswith('Compiling '):
      self.names.append(text.split()[1])


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
  """Yields the names of the programs that JAX compiles in the block."""
  found, logger = _Compilations(), logging.getLogger('jax')
  logger.addHandler(found)
  try:
    with jax.log_compiles():
      yield found.names
  finally:
    logger.removeHandler(found)


def everything(state: Any) -> tuple:
  """Every bit of the state of a run; of the chain every row.

  But for the names of the buckets: a process never uses one twice.
  """
  protocol = json.loads(state.protocol)
  chain = sqlite3.connect(':memory:')
  chain.deserialize(base64.b64decode(protocol.pop('chain')))
  rows = [_BUCKET.sub('', row) for row in chain.iterdump()]
  chain.close()
  return bits(state._replace(protocol=None)), protocol, rows


def untimed(path: pathlib.Path) -> list[dict[str, Any]]:
  """The records of a metrics file, without the fields that a clock wrote."""
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
