"""Chunked SSD in plain XLA, in four numbered steps.

Inside a chunk the scan is a masked matrix product; between chunks only the
state is passed. `ssd_xla` joins the chunk states by an associative scan
(parallel, any device); `ssd_xla_scan` carries the state through a scan over
chunks (what a CPU likes).

Inside this file heads are (G, R) and come before the tokens of a chunk, and a
state is (..., G, N, R, P): its two products are then large matrices without a
transpose.
"""

import functools
import operator

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

_XLA_CHUNK = 64
_XLA_SCAN_CHUNK = 32


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
  """SSD by chunks, chunk states joined by `lax.associative_scan`.

  Arguments, results and numerics as in `ssd`, which has checked and cast.
  Source: Dao and Gu, arXiv 2405.21060, section 6.
  """
  batch, length, heads, head_dim = x.shape
  groups = B.shape[2]
  q = min(chunk_size or _XLA_CHUNK, length)
  # A padded token has dt = 0, which leaves the state as it is.
  x_c, dt_c, B_c, C_c = (_pad_to_chunks(a, q) for a in (x, dt, B, C))
  x_c, dt_c, a = _heads_first(x_c, dt_c, A, groups)  # (B, c, G, R, Q, P)

  y = _within_chunk(x_c, dt_c, a, B_c, C_c)  # 1.
  states = _state_added(x_c, dt_c, a, B_c)  # 2.
  # 3. state_c = decay_c state_{c-1} + added_c, the initial state in front.
  decay = _per_state(jnp.exp(jnp.sum(a, axis=-1)))
  decay = jnp.concatenate([jnp.ones_like(decay[:, :1]), decay], axis=1)
  first = _state_in(initial_state, groups)[:, None]
  states = jnp.concatenate([first, states], axis=1)
  _, states = lax.associative_scan(
    lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (decay, states), axis=1
  )
  y += _from_state(states[:, :-1], a, C_c)  # 4.
  if D is not None:
    y += D.reshape(groups, -1, 1, head_dim) * x_c

  y = jnp.moveaxis(y.astype(x.dtype), -2, 2)  # (B, c, Q, G, R, P)
  y = y.reshape(batch, -1, heads, head_dim)[:, :length]
  return y, _state_out(states[:, -1])


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
  """SSD by chunks, the state carried by a scan over chunks.

  Arguments, results and numerics as in `ssd`, which has checked and cast.
  Each chunk is cut out of the whole arrays inside the loop: no transposed or
  padded copy of x is made, and the gradient of x is summed in place.
  """
  batch, length, heads, head_dim = x.shape
  groups = B.shape[2]
  q = min(chunk_size or _XLA_SCAN_CHUNK, length)
  num_chunks = -(-length // q)

  # Recomputing a chunk in the backward pass keeps memory linear in L, with
  # one state per chunk saved.
  @jax.checkpoint
  def one_chunk(state, chunk):
    # The last chunk ends with the last token; where it overlaps the chunk
    # before, dt = 0 leaves the state as it is and y is dropped below.
    start = jnp.minimum(chunk * q, length - q)
    x_c, dt_c, B_c, C_c = (
      lax.dynamic_slice_in_dim(a, start, q, axis=1) for a in (x, dt, B, C)
    )
    is_new = start + jnp.arange(q) >= chunk * q
    dt_c = jnp.where(is_new[:, None], dt_c, 0.0)
    x_c, dt_c, a = _heads_first(x_c, dt_c, A, groups)  # (B, G, R, Q, P)

    y = _within_chunk(x_c, dt_c, a, B_c, C_c)  # 1.
    y += _from_state(state, a, C_c)  # 4.
    if D is not None:
      y += D.reshape(groups, -1, 1, head_dim) * x_c
    decay = _per_state(jnp.exp(jnp.sum(a, axis=-1)))
    state = decay * state + _state_added(x_c, dt_c, a, B_c)  # 2. and 3.
    y = jnp.moveaxis(y.astype(x.dtype), -2, 1)  # (B, Q, G, R, P)
    return state, y.reshape(batch, q, heads, head_dim)

  state, y = lax.scan(
    one_chunk, _state_in(initial_state, groups), jnp.arange(num_chunks)
  )
  last = y[-1, :, num_chunks * q - length :]
  y = jnp.moveaxis(y[:-1], 0, 1).reshape(batch, -1, heads, head_dim)
  return jnp.concatenate([y, last], axis=1), _state_out(state)


def _within_chunk(x, dt, a, B, C):
  """1. What a chunk's own tokens give: (C B' o decay) (dt x)."""
  scores = _einsum('...ign,...jgn->...gij', C, B)
  scores = scores[..., None, :, :] * _decay_matrix(a)  # (..., G, R, Q, Q)
  x_dt = (x * dt[..., None]).astype(x.dtype)
  return _einsum('...ij,...jp->...ip', scores.astype(x.dtype), x_dt)


def _state_added(x, dt, a, B):
  """2. What a chunk adds to the state: B' (decay to its end, dt, x)."""
  to_end = jnp.exp(_sum_where(operator.gt, a))
  x_dt = (x * (dt * to_end)[..., None]).astype(x.dtype)
  return _einsum('...jgn,...grjp->...gnrp', B, x_dt)


def _from_state(state, a, C):
  """4. What the state before a chunk gives: decay (C state)."""
  from_start = jnp.exp(_sum_where(operator.le, a))
  y = _einsum('...ign,...gnrp->...grip', C, state.astype(C.dtype))
  return from_start[..., None] * y


def _decay_matrix(a):
  """exp(a_{j+1} + ... + a_i) for j < i, 1 for j = i, 0 above: (..., Q, Q).

  A cumulative sum of 200 is known to 1e-5 only, and so would be the decay
  between two neighbours. Multiples of 2^-10 are summed exactly up to 2^14 and
  what is left of each term stays small, so that differences of these two sums
  are accurate at any chunk size.
  """
  high = lax.stop_gradient(jnp.round(a * 1024) / 1024)
  high, low = (_sum_where(operator.le, part) for part in (high, a - high))
  high, low = (cs[..., :, None] - cs[..., None, :] for cs in (high, low))
  difference = high + low
  # Above 0 only by rounding. The gradient passes the clamp, or dt = 0, where
  # the difference is 0, would lose a part of it.
  difference -= lax.stop_gradient(jnp.maximum(difference, 0.0))
  # Masked before exp, so that neither value nor gradient meets an overflow.
  # The diagonal is a constant: its two gradients would cancel only nearly.
  q = a.shape[-1]
  below = jnp.tril(jnp.ones((q, q), bool), -1)
  otherwise = jnp.where(jnp.eye(q, dtype=bool), 0.0, -jnp.inf)
  return jnp.exp(jnp.where(below, difference, otherwise))


def _sum_where(compare, a):
  """Sum of a_k over compare(k, i): a product, faster than cumsum on CPU."""
  k = jnp.arange(a.shape[-1])
  ones = compare(k[:, None], k).astype(a.dtype)
  return _einsum('...k,ki->...i', a, ones)


def _heads_first(x, dt, A, groups):
  """(..., Q, H, P) -> (..., G, R, Q, P), dt likewise; a = dt A."""
  x = x.reshape(*x.shape[:-2], groups, -1, x.shape[-1])
  dt = dt.reshape(*dt.shape[:-1], groups, -1)
  x, dt = jnp.moveaxis(x, -4, -2), jnp.moveaxis(dt, -3, -1)
  return x, dt, dt * A.reshape(groups, -1, 1)


def _per_state(decay):
  """(..., G, R) -> (..., G, 1, R, 1), to multiply a state."""
  return decay[..., None, :, None]


def _state_in(state, groups):
  """(B, H, P, N) -> (B, G, N, R, P)."""
  state = state.reshape(state.shape[0], groups, -1, *state.shape[2:])
  return jnp.moveaxis(state, -1, 2)


def _state_out(state):
  """(B, G, N, R, P) -> (B, H, P, N)."""
  state = jnp.moveaxis(state, 2, -1)
  return state.reshape(state.shape[0], -1, *state.shape[3:])


def _pad_to_chunks(a, q):
  """(B, L, ...) -> (B, c, Q, ...), zeros at the end."""
  a = jnp.pad(a, [(0, 0), (0, -a.shape[1] % q)] + [(0, 0)] * (a.ndim - 2))
  return a.reshape(a.shape[0], -1, q, *a.shape[2:])
