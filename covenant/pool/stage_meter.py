"""The measurements of a process that holds stages of a pipeline."""

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Generator

import jax

from covenant import config as config_lib
from covenant import typing as ct
from covenant.node import step_meter
from covenant.telemetry import telemetry as telemetry_lib
from covenant.train.pipeline import stage as stage_lib
from covenant.train.pipeline import stage_programs
from covenant.train.pipeline import subspace

# The phase of the work that a message asks for; others are training.
_PHASES = {
  'take': 'catch_up',
  'reset': 'catch_up',
  'order': 'apply',
  'begin': 'begin',
  'fit': 'begin',
}


class _Measured:
  """One stage and its inner step under way."""

  def __init__(
    self,
    stage: stage_lib.Stage,
    make: Callable[[stage_lib.Stage], step_meter.StepMeter],
  ):
    self.stage, self._make = stage, make
    self._config, self._meter = stage.config, make(stage)
    self.round = -1  # the last one that it has begun
    self.tokens, self.began, self.busy = 0, 0.0, 0.0

  @property
  def meter(self) -> step_meter.StepMeter:
    """The meter by the rules that the stage follows."""
    if self.stage.config is not self._config:
      self._config, self._meter = self.stage.config, self._make(self.stage)
    return self._meter

  def restart(self, now: float) -> None:
    """Begins an inner step."""
    self.tokens, self.began, self.busy = 0, now, 0.0


class StageMeter:
  """Writes the steps and rounds of stages; used by all their threads.

  A step of a stage lasts from one update of its parameters to the next.

  Args:
    config: of the run.
    island: the pipeline.
    telemetry: gets the steps and the rounds.
    clock: seconds since any fixed time.
  """

  def __init__(
    self,
    config: config_lib.Config,
    island: config_lib.Island,
    telemetry: telemetry_lib.Telemetry,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._config, self._telemetry = config, telemetry
    self._spans = subspace.spans(config.decoder, island)
    self._clock = clock
    self._lock = threading.Lock()
    self._stages: dict[int, _Measured] = {}
    self._round = self._completed = -1
    self._phases: dict[str, float] = collections.defaultdict(float)
    self._working, self._idle, self._since = 0, 0.0, clock()

  def add(self, index: int, stage: stage_lib.Stage) -> None:
    """Begins to measure a stage."""
    model, length = self._config.decoder, self._config.data.context
    own = stage_programs.pick(stage.shared.params, stage.programs.names.own)
    weights = sum(x.size for x in jax.tree.leaves(own))
    layers = len(self._spans[index])
    flops = 6.0 * weights + 12.0 * layers * length * model.width

    def make(stage: stage_lib.Stage) -> step_meter.StepMeter:
      return step_meter.StepMeter(
        stage.config, stage.method, self._telemetry, flops
      )

    with self._lock:
      self._stages[index] = _Measured(stage, make)

  def remove(self, *indices: int) -> None:
    """Forgets stages that this process has left."""
    with self._lock:
      for index in indices:
        self._stages.pop(index, None)

  @contextlib.contextmanager
  def work(self, index: int, text: dict[str, ct.Json]) -> Generator[None]:
    """Measures the work that a message asks a stage for."""
    is_begin = text.get('do') == 'begin'
    round_index = int(text['round']) if is_begin else -1
    with self._lock:
      began = self._clock()
      if not self._working:
        self._idle += began - self._since
      self._working += 1
      if is_begin:
        self._begin(index, round_index, began)
    error = ''
    try:
      yield
    except Exception as e:
      error = f'{type(e).__name__}: {e}'
      raise
    finally:
      with self._lock:
        self._end(index, text, began, error)

  def pulse(self) -> None:
    """Looks whether nothing has been completed for long."""
    with self._lock:
      self._complete(self._completed)

  def _begin(self, index: int, round_index: int, now: float) -> None:
    if self._completed < 0:  # earlier work is of no round
      self._phases.clear()
      self._idle = 0.0
    self._round = round_index
    self._complete(round_index)
    self._stages[index].round = round_index
    self._stages[index].restart(now)

  def _end(
    self, index: int, text: dict[str, ct.Json], began: float, error: str
  ) -> None:
    now, what = self._clock(), str(text.get('do'))
    self._working -= 1
    self._since = now
    phase = _PHASES.get(what, 'train')
    if error:
      self._telemetry.event(phase, error, now - began, phase)
      return
    self._phases[phase] += now - began
    if (measured := self._stages.get(index)) is None:
      return
    measured.busy += now - began
    if what in ('forward', 'last'):
      measured.tokens += int(text['sequences']) * measured.stage.context
    elif what == 'abort':
      measured.tokens = 0  # its microbatches will come again
    elif what == 'update':
      self._step(index, measured, text, now)
    elif what == 'order' and 0 <= measured.round == self._round:
      self._complete(self._round + 1)  # others catch up

  def _step(
    self, index: int, done: _Measured, text: dict[str, ct.Json], now: float
  ) -> None:
    seconds = now - done.began
    step = telemetry_lib.Measured(
      self._round + 1,
      int(text['step']),
      done.tokens,
      float(text['nats']),
      float(text['norm']),
      seconds,
      max(seconds - done.busy, 0.0),
      index,
    )
    done.meter.add(step, int(done.stage.private.joined))
    done.restart(now)

  def _complete(self, completed: int) -> None:
    """Hands on what a round took, once it is over."""
    if completed != self._completed:
      for phase, seconds in self._phases.items():
        self._telemetry.event(phase, '', seconds, phase)
      self._telemetry.waited(self._idle)
      self._phases.clear()
      self._idle, self._completed = 0.0, completed
    self._telemetry.pulse(completed, self._config.network.block_seconds)
