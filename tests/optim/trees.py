"""Parameters of several shapes, and meshes to cut them on."""

import jax
import numpy as np

from covenant import config as config_lib
from covenant.models import sharding

P = jax.P
BLOCK = (8, 8)
# A stack of matrices, a table, and what blocks do not divide.
SHAPES = {'gain': (5, 12), 'stack': (3, 32, 16), 'table': (64, 8), 'v': (70,)}
STACK = {'stack': SHAPES['stack']}


def mesh(fsdp, tensor):
  devices = config_lib.Devices(fsdp=fsdp, tensor=tensor)
  return sharding.mesh(devices, jax.devices())


def specs(shapes, mesh):
  rows, columns = (
    name if mesh.shape[name] > 1 else None for name in ('fsdp', 'tensor')
  )
  both = tuple(name for name in (rows, columns) if name)
  every = {'stack': P(None, rows, columns), 'table': P(both, None)}
  return {name: every.get(name, P()) for name in shapes}


def random_tree(shapes, seed):
  rng = np.random.default_rng(seed)
  return {
    name: rng.standard_normal(shape).astype(np.float32)
    for name, shape in shapes.items()
  }
