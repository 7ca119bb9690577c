"""SSD on a TPU: one fused Mosaic kernel forward and one backward.

The recurrence of `reference.py`, chunk by chunk (arXiv 2405.21060, section
6). With a chunk's a = dt A, c = cumsum(a), S the state that enters it,

  Y = ((C B') o exp(c_i - c_j) o dt_j) X + exp(c_i) C S     j <= i
  S <- exp(c_Q) S + (B o exp(c_Q - c_j) dt_j)' X

What the kernels do to keep the units of a TensorCore busy:

* x stays (B, L, H*P). R = 128 / P neighbouring heads form a tile: one block
  of 128 lanes. The chunk is Q = 128 / R tokens, so the Q x Q decay tiles of
  the R heads side by side fill 128 lanes too, and X as a block diagonal
  (R*Q, R*P) serves both of them in one product.
* B' o (decay, dt) is scaled along lanes, where a row is broadcast for free,
  and shares that block diagonal; x itself reaches the MXU untouched.
* C B' is computed and masked once per chunk and group, never per head.
* dt, B and C come with tokens on the lanes, (B, H, L) and (B, G*N, L). That is
  how XLA lays out arrays this narrow, so the transposition is free.
* Cumulative sums are products with a triangle of ones, exact: dt A is split
  into three bfloat16 parts. Decays are exp2 of clamped float32 differences.
* The backward kernel walks the blocks in reverse, recomputes the states
  inside a block from the one saved at its start, and works on transposed
  tiles: nearly every sum over tokens then runs along sublanes.

Nothing of size L x Q is stored: the residuals are the inputs and one float32
state per `Blocks.backward` tokens.
"""

import functools

import jax
import jax.numpy as jnp

from .. import placement
from .pallas_tpu_backward import backward
from .pallas_tpu_call import choose_blocks
from .pallas_tpu_forward import forward


def ssd_pallas_tpu(
  x,
  dt,
  A,
  B,
  C,
  D=None,
  initial_state=None,
  *,
  chunk_size=None,
  return_final_state=True,
  interpret=False,
  mesh=None,
  batch_axes=None,
):
  """The SSD scan in two fused TPU kernels, forward and backward.

  Equals `reference.py`. Source: Mamba-2, arXiv 2405.21060, section 6.
  Differentiable in every array, in reverse mode only.

  Args:
    x: (B, L, H, P), bfloat16 or float32. P a multiple of 8 (64 and 128 fill
      the lanes), H at most 128.
    dt: (B, L, H), positive, any float dtype.
    A: (H,), negative.
    B: (B, L, G, N), N a multiple of 16; used in x's dtype.
    C: (B, L, G, N), the same.
    D: (H,), (H, P) or None.
    initial_state: (B, H, P, N) or None for zeros.
    chunk_size: has no effect on the result nor here: the chunk is what fills
      the lanes, `Blocks.chunk`.
    return_final_state: static; without it no state is written.
    interpret: False, True or `pltpu.InterpretParams`: run without a TPU.
    mesh: with `batch_axes`, run per shard of the batch.
    batch_axes: mesh axis name or names that shard the batch.

  Returns:
    y (B, L, H, P) in x's dtype, and the final state (B, H, P, N) float32 or
    None.

  Numerics: bfloat16 or float32 (HIGHEST) products, accumulated in float32;
  dt, decays and states float32.

  Raises:
    NotImplementedError: a size or dtype that the kernels cannot do.
  """
  del chunk_size
  choose_blocks(x, B)  # complain before tracing anything
  arrays = {'x': x, 'dt': dt, 'A': A, 'B': B, 'C': C, 'D': D}
  arrays['initial_state'] = initial_state
  run = functools.partial(
    _ssd_arrays, return_final_state=return_final_state, interpret=interpret
  )
  return placement.over_batch(run, arrays, mesh, batch_axes, whole=('A', 'D'))


def _ssd_arrays(
  x, dt, A, B, C, D, initial_state, *, return_final_state, interpret
):
  """From the public layout to the kernels' and back."""
  batch, length, heads, head_dim = x.shape
  blocks = choose_blocks(x, B)

  def tokens_last(v):  # (B, L, ...) -> (B, channels, L)
    return jnp.swapaxes(v.reshape(batch, length, -1), 1, 2)

  skip = state = None
  if D is not None:
    skip = jnp.broadcast_to(
      D.astype(jnp.float32).reshape(heads, -1), (heads, head_dim)
    ).reshape(1, -1)  # (1, H*P)
  if initial_state is not None:
    state = jnp.moveaxis(initial_state.astype(jnp.float32), 3, 1)
    state = state.reshape(batch, -1, blocks.channels)  # (B, N, H*P)
  y, state = _ssd(
    blocks,
    return_final_state,
    interpret,
    x.reshape(batch, length, -1),
    tokens_last(dt.astype(jnp.float32)),
    A.astype(jnp.float32),
    tokens_last(B.astype(x.dtype)),
    tokens_last(C.astype(x.dtype)),
    skip,
    state,
  )
  if state is not None:
    state = state.reshape(batch, -1, heads, head_dim)
    state = jnp.moveaxis(state, 1, 3)  # (B, H, P, N)
  return y.reshape(x.shape), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ssd(blocks, want_state, interpret, x, dt, A, b, c, skip, state):
  y, _, end = forward(
    blocks, want_state, interpret, x, dt, A, b, c, skip, state, save=False
  )
  return y, end


def _ssd_fwd(blocks, want_state, interpret, x, dt, A, b, c, skip, state):
  save = blocks.length > blocks.backward
  y, states, end = forward(
    blocks, want_state, interpret, x, dt, A, b, c, skip, state, save=save
  )
  if not save and state is not None:
    states = state[:, None]
  return (y, end), (x, dt, A, b, c, skip, states, state is not None)


def _ssd_bwd(blocks, want_state, interpret, saved, cotangents):
  del want_state
  return backward(blocks, interpret, *saved, *cotangents)


_ssd.defvjp(_ssd_fwd, _ssd_bwd)
