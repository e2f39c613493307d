"""The measurements of one process, and everybody who gets them.

metrics.jsonl is the truth; TensorBoard, Prometheus and trackers get copies.
Nothing here ends a node: what cannot be written or sent is said once and lost.
"""

import collections
import pathlib
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from covenant import config as config_lib
from covenant import metrics
from covenant import typing as ct
from covenant.store import traffic
from covenant.telemetry import alerts as alerts_lib
from covenant.telemetry import copies
from covenant.telemetry import machine
from covenant.telemetry import spikes
from covenant.telemetry import trackers as trackers_lib


class Node(NamedTuple):
  """The process that is measured."""

  role: str
  hotkey: str
  folder: pathlib.Path
  first: bool = True  # False: another rank has the endpoint and the trackers


class Speed(NamedTuple):
  """The arithmetic of a token, and what the devices could do at most."""

  flops_per_token: float
  peak: float  # FLOP/s of all devices of this process


class Measured(NamedTuple):
  """The measurements of one inner step."""

  round: int  # rounds completed once its round is
  step: int  # inner step of the run
  tokens: int
  loss: float | None  # nats per token; None: not finite
  gradient_norm: float | None
  seconds: float  # 0 if not measured
  wait_seconds: float
  stage: int | None = None  # of a pipeline


class Telemetry:
  """Takes the measurements of one process.

  Args:
    config: of the run.
    node: the process.
    spike: called with a text for each loss spike.
    clock: seconds since any fixed time.

  Attributes:
    url: of the endpoint; empty without.

  Raises:
    EndpointError, PluginError, MissingExtraError: the config cannot be met.
  """

  def __init__(
    self,
    config: config_lib.Config,
    node: Node,
    spike: Callable[[str], None] = lambda text: None,
    clock: Callable[[], float] = time.monotonic,
  ):
    section = config.telemetry if node.first else config_lib.Telemetry()
    own = config.alerts if node.first else config_lib.Alerts()
    self._config, self._node = config, node
    self._spike, self._clock = spike, clock
    self._spikes = spikes.SpikeDetector(
      config.telemetry.spike_sigmas, config.telemetry.spike_steps
    )
    names = {'role': node.role, 'hotkey': node.hotkey, 'run': config.name}
    self._alerts = alerts_lib.Alerts(own, dict(names), clock)
    self._writer: metrics.MetricsWriter | None = None
    self._copies = copies.Copies(
      section,
      trackers_lib.run_of(
        config, '-'.join(filter(None, (node.role, node.hotkey))), node.folder
      ),
      names,
    )
    self.url = self._copies.url
    self._said: set[str] = set()
    self._round = -1
    self._since = clock()
    self._phases: dict[str, float] = collections.defaultdict(float)
    self._failures = 0
    self._queue = 0.0
    self._traffic = traffic.TRAFFIC.totals
    self._pools = traffic.POOLS.totals

  def step(
    self,
    step: Measured,
    rate: float,
    device_bytes: int | None,
    speed: Speed | None,
  ) -> None:
    """Takes an inner step.

    Args:
      step: its measurements.
      rate: its learning rate.
      device_bytes: memory in use on a device; None: unknown.
      speed: None: the peak is unknown.
    """
    skipped = step.loss is None or step.gradient_norm is None
    per_second = mfu = None
    if step.seconds:
      per_second = step.tokens / step.seconds
      if speed is not None:
        mfu = per_second * speed.flops_per_token / speed.peak
    record = metrics.Step(
      round=step.round,
      step=step.step,
      tokens=step.tokens,
      loss=step.loss,
      gradient_norm=step.gradient_norm,
      learning_rate=rate,
      skipped=int(skipped),
      seconds=step.seconds,
      wait_seconds=step.wait_seconds,
      tokens_per_second=per_second,
      mfu=mfu,
      device_bytes=device_bytes,
      host_bytes=machine.used_bytes(),
      stage=step.stage,
    )
    self.log(record)
    if text := self._spikes.add(record):
      self._spike(text)

  def event(self, what: str, error: str, seconds: float, phase: str) -> None:
    """Takes an event of the node; `phase` is empty for one that is none."""
    if phase:
      self._phases[f'{phase}_seconds'] += seconds
      self._failures += bool(error)
    self._copies.event(what, error)

  def waited(self, seconds: float) -> None:
    """Takes time in which the node had nothing to do."""
    self._queue += seconds

  def status(self, fields: dict[str, ct.Json]) -> None:
    """Takes the present state of the node."""
    self._copies.status(fields)

  def alert(self, kind: str, message: str) -> None:
    """Sends an alert, if its class has a command and none was sent lately."""
    self._alerts.send(kind, message, round=max(self._round, 0))

  def follow(self, config: config_lib.Config) -> None:
    """Goes on with an amended config of the run."""
    self._config = config

  def pulse(self, completed: int, block_seconds: float, every: int = 1) -> None:
    """Takes the rounds completed up to now, by `every`; called all the time.

    Writes the record of a round once it is over, and alerts when none has been
    for long, whether the chain answers or not.
    """
    now = self._clock()
    if completed != self._round:
      if self._round >= 0:
        self._log_round(completed, now - self._since)
      else:
        self._pools = traffic.POOLS.totals
      self._round, self._since = completed, now
      return
    length = every * self._config.phases.round_blocks * block_seconds
    waited = now - self._since
    if waited > self._config.alerts.stalled_rounds * length:
      self.alert('stalled', f'no round was completed for {waited / 60:.0f} min')

  def _log_round(self, completed: int, seconds: float) -> None:
    totals = traffic.TRAFFIC.totals
    moved, self._traffic = totals.since(self._traffic), totals
    totals = traffic.POOLS.totals
    pools, self._pools = totals.since(self._pools), totals
    in_pool = seconds > 0 and pools.bytes_sent + pools.bytes_received > 0
    free = machine.free_disk_bytes(self._node.folder)
    self.log(
      metrics.NodeRound(
        round=completed,
        seconds=seconds,
        queue_seconds=self._queue,
        bytes_sent=int(moved.bytes_sent),
        bytes_received=int(moved.bytes_received),
        send_rate=moved.bytes_sent / (moved.send_seconds or 1.0),
        receive_rate=moved.bytes_received / (moved.receive_seconds or 1.0),
        retries=int(moved.retries + pools.retries),
        failures=self._failures,
        host_bytes=machine.used_bytes(),
        host_free_bytes=machine.free_bytes(),
        disk_free_bytes=free,
        **self._phases,
        pool_bytes_sent=int(pools.bytes_sent) if in_pool else None,
        pool_bytes_received=int(pools.bytes_received) if in_pool else None,
        pool_send_rate=pools.bytes_sent / seconds if in_pool else None,
        pool_receive_rate=pools.bytes_received / seconds if in_pool else None,
      )
    )
    self._phases.clear()
    self._failures, self._queue = 0, 0.0
    if free < 1e9 * self._config.alerts.disk_gb:
      self.alert('disk', f'{free / 1e9:.1f} GB are free in {self._node.folder}')

  def log(self, record: metrics.Line) -> None:
    """Writes a record and hands copies to all others."""
    try:
      if self._writer is None:
        # A restarted node may train its last round again, or go on with what
        # it has sealed.
        again = isinstance(record, metrics.Step)
        self._writer = metrics.MetricsWriter(
          self._node.folder / 'metrics.jsonl',
          self._node.folder / 'tensorboard',
          resume=max(record.round - again, 0),
        )
      self._writer.write(record)
    except (OSError, metrics.MetricsError) as e:
      self._say_once(f'metrics.jsonl: {e}')
      self.alert('disk', f'metrics.jsonl cannot be written: {e}')
    self._copies.record(record)

  def _say_once(self, text: str) -> None:
    if text not in self._said:
      self._said.add(text)
      print(f'telemetry: {text}', file=sys.stderr, flush=True)

  def close(self) -> None:
    """Completes everything; the process has ended its work."""
    self._copies.close()
    self._alerts.close()
    if self._writer is not None:
      writer, self._writer = self._writer, None
      try:
        writer.close()
      except OSError as e:
        self._say_once(f'metrics.jsonl: {e}')
