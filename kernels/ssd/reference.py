"""The recurrence itself, one step per token: the definition of `ssd`."""

import jax
import jax.numpy as jnp
from jax import lax


def ssd_reference(
  x: jax.Array,
  dt: jax.Array,
  A: jax.Array,
  B: jax.Array,
  C: jax.Array,
  D: jax.Array | None,
  initial_state: jax.Array,
  chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """SSD by a scan over time, everything in float32.

  S_t = exp(dt_t A_h) S_{t-1} + dt_t x_t B_t',  y_t = S_t C_t + D_h x_t

  Source: Dao and Gu, arXiv 2405.21060, equation (1) with scalar A.

  Args:
    x, dt, A, B, C, D, initial_state: as `ssd` has checked and cast them.
    chunk_size: not used; there are no chunks.

  Returns:
    y (B, L, H, P) in x's dtype and the final state (B, H, P, N) float32.

  Numerics: no matrix product, float32 throughout; y is rounded once.
  """
  del chunk_size
  heads_per_group = x.shape[2] // B.shape[2]

  def step(state, inputs):
    x_t, dt_t, B_t, C_t = (a.astype(jnp.float32) for a in inputs)
    B_t, C_t = (
      jnp.repeat(a, heads_per_group, axis=1) for a in (B_t, C_t)
    )  # (B, H, N)
    update = (dt_t[..., None] * x_t)[..., None] * B_t[:, :, None, :]
    state = jnp.exp(dt_t * A)[..., None, None] * state + update
    y_t = jnp.sum(state * C_t[:, :, None, :], axis=-1)  # (B, H, P)
    if D is not None:
      y_t += D * x_t
    return state, y_t.astype(x.dtype)

  over_time = tuple(jnp.moveaxis(a, 1, 0) for a in (x, dt, B, C))
  state, y = lax.scan(step, initial_state, over_time)
  return jnp.moveaxis(y, 0, 1), state
