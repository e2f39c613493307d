"""Error feedback: what one round does not send, later rounds do.

e_t = beta * e_{t-1} + delta_t;  sent = C(e_t);  e_t <- e_t - sent
(Covenant-72B, eq. 1; reference/papers.md 1.2). The decay comes before the
addition and covers the whole residual; `sent` is the dequantized value.
"""

import jax


def accumulate(error: jax.Array, delta: jax.Array, decay: float) -> jax.Array:
  """What is offered to the compressor: the decayed residual and the news."""
  return decay * error + delta


def residual(offered: jax.Array, sent: jax.Array) -> jax.Array:
  """What stays here for later rounds."""
  return offered - sent
