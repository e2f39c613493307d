"""Names for the pytrees that functions of this project pass around."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np
import optax

Array: TypeAlias = jax.Array | np.ndarray
AbstractArray: TypeAlias = Array | jax.ShapeDtypeStruct
Scalar: TypeAlias = Any  # a number, or an array of shape ()
PyTree: TypeAlias = Any  # nested containers of arrays
Params: TypeAlias = PyTree  # a model's parameters
Grads: TypeAlias = PyTree  # like Params
Delta: TypeAlias = PyTree  # like Params: start minus end of a round
Message: TypeAlias = PyTree  # like Params, each leaf a compressed tensor
OptState: TypeAlias = optax.OptState
Tokens: TypeAlias = Array  # int32 [B, L + 1]
Json: TypeAlias = Any  # what json.loads returns
Sign: TypeAlias = Callable[[bytes], bytes]
# A named axis of `jax.shard_map` or `jax.vmap`, or several; None: one peer.
AxisName: TypeAlias = str | tuple[str, ...] | None
