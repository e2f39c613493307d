"""A stage of a pipeline: the state that stays on its machine, and its steps.

A stage has the parameters and the outer state of its layers, their moments and
their error feedback. What passes its boundaries is bytes.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from covenant import config as config_lib
from covenant import errors
from covenant import typing as ct
from covenant.config import amend
from covenant.optim import weight
from covenant.train import pieces as pieces_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train.pipeline import stage_bytes
from covenant.train.pipeline import stage_programs
from covenant.train.pipeline import stage_tools
from covenant.wire import payload


class StageError(errors.CovenantError):
  """A message to a stage does not fit what it is doing."""


class PrivateState(NamedTuple):
  """The state of a stage that leads to no shared parameters."""

  inner: ct.OptState
  error: ct.Params | None
  joined: np.int32  # inner step of the run at which they began; -1: not yet


class StageUpdate(NamedTuple):
  """The part of an outer step that a stage takes."""

  factors_RxP: np.ndarray  # of its tensors
  parts_R: np.ndarray  # weights of the messages
  totals: weight.Totals


@dataclasses.dataclass
class _Round:
  """The state of a stage while it trains a round."""

  own: ct.Params
  boundaries: dict[int, stage_programs.Boundary]
  # Tokens, coordinates received, and the boundary they crossed, by microbatch.
  kept: dict[int, tuple[ct.Tokens, ct.PyTree, int]] = dataclasses.field(
    default_factory=dict
  )
  tables: dict[int, jax.Array] = dataclasses.field(default_factory=dict)
  sums: ct.Grads | None = None


class Stage:
  """One stage; used by one thread.

  Args:
    config: the config of the run.
    island: the pipeline.
    index: the number of the stage.

  Attributes:
    config: the config with the values of this round.
    shared: its part of the state that all nodes share.
    private: moments and error feedback.
    initial: returns its part of the state before the first round.
    context: positions per sequence.
    spec: the layout of its sections.
    held_spec: the same with the embedding, which every stage moves along.
    method, outer_step: the algorithm of the run, and its outer step.
  """

  def __init__(
    self, config: config_lib.Config, island: config_lib.Island, index: int
  ):
    tools = stage_tools.of(config, island, index)
    self._of, self._changes = (config, island, index), {}
    self.programs, self.method = tools.programs, tools.method
    self.config = tools.config
    self.context = config.data.context
    self.spec, self.held_spec = tools.spec, tools.held_spec
    self._own = tools.own
    self._compressor, self.outer_step = tools.compressor, tools.outer_step
    self.initial = tools.initial
    self.shared = self.initial()
    self.private = self.fresh()
    self._round: _Round | None = None

  def follow(self, changes: amend.Changes) -> None:
    """Takes the values by path that amendments have changed since the start.

    Raises:
      ConfigError: a value may not change so.
    """
    if changes != self._changes:
      tools = stage_tools.of(*self._of, changes)
      self.programs, self.method = tools.programs, tools.method
      self.config, self.outer_step = tools.config, tools.outer_step
      self._changes = dict(changes)

  def fresh(self) -> PrivateState:
    """Returns new moments and error feedback."""
    assert self.method.inner is not None
    own = stage_programs.pick(self.shared.params, self.programs.names.own)
    error = None
    if self.method.error_decay is not None:
      error = jax.tree.map(jnp.zeros_like, own)
    return PrivateState(self.method.inner.init(own), error, np.int32(-1))

  def adopt(self, tensors: Mapping[str, bytes]) -> None:
    """Takes the shared state of a checkpoint, the bytes of each tensor."""
    self.shared = jax.tree_util.tree_map_with_path(
      lambda path, x: jnp.asarray(
        self._read(
          tensors[jax.tree_util.keystr(path, simple=True, separator='.')],
          jax.ShapeDtypeStruct(x.shape, x.dtype),
        )
      ),
      self.shared,
    )

  def digests(self) -> dict[str, list[str]]:
    """Returns the digests of its part of the shared state, by tensor."""
    leaves = shared_state_lib.named_leaves(self.shared)
    return {
      name: [x.hex() for x in pieces_lib.piece_digests(leaf)]
      for name, leaf in leaves.items()
    }

  def begin(
    self,
    tokens_BxL1: ct.Tokens,
    coordinates: bytes,
    fits: Mapping[int, bytes],
    crossed: int,
  ) -> tuple[bytes, bytes]:
    """Begins a round; fits the boundary after this stage unless it is given.

    Args:
      tokens_BxL1: the tokens that boundaries are fitted to.
      coordinates: those of these tokens at the boundary before it.
      fits: the known fits, by the stage after the boundary.
      crossed: the boundary that the coordinates crossed; see `forward`.

    Returns:
      The fit and what crosses by it; nothing where nothing was fitted.
    """
    p, own = self.programs, self._copy_own()
    table = self.shared.params['embedding']
    found: dict[int, stage_programs.Boundary] = {
      i: p.constants(table, self._read(data, p.fit_form))
      for i, data in fits.items()
    }
    after, sent, crossing = p.index + 1, b'', b''
    if not p.is_last and after not in found:
      packed = None
      if not p.is_first:
        shape = (len(tokens_BxL1), tokens_BxL1.shape[1] - 1)
        packed = self._read(coordinates, p.coordinates(*shape))
      fitted, crosses = p.fit(
        own, table, tokens_BxL1, packed, found.get(crossed)
      )
      found[after] = p.constants(table, fitted)
      sent, crossing = map(stage_bytes.to_bytes, (fitted, crosses))
    if p.has_ring and (p.is_first or p.is_last):
      # The boundary from the table has the basis of the one after it.
      wide = table.astype(jnp.float32)
      found[0] = stage_programs.Boundary(wide, found[1].basis_DxK)
    self._round = _Round(own, found)
    return sent, crossing

  def add_fit(self, boundary: int, fit: bytes) -> None:
    """Takes the fit of a boundary that input crosses past bypassed stages."""
    p = self.programs
    self._now.boundaries[boundary] = p.constants(
      self.shared.params['embedding'], self._read(fit, p.fit_form)
    )

  def _copy_own(self) -> ct.Params:
    own = stage_programs.pick(self.shared.params, self.programs.names.own)
    return jax.tree.map(jnp.copy, own)

  @property
  def _now(self) -> _Round:
    if self._round is None:
      raise StageError('expected the beginning of a round first')
    return self._round

  def look_up(self, tokens_bxL1: ct.Tokens) -> bytes:
    """Returns the coordinates of embeddings, for the first stage."""
    now = self._now
    return stage_bytes.to_bytes(
      self.programs.look_up(now.own, tokens_bxL1, now.boundaries[0])
    )

  def forward(
    self,
    microbatch: int,
    tokens_bxL1: ct.Tokens,
    coordinates: bytes,
    crossed: int,
  ) -> bytes:
    """Returns the coordinates that a microbatch sends on.

    Args:
      microbatch: its number in the inner step.
      tokens_bxL1: its tokens.
      coordinates: those received.
      crossed: the boundary that they crossed: the number of this stage, or a
        lower one if stages before it are bypassed.
    """
    p, now = self.programs, self._now
    packed = self._coordinates(tokens_bxL1, coordinates)
    now.kept[microbatch] = tokens_bxL1, packed, crossed
    return stage_bytes.to_bytes(
      p.forward(
        now.own,
        packed,
        tokens_bxL1,
        now.boundaries.get(crossed),
        now.boundaries[p.index + 1],
      )
    )

  def last(
    self,
    microbatch: int,
    tokens_bxL1: ct.Tokens,
    coordinates: bytes,
    crossed: int,
    divisor: float,
  ) -> tuple[bytes, float]:
    """Returns what the last stage sends back, and its part of the loss."""
    p, now = self.programs, self._now
    packed = self._coordinates(tokens_bxL1, coordinates)
    sums, table, back, (_, nats) = p.last(
      now.own,
      self._sums(),
      packed,
      tokens_bxL1,
      now.boundaries[crossed],
      np.float32(divisor),
    )
    now.sums = sums
    if table is not None:
      now.tables[microbatch] = table
      now.kept[microbatch] = tokens_bxL1, None, 0
    return stage_bytes.to_bytes(back), float(nats)

  def backward(self, microbatch: int, gradient: bytes) -> bytes:
    """Adds a microbatch's gradient; returns what goes back to the stage before.

    On the last stage it is the gradient of embeddings.
    """
    p, now = self.programs, self._now
    tokens_bxL1, packed, crossed = now.kept.pop(microbatch)
    given = self._coordinates(tokens_bxL1, gradient)
    if p.is_last:
      table = now.tables.pop(microbatch)
      now.sums = p.table_backward(
        now.own, self._sums(), table, tokens_bxL1, now.boundaries[0], given
      )
      return b''
    now.sums, back = p.backward(
      now.own,
      self._sums(),
      packed,
      tokens_bxL1,
      now.boundaries.get(crossed),
      now.boundaries[p.index + 1],
      given,
    )
    return b'' if back is None else stage_bytes.to_bytes(back)

  def squares(self) -> list[float]:
    """Returns the sum of squares of the gradient of each own tensor."""
    return [
      float(x) for x in jax.tree.leaves(self.programs.squares(self._sums()))
    ]

  def update(self, norm: float, nats: float, step: int) -> None:
    """Takes the inner step of the run of a number.

    Args:
      norm: of the whole gradient.
      nats: the loss.
      step: the number.
    """
    now = self._now
    if (joined := self.private.joined) < 0:
      joined = np.int32(step)
    now.own, inner = self.programs.update(
      now.own,
      self.private.inner,
      self._sums(),
      np.float32(norm),
      np.float32(nats),
      np.int32(step),
      joined,
    )
    self.private = self.private._replace(inner=inner, joined=joined)
    self.abort()

  def abort(self) -> None:
    """Forgets the gradients of the inner step under way."""
    if self._round is not None:
      now = self._round
      now.kept, now.tables, now.sums = {}, {}, None

  def seal(self) -> tuple[list[bytes], float]:
    """Ends a round: returns the sections of its tensors, and the error's norm.

    The norm is that of the new error feedback. It is not finite where a tensor
    is not, and then moments and error feedback begin anew.
    """
    p, now = self.programs, self._now
    start = stage_programs.pick(self.shared.params, p.names.own)
    end = now.own
    if not p.is_last:
      basis = now.boundaries[p.index + 1].basis_DxK
      end = p.learned(start, end, basis)
    sent = self._compressor.compress(start, end, self.private.error)
    self._round = None
    parts = jax.tree.structure(self._own).flatten_up_to(sent.message)
    sections = [
      payload.encode_tensor(tensor, part, self.spec)
      for tensor, part in zip(self.spec.tensors, parts, strict=True)
    ]
    norm = sent.error_norm
    if math.isfinite(norm):
      self.private = self.private._replace(error=sent.error)
    else:
      self.private = self.fresh()
    return sections, norm

  def apply(
    self, sections_RxP: Sequence[Sequence[bytes]], update: StageUpdate
  ) -> float:
    """Takes its part of an outer step; returns the sum of squares of the delta.

    Args:
      sections_RxP: the sections of its tensors, of each message.
      update: the factors and weights.

    Raises:
      PayloadError: a section is not one of this run.
    """
    structure = jax.tree.structure(self.shared.params)
    messages = []
    for sections_P in sections_RxP:
      parts = []
      for tensor, data in zip(self.held_spec.tensors, sections_P, strict=True):
        part, rest = payload.decode_tensor(
          tensor, memoryview(data), self.held_spec
        )
        if rest:
          raise payload.PayloadError(
            payload.Reason.LENGTH, f'{tensor.name}: a section is too long'
          )
        parts.append(part)
      messages.append(structure.unflatten(parts))
    if not messages:
      return 0.0
    new = self.outer_step.apply_sum(
      self.shared.params, self.shared.outer, messages, *update
    )
    self.shared = self.shared._replace(params=new.params, outer=new.outer)
    return new.delta_norm**2

  def numbers(self, tokens_bxL1: ct.Tokens, data: bytes) -> np.ndarray:
    """Returns coordinates that a stage sent as numbers, float32."""
    packed = self._coordinates(tokens_bxL1, data)
    return np.asarray(self.programs.unpack(packed), np.float32)

  def _sums(self) -> ct.Grads:
    now = self._now
    if now.sums is None:
      now.sums = jax.tree.map(jnp.zeros_like, now.own)
    return now.sums

  def _coordinates(self, tokens_bxL1: ct.Tokens, data: bytes) -> ct.PyTree:
    if not data:
      return None
    b, length = tokens_bxL1.shape
    return self._read(data, self.programs.coordinates(b, length - 1))

  def _read(self, data: bytes, abstract: ct.PyTree) -> ct.PyTree:
    try:
      return stage_bytes.from_bytes(data, abstract)
    except ValueError as e:
      raise StageError(f'stage {self.programs.index}: {e}') from None
