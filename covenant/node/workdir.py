"""The folder of a node or of an emulated run, but for its checkpoints.

config.json      of an emulated run: its config
metrics.jsonl    of a process: a line per inner step and round; of an emulated
                 run: a line per round and evaluation; tensorboard/ mirrors it
steps.jsonl      of an emulated run: a line per inner step
verdicts.jsonl   the findings of validators about every miner, a line per round
events.jsonl     of a process: what it did and what failed; of an emulated run:
                 lost rounds, skipped steps and loss spikes
amendments.jsonl what the run adopted, a line per amendment
status.json      of a process: where it stands now
starts.jsonl     when, where and with what versions it was started, a line each
pool.jsonl       of a pool: the work of each worker, a line per round
profile/         one round under JAX's profiler
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Generator, Sequence

import jax

from covenant import config as config_lib
from covenant import files
from covenant import folder_lock
from covenant import metrics
from covenant import startup
from covenant import typing as ct
from covenant.node import base as node_lib
from covenant.node import validator_role as validator_lib
from covenant.protocol import amendments as amendments_lib
from covenant.protocol import apply
from covenant.protocol import round as round_lib
from covenant.telemetry import copies as copies_lib
from covenant.telemetry import provenance
from covenant.telemetry import spikes
from covenant.telemetry import telemetry as telemetry_lib
from covenant.telemetry import trackers as trackers_lib

_CONFIG = 'config.json'
_VERDICTS = 'verdicts.jsonl'
_EVENTS = 'events.jsonl'
_STEPS = 'steps.jsonl'
AMENDMENTS = 'amendments.jsonl'
# Fields that may differ when a run is resumed. A miner on other devices rounds
# differently; on how many the miners are spread changes nothing.
_FREE = (
  'eval.samples',
  'eval.prompt',
  'eval.sample_tokens',
  'rounds',  # a run may be made longer (extension.py)
  'devices.',
  'network.coordinator',
  'network.process',
  'plan.',
  'data.cache_gb',
  'data.places',
  'telemetry.',
  'alerts.',
)
# The places of data, which the identity compares by its digests.
_PLACES = ('data.path', 'data.tokenizer_path', 'data.digest', 'data.phases')


_PHASES = {phase.value: phase.name.lower() for phase in round_lib.Phase}
# The class of the alert of an event with an error.
_ALERTS = {
  node_lib.LOST_ROUND: 'diverged',
  node_lib.SKIPPED: 'diverged',
  node_lib.SPIKE: 'diverged',
  node_lib.WEIGHTS: 'weights',
  node_lib.RELEASE: 'lost',
  node_lib.DIVERGED: 'diverged',
}


class Workdir:
  """Writes the files of one process; use as a context manager.

  The folder of a process with a role is locked until the end of either.

  Args:
    path: the folder, which all ranks of a node share.
    role: of a process, such as 'miner'; its folder is made when missing.
    hotkey: of a process.
    rank: of a process that shares the folder; all but rank 0 write to rank-N/.
    profile: a round to trace, from 0 on. TensorBoard and Perfetto show it; on
      one device it takes some megabytes. None traces nothing.

  Raises:
    FolderInUseError: another process writes there.
  """

  _is_full = False  # True after a write that failed
  last_error = ''  # phase and class of the last error of this process

  def __init__(
    self,
    path: str | os.PathLike[str],
    role: str = '',
    hotkey: str = '',
    rank: int = 0,
    profile: int | None = None,
  ):
    self.path = pathlib.Path(path, f'rank-{rank}' if rank else '')
    self._status: dict[str, ct.Json] = {
      'role': role,
      'hotkey': hotkey,
      'pid': os.getpid(),
      'error': '',
    }
    self._held = contextlib.ExitStack()
    if role:
      self._held.enter_context(folder_lock.hold(self.path))
    self._rank = rank
    self._measured: telemetry_lib.Telemetry | None = None
    self._copies: copies_lib.Copies | None = None
    self._at = 0, 0  # block and round of the last event
    self._profile = profile
    self._is_tracing = False
    self._writer: metrics.MetricsWriter | None = None
    self._observe: Callable[[metrics.Record], None] = lambda record: None

  def __enter__(self) -> 'Workdir':
    return self

  def __exit__(self, *_: object) -> None:
    self._end_trace()
    if self._writer is not None:
      self._writer.close()
    if self._copies is not None:
      self._copies.close()
    if self._measured is not None:
      self._measured.close()
    self._held.close()

  @property
  def telemetry(self) -> telemetry_lib.Telemetry:
    """The measurements of a process; `measure` comes first."""
    assert self._measured is not None
    return self._measured

  def measure(self, config: config_lib.Config) -> None:
    """Begins the measurements of a process, and notes its start."""
    with self._unless_full():
      provenance.record(self.path)
    node = telemetry_lib.Node(
      self._status['role'], self._status['hotkey'], self.path, not self._rank
    )
    self._measured = telemetry_lib.Telemetry(config, node, self._spike)
    if self._measured.url:
      self.status(metrics=self._measured.url)

  def _spike(self, text: str) -> None:
    self.event(node_lib.Event(*self._at, node_lib.SPIKE, text))

  def held(self) -> config_lib.Config | None:
    """Returns the config of the run in the folder, if there is one."""
    path = self.path / _CONFIG
    return config_lib.from_json(path.read_text()) if path.exists() else None

  def check_owner(self, config: config_lib.Config) -> None:
    """Refuses a folder that holds a run with another config.

    Raises:
      ConfigError: names the fields that differ; where it runs may differ.
    """
    there = self.held()
    if there is None:
      return
    config = config_lib.from_json(_shown(config))
    data = there.data
    if not data.digest and data.path == config.data.path:  # of an old release
      data = dataclasses.replace(data, digest=config.data.digest)
    known = config_lib.identity(dataclasses.replace(there, data=data))
    moved = known == config_lib.identity(config)
    free = (*_FREE, *_PLACES) if moved else _FREE
    differ = [
      line
      for line in config_lib.differences(there, config)
      if not line.startswith(free)
    ]
    if differ:
      raise config_lib.ConfigError(
        f'{self.path} holds a run with another config. Choose another '
        + '\n  '.join(['--workdir, or set back:', *differ])
      )

  def open_run(
    self,
    config: config_lib.Config,
    resume: int | None,
    observe: Callable[[metrics.Record], None],
  ) -> None:
    """Opens the files of an emulated run.

    Args:
      config: of the run.
      resume: rounds completed by the checkpoint that the run resumes from;
        records of later ones are dropped. None: there is no checkpoint.
      observe: called with every record, those of earlier starts included.
    """
    files.write(self.path / _CONFIG, _shown(config))
    provenance.record(self.path)
    path = self.path / 'metrics.jsonl'
    self._writer = metrics.MetricsWriter(
      path, self.path / 'tensorboard', resume=resume
    )
    self._observe = observe
    self._spikes = spikes.SpikeDetector(
      config.telemetry.spike_sigmas, config.telemetry.spike_steps
    )
    run = trackers_lib.run_of(config, self.path.name, self.path)
    names = {'role': 'emulate', 'hotkey': '', 'run': config.name}
    self._copies = copies_lib.Copies(config.telemetry, run, names)
    for record in metrics.read(path):
      observe(record)
    for name in (_VERDICTS, _EVENTS):
      lines = files.read_records(self.path / name, 'round').objects
      kept = [json.dumps(x) for x in lines if x['round'] < (resume or 0)]
      if lines or name == _VERDICTS:
        files.write_lines(self.path / name, kept)
    steps = self.path / _STEPS
    found = metrics.read(steps, [metrics.Step]) if steps.exists() else []
    found = [x for x in found if x.round <= (resume or 0)]
    files.write_lines(steps, map(metrics.encode, found))
    for step in found:
      self._spikes.add(step)

  def log(self, record: metrics.Record) -> None:
    """Writes a record of an emulated run; `open_run` comes first."""
    assert self._writer is not None
    self._writer.write(record)
    if self._copies is not None:
      self._copies.record(record)
    self._observe(record)

  def log_steps(self, steps: Sequence[metrics.Step]) -> None:
    """Writes the inner steps of a round of an emulated run."""
    assert self._writer is not None and self._copies is not None
    lines = (json.loads(metrics.encode(step)) for step in steps)
    files.append_jsonl(self.path / _STEPS, *lines)
    for step in steps:
      self._writer.mirror(step)
      self._copies.record(step)
      if text := self._spikes.add(step):
        event = node_lib.Event(0, step.round - 1, node_lib.SPIKE, text)
        self.note('', event)

  def announce(self, uid: int, verdict: validator_lib.Verdict) -> None:
    """Appends the verdict of one of the validators of an emulated run."""
    line = {'validator': uid, **verdict._asdict()}
    files.append_jsonl(self.path / _VERDICTS, line)

  def note(self, name: str, event: node_lib.Event) -> None:
    """Appends an event of one of the nodes of an emulated run."""
    line = {'time': time.time(), 'node': name, **event._asdict()}
    files.append_jsonl(self.path / _EVENTS, line)

  def sync(self) -> None:
    """Returns once all records of an emulated run are on the disk."""
    assert self._writer is not None
    self._writer.sync()

  def event(self, event: node_lib.Event) -> None:
    """Appends an event of a process; an error also goes into its status."""
    self._at = event.block, event.round
    if event.error:
      is_note = event.what in node_lib.NOTES
      kind = '' if is_note else f': {event.error.partition(":")[0]}'
      self.last_error = event.what + kind
    if self._measured is not None:
      phase, kind = _PHASES.get(event.what, ''), _ALERTS.get(event.what)
      self._measured.event(event.what, event.error, event.seconds, phase)
      if event.error.startswith(apply.OutOfSyncError.__name__):
        kind = 'lost'
      if event.error and kind:
        self._measured.alert(kind, f'{event.what}: {event.error}')
    self.record('events', {'time': time.time(), **event._asdict()})
    if event.error:
      self.status(error=f'block {event.block}, {event.what}: {event.error}')

  def adopted(self, record: dict[str, ct.Json], missing: str = '') -> None:
    """Appends an amendment that the run adopted, once; alerts what it needs.

    Args:
      record: of the amendment (`amendments.record`).
      missing: what this machine lacks to follow it; empty if it has all.
    """
    path = self.path / AMENDMENTS
    known = {x['digest'] for x in files.read_records(path, 'digest').objects}
    if record['digest'] not in known:
      self.record(path.stem, record)
      print(amendments_lib.describe(record), flush=True)
    if needed := record['needed'] or missing:
      self.event(node_lib.Event(*self._at, node_lib.RELEASE, needed))

  def verdict(self, verdict: validator_lib.Verdict) -> None:
    """Appends the verdict of a validator's process."""
    self.record('verdicts', verdict._asdict())

  def record(self, name: str, fields: dict[str, ct.Json]) -> None:
    """Appends a line to NAME.jsonl; a full disk loses it, not the process."""
    with self._unless_full():
      files.append_jsonl(self.path / f'{name}.jsonl', fields)

  def status(self, **fields: ct.Json) -> None:
    """Changes fields of status.json; a full disk loses the change."""
    self._status |= fields
    if self._measured is not None:
      self._measured.status(self._status)
    with self._unless_full():
      files.write(self.path / 'status.json', json.dumps(self._status))

  def begin_round(self, round_index: int) -> None:
    """Traces the round to profile; may be called often for one round."""
    if round_index != self._profile:
      self._end_trace()
    elif not self._is_tracing:
      jax.profiler.start_trace(str(self.path / 'profile'))
      self._is_tracing = True

  def _end_trace(self) -> None:
    if self._is_tracing:
      self._is_tracing = False
      jax.profiler.stop_trace()

  @contextlib.contextmanager
  def _unless_full(self) -> Generator[None]:
    try:
      yield
      self._is_full = False
    except OSError as e:
      if not self._is_full:  # said once, until a write succeeds
        self._is_full = True
        with contextlib.suppress(OSError):  # its log may be on the same disk
          text = f'cannot write what happened: {startup.os_error(e)}'
          print(text, file=sys.stderr, flush=True)
      if self._measured is not None:
        self._measured.alert('disk', f'a file cannot be written: {e}')


def _shown(config: config_lib.Config) -> str:
  """Returns a config as JSON without secrets; an emulation needs none."""
  raw = json.loads(config_lib.to_json(config))
  return json.dumps(config_lib.hide_secrets(raw), indent=2) + '\n'
