"""The address and certificate of a pool's server."""

import re
import ssl
from typing import NamedTuple

from covenant import config as config_lib


class ServerSettings(NamedTuple):
  """The address, certificate and limits of a pool's server."""

  host: str
  port: int  # 0 is any free one
  certificate: str = ''  # PEM file of the chain; empty: plain HTTP
  certificate_key: str = ''  # PEM file
  # Addresses of reverse proxies, whose X-Forwarded-For is believed.
  proxies: tuple[str, ...] = ()


def of(config: config_lib.Pool) -> ServerSettings:
  """Returns where a pool listens; raises ConfigError."""
  host, _, port = config.listen.rpartition(':')
  if not host or not re.fullmatch(r'[0-9]{1,5}', port) or int(port) > 65535:
    raise config_lib.ConfigError(
      f'pool.listen: expected HOST:PORT, got {config.listen!r}'
    )
  return ServerSettings(
    host.strip('[]'),
    int(port),
    config.certificate,
    config.certificate_key,
    config.proxies,
  )


def ssl_context(settings: ServerSettings) -> ssl.SSLContext | None:
  """Returns the TLS context of a server; None for plain HTTP."""
  if not settings.certificate:
    return None
  context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
  context.load_cert_chain(
    settings.certificate, settings.certificate_key or None
  )
  return context
