"""A round of training by the stages of a pipeline, as their head directs it.

Microbatches follow each other through the stages, and every stage goes back
with one before it goes forward with the next (1F1B). The head passes on what
stages send, and lets in a microbatch when one has come back: so many are under
way, and a stage that is slow holds up the others instead of being flooded.

If a stage is lost, its place is taken by another worker, which begins from the
shared parameters; all stages forget the inner step under way, and its
microbatches are sent again. With `pool.bypass_steps` the others do not wait for
an inner stage: the activations before it go to the stage after it, and it has
no part in these steps. At the beginning of a round, when boundaries are fitted,
they wait for it as long as for an answer.
"""

import collections
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn

import numpy as np

from covenant import config as config_lib
from covenant import typing as ct
from covenant.config import amend
from covenant.data import assignment
from covenant.pool import seat_events
from covenant.pool import seats as seats_lib
from covenant.pool import stage_talk
from covenant.pool import stage_work
from covenant.train import local as local_lib
from covenant.train.pipeline import stage_bytes
from covenant.train.pipeline import stage_programs
from covenant.train.pipeline import subspace


class _NotFiniteError(Exception):
  """Different workers make numbers of a step that are not finite."""


class StageRound:
  """The training of one round.

  Args:
    config: the config of the run.
    island: the pipeline, with its steps and batch.
    seats: the stages.
    round_index: the round.
    late: returns True when the time is over, or the head is to stop.
    patience: seconds that a stage may take for an answer.
    draw: the generator that selects samples, unknown to workers.
    observe: called with each step, once it is done.
    changes: by amendments, see `amend.for_stages`.
  """

  def __init__(
    self,
    config: config_lib.Config,
    island: config_lib.Island,
    seats: seats_lib.Seats,
    round_index: int,
    late: Callable[[], bool],
    patience: float,
    draw: np.random.Generator,
    observe: local_lib.Observe = lambda step: None,
    changes: amend.Changes = amend.NOTHING,
  ):
    self._model, self._island = config.decoder, island
    self._seats = seats
    self._round = round_index
    self._late = late
    self._fit_form = stage_programs.fits(self._model, island)
    self._patience = patience
    self._observe = observe
    self._stages = island.stages
    self._spans = subspace.spans(self._model, island)
    self._ring = self._model.tie_embeddings
    self._microbatch = config.optim.inner.microbatch_size or island.batch
    self._schedule_steps = config.optim.inner_steps
    self._changes = changes
    self._most_bypassed = config.pool.bypass_steps
    self._bypassed = [0] * island.stages  # steps of each stage
    self._told: set[tuple[int, int]] = set()  # stage, boundary that it knows
    self._in_flight = 2 * (self._stages + self._ring)
    self._leaves = stage_work.leaf_places(self._model, island)
    self._sizes = collections.Counter(s for s, _ in self._leaves)
    self._fits: dict[int, bytes] = {}
    self._crossing: dict[int, bytes] = {}  # of the fitted tokens, by sender
    self._begun: set[int] = set()  # stages that have begun this round
    self._attempt = 0
    self._talk = stage_talk.StageTalk(seats, self._stages, late, patience)
    self._passed = 0
    self._work: dict[str, int] = {}
    self._done_by: dict[int, str] = {}  # the worker of a step, by stage
    self._samples = stage_work.Samples(draw)
    self._refused: dict[str, str] = {}
    self._not_finite: tuple[int, str] = -1, ''  # step and worker

  def train(
    self, batches: Iterable[np.ndarray], fitted_BxL1: np.ndarray
  ) -> stage_work.StagesResult | None:
    """Trains as many steps as there is time for; None if there was for none.

    Args:
      batches: the tokens of each step, int32 [B, L + 1].
      fitted_BxL1: the tokens that boundaries are fitted to.
    """
    receipt, losses, norms = assignment.Receipt(), [], []
    self._fitted = fitted_BxL1
    began = since = time.monotonic()
    try:
      self._recover()  # from what happened before
      began = since = time.monotonic()
      for h, tokens_BxL1 in enumerate(batches):
        wait = time.monotonic() - since
        nats, norm = self._until_done(h, tokens_BxL1)
        receipt.add(tokens_BxL1)
        losses.append(nats)
        norms.append(norm)
        self._count(len(tokens_BxL1) // self._microbatch)
        seconds = time.monotonic() - since
        since += seconds
        at = self._round, h, self._schedule_step(h)
        found = nats, norm, seconds, wait
        self._observe(stage_work.inner_step(at, tokens_BxL1, found))
    except stage_talk.LateError:
      if not (losses or self._seats.missing()):
        if (slow := self._talk.slowest()) is not None:
          self._seats.drop(slow, if_another=True)
      self._talk.tell_all({'do': 'abort'})
    seconds = max(time.monotonic() - began, 1e-9)
    if not losses:
      return None
    return stage_work.StagesResult(
      receipt.sequences,
      receipt.digest(),
      tuple(losses),
      tuple(norms),
      self._work,
      tuple(1 - min(busy / seconds, 1.0) for busy in self._talk.busy),
      self._attempt,
      self._passed,
      tuple(self._samples.kept),
      self._refused,
      self._fits,
      tuple(self._bypassed),
    )

  def _count(self, microbatches: int) -> None:
    """Counts the work of a step for the workers that did it."""
    for s, span in enumerate(self._spans):
      if s in self._talk.away:
        self._bypassed[s] += 1
      elif worker := self._done_by.get(s):
        done = self._work.get(worker, 0)
        self._work[worker] = done + len(span) * microbatches

  def _schedule_step(self, step: int) -> int:
    """Returns the inner step of the run that a step of this round is."""
    index = step * self._schedule_steps // self._island.steps
    return self._round * self._schedule_steps + index

  def seal(self) -> list[seat_events.Event | None]:
    """Returns each stage's sections; None of one that did not answer."""
    found: list[seat_events.Event | None] = [None] * self._stages
    self._talk.forget()
    waiting = self._begun - self._talk.forget_losses()
    for s in waiting:
      self._talk.ask(s, {'do': 'seal'})
    until = time.monotonic() + self._patience
    while waiting and (left := until - time.monotonic()) > 0:
      event = self._seats.poll(left)
      if event is None:
        continue
      if event.what == seat_events.LOST:
        waiting.discard(event.stage)
      elif event.what == 'sealed' and event.stage in waiting:
        waiting.discard(event.stage)
        found[event.stage] = event
    return found

  def _until_done(
    self, step: int, tokens_BxL1: np.ndarray
  ) -> tuple[float, float]:
    """Does a step as `_step`, again after every loss of a stage."""
    while True:
      try:
        return self._step(step, tokens_BxL1)
      except _NotFiniteError:  # it is not taken, like one of a miner's
        self._attempt += 1
        self._talk.forget()
        self._talk.tell_all({'do': 'abort'})
        return math.nan, math.nan
      except stage_talk.LostError:
        pass
      except stage_talk.NonsenseError as e:
        self.refuse(*e.args)
      self._attempt += 1
      self._recover()

  def _recover(self) -> None:
    """Waits until all stages that are not bypassed know this round."""
    if not self._fits:
      self._seats.wait(self._late, time.monotonic() + self._patience)
    while not self._late():
      self._begun -= self._talk.forget_losses()
      missing = self._seats.missing()
      if not missing or not all(map(self._may_bypass, missing)):
        if not self._seats.wait(self._late):
          raise stage_talk.LateError
        self._begun -= self._talk.forget_losses()
        if not self._seats.is_ready:
          continue
        missing = set()
      self._talk.away = missing
      self._begun -= missing
      self._talk.forget()
      self._talk.tell_all({'do': 'abort'})
      try:
        return self._begin()
      except stage_talk.LostError:
        continue
      except stage_talk.NonsenseError as e:
        self.refuse(*e.args)
    raise stage_talk.LateError

  def _may_bypass(self, stage: int) -> bool:
    """Returns whether others go on without a stage; not to judge one again."""
    is_inner = 0 < stage < self._stages - 1
    has_steps = self._bypassed[stage] < self._most_bypassed
    return is_inner and has_steps and not self._refused

  def _boundary(self, stage: int) -> int:
    """Returns the boundary that the input of a stage crosses."""
    return self._talk.before(stage) + 1 if stage else 0

  def _begin(self) -> None:
    """Begins the round at the stages that have not, one after another."""
    for s in range(self._stages):
      if s not in self._begun | self._talk.away:
        self._begin_stage(s)
    for s in self._begun:
      boundary = self._boundary(s)
      if boundary and (s, boundary) not in self._told:
        self._told.add((s, boundary))
        text = {'do': 'fit', 'stage': s, 'boundary': boundary}
        self._seats.send(s, text, self._fits[boundary])
        self._passed += len(self._fits[boundary])

  def _begin_stage(self, s: int) -> None:
    """Begins the round at a stage, which fits the boundary after it at first.

    Raises:
      LostError, LateError, NonsenseError: see `StageTalk.next`.
    """
    # A boundary that a bypassed stage has not fitted is not there.
    crossed = max((i for i in self._fits if i <= s), default=0)
    crossing = self._crossing.get(crossed - 1, b'')
    known = self._fits.keys() & {s, s + 1, 1, crossed}
    wanted = {i: self._fits[i] for i in sorted(known)}
    self._told = {(t, i) for t, i in self._told if t != s}
    self._told |= {(s, i) for i in wanted}
    text = {
      'do': 'begin',
      'round': self._round,
      'changes': dict(self._changes),
      'sequences': len(self._fitted),
      'crossing': len(crossing),
      'crossed': crossed,
      'fits': [[i, len(data)] for i, data in wanted.items()],
    }
    tokens = stage_work.tokens_bytes(self._fitted)
    self._talk.ask(s, text, b''.join([tokens, crossing, *wanted.values()]))
    answer = self._talk.answer(s, 'begun')
    if s + 1 < self._stages and s + 1 not in self._fits:
      size = stage_bytes.size_of(self._fit_form)
      fit, crossing = answer.data[:size], answer.data[size:]
      form = self._form(len(self._fitted))
      why = stage_work.flaw(fit, self._fit_form)
      if why := why or stage_work.flaw(crossing, form):
        raise stage_talk.NonsenseError(s, answer.worker, f'the fit: {why}')
      self._fits[s + 1], self._crossing[s] = fit, crossing
      self._passed += len(answer.data)
    self._begun.add(s)

  def _step(self, step: int, tokens_BxL1: np.ndarray) -> tuple[float, float]:
    """Trains one step on one batch; returns loss and norm of the gradient."""
    if self._talk.away:
      self._recover()  # with the workers that have come meanwhile
    slices = tokens_BxL1.reshape(-1, self._microbatch, tokens_BxL1.shape[1])
    count, divisor = len(slices), float(max(np.sum(tokens_BxL1[:, 1:] >= 0), 1))
    nats_M = np.zeros(count, np.float32)
    squares: dict[int, list[float]] = {}
    came: dict[tuple[int, int], bytes] = {}  # by stage and microbatch
    given: dict[tuple[int, int], bytes] = {}  # gradients
    last, let_in, back = self._stages - 1, 0, 0

    def go(s: int, what: str, m: int, data: bytes = b'') -> None:
      text: dict[str, ct.Json] = {'do': what, 'microbatch': m}
      text |= {'attempt': self._attempt, 'count': count}
      if what in ('look_up', 'forward', 'last'):
        came[s, m] = data
        text |= {'sequences': len(slices[m]), 'divisor': divisor}
        text['crossed'] = self._boundary(s)
        data = stage_work.tokens_bytes(slices[m]) + data
      else:
        given[s, m] = data
      self._talk.ask(s, text, data)

    while len(squares) < self._stages - len(self._talk.away):
      while let_in < count and let_in - back < self._in_flight:
        go(*((last, 'look_up') if self._ring else (0, 'forward')), let_in)
        let_in += 1
      event = self._talk.next()
      s, m = event.stage, event.text['microbatch']
      found, nats = self._numbers(event)
      if not all(map(math.isfinite, (nats, *found))):
        self._blame(step, event, stage_work.NOT_FINITE)
      if found:
        squares[s], self._done_by[s] = found, event.worker
      self._passed += len(event.data)
      if event.data or event.what != 'backward':
        if why := stage_work.flaw(event.data, self._form(len(slices[m]))):
          self._blame(step, event, why)
      if event.what in ('forward', 'last', 'backward') and event.data:
        of = s, event.worker, step, slices[m], self._boundary(s)
        sent = came[s, m], given.get((s, m), b''), divisor, event.data
        self._samples.add(stage_work.Sample(*of, *sent))
      match event.what:
        case 'looked_up':
          go(0, 'forward', m, event.data)
        case 'forward':
          after = self._talk.after(s)
          go(after, 'last' if after == last else 'forward', m, event.data)
        case 'last':
          nats_M[m] = nats
          go(self._talk.before(last), 'backward', m, event.data)
        case 'backward' if s > 0 and s < last:
          go(self._talk.before(s), 'backward', m, event.data)
        case 'backward' if s == 0 and self._ring:
          go(last, 'backward', m, event.data)
        case 'backward':
          back += 1
    nats, norm = float(stage_work.total(nats_M)), self._norm(squares)
    index = self._schedule_step(step)
    update = {'do': 'update', 'norm': norm, 'nats': nats, 'step': index}
    self._talk.tell_all(update)
    return nats, norm

  def _numbers(self, event: seat_events.Event) -> tuple[list[float], float]:
    """Returns the squares and the loss of an answer; raises NonsenseError."""
    squares, nats = stage_work.numbers(event.text)
    has_all = len(squares) in (0, self._sizes[event.stage])
    if not has_all or any(x < 0 for x in squares):
      why = 'malformed numbers'
      raise stage_talk.NonsenseError(event.stage, event.worker, why)
    return squares, nats

  def _norm(self, squares: Mapping[int, list[float]]) -> float:
    present = [squares[s][i] for s, i in self._leaves if s in squares]
    return float(np.sqrt(stage_work.total(present)))

  def _blame(self, step: int, event: seat_events.Event, why: str) -> NoReturn:
    """Refuses the sender of a message with impossible numbers.

    Raises:
      LostError: its holder is refused.
      _NotFiniteError: another holder sent such numbers too: the training has
        diverged.
    """
    worker = event.worker
    last_step, last_worker = self._not_finite
    if why == stage_work.NOT_FINITE:
      if last_step == step and last_worker != worker:
        self._refused.pop(last_worker, None)  # both are honest
        self._seats.banned.discard(last_worker)
        raise _NotFiniteError
      self._not_finite = step, worker
    said = f'stage {event.stage}, step {step}: {why}'
    self.refuse(event.stage, worker, said)
    raise stage_talk.LostError

  def refuse(self, stage: int, worker: str, why: str) -> None:
    """Takes a stage from a worker, which is not paid for this round.

    If the worker has lost the stage already, its new holder keeps it.
    """
    self._refused[worker] = why
    self._seats.banned.add(worker)
    self._seats.drop(stage, holder=worker)

  def _form(self, sequences: int) -> ct.PyTree:
    """Returns the shapes of coordinates; see `StagePrograms.coordinates`."""
    length = self._fitted.shape[1] - 1
    return stage_programs.coordinates(
      self._model, self._island, sequences, length
    )
