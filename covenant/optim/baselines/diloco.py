"""DiLoCo (arXiv 2311.08105): SparseLoCo's round with nothing left out.

Dense float32 deltas, no error feedback, the plain mean over all peers, and
outer Nesterov at (0.7, 0.9), the paper's values.
"""

import optax

from covenant.optim import sparseloco


def diloco(
  inner: optax.GradientTransformation,
  outer: optax.GradientTransformation | None = None,
  inner_steps: int = 500,
  axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  """DiLoCo as an optax transformation; arguments as in `sparseloco`."""
  return sparseloco.sparseloco(
    inner,
    outer if outer is not None else sparseloco.nesterov(0.7, momentum=0.9),
    inner_steps,
    compression=sparseloco.Dense(),
    error_decay=None,
    axis_name=axis_name,
    mean_over='all',
    clip='none',
  )
