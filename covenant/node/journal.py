"""What a process of a run did, for people and for whoever started it.

In its workdir
  events.jsonl    what it did and what it could not do
  status.json     where it stands now
  verdicts.jsonl  of a validator: what it found about everybody, every round
  pool.jsonl      of a pool: what each worker did, every round
"""

import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from covenant import files
from covenant.node import base as node_lib
from covenant.node import validator as validator_lib


class Journal:
  """What a process did, for people and for whoever started it.

  What cannot be written, for the disk is full, is left out: nobody is to die
  of it.
  """

  def __init__(self, workdir: pathlib.Path, role: str, hotkey: str):
    workdir.mkdir(parents=True, exist_ok=True)
    self._workdir = workdir
    self._status: dict[str, Any] = {
      'role': role,
      'hotkey': hotkey,
      'pid': os.getpid(),
      'error': '',
    }

  def event(self, event: node_lib.Event) -> None:
    self.record('events', {'time': time.time(), **event._asdict()})
    if event.error:
      self.status(error=f'block {event.block}, {event.what}: {event.error}')

  def verdict(self, verdict: validator_lib.Verdict) -> None:
    self.record('verdicts', verdict._asdict())

  def record(self, name: str, fields: dict[str, Any]) -> None:
    """Appends a line to NAME.jsonl."""
    with _if_possible():
      files.append_jsonl(self._workdir / f'{name}.jsonl', fields)

  def status(self, **fields: Any) -> None:
    """Replaces status.json, at once or not at all."""
    self._status |= fields
    with _if_possible():
      files.write(self._workdir / 'status.json', json.dumps(self._status))


@contextlib.contextmanager
def _if_possible() -> Iterator[None]:
  try:
    yield
  except OSError as e:
    with contextlib.suppress(OSError):  # its log may be on the same disk
      print(f'cannot write what happened: {e}', file=sys.stderr, flush=True)
