"""The groups of leaves that one program works on together.

A small model on one device is one group. On a mesh, or where a model is large,
every leaf is a group of its own: leaves of one shape share their programs, and
each leaf is worked on slice by slice (sharded_leaf.py), so that memory beside
the model is a few slices.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax

from covenant import typing as ct
from covenant.optim import compression as compression_lib
from covenant.optim import sharded_leaf

_LEAF = jax.tree.structure(0)
_CPU_BUDGET = 1 << 20  # elements of a slice whose sums stay in a cache


def budget_here() -> int:
  """Returns the elements of a slice on a device of this process."""
  is_cpu = jax.default_backend() == 'cpu'
  return _CPU_BUDGET if is_cpu else sharded_leaf.BUDGET


class LeafGroup(NamedTuple):
  """The leaves of one group; hashable, so that it can select a program."""

  treedef: jax.tree_util.PyTreeDef  # of the group's part of a model
  leaves: tuple[sharded_leaf.ShardedLeaf, ...]  # several only without a mesh

  @property
  def slices(self) -> int:
    """The number of slices of each leaf; 1 if there are several leaves."""
    return self.leaves[0].slices if self.leaves else 1

  @property
  def axes(self) -> tuple[str, ...]:
    """The mesh axes that the group's leaf is sharded on."""
    return self.leaves[0].axes if self.leaves else ()

  @property
  def local_size(self) -> int:
    """The number of elements on one device."""
    return sum(math.prod(leaf.local_shape) for leaf in self.leaves)

  def map(self, f: Callable[..., ct.PyTree], *trees: ct.PyTree) -> ct.PyTree:
    """Returns the tree of `f(leaf, x, ...)` over the leaves of `trees`.

    A tree may be None: then so is x.
    """
    columns = [
      [None] * len(self.leaves) if t is None else self.treedef.flatten_up_to(t)
      for t in trees
    ]
    return self.treedef.unflatten(map(f, self.leaves, *columns))

  def on_shards(
    self, f: Callable[..., ct.PyTree], in_specs: ct.PyTree, out_specs: ct.PyTree
  ) -> Callable[..., ct.PyTree]:
    """Returns `f`, which takes and returns shards, as a function of wholes."""
    if not self.leaves:
      return f
    return self.leaves[0].on_shards(f, in_specs, out_specs)


class Groups:
  """The groups of a model, in leaf order.

  Args:
    abstract_params: the parameters or their shapes.
    compression: the compressor that makes the messages.
    mesh: that of the node; None is one device.
    specs: how each leaf is sharded on it, a tree of `jax.P`.
    budget: elements of a slice, see `sharded_leaf.leaves`; a model of one
      device with at most as many is one group.
    per_leaf: whether leaves may be worked on alone; False needs `mesh` None.

  Raises:
    ValueError: a shard does not consist of whole blocks; names the leaf.
  """

  def __init__(
    self,
    abstract_params: ct.Params,
    compression: compression_lib.Compression,
    mesh: jax.sharding.Mesh | None = None,
    specs: ct.PyTree = None,
    budget: int = sharded_leaf.BUDGET,
    per_leaf: bool = True,
  ):
    self.treedef = jax.tree.structure(abstract_params)
    leaves = sharded_leaf.leaves(
      abstract_params, compression, mesh, specs, budget
    )
    self.is_small = sum(math.prod(leaf.shape) for leaf in leaves) <= budget
    self.is_one = mesh is None and (self.is_small or not per_leaf)
    if self.is_one:
      whole = (dataclasses.replace(leaf, slices=1) for leaf in leaves)
      self._groups = [LeafGroup(self.treedef, tuple(whole))]
    else:
      self._groups = [LeafGroup(_LEAF, (leaf,)) for leaf in leaves]

  def __len__(self) -> int:
    return len(self._groups)

  def __iter__(self) -> Iterator[LeafGroup]:
    return iter(self._groups)

  @property
  def largest(self) -> LeafGroup:
    """The group that has the most elements on a device."""
    return max(self._groups, key=lambda group: group.local_size)

  def split(self, tree: ct.PyTree) -> list[ct.PyTree]:
    """Returns the part of each group of a tree; of None, as many None."""
    if tree is None:
      return [None] * len(self)
    return [tree] if self.is_one else self.treedef.flatten_up_to(tree)

  def merge(self, parts: Sequence[ct.PyTree]) -> ct.PyTree:
    """Returns the tree that `split` takes apart."""
    return parts[0] if self.is_one else self.treedef.unflatten(parts)


def abstract_part(
  leaf: sharded_leaf.ShardedLeaf, compression: compression_lib.Compression
) -> ct.PyTree:
  """Returns a slice of a leaf's part of a message, as shapes on its mesh."""
  quantizer = getattr(compression, 'quantizer', None)
  part = jax.eval_shape(compression.compress, leaf.abstract_slice)
  if quantizer is None:
    return leaf.abstract_stacked(part)
  packets = jax.eval_shape(
    lambda part: tuple(sharded_leaf.split(p, quantizer) for p in part), part
  )
  return tuple(
    p._replace(rows=tuple(map(leaf.abstract_stacked, p.rows))) for p in packets
  )
