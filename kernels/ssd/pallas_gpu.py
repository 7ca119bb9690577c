"""SSD on an NVIDIA GPU: Triton kernels for H100, H200 and newer.

Not measured: these kernels were interpreted, lowered for CUDA, and compiled by
Triton 3.6 for sm_90, but never run on a GPU. Hence they are off:
`implementation=None` takes 'xla' on a GPU. Asked for by name they run:

  ssd(..., implementation='pallas_gpu')
  python main.py ... --config.student.ssd_implementation=pallas_gpu
  python kernels/bench.py --all    # timed, against 'xla'
  JAX_PLATFORMS=cuda python -m pytest -m gpu tests/test_ssd_gpu.py

If they win there, `DEFAULT_IMPLEMENTATION['gpu']` in `api.py` is the one word
to change; sizes that they lack then fall back to 'xla'. Pallas' Triton backend
is deprecated since JAX 0.11, but there.

The recurrence of `reference.py`, chunk by chunk (arXiv 2405.21060, section
6), with a = dt A, c = cumsum(a) and S the state that enters a chunk:

  Y = ((C B') o exp(c_i - c_j) o dt_j) X + exp(c_i) C S' + D X     j <= i
  S <- exp(c_Q) S + X' (B o exp(c_Q - c_j) dt_j)

* Forward: one program per image and head walks the chunks, the state in its
  registers. x, y, B and C are read and written in the layout of the model,
  once; only dt, which is small, is transposed: (B, H, L), tokens side by side.
* Where images x heads are fewer than the multiprocessors, as for one large
  image, the sequence is cut into segments: each is run from zeros for its end
  state, the states are passed on in one small product, and each is run again.
* Backward: nothing of the forward pass is kept but its inputs and the segments'
  states. The same walk, forward over x and B and in reverse over dY and C,
  writes the state S before each chunk and the gradient T of the one after it,
  rounded to x's dtype, as products take them: with bfloat16 and P = N = 64 each
  is as large as x. Then all chunks at once: a program takes a chunk and a block
  of heads, and adds up dB and dC over those heads in registers. No atomics:
  the same bits every time.
* A chunk is 64 tokens, the height of a Hopper matrix instruction, with four
  warps; exponentials are exp2 of clamped float32 differences. With bfloat16 and
  P = N = 64, ptxas gives the forward kernel 244 registers and spills none, the
  gradient 255 and spills 436 bytes. Float32 products are scalar and spill much
  more: that path is for checking, not for speed.
"""

import functools

import jax
import jax.numpy as jnp

from .. import placement
from .pallas_gpu_backward import gradients
from .pallas_gpu_call import LOG2_E, choose_blocks
from .pallas_gpu_forward import scan, states


def ssd_pallas_gpu(
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
  segments=None,
  mesh=None,
  batch_axes=None,
):
  """The SSD scan in GPU kernels, forward and backward.

  Equals `reference.py`. Source: Mamba-2, arXiv 2405.21060, section 6.
  Differentiable in every array, in reverse mode only.

  Args:
    x: (B, L, H, P), bfloat16 or float32; P 16, 32, 64 or 128.
    dt: (B, L, H), at least 0, any float dtype.
    A: (H,), at most 0.
    B: (B, L, G, N), N 16, 32, 64 or 128; used in x's dtype.
    C: (B, L, G, N), the same.
    D: (H,), (H, P) or None.
    initial_state: (B, H, P, N) or None for zeros.
    chunk_size: has no effect on the result nor here: the chunk is what fills
      a matrix instruction, `Blocks.chunk`.
    return_final_state: static; without it no state is written.
    interpret: run without a GPU.
    segments: parts that the sequence is cut into, to run side by side; None
      chooses by the number of images and heads.
    mesh: with `batch_axes`, run per shard of the batch.
    batch_axes: mesh axis name or names that shard the batch.

  Returns:
    y (B, L, H, P) in x's dtype, and the final state (B, H, P, N) float32 or
    None.

  Numerics: bfloat16 or float32 (HIGHEST, never TF32) products, accumulated in
  float32; dt, decays and carried states float32.

  Raises:
    NotImplementedError: a size or dtype that the kernels cannot do.
  """
  del chunk_size
  choose_blocks(x, B, segments)  # complain before tracing anything
  arrays = {'x': x, 'dt': dt, 'A': A, 'B': B, 'C': C, 'D': D}
  arrays['initial_state'] = initial_state
  run = functools.partial(
    _ssd_arrays,
    return_final_state=return_final_state,
    interpret=interpret,
    segments=segments,
  )
  return placement.over_batch(run, arrays, mesh, batch_axes, whole=('A', 'D'))


def _ssd_arrays(
  x,
  dt,
  A,
  B,
  C,
  D,
  initial_state,
  *,
  return_final_state,
  interpret,
  segments,
):
  """Arguments as the kernels take them; they keep the public layout."""
  heads, head_dim = x.shape[2:]
  blocks = choose_blocks(x, B, segments)
  # A padded token has dt = 0, which leaves the state as it is.
  padding = blocks.padded_length - blocks.length
  dt = jnp.swapaxes(dt.astype(jnp.float32), 1, 2)
  dt = jnp.pad(dt, ((0, 0), (0, 0), (0, padding)))  # (B, H, c*Q)
  if D is not None:
    D = jnp.broadcast_to(
      D.astype(jnp.float32).reshape(heads, -1), (heads, head_dim)
    )
  if initial_state is not None:
    initial_state = initial_state.astype(jnp.float32)
  return _ssd(
    blocks,
    return_final_state,
    interpret,
    x,
    dt,
    A.astype(jnp.float32),
    B.astype(x.dtype),
    C.astype(x.dtype),
    D,
    initial_state,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ssd(blocks, want_state, interpret, *arrays):
  return _ssd_fwd(blocks, want_state, interpret, *arrays)[0]


def _ssd_fwd(blocks, want_state, interpret, x, dt, A, b, c, skip, state):
  rate = A * LOG2_E
  if blocks.segments == 1:
    starts, end = None if state is None else state[:, None], None
  else:
    starts, end = _segment_starts(blocks, interpret, x, dt, rate, b, state)
  want_ends = want_state and end is None
  y, ends = scan(
    blocks, interpret, x, dt, rate, b, c, skip, starts, want_ends=want_ends
  )
  if want_ends:
    end = ends[:, 0]
  saved = x, dt, A, b, c, skip, state, starts
  return (y, end if want_state else None), saved


def _ssd_bwd(blocks, want_state, interpret, saved, cotangents):
  """S before each chunk from the left, T from the right, then gradients."""
  del want_state
  x, dt, A, b, c, skip, state, starts = saved
  g, dend = cotangents
  rate = A * LOG2_E
  run = functools.partial(states, blocks, interpret, save=True)
  _, S = run(x, dt, rate, b, starts)
  if blocks.segments == 1:
    ends, first = None if dend is None else dend[:, None], None
  else:
    ends, first = _segment_starts(
      blocks, interpret, g, dt, rate, c, dend, reverse=True
    )
  want_ends = state is not None and first is None
  found, T = run(g, dt, rate, c, ends, reverse=True, want_ends=want_ends)
  if want_ends:
    first = found[:, 0]
  dx, ddt, dA, db, dc, dskip = gradients(
    blocks, interpret, x, dt, rate, b, c, skip, g, S, T
  )
  return dx, ddt, dA, db, dc, dskip, None if state is None else first


_ssd.defvjp(_ssd_fwd, _ssd_bwd)


def _segment_starts(blocks, interpret, x, dt, rate, b, state, *, reverse=False):
  """State before each segment (B, segments, H, P, N), and the last state.

  Every segment is run from zeros. What one has added then reaches the state
  before segment k through the decays of the segments between, whose exponents
  are plain sums: no differences.
  """
  added, _ = states(
    blocks, interpret, x, dt, rate, b, None, reverse=reverse, want_ends=True
  )
  a = dt * rate[:, None]
  a = jnp.sum(a.reshape(*a.shape[:2], blocks.segments, -1), axis=3)
  if reverse:
    a, added = jnp.flip(a, 2), jnp.flip(added, 1)
  if state is None:
    state = jnp.zeros_like(added[:, 0])
  added = jnp.concatenate([state[:, None], added], axis=1)  # (B, s+1, H, P, N)
  # added_j is there before segment j: segments j to k - 1 lie between.
  count = blocks.segments
  k, j, m = jnp.ogrid[: count + 1, : count + 1, :count]
  between = jnp.where((j <= m) & (m < k), a[:, :, None, None], 0.0)
  decay = jnp.exp2(jnp.sum(between, axis=-1))  # (B, H, s+1, s+1)
  decay = jnp.where((j <= k)[..., 0], decay, 0.0)
  before = jnp.einsum(
    'bhkj,bjhpn->bkhpn', decay, added, precision=jax.lax.Precision.HIGHEST
  )
  starts, last = before[:, :-1], before[:, -1]
  return jnp.flip(starts, 1) if reverse else starts, last
