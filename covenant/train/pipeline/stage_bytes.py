"""Trees of arrays as bytes, whose shapes both sides know."""

import math

import jax
import numpy as np

from covenant import typing as ct


def to_bytes(tree: ct.PyTree) -> bytes:
  """Returns the bytes of the arrays of a tree, one after another."""
  leaves = jax.tree.leaves(jax.device_get(tree))
  return b''.join(np.ascontiguousarray(x).tobytes() for x in leaves)


def size_of(abstract: ct.PyTree) -> int:
  """Returns the bytes of the arrays of a tree."""
  leaves = jax.tree.leaves(abstract)
  return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in leaves)


def from_bytes(data: bytes, abstract: ct.PyTree) -> ct.PyTree:
  """Returns the tree whose arrays have these bytes; raises ValueError."""
  leaves, treedef = jax.tree.flatten(abstract)
  sizes = [math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in leaves]
  if sum(sizes) != len(data):
    raise ValueError(f'expected {sum(sizes)} bytes, got {len(data)}')
  ends = np.cumsum([0, *sizes])
  return treedef.unflatten(
    np.frombuffer(data[a:b], np.dtype(x.dtype)).reshape(x.shape)
    for x, a, b in zip(leaves, ends[:-1], ends[1:], strict=True)
  )
