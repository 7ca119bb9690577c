"""The backward TPU kernel of `ssd`; `pallas_tpu.py` says how it works."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .pallas_tpu_call import LANES, LOG2_E, Call, take_inputs
from .pallas_tpu_chunk import (
  block_chunks,
  block_diagonal,
  dot,
  exp,
  head_ends,
  iota,
  pad,
  side_by_side,
  spread,
  token_sums,
)


def backward(
  blocks, interpret, x, dt, A, b, c, skip, states, want_dstate, dy, dend
):
  """Cotangents of x, dt, A, b, c, skip and the initial state."""
  batch = x.shape[0]
  call = Call(blocks, batch, blocks.backward, reverse=True)
  wide = call.tokens(blocks.channels)
  narrow = call.tokens_last(blocks.narrow)
  take_inputs(call, x, dt, A, b, c, skip)
  call.operand('dy', dy, wide)
  call.operand('start', states, call.states(None))
  call.operand('dend', dend, call.per_example(*blocks.state_shape))
  call.result('dx', x.shape, x.dtype, wide)
  call.result('ddt', dt.shape, jnp.float32, call.tokens_last(blocks.heads))
  call.result('db', b.shape, b.dtype, narrow)
  call.result('dc', c.shape, c.dtype, narrow)
  for name, shape, wanted in (
    ('da', (blocks.row_count, LANES), True),
    ('dskip', (1, blocks.channels), skip is not None),
    ('dstart', blocks.state_shape, want_dstate),
  ):
    spec = call.per_example(*shape)
    call.result(name, (batch, *shape), jnp.float32, spec, wanted)
  chunks = -(-blocks.backward // blocks.chunk)
  scratch = {
    'dstate': pltpu.VMEM(blocks.state_shape, jnp.float32),
    'swap': pltpu.VMEM((blocks.heads, LANES), jnp.float32),
    'inner': pltpu.VMEM((chunks + 1, *blocks.state_shape), jnp.float32),
  }
  found = call.run(_kernel, scratch, interpret, 'ssd_bwd')
  dA = jnp.sum(found['da'], axis=0)[: blocks.tiles]
  dA = jnp.sum(dA.reshape(blocks.heads, blocks.chunk), axis=1)
  dskip = None if skip is None else jnp.sum(found['dskip'], axis=0)
  dx, ddt, db, dc = (found[name] for name in ('dx', 'ddt', 'db', 'dc'))
  return dx, ddt, dA, db, dc, dskip, found.get('dstart')


def _kernel(blocks, refs):
  n_steps = pl.num_programs(1)
  step = pl.program_id(1)

  @pl.when(step == 0)
  def _():
    if refs.dend is None:
      refs.dstate[...] = jnp.zeros_like(refs.dstate)
    else:
      refs.dstate[...] = refs.dend[...]
    refs.da[...] = jnp.zeros_like(refs.da)
    if refs.dskip is not None:
      refs.dskip[...] = jnp.zeros_like(refs.dskip)

  chunks = block_chunks(blocks, blocks.backward, n_steps - 1 - step, refs)
  groups = [
    [_group_inputs(blocks, refs, chunk, g) for g in range(blocks.groups)]
    for chunk in chunks
  ]
  if refs.start is None:
    refs.inner[0] = jnp.zeros_like(refs.dstate)
  else:
    refs.inner[0] = refs.start[...]
  for k, chunk in enumerate(chunks):
    _next_states(blocks, refs, chunk, k, groups[k])
  sums = [None] * len(chunks)
  for k in reversed(range(len(chunks))):
    sums[k] = _chunk_backward(blocks, refs, chunks[k], k, groups[k])
  _dt_backward(blocks, refs, chunks, sums)

  if refs.dstart is not None:

    @pl.when(step == n_steps - 1)
    def _():
      refs.dstart[...] = refs.dstate[...]


class _Group(NamedTuple):
  """B and C of a chunk and group, in the forms the backward kernel uses."""

  b: jax.Array  # (Q, N)
  b_t: jax.Array  # (N, R*Q) float32
  c_t: jax.Array  # (N, R*Q) float32
  bc: jax.Array  # (Q, R*Q), B_j C_i for j <= i


def _group_inputs(blocks, refs, chunk, group):
  b, c, b_t, c_t = chunk.load_group(refs, blocks, group)
  count = blocks.tile_heads
  bc = dot(b, side_by_side(c, count, 0), (1, 1))
  return _Group(
    b=b,
    b_t=side_by_side(b_t, count, 1),
    c_t=side_by_side(c_t, count, 1),
    bc=jnp.where(_anticausal(blocks), bc, 0.0),
  )


def _anticausal(blocks):
  """(Q, R*Q) mask of row j <= lane i: a transposed causal tile."""
  shape = (blocks.chunk, LANES)
  return iota(shape, 0) <= lax.rem(iota(shape, 1), blocks.chunk)


def _next_states(blocks, refs, chunk, k, groups):
  """Forward sweep over a block: the state after chunk k, recomputed."""
  for group, inputs in enumerate(groups):
    for tile in blocks.group_tiles(group):
      lanes = blocks.tile_lanes(tile)
      x = chunk.load(refs.x, blocks, lanes)
      left = inputs.b_t * chunk.in_row[tile : tile + 1]
      add = dot(left.astype(x.dtype), block_diagonal(blocks, x))
      # the chunk's last token lies in its last 8 rows: one vector register
      ends = spread(
        blocks, chunk.sum_col[blocks.chunk - 8 :], tile, blocks.head_dim
      )
      decay = exp(ends[7:8])
      refs.inner[k + 1, :, lanes] = refs.inner[k, :, lanes] * decay + add


class _RowSums(NamedTuple):
  """Rows of a chunk, a list over the tiles each, for the gradient of dt."""

  out: list  # (1, R*Q): sum of dy_i dy_i/dc_i
  dt_diagonal: list  # (R.., Q): of d/d dt_j within the chunk
  dt_state: list  # (1, R*Q): of B_j dS x_j
  end: list  # (1, R*P): of S dS at the chunk's end


class _GroupTotals:
  """Sums over the heads of a group, kept in registers."""

  def __init__(self, blocks):
    self.dbc = jnp.zeros((blocks.chunk, LANES), jnp.float32)
    self.db = jnp.zeros((blocks.state_dim, LANES), jnp.float32)
    self.dc = jnp.zeros((blocks.state_dim, LANES), jnp.float32)


def _chunk_backward(blocks, refs, chunk, k, groups):
  """Reverse sweep over chunk k, all heads.

  Writes dx, db, dc and adds to dskip; dstate goes from the chunk's end to its
  start. Returns rows for `_dt_backward`.
  """
  sums = _RowSums([], [], [], [])
  for group, held in enumerate(groups):
    totals = _GroupTotals(blocks)
    _in_step(
      _tile_backward(blocks, refs, chunk, k, held, tile, totals, sums)
      for tile in blocks.group_tiles(group)
    )
    dtype = refs.db.dtype
    dbc = jnp.where(_anticausal(blocks), totals.dbc, 0.0)
    dbc = _fold(blocks, dbc).astype(dtype)  # (Q, Q), rows j, lanes i
    b_t, c_t = (v[:, : blocks.chunk].astype(dtype) for v in held[1:3])
    channels = blocks.group_channels(group)
    dc = _fold(blocks, totals.dc) + dot(b_t, dbc)
    db = _fold(blocks, totals.db) + dot(c_t, dbc, (1, 1))
    chunk.store_last(refs.dc, channels, dc)
    chunk.store_last(refs.db, channels, db)
  return sums


def _in_step(tiles):
  """Runs generators as a pipeline: each starts one stage after the last.

  A kernel body is one long basic block, and the compiler's scheduler looks
  ahead only so far: products of one tile must stand beside the elementwise
  work of another for both units to be busy.
  """
  tiles, live = list(tiles), []
  while tiles or live:
    live += tiles[:1]
    tiles = tiles[1:]
    live = [tile for tile in live if next(tile, True) is None]


def _fold(blocks, v):
  """Sums the heads of a tile: (rows, R*Q) -> (rows, Q)."""
  return functools.reduce(jnp.add, jnp.split(v, blocks.tile_heads, axis=1))


def _tile_backward(blocks, refs, chunk, k, held, tile, totals, sums):
  """One tile of chunk k, in stages for `_in_step`; tiles are transposed."""
  dtype = refs.x.dtype
  lanes, row = blocks.tile_lanes(tile), slice(tile, tile + 1)
  head_dim, size = blocks.head_dim, blocks.chunk
  x, dy = (chunk.load(ref, blocks, lanes) for ref in (refs.x, refs.dy))
  state, next_state = (refs.inner.at[i] for i in (k, k + 1))
  dstate = refs.dstate[:, lanes]  # (N, R*P)
  x_diagonal, dy_diagonal = (block_diagonal(blocks, v) for v in (x, dy))
  sum_j = spread(blocks, chunk.sum_col, tile, size)
  dt_j = spread(blocks, chunk.dt_col, tile, size)
  sum_p, dt_p = sum_j, dt_j
  if head_dim != size:
    sum_p = spread(blocks, chunk.sum_col, tile, head_dim)
    dt_p = spread(blocks, chunk.dt_col, tile, head_dim)
  yield
  decay = exp(chunk.sum_row[row] - sum_j)  # (Q, R*Q), rows j, lanes i
  m = (held.bc * decay).astype(dtype)
  c_out = (held.c_t * chunk.out_row[row]).astype(dtype)
  yield
  dm = dot(x, dy_diagonal, (1, 1))  # (Q, R*Q) x_j dy_i
  s_dy = dot(state[:, lanes].astype(dtype), dy_diagonal, (1, 1))
  ds_x = dot(dstate.astype(dtype), x_diagonal, (1, 1))  # (N, R*Q)
  yield
  du = dot(m, dy_diagonal)  # (Q, R*P), the gradient of dt x
  dstate_add = dot(c_out, dy_diagonal)  # (N, R*P)
  b_ds = dot(held.b, dstate.astype(dtype))  # (Q, R*P)
  yield
  dm = dm * decay
  # Row and column sums of one rounded matrix: they have to cancel in ddt.
  # The MXU takes them over lanes; across lanes the XLU would be the limit.
  pull = (dm * held.bc).astype(dtype)
  head = lax.div(iota((16, LANES), 1), size)
  ones = jnp.where(iota((16, LANES), 0) == head, 1.0, 0.0).astype(dtype)
  sums.dt_diagonal.append(dot(ones, pull, (1, 1)))
  totals.dbc += dm * dt_j
  out = jnp.sum(pull.astype(jnp.float32) * dt_j, axis=0, keepdims=True)
  yield
  totals.dc += s_dy * chunk.out_row[row]
  reach = jnp.sum(held.c_t * s_dy, axis=0, keepdims=True)
  sums.out.append(out + chunk.out_row[row] * reach)
  yield
  totals.db += ds_x * chunk.in_row[row]
  sums.dt_state.append(jnp.sum(held.b_t * ds_x, axis=0, keepdims=True))
  sums.end.append(jnp.sum(dstate * next_state[:, lanes], axis=0, keepdims=True))
  yield
  end = sum_p[size - 1 :]
  dx = dt_p * (du + exp(end - sum_p) * b_ds)
  if refs.skip is not None:
    dy = dy.astype(jnp.float32)
    dx = dx + refs.skip[:, lanes] * dy
    refs.dskip[:, lanes] += jnp.sum(
      dy * x.astype(jnp.float32), axis=0, keepdims=True
    )
  chunk.store(refs.dx, lanes, dx)
  refs.dstate[:, lanes] = dstate * exp(end) + dstate_add


def _dt_backward(blocks, refs, chunks, sums):
  """ddt, and dA added up, from the row sums of every chunk.

  With dc_i the gradient of the cumulative sums, da_j = sum_{i >= j} dc_i.
  """
  size, count = blocks.chunk, blocks.tile_heads

  def stack(rows):
    return pad(jnp.concatenate(rows), blocks.row_count, 0)

  direct, dsums, ends = [], [], []
  for chunk, held in zip(chunks, sums, strict=True):
    diagonal = [
      stack([v[r : r + 1] for v in held.dt_diagonal]) for r in range(count)
    ]
    reach = exp(head_ends(blocks, chunk.sum_row) - chunk.sum_row)
    ddt = jnp.concatenate(diagonal, axis=1) + reach * stack(held.dt_state)
    direct.append(ddt)
    dsums.append(stack(held.out) - chunk.dt_row * ddt)
    heads = jnp.split(stack(held.end), count, axis=1)
    ends.append(
      jnp.concatenate(
        [
          jnp.broadcast_to(
            jnp.sum(v, axis=1, keepdims=True), (v.shape[0], size)
          )
          for v in heads
        ],
        axis=1,
      )
    )
  das = jnp.split(token_sums(blocks, jnp.concatenate(dsums), True), len(chunks))
  rate = refs.rate[...] * (1 / LOG2_E)
  ddts = []
  for chunk, da, end, ddt in zip(chunks, das, ends, direct, strict=True):
    da = da + end
    refs.da[...] += da * chunk.dt_row
    ddts.append((ddt + da * rate)[: blocks.tiles])
  for k in range(0, len(chunks), count):
    some = ddts[k : k + count]
    lanes = sum(chunk.count for chunk in chunks[k : k + count])
    for r in range(count):
      heads = [v[:, r * size : (r + 1) * size] for v in some]
      refs.swap[pl.ds(r, blocks.tiles, count), :] = pad(
        jnp.concatenate(heads, axis=1), LANES, 1
      )
    start = chunks[k].start
    refs.ddt[:, start : start + lanes] = refs.swap[:, :lanes]
