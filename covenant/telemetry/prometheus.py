"""An endpoint for Prometheus, with the newest record of each kind."""

from collections.abc import Mapping

from covenant import errors
from covenant import extras
from covenant import typing as ct

with extras.needed('run'):
  import prometheus_client as prometheus


class EndpointError(errors.CovenantError):
  """The endpoint cannot be opened; names the address."""


class Endpoint:
  """Serves `covenant_KIND_FIELD` of the newest records, until it is closed.

  Args:
    address: HOST:PORT, or PORT on the loopback; see `config.telemetry`.
    node: labels of `covenant_node_info`, such as the role.

  Attributes:
    url: where Prometheus finds it.

  Raises:
    EndpointError: the address cannot be used.
  """

  def __init__(self, address: str, node: Mapping[str, str]):
    host, _, port = address.rpartition(':')
    host = host or '127.0.0.1'
    self._registry = prometheus.CollectorRegistry()
    self._gauges: dict[str, prometheus.Gauge] = {}
    info = prometheus.Info(
      'covenant_node',
      'The role and hotkey of this node',
      registry=self._registry,
    )
    info.info(dict(node))
    self._tokens = prometheus.Counter(
      'covenant_tokens', 'Tokens trained on', registry=self._registry
    )
    self._events = prometheus.Counter(
      'covenant_events',
      'Phases and notes of this node, and how they ended',
      ['what', 'outcome'],
      registry=self._registry,
    )
    try:
      self._server, self._thread = prometheus.start_http_server(
        int(port), host, self._registry
      )
    except OSError as e:
      raise EndpointError(
        f'telemetry.prometheus: {address} cannot be opened: {e.strerror}; '
        'choose another port, or 0'
      ) from e
    self.url = f'http://{host}:{self._server.server_port}/metrics'

  def record(self, kind: str, values: Mapping[str, float]) -> None:
    """Shows the numbers of a record."""
    for name, value in values.items():
      full = f'covenant_{kind}_{name}'
      if full not in self._gauges:
        self._gauges[full] = prometheus.Gauge(
          full,
          f'{name} of the newest {kind}; see covenant/metrics.py',
          registry=self._registry,
        )
      self._gauges[full].set(value)
    if kind == 'step':
      self._tokens.inc(values['tokens'])

  def event(self, what: str, error: str) -> None:
    """Counts an event of the node."""
    self._events.labels(what, 'failed' if error else 'done').inc()

  def close(self) -> None:
    """Ends the server."""
    self._server.shutdown()
    self._server.server_close()
    self._thread.join()


def values_of(status: Mapping[str, ct.Json]) -> dict[str, float]:
  """Returns the numbers of a status, as the record of a kind."""
  return {
    name: float(value)
    for name, value in status.items()
    if isinstance(value, (int, float)) and not isinstance(value, bool)
  }
