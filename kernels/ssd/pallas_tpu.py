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

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..cost import cost_estimate

LANES = 128
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Every size the kernels are built from. Letters as in `api.py`."""

  length: int  # L
  heads: int  # H
  head_dim: int  # P
  state_dim: int  # N
  groups: int  # G
  itemsize: int  # bytes of an element of x
  tile_heads: int  # R, heads that share 128 lanes
  forward: int  # tokens of a grid step of the forward kernel
  backward: int  # the same of the backward kernel

  @property
  def chunk(self):  # Q
    return LANES // self.tile_heads

  @property
  def width(self):  # lanes of a tile in x
    return self.tile_heads * self.head_dim

  @property
  def tiles(self):
    return self.heads // self.tile_heads

  @property
  def row_count(self):  # tiles, rounded up to whole sublanes
    return -(-self.tiles // 8) * 8

  @property
  def channels(self):
    return self.heads * self.head_dim

  @property
  def saved(self):  # states saved per step of the forward kernel
    return -(-self.forward // self.backward)

  def grid(self, batch, block):
    return batch, -(-self.length // block)

  def group_tiles(self, group):
    per_group = self.tiles // self.groups
    return range(group * per_group, (group + 1) * per_group)

  def vmem_bytes(self, backward):
    """VMEM by item; blocks of the pipeline are held twice."""
    tokens = self.backward if backward else self.forward
    state = self.state_dim * self.channels * 4
    wide = 2 * tokens * self.channels * self.itemsize
    narrow = 2 * tokens * self.groups * self.state_dim * self.itemsize
    dt = 2 * self.row_count * self.tile_heads * tokens * 4
    items = {'x': wide, 'dt': dt, 'b': narrow, 'c': narrow, 'carry': state}
    if backward:
      inner = (-(-tokens // self.chunk) + 1) * state
      items |= {'dy': wide, 'dx': wide, 'ddt': dt, 'db': narrow, 'dc': narrow}
      items |= {'states': 2 * state, 'inner states': inner}
      items |= {'end states': 4 * state}
    else:
      items |= {'y': wide, 'states': 2 * self.saved * state}
      items |= {'end states': 4 * state}
    # Room for what the register allocator spills; in float32 with a group
    # per head, 24 of them, 8 MiB were too few.
    return items | {'spills': (8 + self.groups) * 2**20}


def choose_blocks(x, b) -> Blocks:
  """Blocks of a call with x (B, L, H, P) and b (B, L, G, N).

  Raises NotImplementedError for sizes and dtypes that the kernels cannot do.
  """
  _, length, heads, head_dim = x.shape
  groups, state_dim = b.shape[2:]
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(
      f'pallas_tpu computes in bfloat16 or float32, got x of {x.dtype}'
    )
  if head_dim % 8:
    raise NotImplementedError(
      'pallas_tpu needs a head dim P that is a multiple of 8 (8 '
      f'sublanes), got P={head_dim}'
    )
  if state_dim % 16:
    raise NotImplementedError(
      'pallas_tpu needs a state dim N that is a multiple of 16 (a bfloat16 '
      f'tile has 16 rows), got N={state_dim}'
    )
  if heads > LANES:
    raise NotImplementedError(
      f'pallas_tpu keeps all heads of a token in 128 lanes, got H={heads}'
    )
  tile_heads = 1
  while (
    2 * tile_heads * head_dim <= LANES
    and (heads // groups) % (2 * tile_heads) == 0
  ):
    tile_heads *= 2
  # A float32 product is six bfloat16 ones and makes the body as much longer.
  forward, backward = (512, 256) if x.dtype == jnp.bfloat16 else (256, 128)
  return Blocks(
    length=length,
    heads=heads,
    head_dim=head_dim,
    state_dim=state_dim,
    groups=groups,
    itemsize=x.dtype.itemsize,
    tile_heads=tile_heads,
    forward=min(length, forward),
    backward=min(length, backward),
  )


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
  arrays = {'x': x, 'dt': dt, 'A': A, 'B': B, 'C': C}
  if D is not None:
    arrays['D'] = D
  if initial_state is not None:
    arrays['initial_state'] = initial_state

  def run(arrays):
    return _ssd_arrays(
      **arrays, return_final_state=return_final_state, interpret=interpret
    )

  if mesh is None:
    return run(arrays)
  sharded = jax.sharding.PartitionSpec(batch_axes)
  whole = jax.sharding.PartitionSpec()
  return jax.shard_map(
    run,
    mesh=mesh,
    in_specs=({k: whole if k in 'AD' else sharded for k in arrays},),
    out_specs=(sharded, sharded if return_final_state else whole),
    check_vma=False,  # a Pallas call says nothing about varying axes
  )(arrays)


def _ssd_arrays(
  x, dt, A, B, C, D=None, initial_state=None, *, return_final_state, interpret
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
  y, _, end = _forward(
    blocks, want_state, interpret, x, dt, A, b, c, skip, state, save=False
  )
  return y, end


def _ssd_fwd(blocks, want_state, interpret, x, dt, A, b, c, skip, state):
  save = blocks.length > blocks.backward
  y, states, end = _forward(
    blocks, want_state, interpret, x, dt, A, b, c, skip, state, save=save
  )
  if not save and state is not None:
    states = state[:, None]
  return (y, end), (x, dt, A, b, c, skip, states, state is not None)


def _ssd_bwd(blocks, want_state, interpret, saved, cotangents):
  del want_state
  return _backward(blocks, interpret, *saved, *cotangents)


_ssd.defvjp(_ssd_fwd, _ssd_bwd)


# The calls


class _Call:
  """Operands and results of a pallas_call, each with its BlockSpec."""

  def __init__(self, blocks, batch, block, reverse):
    self.grid = blocks.grid(batch, block)
    self.blocks, self.block, self.reverse = blocks, block, reverse
    self.operands, self.in_specs = [], []
    self.results, self.out_specs = [], []

  def _at(self, k):
    return self.grid[1] - 1 - k if self.reverse else k

  def tokens(self, width):  # (B, L, width)
    return pl.BlockSpec(
      (None, self.block, width), lambda i, k: (i, self._at(k), 0)
    )

  def tokens_last(self, width):  # (B, width, L)
    return pl.BlockSpec(
      (None, width, self.block), lambda i, k: (i, 0, self._at(k))
    )

  def states(self, count):  # (B, blocks, N, H*P)
    shape = (None, count, self.blocks.state_dim, self.blocks.channels)
    return pl.BlockSpec(shape, lambda i, k: (i, self._at(k), 0, 0))

  def per_example(self, *shape):  # (B, ...)
    return pl.BlockSpec((None, *shape), lambda i, k: (i, 0, 0))

  def constant(self, *shape):
    return pl.BlockSpec(shape, lambda i, k: (0, 0))

  def take(self, array, spec):
    """Adds an operand unless it is None; says whether it is there."""
    if array is not None:
      self.operands.append(array)
      self.in_specs.append(spec)
    return array is not None

  def give(self, shape, dtype, spec, wanted=True):
    """Adds a result if it is wanted."""
    if wanted:
      self.results.append(jax.ShapeDtypeStruct(shape, dtype))
      self.out_specs.append(spec)
    return wanted

  def run(self, kernel, scratch, interpret, name):
    blocks = self.blocks
    flops, transcendentals = _step_work(blocks, self.block, self.reverse)
    return pl.pallas_call(
      kernel,
      grid=self.grid,
      in_specs=self.in_specs,
      out_specs=self.out_specs,
      out_shape=self.results,
      scratch_shapes=scratch,
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=('parallel', 'arbitrary'),
        vmem_limit_bytes=sum(blocks.vmem_bytes(self.reverse).values()),
      ),
      cost_estimate=cost_estimate(
        self.grid,
        self.in_specs + self.out_specs,
        self.operands + self.results,
        flops=flops,
        transcendentals=transcendentals,
      ),
      interpret=interpret,
      name=name,
    )(*self.operands)


def _step_work(blocks, block, backward):
  """FLOPs of the products and exponentials of one grid step."""
  chunks = -(-block // blocks.chunk)
  inner, wide = LANES, blocks.width
  q, n = blocks.chunk, blocks.state_dim
  if backward:
    rows = (q + n) * inner + q * n + (q + n) * inner + n * inner + n * inner
    tile, exps = rows * wide + 16 * q * inner, q * (inner + wide)
    group = 2 * q * inner * n + 2 * n * q * q
  else:
    tile, exps = ((q + n) * inner + q * n) * wide, q * (inner + wide)
    group = q * inner * n
  return (
    2 * chunks * (blocks.tiles * tile + blocks.groups * group),
    chunks * (blocks.tiles * exps + 2 * blocks.row_count * inner),
  )


def _decay_rates(blocks, A):
  """A log2(e) as (tiles, R*Q) rows, one value per head and token lane."""
  rates = (A * LOG2_E).reshape(blocks.tiles, blocks.tile_heads)
  rates = jnp.repeat(rates, blocks.chunk, axis=1)
  return jnp.pad(rates, ((0, blocks.row_count - blocks.tiles), (0, 0)))


def _take_inputs(call, x, dt, A, b, c, skip):
  blocks = call.blocks
  narrow = blocks.groups * blocks.state_dim
  call.take(x, call.tokens(blocks.channels))
  call.take(dt, call.tokens_last(blocks.heads))
  call.take(_decay_rates(blocks, A), call.constant(blocks.row_count, LANES))
  call.take(b, call.tokens_last(narrow))
  call.take(c, call.tokens_last(narrow))
  return call.take(skip, call.constant(1, blocks.channels))


def _forward(
  blocks, want_state, interpret, x, dt, A, b, c, skip, state, *, save
):
  """y, the states at every `blocks.backward` tokens, the final state."""
  batch = x.shape[0]
  call = _Call(blocks, batch, blocks.forward, reverse=False)
  shape = blocks.state_dim, blocks.channels
  has_skip = _take_inputs(call, x, dt, A, b, c, skip)
  has_state = call.take(state, call.per_example(*shape))
  call.give(x.shape, x.dtype, call.tokens(blocks.channels))
  count = call.grid[1] * blocks.saved
  call.give(
    (batch, count, *shape), jnp.float32, call.states(blocks.saved), save
  )
  call.give((batch, *shape), jnp.float32, call.per_example(*shape), want_state)
  kernel = functools.partial(
    _forward_kernel,
    blocks=blocks,
    has_skip=has_skip,
    has_state=has_state,
    save=save,
    want_state=want_state,
  )
  scratch = [
    pltpu.VMEM(shape, jnp.float32),
    pltpu.VMEM((blocks.heads, LANES), jnp.float32),
  ]
  y, *rest = call.run(kernel, scratch, interpret, 'ssd_fwd')
  return y, rest.pop(0) if save else None, rest[0] if want_state else None


def _backward(
  blocks, interpret, x, dt, A, b, c, skip, states, want_dstate, dy, dend
):
  """Cotangents of x, dt, A, b, c, skip and the initial state."""
  batch = x.shape[0]
  call = _Call(blocks, batch, blocks.backward, reverse=True)
  shape = blocks.state_dim, blocks.channels
  narrow = blocks.groups * blocks.state_dim
  rows = blocks.row_count, LANES
  has_skip = _take_inputs(call, x, dt, A, b, c, skip)
  call.take(dy, call.tokens(blocks.channels))
  has_states = call.take(states, call.states(None))
  has_dend = call.take(dend, call.per_example(*shape))
  call.give(x.shape, x.dtype, call.tokens(blocks.channels))
  call.give(dt.shape, jnp.float32, call.tokens_last(blocks.heads))
  call.give(b.shape, b.dtype, call.tokens_last(narrow))
  call.give(c.shape, c.dtype, call.tokens_last(narrow))
  call.give((batch, *rows), jnp.float32, call.per_example(*rows))
  wide = 1, blocks.channels
  call.give((batch, *wide), jnp.float32, call.per_example(*wide), has_skip)
  call.give((batch, *shape), jnp.float32, call.per_example(*shape), want_dstate)
  kernel = functools.partial(
    _backward_kernel,
    blocks=blocks,
    has_skip=has_skip,
    has_states=has_states,
    has_dend=has_dend,
    want_dstate=want_dstate,
  )
  chunks = -(-blocks.backward // blocks.chunk)
  scratch = [
    pltpu.VMEM(shape, jnp.float32),
    pltpu.VMEM((blocks.heads, LANES), jnp.float32),
    pltpu.VMEM((chunks + 1, *shape), jnp.float32),
  ]
  dx, ddt, db, dc, da, *rest = call.run(kernel, scratch, interpret, 'ssd_bwd')
  dA = jnp.sum(da, axis=0)[: blocks.tiles]
  dA = jnp.sum(dA.reshape(blocks.heads, blocks.chunk), axis=1)
  dskip = jnp.sum(rest.pop(0), axis=0) if has_skip else None
  return dx, ddt, dA, db, dc, dskip, rest[0] if want_dstate else None


# Pieces of the kernels. "Rows" are (tiles, R*Q), one row per tile with lanes
# (head of the tile, token); "columns" are (Q, 128) with a head on a lane.


def _iota(shape, axis):
  return lax.broadcasted_iota(jnp.int32, shape, axis)


def _dot(a, b, contract=(1, 0)):
  """Product of two operands of one dtype, accumulated in float32."""
  exact = a.dtype == jnp.float32
  return lax.dot_general(
    a,
    b,
    (((contract[0],), (contract[1],)), ((), ())),
    precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
    preferred_element_type=jnp.float32,
  )


def _pad(v, size, axis):
  if v.shape[axis] == size:
    return v
  shape = list(v.shape)
  shape[axis] = size - v.shape[axis]
  return jnp.concatenate([v, jnp.zeros(shape, v.dtype)], axis=axis)


def _side_by_side(v, count, axis):
  return v if count == 1 else jnp.concatenate([v] * count, axis=axis)


class _Chunk(NamedTuple):
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
    v = _pad(v, blocks.chunk, 0)
    if self.left is None:
      return v
    return jnp.where(_iota(v.shape, 0) < self.left, v, jnp.zeros((), v.dtype))

  def load_last(self, ref, blocks, rows):
    """(rows, Q) of a block with tokens last, zero where there is none."""
    v = ref[rows, self.start : self.start + self.count]
    v = _pad(v, blocks.chunk, 1)
    if self.left is None:
      return v
    return jnp.where(_iota(v.shape, 1) < self.left, v, jnp.zeros((), v.dtype))

  def store(self, ref, lanes, v):
    ref[self.start : self.start + self.count, lanes] = v[: self.count].astype(
      ref.dtype
    )

  def store_last(self, ref, rows, v):
    ref[rows, self.start : self.start + self.count] = v[:, : self.count].astype(
      ref.dtype
    )


def _token_sums(blocks, rows, suffix):
  """Prefix or suffix sums over the tokens of every head, to float32.

  A product with a block diagonal of triangles of ones, exact in bfloat16; the
  rows are split into three bfloat16 parts that hold all their bits.
  """
  shape = (LANES, LANES)
  i, j = _iota(shape, 0), _iota(shape, 1)
  same_head = lax.div(i, blocks.chunk) == lax.div(j, blocks.chunk)
  ones = jnp.where(same_head & ((i >= j) if suffix else (i <= j)), 1.0, 0.0)
  parts = []
  for _ in range(3):
    parts.append(rows.astype(jnp.bfloat16))
    rows = rows - parts[-1].astype(jnp.float32)
  high, mid, low = jnp.split(
    _dot(jnp.concatenate(parts), ones.astype(jnp.bfloat16)), 3
  )
  return high + mid + low


def _columns(blocks, rows):
  """Rows (tiles, R*Q) -> columns (Q, 128), tile t of head r at r*128/R + t."""
  section = LANES // blocks.tile_heads
  return jnp.concatenate(
    [
      _pad(rows[:, r * blocks.chunk : (r + 1) * blocks.chunk], section, 0)
      for r in range(blocks.tile_heads)
    ]
  ).T


def _spread(blocks, column, tile, width):
  """(Q, R*width): a tile's columns, each broadcast over `width` lanes."""
  section = LANES // blocks.tile_heads
  if blocks.tile_heads * width == LANES:
    lane = _iota((column.shape[0], LANES), 1)
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


def _head_ends(blocks, rows):
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
    swap_ref[...] = _pad(dt_ref[:, start : start + lanes], LANES, 1)
    # head r of every tile: a strided load, which wants all 128 lanes
    heads = [swap_ref[pl.ds(r, blocks.tiles, count), :] for r in range(count)]
    for k in range(-(-lanes // chunk)):
      rows.append(
        jnp.concatenate(
          [v[:, k * chunk : (k + 1) * chunk] for v in heads], axis=1
        )
      )
  return [_pad(v, blocks.row_count, 0) for v in rows]


def _chunks(blocks, size, position, dt_ref, rate_ref, swap_ref):
  """The `_Chunk`s of the block of `size` tokens at `position`."""
  starts = range(0, size, blocks.chunk)
  ragged = blocks.length % size != 0
  lefts = [
    blocks.length - position * size - s if ragged else None for s in starts
  ]
  dts = _dt_rows(blocks, dt_ref, swap_ref, starts, size)
  for k, left in enumerate(lefts):
    if left is not None:
      token = lax.rem(_iota(dts[k].shape, 1), blocks.chunk)
      dts[k] = jnp.where(token < left, dts[k], 0.0)
  rate = rate_ref[...]
  sums = jnp.split(
    _token_sums(blocks, jnp.concatenate([v * rate for v in dts]), False),
    len(dts),
  )
  return [
    _Chunk(
      start=start,
      count=min(blocks.chunk, size - start),
      left=left,
      dt_row=dt,
      sum_row=row,
      dt_col=_columns(blocks, dt),
      sum_col=_columns(blocks, row),
      in_row=dt * _exp(_head_ends(blocks, row) - row),
      out_row=_exp(row),
    )
    for start, left, dt, row in zip(starts, lefts, dts, sums, strict=True)
  ]


def _exp(log2_decay):
  """Decay from its clamped logarithm (base 2)."""
  return jnp.exp2(jnp.minimum(log2_decay, 0.0))


def _block_diagonal(blocks, x):
  """(Q, R*P) -> (R*Q, R*P), each head's rows on its own lanes."""
  count = blocks.tile_heads
  if count == 1:
    return x
  shape = (count * blocks.chunk, blocks.width)
  row_head = lax.div(_iota(shape, 0), blocks.chunk)
  lane_head = lax.div(_iota(shape, 1), blocks.head_dim)
  return jnp.where(
    row_head == lane_head,
    _side_by_side(x, count, 0),
    jnp.zeros((), x.dtype),
  )


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


def _forward_kernel(*refs, blocks, has_skip, has_state, save, want_state):
  refs = list(refs)
  x_ref, dt_ref, rate_ref, b_ref, c_ref = refs[:5]
  del refs[:5]
  skip_ref = refs.pop(0) if has_skip else None
  start_ref = refs.pop(0) if has_state else None
  y_ref = refs.pop(0)
  saved_ref = refs.pop(0) if save else None
  end_ref = refs.pop(0) if want_state else None
  state_ref, swap_ref = refs
  n_steps = pl.num_programs(1)
  step = pl.program_id(1)
  dtype = x_ref.dtype

  @pl.when(step == 0)
  def _():
    state_ref[...] = start_ref[...] if has_state else jnp.zeros_like(state_ref)

  token = lax.rem(_iota((blocks.chunk, LANES), 1), blocks.chunk)
  causal = token <= _iota((blocks.chunk, LANES), 0)
  size, width = blocks.forward, blocks.width
  chunks = _chunks(blocks, size, step, dt_ref, rate_ref, swap_ref)
  for chunk in chunks:
    if save and chunk.start % blocks.backward == 0:
      saved_ref[chunk.start // blocks.backward] = state_ref[...]
    rows = slice(None, chunk.count)
    # after the last token nobody asks for the state
    last = not want_state and chunk is chunks[-1] and size >= blocks.length
    for group in range(blocks.groups):
      channels = slice(group * blocks.state_dim, (group + 1) * blocks.state_dim)
      b_t = chunk.load_last(b_ref, blocks, channels).astype(jnp.float32)
      c_t = chunk.load_last(c_ref, blocks, channels).astype(jnp.float32)
      b, c = b_t.T.astype(dtype), c_t.T.astype(dtype)
      b_t = _side_by_side(b_t, blocks.tile_heads, 1)  # (N, R*Q)
      cb = _dot(c, _side_by_side(b, blocks.tile_heads, 0), (1, 1))
      cb = jnp.where(causal, cb, 0.0)  # (Q, R*Q)
      for tile in blocks.group_tiles(group):
        lanes = slice(tile * width, (tile + 1) * width)
        row = slice(tile, tile + 1)
        x = chunk.load(x_ref, blocks, lanes)
        state = state_ref[:, lanes]  # (N, R*P)
        sums = _spread(blocks, chunk.sum_col, tile, blocks.chunk)[rows]
        m = cb[rows] * _exp(sums - chunk.sum_row[row]) * chunk.dt_row[row]
        if blocks.head_dim != blocks.chunk:
          sums = _spread(blocks, chunk.sum_col, tile, blocks.head_dim)[rows]
        out_decay = _exp(sums)  # (Q, R*P)
        left = m if last else jnp.concatenate([m, b_t * chunk.in_row[row]])
        both = _dot(left.astype(dtype), _block_diagonal(blocks, x))
        y = both[rows] + out_decay * _dot(c[rows], state.astype(dtype))
        if has_skip:
          y = y + skip_ref[:, lanes] * x[rows].astype(jnp.float32)
        chunk.store(y_ref, lanes, y)
        if not last:
          decay = out_decay[chunk.count - 1 : chunk.count]
          state_ref[:, lanes] = state * decay + both[chunk.count :]

  if want_state:

    @pl.when(step == n_steps - 1)
    def _():
      end_ref[...] = state_ref[...]


def _backward_kernel(
  *refs, blocks, has_skip, has_states, has_dend, want_dstate
):
  refs = list(refs)
  x_ref, dt_ref, rate_ref, b_ref, c_ref = refs[:5]
  del refs[:5]
  skip_ref = refs.pop(0) if has_skip else None
  dy_ref = refs.pop(0)
  start_ref = refs.pop(0) if has_states else None
  dend_ref = refs.pop(0) if has_dend else None
  dx_ref, ddt_ref, db_ref, dc_ref, da_ref = refs[:5]
  del refs[:5]
  dskip_ref = refs.pop(0) if has_skip else None
  dstart_ref = refs.pop(0) if want_dstate else None
  dstate_ref, swap_ref, inner_ref = refs
  n_steps = pl.num_programs(1)
  step = pl.program_id(1)

  @pl.when(step == 0)
  def _():
    dstate_ref[...] = dend_ref[...] if has_dend else jnp.zeros_like(dstate_ref)
    da_ref[...] = jnp.zeros_like(da_ref)
    if has_skip:
      dskip_ref[...] = jnp.zeros_like(dskip_ref)

  size = blocks.backward
  chunks = _chunks(blocks, size, n_steps - 1 - step, dt_ref, rate_ref, swap_ref)
  groups = [
    [
      _group_inputs(blocks, chunk, group, b_ref, c_ref)
      for group in range(blocks.groups)
    ]
    for chunk in chunks
  ]
  inner_ref[0] = start_ref[...] if has_states else jnp.zeros_like(dstate_ref)
  for k, chunk in enumerate(chunks):
    _next_states(blocks, chunk, groups[k], x_ref, inner_ref, k)
  sums = [None] * len(chunks)
  for k in reversed(range(len(chunks))):
    sums[k] = _chunk_backward(
      blocks,
      chunks[k],
      groups[k],
      inner_ref.at[k],
      inner_ref.at[k + 1],
      dstate_ref,
      (x_ref, dy_ref, skip_ref),
      (dx_ref, db_ref, dc_ref, dskip_ref),
    )
  _dt_backward(blocks, chunks, sums, rate_ref, da_ref, ddt_ref, swap_ref)

  if want_dstate:

    @pl.when(step == n_steps - 1)
    def _():
      dstart_ref[...] = dstate_ref[...]


class _Group(NamedTuple):
  """B and C of a chunk and group, in the forms the backward kernel uses."""

  b: jax.Array  # (Q, N)
  b_t: jax.Array  # (N, R*Q) float32
  c_t: jax.Array  # (N, R*Q) float32
  bc: jax.Array  # (Q, R*Q), B_j C_i for j <= i


def _group_inputs(blocks, chunk, group, b_ref, c_ref):
  channels = slice(group * blocks.state_dim, (group + 1) * blocks.state_dim)
  b_t = chunk.load_last(b_ref, blocks, channels).astype(jnp.float32)
  c_t = chunk.load_last(c_ref, blocks, channels).astype(jnp.float32)
  b, c = b_t.T.astype(b_ref.dtype), c_t.T.astype(c_ref.dtype)
  count = blocks.tile_heads
  bc = _dot(b, _side_by_side(c, count, 0), (1, 1))
  return _Group(
    b=b,
    b_t=_side_by_side(b_t, count, 1),
    c_t=_side_by_side(c_t, count, 1),
    bc=jnp.where(_anticausal(blocks), bc, 0.0),
  )


def _anticausal(blocks):
  """(Q, R*Q) mask of row j <= lane i: a transposed causal tile."""
  shape = (blocks.chunk, LANES)
  return _iota(shape, 0) <= lax.rem(_iota(shape, 1), blocks.chunk)


def _next_states(blocks, chunk, groups, x_ref, inner_ref, k):
  """Forward sweep over a block: the state after chunk k, recomputed."""
  for group, inputs in enumerate(groups):
    for tile in blocks.group_tiles(group):
      lanes = slice(tile * blocks.width, (tile + 1) * blocks.width)
      x = chunk.load(x_ref, blocks, lanes)
      left = inputs.b_t * chunk.in_row[tile : tile + 1]
      add = _dot(left.astype(x.dtype), _block_diagonal(blocks, x))
      # the chunk's last token lies in its last 8 rows: one vector register
      ends = _spread(
        blocks, chunk.sum_col[blocks.chunk - 8 :], tile, blocks.head_dim
      )
      decay = _exp(ends[7:8])
      inner_ref[k + 1, :, lanes] = inner_ref[k, :, lanes] * decay + add


def _chunk_backward(
  blocks, chunk, groups, state_ref, next_ref, dstate_ref, inputs, outputs
):
  """Reverse sweep over one chunk, all heads.

  Writes dx, db, dc and adds to dskip; dstate_ref goes from the chunk's end to
  its start. Returns rows for `_dt_backward`.
  """
  db_ref, dc_ref = outputs[1:3]
  sums = _RowSums([], [], [], [])
  for group, held in enumerate(groups):
    totals = _GroupTotals(blocks)
    _in_step(
      _tile_backward(
        blocks,
        chunk,
        held,
        tile,
        state_ref,
        next_ref,
        dstate_ref,
        inputs,
        outputs,
        totals,
        sums,
      )
      for tile in blocks.group_tiles(group)
    )
    dtype = db_ref.dtype
    dbc = jnp.where(_anticausal(blocks), totals.dbc, 0.0)
    dbc = _fold(blocks, dbc).astype(dtype)  # (Q, Q), rows j, lanes i
    b_t, c_t = (v[:, : blocks.chunk].astype(dtype) for v in held[1:3])
    channels = slice(group * blocks.state_dim, (group + 1) * blocks.state_dim)
    dc = _fold(blocks, totals.dc) + _dot(b_t, dbc)
    db = _fold(blocks, totals.db) + _dot(c_t, dbc, (1, 1))
    chunk.store_last(dc_ref, channels, dc)
    chunk.store_last(db_ref, channels, db)
  return sums


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


def _fold(blocks, v):
  """Sums the heads of a tile: (rows, R*Q) -> (rows, Q)."""
  return functools.reduce(jnp.add, jnp.split(v, blocks.tile_heads, axis=1))


def _tile_backward(
  blocks,
  chunk,
  held,
  tile,
  state_ref,
  next_ref,
  dstate_ref,
  inputs,
  outputs,
  totals,
  sums,
):
  """One tile of one chunk, in stages for `_in_step`; tiles are transposed."""
  x_ref, dy_ref, skip_ref = inputs
  dx_ref, _, _, dskip_ref = outputs
  dtype = x_ref.dtype
  lanes = slice(tile * blocks.width, (tile + 1) * blocks.width)
  row = slice(tile, tile + 1)
  head_dim, size = blocks.head_dim, blocks.chunk
  x, dy = (chunk.load(ref, blocks, lanes) for ref in (x_ref, dy_ref))
  dstate = dstate_ref[:, lanes]  # (N, R*P)
  x_diagonal, dy_diagonal = (_block_diagonal(blocks, v) for v in (x, dy))
  sum_j = _spread(blocks, chunk.sum_col, tile, size)
  dt_j = _spread(blocks, chunk.dt_col, tile, size)
  sum_p, dt_p = sum_j, dt_j
  if head_dim != size:
    sum_p = _spread(blocks, chunk.sum_col, tile, head_dim)
    dt_p = _spread(blocks, chunk.dt_col, tile, head_dim)
  yield
  decay = _exp(chunk.sum_row[row] - sum_j)  # (Q, R*Q), rows j, lanes i
  m = (held.bc * decay).astype(dtype)
  c_out = (held.c_t * chunk.out_row[row]).astype(dtype)
  yield
  dm = _dot(x, dy_diagonal, (1, 1))  # (Q, R*Q) x_j dy_i
  s_dy = _dot(state_ref[:, lanes].astype(dtype), dy_diagonal, (1, 1))
  ds_x = _dot(dstate.astype(dtype), x_diagonal, (1, 1))  # (N, R*Q)
  yield
  du = _dot(m, dy_diagonal)  # (Q, R*P), the gradient of dt x
  dstate_add = _dot(c_out, dy_diagonal)  # (N, R*P)
  b_ds = _dot(held.b, dstate.astype(dtype))  # (Q, R*P)
  yield
  dm = dm * decay
  # Row and column sums of one rounded matrix: they have to cancel in ddt.
  # The MXU takes them over lanes; across lanes the XLU would be the limit.
  pull = (dm * held.bc).astype(dtype)
  head = lax.div(_iota((16, LANES), 1), size)
  ones = jnp.where(_iota((16, LANES), 0) == head, 1.0, 0.0).astype(dtype)
  sums.dt_diagonal.append(_dot(ones, pull, (1, 1)))
  totals.dbc += dm * dt_j
  out = jnp.sum(pull.astype(jnp.float32) * dt_j, axis=0, keepdims=True)
  yield
  totals.dc += s_dy * chunk.out_row[row]
  reach = jnp.sum(held.c_t * s_dy, axis=0, keepdims=True)
  sums.out.append(out + chunk.out_row[row] * reach)
  yield
  totals.db += ds_x * chunk.in_row[row]
  sums.dt_state.append(jnp.sum(held.b_t * ds_x, axis=0, keepdims=True))
  sums.end.append(jnp.sum(dstate * next_ref[:, lanes], axis=0, keepdims=True))
  yield
  end = sum_p[size - 1 :]
  dx = dt_p * (du + _exp(end - sum_p) * b_ds)
  if skip_ref is not None:
    dy = dy.astype(jnp.float32)
    dx = dx + skip_ref[:, lanes] * dy
    dskip_ref[:, lanes] += jnp.sum(
      dy * x.astype(jnp.float32), axis=0, keepdims=True
    )
  chunk.store(dx_ref, lanes, dx)
  dstate_ref[:, lanes] = dstate * _exp(end) + dstate_add


def _dt_backward(blocks, chunks, sums, rate_ref, da_ref, ddt_ref, swap_ref):
  """ddt, and dA added up, from the row sums of every chunk.

  With dc_i the gradient of the cumulative sums, da_j = sum_{i >= j} dc_i.
  """
  size, count = blocks.chunk, blocks.tile_heads

  def stack(rows):
    return _pad(jnp.concatenate(rows), blocks.row_count, 0)

  direct, dsums, ends = [], [], []
  for chunk, held in zip(chunks, sums, strict=True):
    diagonal = [
      stack([v[r : r + 1] for v in held.dt_diagonal]) for r in range(count)
    ]
    reach = _exp(_head_ends(blocks, chunk.sum_row) - chunk.sum_row)
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
  das = jnp.split(
    _token_sums(blocks, jnp.concatenate(dsums), True), len(chunks)
  )
  rate = rate_ref[...] * (1 / LOG2_E)
  ddts = []
  for chunk, da, end, ddt in zip(chunks, das, ends, direct, strict=True):
    da = da + end
    da_ref[...] += da * chunk.dt_row
    ddts.append((ddt + da * rate)[: blocks.tiles])
  for k in range(0, len(chunks), count):
    some = ddts[k : k + count]
    lanes = sum(chunk.count for chunk in chunks[k : k + count])
    for r in range(count):
      heads = [v[:, r * size : (r + 1) * size] for v in some]
      swap_ref[pl.ds(r, blocks.tiles, count), :] = _pad(
        jnp.concatenate(heads, axis=1), LANES, 1
      )
    start = chunks[k].start
    ddt_ref[:, start : start + lanes] = swap_ref[:, :lanes]
