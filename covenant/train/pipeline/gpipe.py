"""A pipeline over the devices of a mesh axis, 'stage'.

Each device has the layers of one stage, their gradient and the state of their
optimizer. Microbatches follow each other through the stages in the order of
GPipe (Huang et al, arXiv 1811.06965): all forward, then all backward. Stages
pass the coordinates of activations in a subspace, K numbers per position, and
their gradients (subspace.py); only sums of scalars pass besides. The result is
that of `subspace.next_token_gradient` on one device.

With tied embeddings the last stage has the table, all of which it needs for the
logits, and sends the coordinates of embeddings to the first stage, so that the
boundaries form a ring. Otherwise the first stage has a table of its own.

Shapes: S stages, N layers of all of them, M microbatches of b sequences, B = M
* b, L length, D width, K numbers per position, V vocabulary; L1 = L + 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from covenant import config as config_lib
from covenant import typing as ct
from covenant.models import llama
from covenant.models import loss as loss_lib
from covenant.models import sharding
from covenant.train.pipeline import quantized
from covenant.train.pipeline import subspace

AXIS = 'stage'
_OWN = jax.P(AXIS)  # the spec of split parameters


def split(
  model: config_lib.Model, params: ct.Params, mesh: jax.sharding.Mesh
) -> ct.Params:
  """Moves the parameters of each stage to its device, in new buffers.

  Args:
    model: the model, whose layers the stages share evenly.
    params: parameters of `llama.init`, or like them, on any one device.
    mesh: a mesh with the axis 'stage'.

  Returns:
    The layers stacked, [N, ...]. Other leaves have a leading axis S, a copy per
    stage, of which only that of the stage that uses it is trained.
  """
  devices = list(mesh.devices.flat)
  depth = model.layers // len(devices)

  def place(pieces: list[jax.Array]) -> jax.Array:
    """Concatenates arrays, one per stage, along their first axis."""
    shape = (sum(x.shape[0] for x in pieces), *pieces[0].shape[1:])
    placed = [
      jax.device_put(x, device)
      for x, device in zip(pieces, devices, strict=True)
    ]
    return jax.make_array_from_single_device_arrays(
      shape, jax.NamedSharding(mesh, _OWN), placed
    )

  stacks = []
  for first in range(0, model.layers, depth):
    layers = subspace.stage_layers(model, params, first, depth)
    if isinstance(layers, tuple):
      layers = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    stacks.append(layers)
  found = {
    name: jax.tree.map(lambda x: place([x[None]] * len(devices)), part)
    for name, part in params.items()
    if not name.startswith('layers')
  }
  found['layers'] = jax.tree.map(lambda *x: place(list(x)), *stacks)
  return found


def join(
  model: config_lib.Model, parts: ct.Params, device: jax.Device
) -> ct.Params:
  """Moves split parameters to one device, in the layout of `llama.init`."""

  def pieces(x: jax.Array) -> list[jax.Array]:
    """Returns the piece of each stage in turn, on the device."""
    shards = sorted(x.addressable_shards, key=lambda s: s.index[0].start or 0)
    return [jax.device_put(shard.data, device) for shard in shards]

  has_table = -1 if model.tie_embeddings else 0
  found = {
    name: jax.tree.map(
      lambda x, s=(has_table if name == 'embedding' else -1): pieces(x)[s][0],
      part,
    )
    for name, part in parts.items()
    if name != 'layers'
  }
  layers = jax.tree.map(lambda x: jnp.concatenate(pieces(x)), parts['layers'])
  if model.scan_layers:
    return {**found, 'layers': layers}
  for i in range(model.layers):
    found[f'layers_{i}'] = jax.tree.map(lambda x, i=i: x[i], layers)
  return found


def next_token_gradient(
  model: config_lib.Model,
  parts: ct.Params,
  tokens_BxL1: jax.Array,
  fixed: subspace.Fixed,
  mesh: sharding.AnyMesh,
  bits: int = 0,
  microbatch: int | None = None,
) -> tuple[jax.Array, ct.Grads]:
  """Computes the loss in nats per token, and the gradient of its total.

  Args:
    model: the architecture.
    parts: parameters as `split` returns them.
    tokens_BxL1: tokens on all devices; negative ones are padding.
    fixed: the constants of the round, on all devices.
    mesh: a mesh with the axis 'stage'.
    bits: bits per number that passes; 0 is the compute dtype.
    microbatch: sequences that pass through a stage at once; None is all, and
      then only one stage computes at a time.

  Returns:
    The loss, and the gradient, like `parts`.
  """

  def local(
    parts: ct.Params, tokens_BxL1: jax.Array, fixed: subspace.Fixed
  ) -> tuple[jax.Array, ct.Grads]:
    def sums(own: ct.Params) -> tuple[jax.Array, jax.Array]:
      return _stage(model, own, tokens_BxL1, fixed, bits, microbatch)

    own = _map_tables(parts, lambda x: x[0])
    (_, nats), grads = jax.value_and_grad(sums, has_aux=True)(own)
    return jax.lax.psum(nats, AXIS), _map_tables(grads, lambda x: x[None])

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(_OWN, jax.P(), jax.P()),
    out_specs=(jax.P(), _OWN),
  )(parts, tokens_BxL1, fixed)


def _map_tables(
  parts: ct.Params, f: Callable[[jax.Array], jax.Array]
) -> ct.Params:
  """Maps the leaves of all but the layers."""
  return {
    name: part if name == 'layers' else jax.tree.map(f, part)
    for name, part in parts.items()
  }


def _is_last() -> jax.Array:
  return jax.lax.axis_index(AXIS) == jax.lax.axis_size(AXIS) - 1


def _stage(
  model: config_lib.Model,
  own: ct.Params,
  tokens_BxL1: jax.Array,
  fixed: subspace.Fixed,
  bits: int,
  microbatch: int | None,
) -> tuple[jax.Array, jax.Array]:
  """Runs one stage; returns its part of the loss, total and nats.

  The last stage returns all of the loss, the others 0. At tick t stage s works
  on microbatch t - s - `lag`.
  """
  S, s = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
  L1 = tokens_BxL1.shape[1]
  slices_MxbxL1 = tokens_BxL1.reshape(-1, microbatch or len(tokens_BxL1), L1)
  M, b, _ = slices_MxbxL1.shape
  lag = (
    1 if model.tie_embeddings else 0
  )  # ticks from the table to the first stage
  count = jnp.maximum(jnp.sum(tokens_BxL1[:, 1:] >= 0, dtype=jnp.int32), 1)

  turn = [(i, (i + 1) % S) for i in range(S)][: None if lag else -1]

  def forth(x: jax.Array) -> jax.Array:
    return jax.lax.ppermute(x, AXIS, turn)

  def back(x: jax.Array) -> jax.Array:
    return jax.lax.ppermute(x, AXIS, [(j, i) for i, j in turn])

  def slice_of(i: jax.Array) -> jax.Array:
    return slices_MxbxL1[jnp.clip(i, 0, M - 1)]

  def look_up(table_VxD: jax.Array, tokens_bxL1: jax.Array) -> jax.Array:
    ids_bxL = llama.ids(model, tokens_bxL1[:, :-1])
    return llama.embed(model, {'embedding': table_VxD}, ids_bxL)

  def sent(
    x_bxLxD: jax.Array, tokens_bxL1: jax.Array, stage: jax.Array | int
  ) -> jax.Array:
    x0_bxLxD = look_up(fixed.tokens_SxVxD[stage], tokens_bxL1)
    return subspace.send(x_bxLxD, x0_bxLxD, fixed.basis_SxDxK[stage])

  def received(c_bxLxK: jax.Array, tokens_bxL1: jax.Array) -> jax.Array:
    x0_bxLxD = look_up(fixed.tokens_SxVxD[s], tokens_bxL1)
    return subspace.receive(c_bxLxK, x0_bxLxD, fixed.basis_SxDxK[s])

  def embedded(tokens_bxL1: jax.Array) -> jax.Array:
    return look_up(own['embedding'], tokens_bxL1)

  def loss_of(
    x_bxLxD: jax.Array, tokens_bxL1: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    loss = loss_lib.next_token_loss(
      model,
      own,
      tokens_bxL1,
      lambda model, own, _: llama.product_of(model, own, x_bxLxD),
    )
    weight = loss.tokens.astype(jnp.float32) / count.astype(jnp.float32)
    return loss.total * weight, loss.nats * weight

  def tick(
    c_bxLxK: jax.Array, t: jax.Array
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    i = t - s - lag
    tokens_bxL1 = slice_of(i)
    if model.tie_embeddings:
      x_bxLxD = received(c_bxLxK, tokens_bxL1)
    else:
      x_bxLxD = jax.lax.cond(
        s == 0, lambda _, x: embedded(x), received, c_bxLxK, tokens_bxL1
      )
    document_bxL = llama.documents(model, tokens_bxL1[:, :-1])
    x_bxLxD = subspace.apply_layers(model, own['layers'], x_bxLxD, document_bxL)
    ends = _is_last() & (i >= 0) & (i < M)
    zeros = jax.lax.pcast((jnp.float32(0),) * 2, AXIS, to='varying')
    loss = jax.lax.cond(ends, loss_of, lambda *_: zeros, x_bxLxD, tokens_bxL1)
    # The last stage sends only embeddings, to the first, if it has the table.
    if model.tie_embeddings:
      c_bxLxK = jax.lax.cond(
        _is_last(),
        lambda: sent(embedded(slice_of(t)), slice_of(t), 0),
        lambda: sent(x_bxLxD, tokens_bxL1, s + 1),
      )
    else:
      c_bxLxK = sent(x_bxLxD, tokens_bxL1, jnp.minimum(s + 1, S - 1))
    return quantized.passed(c_bxLxK, bits, forth, back), loss

  nothing_bxLxK = jnp.zeros(
    (b, L1 - 1, fixed.basis_SxDxK.shape[-1]), model.compute_dtype
  )
  nothing_bxLxK = jax.lax.pcast(nothing_bxLxK, AXIS, to='varying')
  ticks = jnp.arange(M + S - 1 + lag)
  _, each = jax.lax.scan(tick, nothing_bxLxK, ticks)
  total, nats = jax.tree.map(jnp.sum, each)
  return total, nats
