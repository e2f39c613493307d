"""Alerts: a command of the operator per class of events, at a limited rate."""

import json
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from covenant import config as config_lib
from covenant import typing as ct

CLASSES = ('stalled', 'lost', 'diverged', 'weights', 'disk')
_TIMEOUT = 60.0  # seconds of a command


class Alerts:
  """Runs the commands of `config.alerts`, each in a thread of its own.

  Alerts of one class within `every_minutes` are counted, and the next one that
  is sent says how many were held back. Nothing that a command does, or fails to
  do, disturbs the node.

  Args:
    config: the section.
    node: fields that every alert has, such as the hotkey.
    clock: seconds since any fixed time.
  """

  def __init__(
    self,
    config: config_lib.Alerts,
    node: dict[str, ct.Json],
    clock: Callable[[], float] = time.monotonic,
  ):
    self._config = config
    self._commands = {
      'stalled': config.stalled,
      'lost': config.lost,
      'diverged': config.diverged,
      'weights': config.weights,
      'disk': config.disk,
    }
    self._node = node
    self._clock = clock
    self._last: dict[str, float] = {}
    self._held = dict.fromkeys(CLASSES, 0)
    self._threads: list[threading.Thread] = []

  def send(self, kind: str, message: str, **fields: ct.Json) -> bool:
    """Runs the command of a class; returns False if it is held back.

    Args:
      kind: one of CLASSES.
      message: a line for people.
      **fields: further ones of the alert.
    """
    command = self._commands[kind] or self._config.command
    now, last = self._clock(), self._last.get(kind)
    if not command:
      return False
    if last is not None and now - last < 60 * self._config.every_minutes:
      self._held[kind] += 1
      return False
    self._last[kind] = now
    alert = {
      'class': kind,
      'message': message,
      'time': time.time(),
      'held_back': self._held[kind],
      **self._node,
      **fields,
    }
    self._held[kind] = 0
    thread = threading.Thread(
      target=_run, args=(command, json.dumps(alert)), daemon=True
    )
    thread.start()
    self._threads = [t for t in self._threads if t.is_alive()] + [thread]
    return True

  def close(self) -> None:
    """Waits a little for commands under way."""
    deadline = time.monotonic() + 5.0
    for thread in self._threads:
      thread.join(max(deadline - time.monotonic(), 0.0))


def _run(command: str, text: str) -> None:
  """Runs a command without a shell, as alerts quote what peers wrote."""
  try:
    done = subprocess.run(
      shlex.split(command),
      input=text.encode(),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      timeout=_TIMEOUT,
      check=False,
    )
    words = done.stderr.decode(errors='replace').strip().splitlines()
    failed = words[-1] if words else f'status {done.returncode}'
    if done.returncode == 0:
      return
  except subprocess.TimeoutExpired:
    failed = f'no end within {_TIMEOUT:g} s'
  except (OSError, ValueError, subprocess.SubprocessError) as e:
    failed = str(e)
  # Not the command itself: the address of a webhook is a secret.
  print(f'the command of an alert failed: {failed[:200]}', file=sys.stderr)
