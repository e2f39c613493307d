"""Headless Chromium for tests, over the DevTools protocol on two pipes."""

import json
import os
import pathlib
import select
import shutil
import subprocess
import time
from typing import Any

_NAMES = ('chromium', 'chromium-browser', 'google-chrome')
_PATIENCE = 60.0  # seconds for one answer, on a machine that is busy


def find() -> str | None:
  """Returns the path of a browser that runs, or None."""
  for program in filter(None, map(shutil.which, _NAMES)):
    # On some systems this name is a script that only says what to install.
    asked = subprocess.run([program, '--version'], capture_output=True)
    if asked.returncode == 0:
      return program
  return None


class Browser:
  """One browser with one empty tab, in its own profile.

  Args:
    program: path of a Chromium.
    profile: an empty folder.
  """

  def __init__(self, program: str, profile: pathlib.Path):
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    # The browser reads from file 3 and writes to file 4. Root, which runs CI,
    # cannot have a sandbox.
    command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
    self._process = subprocess.Popen(
      [
        '/bin/bash', '-c', command, program, '--headless', '--no-sandbox',
        '--remote-debugging-pipe', f'--user-data-dir={profile}',
        '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run',
        '--disable-background-networking', '--disable-component-update',
      ],
      pass_fds=(theirs_in, theirs_out),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(theirs_in)
    os.close(theirs_out)
    self._out, self._in, self._rest = ours_out, ours_in, b''
    self._id = 0
    self.events: list[tuple[str, dict[str, Any]]] = []
    self._session = None
    target = self.send('Target.createTarget', url='about:blank')['targetId']
    self._session = self.send(
      'Target.attachToTarget', targetId=target, flatten=True
    )['sessionId']
    for domain in ('Page', 'Runtime', 'Log', 'Network'):
      self.send(f'{domain}.enable')

  def send(self, method: str, **params: Any) -> dict[str, Any]:
    """Returns the answer to one command."""
    self._id += 1
    message = {'id': self._id, 'method': method, 'params': params}
    if self._session:
      message['sessionId'] = self._session
    os.write(self._out, json.dumps(message).encode() + b'\0')
    while True:
      found = self._receive()
      if found.get('id') == self._id:
        if 'error' in found:
          raise RuntimeError(f'{method}: {found["error"]}')
        return found['result']

  def _receive(self) -> dict[str, Any]:
    end = time.monotonic() + _PATIENCE
    while b'\0' not in self._rest:
      if not select.select([self._in], [], [], end - time.monotonic())[0]:
        raise TimeoutError('the browser does not answer')
      if not (more := os.read(self._in, 1 << 20)):
        raise RuntimeError(f'the browser ended: {self._process.wait()}')
      self._rest += more
    line, _, self._rest = self._rest.partition(b'\0')
    found = json.loads(line)
    if 'method' in found:
      self.events.append((found['method'], found['params']))
    return found

  def open(self, url: str, width: int, height: int, dark: bool = False) -> None:
    """Loads a page on a screen of this size; forgets earlier events."""
    self.send(
      'Emulation.setDeviceMetricsOverride', width=width, height=height,
      deviceScaleFactor=1, mobile=width < 600,
    )  # fmt: skip
    scheme = 'dark' if dark else 'light'
    self.send(
      'Emulation.setEmulatedMedia',
      features=[{'name': 'prefers-color-scheme', 'value': scheme}],
    )
    self.events.clear()
    self.send('Page.navigate', url=url)
    while not any(name == 'Page.loadEventFired' for name, _ in self.events):
      self._receive()

  def ask(self, script: str) -> Any:
    """Returns the value of an expression on the page."""
    found = self.send(
      'Runtime.evaluate',
      expression=script,
      returnByValue=True,
      awaitPromise=True,
    )
    if 'exceptionDetails' in found:
      raise RuntimeError(f'{script}: {found["exceptionDetails"]}')
    return found['result'].get('value')

  def press(self, key: str) -> None:
    """Presses and releases a key such as 'Tab'."""
    codes = {
      'Tab': 9, 'Enter': 13, 'Escape': 27, 'Home': 36, 'ArrowLeft': 37,
      'ArrowRight': 39,
    }  # fmt: skip
    text = {'text': '\r'} if key == 'Enter' else {}
    for kind in ('keyDown', 'keyUp'):
      self.send(
        'Input.dispatchKeyEvent', type=kind, key=key, code=key,
        windowsVirtualKeyCode=codes[key], **(text if kind == 'keyDown' else {}),
      )  # fmt: skip

  def mouse(self, kind: str, x: float, y: float, clicks: int = 1) -> None:
    """Sends 'mouseMoved', 'mousePressed' or 'mouseReleased' at a point."""
    button = {} if kind == 'mouseMoved' else {'button': 'left'}
    self.send(
      'Input.dispatchMouseEvent', type=kind, x=x, y=y,
      **({'buttons': 1} if kind == 'mousePressed' else {}),
      **(button | ({'clickCount': clicks} if button else {})),
    )  # fmt: skip

  def errors(self) -> list[str]:
    """Returns the errors of the page and all output of its console."""
    found = []
    for name, params in self.events:
      if name == 'Runtime.exceptionThrown':
        found.append(str(params['exceptionDetails']))
      elif name == 'Log.entryAdded':
        found.append(params['entry']['text'])
      elif name == 'Runtime.consoleAPICalled':
        found.append(str(params['args']))
    return found

  def requests(self) -> list[str]:
    """Returns the addresses that were requested."""
    return [
      params['request']['url']
      for name, params in self.events
      if name == 'Network.requestWillBeSent'
    ]

  def close(self) -> None:
    self._session = None
    try:
      self.send('Browser.close')
    finally:
      os.close(self._out)
      self._process.wait(timeout=_PATIENCE)
      os.close(self._in)
