"""Where a pipeline's state lies while its stages train."""

from collections.abc import Callable
from typing import Any

import jax

from covenant import config as config_lib
from covenant.train.pipeline import gpipe


class Staging:
  """As `placement.Placement`, for the stages of a pipeline.

  At rest all of a miner's state is on the first device, as if it trained alone
  there: the same state may go on with other stages, or with none.

  Args:
    model: whose layers are shared out.
    mesh: a device a stage, of this process.
  """

  def __init__(self, model: config_lib.Model, mesh: jax.sharding.Mesh):
    self._model = model
    self.mesh = mesh
    self._everywhere = jax.NamedSharding(mesh, jax.P())

  def spread(self, tree: Any, fresh: bool = False) -> Any:
    """Of a tree on one device each stage's on its own, always in new buffers.

    What is not like parameters is on all.
    """
    del fresh
    return _each(
      tree,
      lambda params: gpipe.split(self._model, params, self.mesh),
      self.share,
    )

  def share(self, x: Any) -> Any:
    """An array that all stages have."""
    return jax.device_put(x, self._everywhere)

  def settle(self, tree: Any) -> Any:
    """What `spread` led to, at rest again."""
    device = self.mesh.devices.flat[0]
    return _each(
      tree,
      lambda parts: gpipe.join(self._model, parts, device),
      lambda x: x.addressable_data(0),
    )


def _each(
  tree: Any, of_params: Callable[[Any], Any], of_leaf: Callable[[Any], Any]
) -> Any:
  """A tree, changed: what is like parameters as a whole, and other leaves."""

  def is_params(x: Any) -> bool:
    return isinstance(x, dict) and 'embedding' in x

  return jax.tree.map(
    lambda x: of_params(x) if is_params(x) else of_leaf(x),
    tree,
    is_leaf=is_params,
  )
