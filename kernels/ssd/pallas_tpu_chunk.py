"""What both TPU kernels of `ssd` compute of a chunk.

"Rows" are (tiles, R*Q), one row per tile with lanes (head of the tile, token);
"columns" are (Q, 128) with a head on a lane. Letters as in `pallas_tpu.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .pallas_tpu_call import LANES


def iota(shape, axis):
  return lax.broadcasted_iota(jnp.int32, shape, axis)


def dot(a, b, contract=(1, 0)):
  """Product of two operands of one dtype, accumulated in float32."""
  exact = a.dtype == jnp.float32
  return lax.dot_general(
    a,
    b,
    (((contract[0],), (contract[1],)), ((), ())),
    precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
    preferred_element_type=jnp.float32,
  )


def pad(v, size, axis):
  if v.shape[axis] == size:
    return v
  shape = list(v.shape)
  shape[axis] = size - v.shape[axis]
  return jnp.concatenate([v, jnp.zeros(shape, v.dtype)], axis=axis)


def side_by_side(v, count, axis):
  return v if count == 1 else jnp.concatenate([v] * count, axis=axis)


class Chunk(NamedTuple):
  """A chunk of a block: where it is, and dt and decays of all its heads."""

  start: int  # first token within the block
  count: int  # tokens of it that the block holds
  left: jax.Array | None  # tokens that exist; None: all of them
  dt_row: jax.Array
  sum_row: jax.Array  # cumulative sum of dt A log2(e)
  dt_col: jax.Array
  sum_col: jax.Array
  in_row: jax.Array  # dt exp(from the token to the end of the chunk)
  out_row: jax.Array  # exp(from the start of the chunk to the token)

  def load(self, ref, blocks, lanes):
    """(Q, lanes) of a token block, zero where there is no token."""
    v = ref[self.start : self.start + self.count, lanes]
    v = pad(v, blocks.chunk, 0)
    if self.left is None:
      return v
    return jnp.where(iota(v.shape, 0) < self.left, v, jnp.zeros((), v.dtype))

  def load_last(self, ref, blocks, rows):
    """(rows, Q) of a block with tokens last, zero where there is none."""
    v = ref[rows, self.start : self.start + self.count]
    v = pad(v, blocks.chunk, 1)
    if self.left is None:
      return v
    return jnp.where(iota(v.shape, 1) < self.left, v, jnp.zeros((), v.dtype))

  def load_group(self, refs, blocks, group):
    """B and C of a group, (Q, N) each, then (N, Q) each in float32."""
    channels = blocks.group_channels(group)
    rows = [
      self.load_last(ref, blocks, channels).astype(jnp.float32)
      for ref in (refs.b, refs.c)
    ]
    return *(v.T.astype(refs.b.dtype) for v in rows), *rows

  def store(self, ref, lanes, v):
    ref[self.start : self.start + self.count, lanes] = v[: self.count].astype(
      ref.dtype
    )

  def store_last(self, ref, rows, v):
    ref[rows, self.start : self.start + self.count] = v[:, : self.count].astype(
      ref.dtype
    )


def token_sums(blocks, rows, suffix):
  """Prefix or suffix sums over the tokens of every head, to float32.

  A product with a block diagonal of triangles of ones, exact in bfloat16; the
  rows are split into three bfloat16 parts that hold all their bits.
  """
  shape = (LANES, LANES)
  i, j = iota(shape, 0), iota(shape, 1)
  same_head = lax.div(i, blocks.chunk) == lax.div(j, blocks.chunk)
  ones = jnp.where(same_head & ((i >= j) if suffix else (i <= j)), 1.0, 0.0)
  parts = []
  for _ in range(3):
    parts.append(rows.astype(jnp.bfloat16))
    rows = rows - parts[-1].astype(jnp.float32)
  high, mid, low = jnp.split(
    dot(jnp.concatenate(parts), ones.astype(jnp.bfloat16)), 3
  )
  return high + mid + low


def columns(blocks, rows):
  """Rows (tiles, R*Q) -> columns (Q, 128), tile t of head r at r*128/R + t."""
  section = LANES // blocks.tile_heads
  return jnp.concatenate(
    [
      pad(rows[:, r * blocks.chunk : (r + 1) * blocks.chunk], section, 0)
      for r in range(blocks.tile_heads)
    ]
  ).T


def spread(blocks, column, tile, width):
  """(Q, R*width): a tile's columns, each broadcast over `width` lanes."""
  section = LANES // blocks.tile_heads
  if blocks.tile_heads * width == LANES:
    lane = iota((column.shape[0], LANES), 1)
    source = tile + lax.div(lane, width) * section
    return jnp.take_along_axis(column, source, axis=1, mode='promise_in_bounds')
  heads = range(tile, LANES, section)
  return jnp.concatenate(
    [
      jnp.broadcast_to(column[:, k : k + 1], (column.shape[0], width))
      for k in heads
    ],
    axis=1,
  )


def head_ends(blocks, rows):
  """Every head's last token of its chunk, broadcast over the chunk."""
  chunk = blocks.chunk
  return jnp.concatenate(
    [
      jnp.broadcast_to(
        rows[:, (r + 1) * chunk - 1 : (r + 1) * chunk],
        (rows.shape[0], chunk),
      )
      for r in range(blocks.tile_heads)
    ],
    axis=1,
  )


def _dt_rows(blocks, dt_ref, swap_ref, starts, size):
  """dt (H, tokens) as rows, a list over the chunks of a block."""
  count, chunk = blocks.tile_heads, blocks.chunk
  rows = []
  for start in starts[::count]:
    lanes = min(LANES, size - start)
    swap_ref[...] = pad(dt_ref[:, start : start + lanes], LANES, 1)
    # head r of every tile: a strided load, which wants all 128 lanes
    heads = [swap_ref[pl.ds(r, blocks.tiles, count), :] for r in range(count)]
    for k in range(-(-lanes // chunk)):
      rows.append(
        jnp.concatenate(
          [v[:, k * chunk : (k + 1) * chunk] for v in heads], axis=1
        )
      )
  return [pad(v, blocks.row_count, 0) for v in rows]


def block_chunks(blocks, size, position, refs):
  """The `Chunk`s of the block of `size` tokens at `position`."""
  starts = range(0, size, blocks.chunk)
  ragged = blocks.length % size != 0
  lefts = [
    blocks.length - position * size - s if ragged else None for s in starts
  ]
  dts = _dt_rows(blocks, refs.dt, refs.swap, starts, size)
  for k, left in enumerate(lefts):
    if left is not None:
      token = lax.rem(iota(dts[k].shape, 1), blocks.chunk)
      dts[k] = jnp.where(token < left, dts[k], 0.0)
  rate = refs.rate[...]
  sums = jnp.split(
    token_sums(blocks, jnp.concatenate([v * rate for v in dts]), False),
    len(dts),
  )
  return [
    Chunk(
      start=start,
      count=min(blocks.chunk, size - start),
      left=left,
      dt_row=dt,
      sum_row=row,
      dt_col=columns(blocks, dt),
      sum_col=columns(blocks, row),
      in_row=dt * exp(head_ends(blocks, row) - row),
      out_row=exp(row),
    )
    for start, left, dt, row in zip(starts, lefts, dts, sums, strict=True)
  ]


def exp(log2_decay):
  """Decay from its clamped logarithm (base 2)."""
  return jnp.exp2(jnp.minimum(log2_decay, 0.0))


def block_diagonal(blocks, x):
  """(Q, R*P) -> (R*Q, R*P), each head's rows on its own lanes."""
  count = blocks.tile_heads
  if count == 1:
    return x
  shape = (count * blocks.chunk, blocks.width)
  row_head = lax.div(iota(shape, 0), blocks.chunk)
  lane_head = lax.div(iota(shape, 1), blocks.head_dim)
  return jnp.where(
    row_head == lane_head,
    side_by_side(x, count, 0),
    jnp.zeros((), x.dtype),
  )
