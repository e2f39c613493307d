"""A whole emulated run: rounds, evaluations, checkpoints and their folder."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Callable
from concurrent import futures
from typing import NamedTuple

from covenant import config as config_lib
from covenant import folder_lock
from covenant import metrics
from covenant.data import dataset
from covenant.data import pretrained
from covenant.emulate import devices as devices_lib
from covenant.emulate import host as host_lib
from covenant.emulate import measurements
from covenant.emulate import places
from covenant.emulate import proposals
from covenant.emulate import rollback_files
from covenant.emulate import saved
from covenant.node import extension
from covenant.node import multihost as multihost_lib
from covenant.node import preflight
from covenant.node import samples
from covenant.node import workdir as workdir_lib
from covenant.protocol import checkpoint as checkpoint_lib


class Outcome(NamedTuple):
  """The end of a run."""

  state: checkpoint_lib.RunState
  rounds: int  # of the whole run, as amended
  finished: bool  # False: interrupted, to be resumed


def run(
  config: config_lib.Config,
  workdir: str | os.PathLike[str],
  observe: Callable[[metrics.Record], None] = lambda record: None,
  stop: Callable[[], bool] = lambda: False,
  process_group: multihost_lib.ProcessGroup | None = None,
  profile: int | None = None,
  finish: Callable[[], None] = lambda: None,
  plan: Callable[[int], None] = lambda rounds: None,
  pause: Callable[[], bool] | None = None,
) -> Outcome:
  """Runs `config` in `workdir`, from its newest checkpoint if it has one.

  Writes config.json, metrics.jsonl, steps.jsonl, verdicts.jsonl, tensorboard/,
  checkpoints/ and, with `eval.samples`, samples.jsonl.

  Args:
    config: the experiment.
    workdir: a folder; made when missing. Several processes must all see it.
    observe: called with every record, those of earlier starts included.
    stop: asked after every round and its evaluation; True ends the run with a
      checkpoint, from which it can be resumed.
    process_group: the processes that emulate the run together; this one if
      omitted. Rank 0 alone writes, observes and is asked to stop. The outcome
      of the others lacks what is private to miners elsewhere.
    profile: a round to trace, see `workdir.Workdir`.
    finish: called after the last record, while the last checkpoint is written.
    plan: called before every record of a round with the number of rounds of
      the run, which amendments may change.
    pause: asked before every inner step; True ends the run as `stop` does, but
      within the round. When it is resumed, miners whose rounds were done do not
      train them again. Several processes do not ask.

  Raises:
    ConfigError: the config cannot run here, or `workdir` has another one's.
    DivergedError: the round of every miner is lost; its numbers are not finite.
    MultihostError: another process has ended.
  """
  process_group = process_group or multihost_lib.ProcessGroup()
  workdir = pathlib.Path(workdir)
  folder = workdir_lib.Workdir(
    workdir, rank=process_group.index, profile=profile
  )

  def check() -> None:
    preflight.check(config, places.most(config))
    folder.check_owner(config)

  process_group.broadcast_from(0, 'check', check)
  data = dataset.load(config)
  pause = pause if process_group.is_single else None
  host = host_lib.Host(config, data, None, process_group, pause)
  device_pool, is_first = host.device_pool, not process_group.index
  with contextlib.ExitStack() as stack:
    stack.enter_context(folder_lock.hold(folder.path))
    stack.callback(host.tools.close)
    checkpoints = stack.enter_context(
      checkpoint_lib.Checkpoints(workdir / 'checkpoints', config.checkpoint)
    )
    restored = checkpoints.restore(device_pool.wanted(saved.save(host)))
    if restored is not None:
      saved.load(host, device_pool.loaded(restored))
      rollback_files.load(host, workdir)
    resume = restored.counters.round if restored else None
    completed = resume or config.first_round
    stack.enter_context(folder)
    if is_first:
      held = folder.held() or config
      rounds = host.planned_rounds
      if note := extension.describe(held, config, completed, rounds):
        print(note, file=sys.stderr)
      folder.open_run(config, resume, observe)
      pretrained.keep(folder.path, config, data)
      host.announce, host.stopwatch.note = folder.announce, folder.note
      host.adopted = folder.adopted
      if restored is None:
        folder.log(host.evaluate())
    kept = completed if is_first else None  # one process alone writes
    sampler = samples.Sampler(config, folder.path, kept)
    if config.gauntlet.evaluate and completed < host.rounds:
      # Programs of later phases are compiled beside the first training. Errors
      # come again where they are used.
      warming = stack.enter_context(futures.ThreadPoolExecutor(1, 'warm-up'))
      warming.submit(host.warm_up)
    while completed < host.rounds:
      folder.begin_round(completed)
      proposals.support(host, workdir)
      try:
        record = host.round()
      except devices_lib.PausedError:
        folder.sync()
        rollback_files.save(host, workdir)
        checkpoints.save(saved.save(host), overwrite=True)
        break
      completed = record.round
      plan(host.planned_rounds)
      if is_first:
        folder.log_steps(
          measurements.step_records(config, completed, host.miners, host.model)
        )
        folder.log(record)
      last = completed == host.rounds
      if is_first and (last or completed % config.eval.every == 0):
        folder.log(host.evaluate())
      if is_first and sampler.is_due(completed, last):
        sampler.add(completed, host.validators[0].shared.params)
      # Processes that differ in anything differ in the root.
      stopped = process_group.broadcast_from(
        0, ('round', completed, host.root), stop
      )
      if last or stopped or checkpoints.due(completed):
        if is_first:
          folder.sync()  # a checkpoint has only rounds that are logged
          rollback_files.save(host, workdir)
        checkpoints.save(device_pool.whole(saved.save(host)))
      if stopped:
        break
    if is_first:
      finish()
  finished = completed == host.rounds
  return Outcome(saved.save(host), host.planned_rounds, finished)
