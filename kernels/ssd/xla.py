"""Chunked SSD in plain XLA, in four numbered steps.

Inside a chunk the scan is a masked matrix product; between chunks only the
state (B, H, P, N) is passed. `ssd_xla` joins the chunk states by an
associative scan (parallel, any device); `ssd_xla_scan` carries the state
through a scan over chunks (what a CPU likes).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

# Float32 operands must not become bfloat16 passes; bfloat16 operands are
# multiplied exactly and summed in float32.
_einsum = functools.partial(
  jnp.einsum,
  precision=lax.Precision.HIGHEST,
  preferred_element_type=jnp.float32,
)


def ssd_xla(
  x: jax.Array,
  dt: jax.Array,
  A: jax.Array,
  B: jax.Array,
  C: jax.Array,
  D: jax.Array | None,
  initial_state: jax.Array,
  chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """SSD by chunks, chunk states joined by `lax.associative_scan`."""
  length, heads = x.shape[1:3]
  groups = B.shape[2]
  x, dt, B, C = _to_chunks((x, dt, B, C), chunk_size or 64, groups)
  A, D, state = _group_heads(A, D, initial_state, groups)

  cs = jnp.cumsum(dt * A, axis=2)
  y = _within(x, dt, cs, B, C)  # 1.
  states = _chunk_states(x, dt, cs, B)  # 2.
  # 3. h_c = decay_c h_{c-1} + states_c, with the initial state in front.
  decay = jnp.exp(cs[:, :, -1])[..., None, None]  # (B, c, G, R, 1, 1)
  states = jnp.concatenate([state[:, None], states], axis=1)
  decay = jnp.concatenate([jnp.ones_like(decay[:, :1]), decay], axis=1)
  _, states = lax.associative_scan(
    lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (decay, states), axis=1
  )
  y = y + _from_state(states[:, :-1], cs, C)  # 4.
  if D is not None:
    y = y + D * x
  y = y.astype(x.dtype).reshape(y.shape[0], -1, heads, y.shape[-1])
  return y[:, :length], states[:, -1].reshape(initial_state.shape)


def ssd_xla_scan(
  x: jax.Array,
  dt: jax.Array,
  A: jax.Array,
  B: jax.Array,
  C: jax.Array,
  D: jax.Array | None,
  initial_state: jax.Array,
  chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """SSD by chunks, the state carried by a scan over chunks."""
  length, heads = x.shape[1:3]
  groups = B.shape[2]
  chunks = _to_chunks((x, dt, B, C), chunk_size or 32, groups)
  A, D, state = _group_heads(A, D, initial_state, groups)

  # Recomputing a chunk in the backward pass keeps memory linear in L.
  @jax.checkpoint
  def one_chunk(state, inputs):
    x, dt, B, C = inputs
    cs = jnp.cumsum(dt * A, axis=1)
    y = _within(x, dt, cs, B, C) + _from_state(state, cs, C)  # 1. and 4.
    if D is not None:
      y += D * x
    decay = jnp.exp(cs[:, -1])[..., None, None]
    state = decay * state + _chunk_states(x, dt, cs, B)  # 2. and 3.
    return state, y.astype(x.dtype)

  state, y = lax.scan(
    one_chunk, state, tuple(jnp.moveaxis(a, 1, 0) for a in chunks)
  )
  y = jnp.moveaxis(y, 0, 1)
  y = y.reshape(y.shape[0], -1, heads, y.shape[-1])
  return y[:, :length], state.reshape(initial_state.shape)


def _to_chunks(arrays, chunk_size, groups):
  """(B, L, ...) -> (B, c, Q, ...), heads (H,) split into (G, R)."""
  x, dt, B, C = arrays
  length = x.shape[1]
  chunk_size = min(chunk_size, length)
  # dt = 0 leaves the state as it is, so a padded tail is not seen.
  pad = -length % chunk_size

  def split(a, *trailing):
    a = jnp.pad(a, [(0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 2))
    return a.reshape(a.shape[0], -1, chunk_size, *trailing)

  return (
    split(x, groups, x.shape[2] // groups, x.shape[3]),
    split(dt, groups, dt.shape[2] // groups),
    split(B, *B.shape[2:]),
    split(C, *C.shape[2:]),
  )


def _group_heads(A, D, state, groups):
  """Splits the head axis of A, D and the state into (G, R)."""
  if D is not None:
    D = D.reshape(groups, -1, D.shape[-1])
  batch, _, head_dim, state_dim = state.shape
  state = state.reshape(batch, groups, -1, head_dim, state_dim)
  return A.reshape(groups, -1), D, state


def _within(x, dt, cs, B, C):
  """1. The chunk's own tokens: (C B' o decay) (dt x)."""
  scores = _einsum('...ign,...jgn->...gij', C, B)
  scores = scores[..., None, :, :] * _decay_matrix(cs)  # (..., G, R, Q, Q)
  xd = (x * dt[..., None]).astype(x.dtype)
  return _einsum('...grij,...jgrp->...igrp', scores.astype(x.dtype), xd)


def _chunk_states(x, dt, cs, B):
  """2. What the chunk adds to the state: (decay to the end dt x)' B."""
  to_end = jnp.exp(_clamp(cs[..., -1:, :, :] - cs))
  xd = (x * (dt * to_end)[..., None]).astype(x.dtype)
  return _einsum('...jgrp,...jgn->...grpn', xd, B)


def _from_state(state, cs, C):
  """4. What the state before the chunk adds to y: decay (C h)."""
  y = _einsum('...ign,...grpn->...igrp', C, state.astype(C.dtype))
  return jnp.exp(cs)[..., None] * y


def _decay_matrix(cs):
  """exp(cs_i - cs_j) for j < i, 1 for j = i, 0 above: (..., G, R, Q, Q)."""
  cs = jnp.moveaxis(cs, -3, -1)  # (..., G, R, Q)
  q = cs.shape[-1]
  difference = _clamp(cs[..., :, None] - cs[..., None, :])
  # Masked before exp, so that neither value nor gradient meets an overflow.
  # The diagonal is the constant 1: its two gradients would only cancel.
  below = jnp.tril(jnp.ones((q, q), bool), -1)
  constant = jnp.where(jnp.eye(q, dtype=bool), 0.0, -jnp.inf)
  return jnp.exp(jnp.where(below, difference, constant))


def _clamp(difference):
  """Clamps rounding above 0 but lets the gradient of 0 pass (dt = 0)."""
  return difference - lax.stop_gradient(jnp.maximum(difference, 0.0))
