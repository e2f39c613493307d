"""The shared model of a pipeline's head, whose stages hold the parameters.

To the node it is a shared model like any other. Its state is the number of
outer steps that the stages have taken; the parameters, and the state of the
outer optimizer, are theirs.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from covenant import errors
from covenant import typing as ct
from covenant.config import amend
from covenant.optim import weight
from covenant.pool import orders as orders_lib
from covenant.pool import seats as seats_lib
from covenant.pool import stage_audit
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.train import pieces as pieces_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train import step_bound
from covenant.wire import payload

SharedState = shared_state_lib.SharedState
_AGAIN_SECONDS = 1.0  # until payloads that nobody has are asked for again
_NOBODYS = '0' * 32  # the fingerprint of a state that the stages do not have


class StagesMissingError(errors.CovenantError):
  """The head is asked to stop while it waits for stages."""


class WholePayload(NamedTuple):
  """A verified payload, whose sections the stages will ask for."""

  message: ct.Message
  data: bytes
  round: int


class StagedModel(shared_state_lib.SharedModel):
  """See `SharedModel`; call `attach` before the state is needed."""

  def attach(
    self,
    seats: seats_lib.Seats,
    log: orders_lib.OrderLog,
    auditor: stage_audit.Auditor,
    stop: Callable[[], bool],
  ) -> None:
    """Connects the stages.

    Args:
      seats: the stages.
      log: the outer steps that they have taken.
      auditor: takes an outer step for a stage that was lost.
      stop: returns True if the head is asked to stop.
    """
    self._seats, self._log, self._stop = seats, log, stop
    self._auditor = auditor
    # Shared with the model under an amended config. Payloads of the last two
    # orders by order and digest; where payloads of this round are, by digest.
    self._payloads: dict[int, dict[str, bytes]] = {}
    self._locations: dict[str, tuple[str, ...]] = {}
    self._mirrors: list[str] = []

  def locate(
    self, locations: Mapping[str, tuple[str, ...]], mirrors: Sequence[str] = ()
  ) -> None:
    """Takes the addresses of the buckets of payloads.

    Args:
      locations: of a round's payloads, by digest.
      mirrors: of validators, which have those of rounds before as well.
    """
    self._locations.clear()
    self._locations.update(locations)
    self._mirrors[:] = mirrors

  def places(self, source: orders_lib.Source) -> tuple[str, ...]:
    """Returns the addresses of buckets that may have a payload."""
    return source.locations or tuple(self._mirrors)

  def init(self) -> SharedState:
    """Returns the state before the first round, which stages make alike."""
    steps = np.zeros(step_bound.ROUNDS, np.float32)
    return SharedState({'orders': np.zeros((), np.int32)}, (), steps)

  def adopt(
    self,
    round_index: int,
    files: Mapping[str, Sequence[str]],
    places: Sequence[str],
    leaf: Callable[[str], jax.Array],
  ) -> SharedState:
    """Lets the stages begin from a published checkpoint; see `SharedModel`."""
    pieces = {name: list(some) for name, some in files.items()}
    self._seats.rebase(
      orders_lib.Base(
        round_index, orders_lib.base_id(pieces), pieces, tuple(places)
      )
    )
    orders = {'orders': np.int32(round_index)}
    return SharedState(orders, (), np.asarray(leaf('steps')))

  def rebase(
    self, files: Mapping[str, Sequence[str]], places: Sequence[str]
  ) -> bool:
    """Lets newcomers begin from a checkpoint of this history.

    Returns:
      Whether the stages were at its state lately.
    """
    pieces = {name: list(some) for name, some in files.items()}
    found = shared_state_lib.state_fingerprint(
      {name: list(map(bytes.fromhex, some)) for name, some in pieces.items()}
    )
    for number in range(self._log.number, self._log.base.number, -1):
      if self._log.fingerprint(number) == found:
        state = self._log.state(number)
        base = orders_lib.Base(number, state, pieces, tuple(places))
        self._seats.rebase(base)
        return True
    return False

  def fingerprint(self, shared: SharedState) -> str:
    """Returns the fingerprint of the run, from those of the stages' tensors.

    Of a state that is not known, as orders were lost, it is that of nobody, so
    that the node catches up.

    Raises:
      StagesMissingError, StoreUnavailableError: as `apply_round`.
    """
    number = int(shared.params['orders'])
    known = self._log.fingerprint(number)
    if known is not None:
      return known
    if number != self._log.number:
      return _NOBODYS
    self._wait(number)
    pieces: dict[str, list[bytes]] = {
      'steps': list(pieces_lib.piece_digests(np.asarray(shared.steps)))
    }
    for _, digests in self._seats.states():
      for name, found in digests.items():
        pieces.setdefault(name, [bytes.fromhex(x) for x in found])
    found = shared_state_lib.state_fingerprint(pieces)
    self._log.set_fingerprint(number, found)
    return found

  def check_stages(self) -> tuple[bool, dict[str, str]]:
    """Takes the last outer step of all stages again, which takes a while.

    Returns:
      Whether a stage said false digests, and the workers that did so, with
      reasons. Their stages are given to others.

    Raises:
      OrderError, StoreError: the state of a stage cannot be made.
    """
    number, states = self._log.number, self._seats.states()
    found = [self._auditor.outer_step(stage) for stage in range(len(states))]
    is_false, liars = False, {}
    for stage, (holder, said) in enumerate(states):
      digests, square = found[stage]
      if digests == said:
        continue
      is_false = True
      if holder:  # else the worker that said so has left
        liars[holder] = (
          f'stage {stage}, outer step {number}: its tensors, computed again, '
          'have other digests'
        )
        self._seats.ban(holder)
      self._seats.stand_in(stage, digests, square)
    if is_false:
      self._log.forget_fingerprint(number)
    return is_false, liars

  def decode(
    self,
    data: bytes,
    expected: payload.Header,
    verify: payload.Verify,
  ) -> payload.Payload:
    """Decodes a payload; its message is a `WholePayload`."""
    found = super().decode(data, expected, verify)
    whole = WholePayload(found.message, data, found.header.round)
    return found._replace(message=whole)

  def norms(self, message: ct.Message) -> np.ndarray:
    """Returns the norm of each tensor of a `WholePayload`."""
    return super().norms(message.message)

  def reopen(self, data: bytes) -> ct.Message:
    """Returns the message of a payload that was decoded, packed."""
    return WholePayload(super().reopen(data), data, payload.round_of(data))

  def apply_round(
    self,
    shared: SharedState,
    messages: Mapping[int, ct.Message],
    consume: bool = False,
    weights: Mapping[int, weight.Weight] = shared_state_lib.EQUAL_WEIGHTS,
    norms: Mapping[int, np.ndarray] | None = None,
    keep_params: bool = False,
  ) -> tuple[SharedState, float]:
    """Orders the stages to take an outer step; returns when all have.

    Raises:
      StagesMissingError: the head is asked to stop.
      StoreUnavailableError: nobody can take it for a stage that is not there.
    """
    del consume, keep_params
    if not messages:
      return shared, 0.0
    uids = sorted(messages)
    weighed = [weights.get(uid, weight.Weight()) for uid in uids]
    norms_RxP = np.stack(
      [self.norms(messages[u]) if norms is None else norms[u] for u in uids]
    )
    factors = self.factors(norms_RxP, weighed, np.asarray(shared.steps))
    number = int(shared.params['orders'])
    after = SharedState(
      {'orders': np.int32(number + 1)}, (), np.asarray(factors.steps)
    )
    if number < self._log.base.number:  # the stages begin after it
      return after, math.nan
    for old in self._payloads.keys() - {number - 1}:
      del self._payloads[old]
    kept = self._payloads[number] = {}
    order = orders_lib.Order(
      number,
      self._log.state(number),
      tuple(self._source(uid, messages[uid], kept) for uid in uids),
      np.asarray(factors.factors_RxP, np.float32),
      np.asarray(factors.parts_R, np.uint16),
      amend.for_stages(self.genesis, self._config),
    )
    self._seats.give(order)
    if number + 1 < self._log.number:  # taken before, by a head that stopped
      return after, math.nan
    self._wait(number + 1)
    return after, math.sqrt(self._seats.square())

  def payload(self, source: orders_lib.Source) -> bytes | None:
    """Returns a payload of the last two orders; None of an older one."""
    for kept in list(self._payloads.values()):
      if source.digest in kept:
        return kept[source.digest]
    return None

  def _source(
    self, uid: int, whole: WholePayload, kept: dict[str, bytes]
  ) -> orders_lib.Source:
    data = whole.data
    digest = run_storage_lib.digest(data).hex()
    kept[digest] = data
    ends = payload.section_ends(data, self.spec)
    view = memoryview(data)
    sections = tuple(
      orders_lib.section_digest(view[a:b])
      for a, b in zip(ends[:-1], ends[1:], strict=True)
    )
    locations = self._locations.get(digest, tuple(self._mirrors))
    return orders_lib.Source(
      uid, whole.round, digest, locations, tuple(ends), sections
    )

  def _wait(self, number: int) -> None:
    """Waits until all stages have taken so many outer steps.

    The head takes the last one itself for stages that were lost, whoever comes
    in their place, so that the round goes on.

    Raises:
      StagesMissingError: the head is asked to stop.
      StoreUnavailableError: nobody can take it in the time of an answer.
    """
    what = f'stages to take outer step {number}'
    patience = self._config.pool.patience
    until = time.monotonic() + patience
    while number == self._log.number:
      if self._seats.wait(self._need_not_wait, until):
        return
      if self._stop():
        break
      late, why = sorted(self._seats.missing()), ''
      if set(late) <= self._seats.lost():
        if not (why := self._stand_in(late)):
          return
      if time.monotonic() > until:
        until = time.monotonic() + patience
        names = (f'{s} ({self._seats.worker(s) or "no worker"})' for s in late)
        line = f'waiting for {what}: {", ".join(names)}'
        if why:
          raise store_lib.StoreUnavailableError(f'{line}; {why}')
        print(line, file=sys.stderr, flush=True)
    raise StagesMissingError(f'stopped while waiting for {what}')

  def _need_not_wait(self) -> bool:
    lost = self._seats.lost()
    return self._stop() or self._seats.missing() <= lost

  def _stand_in(self, stages: Sequence[int]) -> str:
    """Takes the last outer step of some stages; returns why it could not."""
    try:
      for stage in stages:
        self._seats.stand_in(stage, *self._auditor.outer_step(stage))
    except (orders_lib.OrderError, store_lib.StoreError) as e:
      time.sleep(_AGAIN_SECONDS)
      return f'the head cannot take it for them: {e}'
    return ''
