"""Hides what must not leave a machine in the text of a config.

Files of a run are copied, shown and sent to others. The endpoint of a chain may
have a key in its path, and the location of a bucket keys to read it.
"""

import re
from collections.abc import Mapping

from covenant import typing as ct

HIDDEN = 'hidden'
_USER = re.compile(r'(?<=://)[^/?#\s]*@')
_PARAMETER = re.compile(
  r'(?i)([\w-]*(?:secret|token|pass|pwd|key|credential|signature|auth|sig|sas)'
  r'[\w-]*=)[^&#;,\s]+'
)
# Names of fields whose text is a secret, not the path of one.
_NAME = re.compile(
  r'(?i).*(?:secret|token|passw(?:or)?d|passphrase|credentials?|api_?key|'
  r'access_key(?:_id)?|signature)'
)
_PATH = re.compile(
  r'(?i)\b((?!(?:s3|r2|file|memory):)[a-z][a-z0-9+.-]*://[^/?#\s]+)[/?#]\S+'
)
_PLACES = ('network', 'pool')  # sections with the addresses of servers


def hide_secrets(value: ct.Json, in_network: bool = False) -> ct.Json:
  """Returns JSON with all that may be secret replaced by 'hidden'.

  That is the user part of any URL, any parameter or field that is named like a
  secret and, in the sections `network` and `pool`, what follows the host in a
  URL. Of the commands in the section `alerts` it is all.

  >>> hide_secrets({'network': {'name': 'wss://rpc.example.org/v1/8fe2'}})
  {'network': {'name': 'wss://rpc.example.org/hidden'}}
  >>> hide_secrets('s3://runs?key_id=K&secret=S&region=eu')
  's3://runs?key_id=hidden&secret=hidden&region=eu'
  """
  if isinstance(value, Mapping):
    return {
      name: _hide_commands(x)
      if name == 'alerts'
      else HIDDEN
      if isinstance(x, str) and x and _NAME.fullmatch(name)
      else hide_secrets(x, in_network or name in _PLACES)
      for name, x in value.items()
    }
  if isinstance(value, (list, tuple)):
    return type(value)(hide_secrets(x, in_network) for x in value)
  if not isinstance(value, str):
    return value
  value = _USER.sub(f'{HIDDEN}@', value)
  value = _PARAMETER.sub(rf'\1{HIDDEN}', value)
  if in_network:
    value = _hide_paths(value)
  return value


def _hide_commands(alerts: ct.Json) -> ct.Json:
  """Returns the section `alerts` without the words of its commands."""
  if not isinstance(alerts, Mapping):
    return hide_secrets(alerts, True)
  return {
    name: HIDDEN if isinstance(x, str) and x else x
    for name, x in alerts.items()
  }


def _hide_paths(text: str) -> str:
  """Returns a text whose URLs have nothing but a scheme and a host."""
  return _PATH.sub(
    lambda found: (
      f'{found[1]}/{HIDDEN}' if found[0].rstrip('/') != found[1] else found[0]
    ),
    text,
  )
