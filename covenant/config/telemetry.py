"""The sections about the measurements and the alerts of one process."""

import dataclasses

from covenant.config import schema


@dataclasses.dataclass(frozen=True)
class Telemetry(schema.Section):
  """The recipients of a process's measurements (covenant/telemetry/)."""

  # Address of Prometheus' endpoint: HOST:PORT, or PORT on the loopback; port 0:
  # any that is free; empty: no endpoint.
  prometheus: str = ''
  # Names of experiment trackers: wandb, trackio, or a function of a
  # `trackers.Run` that returns a tracker, as 'file.py:attribute'.
  trackers: tuple[str, ...] = schema.names()
  project: str = 'covenant'  # name of the project in trackers
  # offline: trackers write to the workdir, and reach nobody.
  mode: str = schema.bounded('offline', choices=('offline', 'online'))
  # Standard deviations above the mean of the last losses that make a spike.
  spike_sigmas: float = schema.positive(6.0)
  spike_steps: int = schema.bounded(50, low=8)  # number of these losses

  def check(self) -> None:
    port = self.prometheus.rpartition(':')[2]
    schema.require(
      not self.prometheus or port.isdecimal() and int(port) < 65536,
      'telemetry.prometheus',
      f'expected PORT, HOST:PORT or nothing, got {self.prometheus!r}',
    )


@dataclasses.dataclass(frozen=True)
class Alerts(schema.Section):
  """Commands that tell a person what happened (covenant/telemetry/alerts.py).

  A command gets the alert as JSON on its standard input, as a webhook wants it:
  'curl -sf --data-binary @- URL'.
  """

  command: str = ''  # for classes without one of their own; empty: none
  stalled: str = ''  # no round was completed for `stalled_rounds`
  lost: str = ''  # the node is out of sync with the run
  diverged: str = ''  # a lost round, a loss spike, or steps that are not finite
  weights: str = ''  # a validator's weights are not in force
  disk: str = ''  # less than `disk_gb` are free, or a write failed
  stalled_rounds: float = schema.positive(2.0)  # rounds of the chain's time
  disk_gb: float = schema.bounded(5.0, low=0.0)  # GB
  every_minutes: float = schema.bounded(60.0, low=0.0)  # between two of a class
