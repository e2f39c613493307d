"""Validators who do not do their duty."""

import json
from collections.abc import Mapping
from typing import Any

from covenant.adversaries import base as adversary
from covenant.node import validator as validator_lib
from covenant.protocol import apply
from covenant.protocol import membership as membership_lib
from covenant.protocol import round as round_lib
from covenant.store import interface as store_lib

_LIMIT = 1 << 24  # bytes of another's verdict


class Corrupt(validator_lib.Validator):
  """A validator's program, but for what a subclass changes."""

  honest = False

  def __init__(self, *args: Any, gang: adversary.Gang, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self._gang = gang


class Lazy(Corrupt):
  """Evaluates nobody; sets the weights that the leader published last.

  It saves the evaluations, and earns as much as who makes them.
  """

  def _score(self, command: round_lib.Command, head: int) -> None:
    collected, r = self._to_score, command.round - 1
    self._to_score = None
    if collected is None or (r + 1) % self.config.gauntlet.weights_every:
      return
    membership = membership_lib.read(self.chain, self.plan.finalized(head))
    for bucket in apply.mirrors(self.objects, membership):
      if bucket.location == self.objects.bucket.location:
        continue
      try:
        key = self.objects.key('verdicts', r - 1)
        verdict = json.loads(bucket.get(key, _LIMIT))
      except (store_lib.StoreError, ValueError):
        continue
      weights = {int(u): float(w) for u, w in verdict['weights'].items()}
      if weights:
        self.chain.set_weights(weights)
      return


class Bribed(Corrupt):
  """Gives half of its weight to its briber, the first adversary's uid."""

  def _score(self, command: round_lib.Command, head: int) -> None:
    super()._score(command, head)
    briber = min(self._gang.names)
    r = command.round - 1
    if (r + 1) % self.config.gauntlet.weights_every == 0:
      self.chain.set_weights({**self._others(briber), briber: 1.0})

  def _others(self, briber: int) -> Mapping[int, float]:
    scores = {u: s.score for u, s in self.standings.standings.items()}
    total = sum(scores.values())
    return {u: x / total for u, x in scores.items() if u != briber and x > 0}


class Omitting(Corrupt):
  """Leaves every second honest peer out of its manifests.

  It harms only while it leads: who has the most stake makes the manifest, and
  need not choose whom others would.
  """

  def _propose(self, collected: validator_lib.Collected, r: int) -> bytes:
    chosen = [u for u in collected.chosen if u in self._gang.names or u % 2]
    return super()._propose(collected._replace(chosen=chosen), r)
