"""Sizes of the TPU kernels of `ssd`, and their Pallas calls.

Letters as in `api.py`; what the sizes are for is said in `pallas_tpu.py`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
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
  def narrow(self):  # rows of B and C
    return self.groups * self.state_dim

  @property
  def state_shape(self):
    return self.state_dim, self.channels

  @property
  def saved(self):  # states saved per step of the forward kernel
    return -(-self.forward // self.backward)

  def grid(self, batch, block):
    return batch, -(-self.length // block)

  def group_channels(self, group):
    return slice(group * self.state_dim, (group + 1) * self.state_dim)

  def tile_lanes(self, tile):
    return slice(tile * self.width, (tile + 1) * self.width)

  def group_tiles(self, group):
    per_group = self.tiles // self.groups
    return range(group * per_group, (group + 1) * per_group)

  def vmem_bytes(self, backward):
    """VMEM by item; blocks of the pipeline are held twice."""
    tokens = self.backward if backward else self.forward
    state = self.state_dim * self.channels * 4
    wide = 2 * tokens * self.channels * self.itemsize
    narrow = 2 * tokens * self.narrow * self.itemsize
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


class Call:
  """Operands and results of a pallas_call, by name, with BlockSpecs."""

  def __init__(self, blocks, batch, block, reverse):
    self.grid = blocks.grid(batch, block)
    self.blocks, self.block, self.reverse = blocks, block, reverse
    self.operands, self.in_specs = {}, []
    self.results, self.out_specs = {}, []

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
    shape = (None, count, *self.blocks.state_shape)
    return pl.BlockSpec(shape, lambda i, k: (i, self._at(k), 0, 0))

  def per_example(self, *shape):  # (B, ...)
    return pl.BlockSpec((None, *shape), lambda i, k: (i, 0, 0))

  def constant(self, *shape):
    return pl.BlockSpec(shape, lambda i, k: (0, 0))

  def operand(self, name, array, spec):
    """Adds an operand unless it is None."""
    if array is not None:
      self.operands[name] = array
      self.in_specs.append(spec)

  def result(self, name, shape, dtype, spec, wanted=True):
    """Adds a result if it is wanted."""
    if wanted:
      self.results[name] = jax.ShapeDtypeStruct(shape, dtype)
      self.out_specs.append(spec)

  def run(self, kernel, scratch, interpret, name):
    """Results by name, of `kernel(blocks, Refs)`; scratch is name -> VMEM."""
    names = [*self.operands, *self.results, *scratch]
    operands, results = list(self.operands.values()), self.results.values()

    def named(*refs):
      kernel(self.blocks, Refs(zip(names, refs, strict=True)))

    flops, transcendentals = _step_work(self.blocks, self.block, self.reverse)
    found = pl.pallas_call(
      named,
      grid=self.grid,
      in_specs=self.in_specs,
      out_specs=self.out_specs,
      out_shape=list(results),
      scratch_shapes=list(scratch.values()),
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=('parallel', 'arbitrary'),
        vmem_limit_bytes=sum(self.blocks.vmem_bytes(self.reverse).values()),
      ),
      cost_estimate=cost_estimate(
        self.grid,
        self.in_specs + self.out_specs,
        [*operands, *results],
        flops=flops,
        transcendentals=transcendentals,
      ),
      interpret=interpret,
      name=name,
    )(*operands)
    return dict(zip(self.results, found, strict=True))


class Refs(dict):
  """References of a kernel by name, as attributes; None for what is absent."""

  __getattr__ = dict.get


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


def take_inputs(call, x, dt, A, b, c, skip):
  """Adds the operands that both kernels have."""
  blocks = call.blocks
  call.operand('x', x, call.tokens(blocks.channels))
  call.operand('dt', dt, call.tokens_last(blocks.heads))
  call.operand(
    'rate', _decay_rates(blocks, A), call.constant(blocks.row_count, LANES)
  )
  call.operand('b', b, call.tokens_last(blocks.narrow))
  call.operand('c', c, call.tokens_last(blocks.narrow))
  call.operand('skip', skip, call.constant(1, blocks.channels))
