"""Copies of the records of metrics.jsonl, for Prometheus and trackers."""

import dataclasses
import sys
from collections.abc import Mapping

from covenant import config as config_lib
from covenant import metrics
from covenant import typing as ct
from covenant.telemetry import prometheus
from covenant.telemetry import trackers as trackers_lib


class Copies:
  """The endpoint and the trackers that a config names.

  Nothing here ends a run: a tracker that fails is said once and left out.

  Args:
    config: the section.
    run: the run, as trackers name it.
    names: labels of the process, such as its role.

  Attributes:
    url: of the endpoint; empty without.

  Raises:
    EndpointError, PluginError, MissingExtraError: the config cannot be met.
  """

  def __init__(
    self,
    config: config_lib.Telemetry,
    run: trackers_lib.Run,
    names: Mapping[str, str],
  ):
    self._endpoint: prometheus.Endpoint | None = None
    self.url = ''
    if config.prometheus:
      self._endpoint = prometheus.Endpoint(config.prometheus, names)
      self.url = self._endpoint.url
    self._trackers = trackers_lib.open_trackers(config, run)

  def record(self, record: metrics.Line) -> None:
    """Hands on a record."""
    values = metrics.scalars(record)
    places = {
      name: value
      for name, value in dataclasses.asdict(record).items()
      if name in ('round', 'step')
    }
    if self._endpoint is not None:
      self._endpoint.record(record.kind, {'round': record.round, **values})
    tagged = {f'{record.kind}/{name}': x for name, x in values.items()}
    for tracker in list(self._trackers):
      try:
        tracker.log(places | tagged)
      except Exception as e:  # a library of others must not end the run
        self._trackers.remove(tracker)
        _say(f'a tracker failed and is left out: {e}')

  def event(self, what: str, error: str) -> None:
    """Counts an event for Prometheus."""
    if self._endpoint is not None:
      self._endpoint.event(what, error)

  def status(self, fields: Mapping[str, ct.Json]) -> None:
    """Shows the numbers of a status to Prometheus."""
    if self._endpoint is not None:
      self._endpoint.record('status', prometheus.values_of(fields))

  def close(self) -> None:
    """Completes the runs of trackers and ends the endpoint."""
    for tracker in self._trackers:
      try:
        tracker.finish()
      except Exception as e:  # as above
        _say(f'a tracker failed at its end: {e}')
    self._trackers = []
    if self._endpoint is not None:
      self._endpoint.close()
      self._endpoint = None


def _say(text: str) -> None:
  print(f'telemetry: {text}', file=sys.stderr, flush=True)
