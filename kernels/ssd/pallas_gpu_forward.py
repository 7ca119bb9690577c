"""The GPU kernels of `ssd` that carry a state; `pallas_gpu.py` says how."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .pallas_gpu_call import Decays, call, dot, load, pairs, store


def scan(blocks, interpret, x, dt, rate, b, c, skip, starts, *, want_ends):
  """y, and the state after each segment or None.

  Args:
    starts: state before each segment (B, segments, H, P, N), None for zeros.
  """
  spec = _Specs(blocks)
  found = call(
    functools.partial(_scan_kernel, blocks),
    spec.grid,
    {
      'x': (x, spec.wide),
      'dt': (dt, spec.dt),
      'rate': (rate, spec.per_head()),
      'b': (b, spec.narrow),
      'c': (c, spec.narrow),
      'skip': (skip, spec.per_head(blocks.head_dim)),
      'start': (starts, spec.state),
    },
    {
      'y': (x.shape, x.dtype, spec.wide),
      'end': (spec.states, jnp.float32, spec.state) if want_ends else None,
    },
    warps=blocks.warps,
    stages=2,
    interpret=interpret,
    name='ssd_fwd',
  )
  return found['y'], found.get('end')


def states(
  blocks,
  interpret,
  x,
  dt,
  rate,
  b,
  starts,
  *,
  reverse=False,
  save=False,
  want_ends=False,
):
  """The state after each segment, and the one before each chunk, or None.

  With `reverse` it is the adjoint recurrence: x is the gradient of y, b is C,
  and a state goes from a chunk's end to its start.

  Args:
    starts: state before each segment (B, segments, H, P, N), None for zeros.
    save: whether to return the state before each chunk, (B, c, H, P, N) in x's
      dtype, in which products take it.
  """
  spec = _Specs(blocks)
  saved = blocks.batch, blocks.chunks, *spec.states[2:]
  found = call(
    functools.partial(_states_kernel, blocks, reverse),
    spec.grid,
    {
      'x': (x, spec.wide),
      'dt': (dt, spec.dt),
      'rate': (rate, spec.per_head()),
      'b': (b, spec.narrow),
      'start': (starts, spec.state),
    },
    {
      'end': (spec.states, jnp.float32, spec.state) if want_ends else None,
      'saved': (saved, x.dtype, spec.saved) if save else None,
    },
    warps=blocks.warps,
    stages=3,
    interpret=interpret,
    name='ssd_states',
  )
  return found.get('end'), found.get('saved')


class _Specs:
  """BlockSpecs of a program per head, segment and image."""

  def __init__(self, blocks):
    length, p, n = blocks.length, blocks.head_dim, blocks.state_dim
    group_heads, chunks = blocks.heads // blocks.groups, blocks.segment_chunks
    # Heads run fastest: neighbours share B and C, and lie side by side in x.
    self.grid = blocks.heads, blocks.segments, blocks.batch
    self.states = blocks.batch, blocks.segments, blocks.heads, p, n
    self.wide = pl.BlockSpec(
      (None, length, None, p), lambda h, s, i: (i, 0, h, 0)
    )
    self.narrow = pl.BlockSpec(
      (None, length, None, n),
      lambda h, s, i: (i, 0, lax.div(h, group_heads), 0),
    )
    self.dt = pl.BlockSpec(
      (None, None, blocks.padded_length), lambda h, s, i: (i, h, 0)
    )
    self.state = pl.BlockSpec(
      (None, None, None, p, n), lambda h, s, i: (i, s, h, 0, 0)
    )
    self.saved = pl.BlockSpec(
      (None, chunks, None, p, n), lambda h, s, i: (i, s, h, 0, 0)
    )

  def per_head(self, *shape):
    zeros = (0,) * len(shape)
    return pl.BlockSpec((None, *shape), lambda h, s, i: (h, *zeros))


def _carry(blocks, refs, one_chunk, reverse=False):
  """Runs state = one_chunk(k, tokens, mask, state) over a segment's chunks."""
  first = pl.program_id(1) * blocks.segment_chunks

  def step(k, state):
    if reverse:
      k = blocks.segment_chunks - 1 - k
    start = (first + k) * blocks.chunk
    mask = start + jnp.arange(blocks.chunk) < blocks.length
    return one_chunk(k, pl.ds(start, blocks.chunk), mask, state)

  if refs.start is None:
    state = jnp.zeros((blocks.head_dim, blocks.state_dim), jnp.float32)
  else:
    state = refs.start[...]
  state = lax.fori_loop(0, blocks.segment_chunks, step, state)
  if refs.end is not None:
    refs.end[...] = state


def _scan_kernel(blocks, refs):
  rate = refs.rate[...]
  skip = None if refs.skip is None else refs.skip[...]

  def one_chunk(k, tokens, mask, state):
    x = load(refs.x.at[tokens, :], mask)  # (Q, P)
    b, c = (load(ref.at[tokens, :], mask) for ref in (refs.b, refs.c))  # (Q, N)
    dt = refs.dt[tokens]
    decays = Decays(dt * rate, blocks.exact)
    i, j = pairs(blocks.chunk, 0, k)
    # Y = decay_i C S' + (C B' o decay o dt_j) X + D X. In this order few tiles
    # are alive at once.
    y = dot(c, state.astype(c.dtype), (1, 1)) * decays.from_start()[:, None]
    state = _next_state(state, x, dt * decays.to_end(), b, decays)
    m = dot(c, b, (1, 1)) * decays.between(0, i >= j) * dt[None, :]
    y += dot(m.astype(x.dtype), x)
    if skip is not None:
      y += skip[None, :] * x.astype(jnp.float32)
    store(refs.y.at[tokens, :], y, mask)
    return state

  _carry(blocks, refs, one_chunk)


def _states_kernel(blocks, reverse, refs):
  rate = refs.rate[...]

  def one_chunk(k, tokens, mask, state):
    if refs.saved is not None:
      refs.saved[k] = state.astype(refs.saved.dtype)
    x = load(refs.x.at[tokens, :], mask)
    b = load(refs.b.at[tokens, :], mask)
    dt = refs.dt[tokens]
    decays = Decays(dt * rate, blocks.exact)
    weight = decays.from_start() if reverse else dt * decays.to_end()
    return _next_state(state, x, weight, b, decays)

  _carry(blocks, refs, one_chunk, reverse)


def _next_state(state, x, weight, b, decays):
  """S <- decay S + X' (weight o B)."""
  b = (b.astype(jnp.float32) * weight[:, None]).astype(b.dtype)
  return state * decays.whole() + dot(x, b, (0, 0))
