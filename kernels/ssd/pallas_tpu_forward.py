"""The forward TPU kernel of `ssd`; `pallas_tpu.py` says how it works."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .pallas_tpu_call import LANES, Call, take_inputs
from .pallas_tpu_chunk import (
  block_chunks,
  block_diagonal,
  dot,
  exp,
  iota,
  side_by_side,
  spread,
)


def forward(
  blocks, want_state, interpret, x, dt, A, b, c, skip, state, *, save
):
  """y, the states at every `blocks.backward` tokens, the final state."""
  batch = x.shape[0]
  call = Call(blocks, batch, blocks.forward, reverse=False)
  shape = blocks.state_shape
  take_inputs(call, x, dt, A, b, c, skip)
  call.operand('start', state, call.per_example(*shape))
  call.result('y', x.shape, x.dtype, call.tokens(blocks.channels))
  call.result(
    'saved',
    (batch, call.grid[1] * blocks.saved, *shape),
    jnp.float32,
    call.states(blocks.saved),
    save,
  )
  call.result(
    'end', (batch, *shape), jnp.float32, call.per_example(*shape), want_state
  )
  scratch = {
    'state': pltpu.VMEM(shape, jnp.float32),
    'swap': pltpu.VMEM((blocks.heads, LANES), jnp.float32),
  }
  found = call.run(_kernel, scratch, interpret, 'ssd_fwd')
  return found['y'], found.get('saved'), found.get('end')


def _kernel(blocks, refs):
  step = pl.program_id(1)

  @pl.when(step == 0)
  def _():
    if refs.start is None:
      refs.state[...] = jnp.zeros_like(refs.state)
    else:
      refs.state[...] = refs.start[...]

  token = lax.rem(iota((blocks.chunk, LANES), 1), blocks.chunk)
  causal = token <= iota((blocks.chunk, LANES), 0)
  size = blocks.forward
  chunks = block_chunks(blocks, size, step, refs)
  for chunk in chunks:
    if refs.saved is not None and chunk.start % blocks.backward == 0:
      refs.saved[chunk.start // blocks.backward] = refs.state[...]
    # after the last token nobody asks for the state
    last = refs.end is None and chunk is chunks[-1] and size >= blocks.length
    for group in range(blocks.groups):
      b, c, b_t, _ = chunk.load_group(refs, blocks, group)
      b_t = side_by_side(b_t, blocks.tile_heads, 1)  # (N, R*Q)
      cb = dot(c, side_by_side(b, blocks.tile_heads, 0), (1, 1))
      cb = jnp.where(causal, cb, 0.0)  # (Q, R*Q)
      for tile in blocks.group_tiles(group):
        _tile(blocks, refs, chunk, tile, b_t, c, cb, last)

  if refs.end is not None:

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
      refs.end[...] = refs.state[...]


def _tile(blocks, refs, chunk, tile, b_t, c, cb, last):
  """Writes y of one tile of one chunk and moves its state on."""
  rows, row = slice(None, chunk.count), slice(tile, tile + 1)
  lanes = blocks.tile_lanes(tile)
  x = chunk.load(refs.x, blocks, lanes)
  state = refs.state[:, lanes]  # (N, R*P)
  sums = spread(blocks, chunk.sum_col, tile, blocks.chunk)[rows]
  m = cb[rows] * exp(sums - chunk.sum_row[row]) * chunk.dt_row[row]
  if blocks.head_dim != blocks.chunk:
    sums = spread(blocks, chunk.sum_col, tile, blocks.head_dim)[rows]
  out_decay = exp(sums)  # (Q, R*P)
  left = m if last else jnp.concatenate([m, b_t * chunk.in_row[row]])
  both = dot(left.astype(x.dtype), block_diagonal(blocks, x))
  y = both[rows] + out_decay * dot(c[rows], state.astype(x.dtype))
  if refs.skip is not None:
    y = y + refs.skip[:, lanes] * x[rows].astype(jnp.float32)
  chunk.store(refs.y, lanes, y)
  if not last:
    decay = out_decay[chunk.count - 1 : chunk.count]
    refs.state[:, lanes] = state * decay + both[chunk.count :]
