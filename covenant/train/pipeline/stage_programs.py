"""The programs of one stage of a pipeline, which runs on a machine of its own.

Together the stages compute what `subspace.next_token_gradient` computes on one
device, and the inner step of train/step.py, bit for bit on equal hardware. Only
coordinates of activations, their gradients, fits and scalars pass between them.

A stage keeps no activations of a microbatch but the coordinates that came in:
its backward program computes the activations again.

Shapes: V vocabulary, D width, K numbers per position, b sequences of a
microbatch, L length; L1 = L + 1.
"""

import copy
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from covenant import config as config_lib
from covenant import typing as ct
from covenant.models import llama
from covenant.models import loss as loss_lib
from covenant.optim import inner as inner_lib
from covenant.train.pipeline import fit as fit_lib
from covenant.train.pipeline import quantized
from covenant.train.pipeline import subspace


class Boundary(NamedTuple):
  """The constants of a round for one boundary."""

  tokens_VxD: jax.Array  # X0 of each token
  basis_DxK: jax.Array  # U


class StageNames(NamedTuple):
  """The subtrees of the parameters that a stage has."""

  own: tuple[str, ...]  # those that it trains
  held: tuple[str, ...]  # and the embedding, to which boundaries are fitted


def names(
  model: config_lib.Model, island: config_lib.Island, index: int
) -> StageNames:
  """Returns the subtrees of a stage; layers must not be stacked."""
  own = [f'layers_{i}' for i in subspace.spans(model, island)[index]]
  is_last = index == island.stages - 1
  if is_last:
    own.append('final_norm')
    if not model.tie_embeddings:
      own.append('unembedding')
  if is_last if model.tie_embeddings else index == 0:
    own.append('embedding')
  return StageNames(tuple(own), tuple(dict.fromkeys([*own, 'embedding'])))


def pick(tree: ct.Params, some: tuple[str, ...]) -> ct.Params:
  """Returns some subtrees of a model's parameters."""
  return {name: tree[name] for name in some}


def coordinates(
  model: config_lib.Model,
  island: config_lib.Island,
  sequences: int,
  length: int,
) -> ct.PyTree:
  """Returns the shapes of packed coordinates."""
  shape, bits = (sequences, length, island.rank), island.bits
  whole = jax.ShapeDtypeStruct(shape, model.compute_dtype)
  if not bits:
    return whole
  return jax.eval_shape(lambda c: quantized.pack(c, bits), whole)


def fits(model: config_lib.Model, island: config_lib.Island) -> fit_lib.Sent:
  """Returns the shapes of a fit."""
  width = model.width
  return jax.eval_shape(
    lambda: fit_lib.Sent(
      quantized.pack(jnp.zeros((width + 1, width)), fit_lib.BITS),
      jnp.zeros((width, island.rank), jnp.bfloat16),
    )
  )


class StagePrograms:
  """The compiled programs of a stage; holds no state.

  Args:
    config: the config of the run.
    island: the pipeline, with a rank.
    index: the number of the stage, from 0 on.

  Raises:
    ConfigError: the layers of the model are stacked, or the optimizer sees all
      tensors at once.
  """

  def __init__(
    self, config: config_lib.Config, island: config_lib.Island, index: int
  ):
    if config.model.scan_layers:
      raise config_lib.ConfigError(
        'model.scan_layers: expected false where stages are processes, because '
        'a stack of layers is one tensor, which no stage has'
      )
    if config.optim.method not in ('sparseloco', 'diloco'):
      raise config_lib.ConfigError(
        "optim.method: expected 'sparseloco' or 'diloco' where stages are "
        f'processes, got {config.optim.method!r}'
      )
    self.model, self.island, self.index = config.decoder, island, index
    self.names = names(self.model, island, index)
    self.span = subspace.spans(self.model, island)[index]
    self.is_first, self.is_last = index == 0, index == island.stages - 1
    self.has_ring = self.model.tie_embeddings
    self._take_inner(config)
    self.fit_form = fits(self.model, island)
    self.fit = jax.jit(self._fit)
    self.constants = jax.jit(lambda *x: Boundary(*fit_lib.constants(*x)))
    self.forward = jax.jit(self._forward)
    self.backward = jax.jit(self._backward, donate_argnames='sums')
    self.last = jax.jit(self._last, donate_argnames='sums')
    self.look_up = jax.jit(self._look_up)
    self.table_backward = jax.jit(self._table_backward, donate_argnames='sums')
    self.squares = jax.jit(
      lambda sums: jax.tree.map(
        lambda x: optax.tree.norm(x, squared=True), sums
      )
    )
    self.learned = jax.jit(self._learned)

  def _take_inner(self, config: config_lib.Config) -> None:
    self._inner = config.optim.inner
    self._rate = inner_lib.schedule(
      self._inner, total_steps=config.rounds * config.optim.inner_steps
    )
    self.update = jax.jit(self._update, donate_argnames=('own', 'state'))

  def amended(self, config: config_lib.Config) -> 'StagePrograms':
    """Returns the same programs with the inner steps of an amended config."""
    made = copy.copy(self)
    made._take_inner(config)
    return made

  def pack(self, c_bxLxK: jax.Array) -> ct.PyTree:
    """Returns coordinates as they are sent."""
    bits = self.island.bits
    return quantized.pack(c_bxLxK, bits) if bits else c_bxLxK

  def unpack(self, packed: ct.PyTree) -> jax.Array:
    """Returns the coordinates that `pack` packed."""
    if not self.island.bits:
      return packed
    return quantized.unpack(packed, self.model.compute_dtype)

  def coordinates(self, sequences: int, length: int) -> ct.PyTree:
    """Returns the shapes of packed coordinates."""
    return coordinates(self.model, self.island, sequences, length)

  def _layers(
    self, own: ct.Params, x: jax.Array, document: jax.Array | None
  ) -> jax.Array:
    layers = tuple(own[f'layers_{i}'] for i in self.span)
    return subspace.apply_layers(self.model, layers, x, document)

  def _fit(
    self,
    own: ct.Params,
    table_VxD: jax.Array,
    tokens_BxL1: jax.Array,
    packed: ct.PyTree,
    inbound: Boundary | None,
  ) -> tuple[fit_lib.Sent, ct.PyTree]:
    """Fits the boundary after this stage; returns the fit and what crosses."""
    table_VxD = table_VxD.astype(jnp.float32)
    seen = fit_lib.see(self.model, table_VxD, tokens_BxL1)
    if self.is_first:
      x = table_VxD[seen.tokens_BxL].astype(self.model.compute_dtype)
    else:
      assert inbound is not None
      x0 = inbound.tokens_VxD[seen.tokens_BxL]
      x = subspace.receive(self.unpack(packed), x0, inbound.basis_DxK)
    x = self._layers(own, x, seen.document_BxL)
    sent = fit_lib.fit(seen, table_VxD, x, self.island.rank)
    known_VxD, basis_DxK = fit_lib.constants(table_VxD, sent)
    x0 = known_VxD[seen.tokens_BxL]
    return sent, self.pack(subspace.send(x, x0, basis_DxK))

  def _ids(self, tokens_bxL1: jax.Array) -> jax.Array:
    return llama.ids(self.model, tokens_bxL1[:, :-1])

  def _inside(
    self,
    own: ct.Params,
    c_bxLxK: jax.Array | None,
    tokens_bxL1: jax.Array,
    inbound: Boundary | None,
  ) -> jax.Array:
    """Returns the output of the layers, from coordinates or embeddings."""
    ids_bxL = self._ids(tokens_bxL1)
    if inbound is None or c_bxLxK is None:
      x = llama.embed(self.model, own, ids_bxL)
    else:
      x0 = inbound.tokens_VxD[ids_bxL]
      x = subspace.receive(c_bxLxK, x0, inbound.basis_DxK)
    document = llama.documents(self.model, tokens_bxL1[:, :-1])
    return self._layers(own, x, document)

  def _coordinates(
    self, x_bxLxD: jax.Array, tokens_bxL1: jax.Array, outbound: Boundary
  ) -> jax.Array:
    x0 = outbound.tokens_VxD[self._ids(tokens_bxL1)]
    return subspace.send(x_bxLxD, x0, outbound.basis_DxK)

  def _forward(
    self,
    own: ct.Params,
    packed: ct.PyTree,
    tokens_bxL1: jax.Array,
    inbound: Boundary | None,
    outbound: Boundary,
  ) -> ct.PyTree:
    """Returns the packed coordinates that a microbatch sends on."""
    c = None if inbound is None else self.unpack(packed)
    x = self._inside(own, c, tokens_bxL1, inbound)
    return self.pack(self._coordinates(x, tokens_bxL1, outbound))

  def _backward(
    self,
    own: ct.Params,
    sums: ct.Grads,
    packed: ct.PyTree,
    tokens_bxL1: jax.Array,
    inbound: Boundary | None,
    outbound: Boundary,
    gradient: ct.PyTree,
  ) -> tuple[ct.Grads, ct.PyTree]:
    """Returns the sums with a microbatch's gradient, and what it sends back."""

    def sent(own: ct.Params, c: jax.Array | None) -> jax.Array:
      x = self._inside(own, c, tokens_bxL1, inbound)
      return self._coordinates(x, tokens_bxL1, outbound)

    c = None if inbound is None else self.unpack(packed)
    _, back = jax.vjp(sent, own, c)
    grads, to_c = back(self.unpack(gradient))
    sums = jax.tree.map(jnp.add, sums, grads)
    return sums, None if to_c is None else self.pack(to_c)

  def _last(
    self,
    own: ct.Params,
    sums: ct.Grads,
    packed: ct.PyTree,
    tokens_bxL1: jax.Array,
    inbound: Boundary,
    divisor: jax.Array,
  ) -> tuple[ct.Grads, jax.Array | None, ct.PyTree, tuple[jax.Array, ...]]:
    """Runs the last stage forward and back.

    Args:
      own: its parameters.
      sums: of the gradients of the microbatches before.
      packed: the coordinates that came.
      tokens_bxL1: the microbatch.
      inbound: the boundary that they crossed.
      divisor: the number of targets of the whole batch, float32.

    Returns:
      The new sums; the gradient of a tied table, which is not in them yet; what
      it sends back; and the microbatch's parts of the loss, total and nats.
    """

    def loss(
      own: ct.Params, c: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
      x = self._inside(own, c, tokens_bxL1, inbound)
      found = loss_lib.next_token_loss(
        self.model,
        own,
        tokens_bxL1,
        lambda model, own, _: llama.product_of(model, own, x),
      )
      weight = found.tokens.astype(jnp.float32) / divisor
      return found.total * weight, (found.total * weight, found.nats * weight)

    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    (grads, to_c), parts = gradient(own, self.unpack(packed))
    table = None
    if self.has_ring:
      table = grads['embedding']
      grads = {**grads, 'embedding': jnp.zeros_like(table)}
    return jax.tree.map(jnp.add, sums, grads), table, self.pack(to_c), parts

  def _look_up(
    self, own: ct.Params, tokens_bxL1: jax.Array, ring: Boundary
  ) -> ct.PyTree:
    """Returns the packed coordinates of embeddings, for the first stage."""
    x = llama.embed(self.model, own, self._ids(tokens_bxL1))
    return self.pack(self._coordinates(x, tokens_bxL1, ring))

  def _table_backward(
    self,
    own: ct.Params,
    sums: ct.Grads,
    table: jax.Array,
    tokens_bxL1: jax.Array,
    ring: Boundary,
    gradient: ct.PyTree,
  ) -> ct.Grads:
    """Returns the sums with both gradients of a tied table."""

    def sent(table: jax.Array) -> jax.Array:
      own_ = {'embedding': table}
      x = llama.embed(self.model, own_, self._ids(tokens_bxL1))
      return self._coordinates(x, tokens_bxL1, ring)

    _, back = jax.vjp(sent, own['embedding'])
    (more,) = back(self.unpack(gradient))
    return {**sums, 'embedding': sums['embedding'] + table + more}

  def _update(
    self,
    own: ct.Params,
    state: ct.OptState,
    grads: ct.Grads,
    norm: jax.Array,
    nats: jax.Array,
    step: jax.Array,
    joined: jax.Array,
  ) -> tuple[ct.Params, ct.OptState]:
    """Takes an inner step; see `step.inner_step`."""
    optimizer = inner_lib.make(self._inner, norm)
    updates, moved = optimizer.update(grads, state, own)
    rate = self._rate(step) * inner_lib.rejoin_factor(self._inner, step, joined)
    updates = jax.tree.map(lambda u: rate * u, updates)
    new = optax.apply_updates(own, updates), moved
    finite = jnp.isfinite(nats) & jnp.isfinite(norm)
    own, state = jax.tree.map(
      lambda x, old: jnp.where(finite, x, old), new, (own, state)
    )
    return own, state

  def _learned(
    self, start: ct.Params, end: ct.Params, basis_DxK: jax.Array
  ) -> ct.Params:
    """Computes `subspace.learned` of a stage before the last."""
    layers = [f'layers_{i}' for i in self.span]
    confine = functools.partial(subspace.confine, basis_DxK=basis_DxK)
    return {**end, **{n: confine(start[n], end[n]) for n in layers}}
