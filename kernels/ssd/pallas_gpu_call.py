"""Sizes of the GPU kernels of `ssd`, and what they share.

Letters as in `api.py`; what the sizes are for is said in `pallas_gpu.py`.
"""

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LOG2_E = math.log2(math.e)
# Programs that keep every multiprocessor of an H100 or H200 (132) busy: below
# the first number the sequence, or a sum over heads, is split until there are
# as many as the second.
FEWEST_PROGRAMS, PROGRAMS = 132, 4 * 132


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Every size the kernels are built from. Letters as in `api.py`."""

  batch: int  # B
  length: int  # L
  heads: int  # H
  head_dim: int  # P
  state_dim: int  # N
  groups: int  # G
  chunk: int  # Q
  segments: int  # parts of the sequence that run side by side
  segment_chunks: int  # chunks of such a part
  head_block: int  # heads whose dB and dC one program adds up
  exact: bool  # float32 operands

  @property
  def chunks(self):  # c, those of the last segment without a token included
    return self.segments * self.segment_chunks

  @property
  def padded_length(self):
    return self.chunks * self.chunk

  @property
  def warps(self):  # of a program; tiles of 64 x 64 want one group of four
    return 4 if max(self.head_dim, self.state_dim) <= 64 else 8

  @property
  def head_blocks(self):
    return self.heads // self.head_block


def choose_blocks(x, b, segments=None) -> Blocks:
  """Blocks of a call with x (B, L, H, P) and b (B, L, G, N).

  Raises NotImplementedError for sizes and dtypes that the kernels cannot do.
  """
  batch, length, heads, head_dim = x.shape
  groups, state_dim = b.shape[2:]
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(
      f'pallas_gpu computes in bfloat16 or float32, got x of {x.dtype}'
    )
  for name, size in (('head dim P', head_dim), ('state dim N', state_dim)):
    if size not in (16, 32, 64, 128):
      raise NotImplementedError(
        f'pallas_gpu needs a {name} of 16, 32, 64 or 128 (Triton has powers '
        f'of two, and a state lives in registers), got {size}'
      )
  exact = x.dtype == jnp.float32
  # A float32 product keeps its operands in registers: half the tokens.
  chunk = 32 if exact else 64
  chunks = pl.cdiv(length, chunk)
  if segments is None:
    full = batch * heads >= FEWEST_PROGRAMS
    segments = 1 if full else pl.cdiv(PROGRAMS, batch * heads)
  segment_chunks = pl.cdiv(chunks, min(segments, chunks))
  segments = pl.cdiv(chunks, segment_chunks)
  # The largest block of heads that still leaves enough programs.
  group_heads = heads // groups
  blocks = [n for n in range(1, group_heads + 1) if group_heads % n == 0]
  full = [n for n in blocks if batch * chunks * heads // n >= PROGRAMS]
  return Blocks(
    batch=batch,
    length=length,
    heads=heads,
    head_dim=head_dim,
    state_dim=state_dim,
    groups=groups,
    chunk=chunk,
    segments=segments,
    segment_chunks=segment_chunks,
    head_block=max(full, default=1),
    exact=exact,
  )


class Refs(dict):
  """References of a kernel by name, as attributes; None for what is absent."""

  __getattr__ = dict.get


def call(kernel, grid, operands, results, *, warps, stages, interpret, name):
  """Runs `kernel(Refs)` over a grid.

  Args:
    kernel: takes `Refs` of all operands and results.
    grid: programs; the first dimension runs fastest on a GPU.
    operands: name -> (array, BlockSpec); those whose array is None are absent.
    results: name -> (shape, dtype, BlockSpec), or None for an absent one.
    warps, stages: of a program, and of the pipeline of its loads.
    interpret: run without a GPU.
    name: of the kernel, as a profiler shows it.

  Returns:
    The results by name.
  """
  operands = {k: v for k, v in operands.items() if v[0] is not None}
  results = {k: v for k, v in results.items() if v is not None}
  names = [*operands, *results]

  def named(*refs):
    kernel(Refs(zip(names, refs, strict=True)))

  found = pl.pallas_call(
    named,
    grid=grid,
    in_specs=[spec for _, spec in operands.values()],
    out_specs=[spec for *_, spec in results.values()],
    out_shape=[
      jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in results.values()
    ],
    # Without these JAX would take another backend (Mosaic GPU).
    compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
    interpret=interpret,
    name=name,
  )(*(array for array, _ in operands.values()))
  return dict(zip(results, found, strict=True))


def load(ref, mask):
  """What `ref` holds of a chunk, tokens first; 0 where there is no token."""
  mask = jnp.broadcast_to(mask[:, None], ref.shape)
  return plgpu.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def store(ref, value, mask):
  """Writes a chunk, tokens first, but for what is no token."""
  mask = jnp.broadcast_to(mask[:, None], ref.shape)
  plgpu.store(ref, value.astype(ref.dtype), mask=mask)


def dot(a, b, contract=(1, 0)):
  """Product of two operands of one dtype, accumulated in float32."""
  exact = a.dtype == jnp.float32  # or float32 would be multiplied as TF32
  return lax.dot_general(
    a,
    b,
    (((contract[0],), (contract[1],)), ((), ())),
    precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
    preferred_element_type=jnp.float32,
  )


def pairs(size, i_axis, step):
  """Two (size, size) tiles: i, which runs along `i_axis`, and j.

  Both start at `step`, a loop's counter: a mask made of them is then not
  computed before the loop, where it would fill the registers.
  """
  tiles = [
    step + lax.broadcasted_iota(jnp.int32, (size, size), axis)
    for axis in (0, 1)
  ]
  return tiles[i_axis], tiles[1 - i_axis]


class Decays:
  """Decays of a chunk of one head, from its a = dt A log2(e), (Q,).

  All are 2 to a clamped difference of float32 cumulative sums. A sum of 200 is
  known to 1e-5 only: for float32 operands a is split into multiples of 2^-10,
  which are summed exactly up to 2^14, and a small rest.
  """

  def __init__(self, a, exact):
    high = jnp.floor(a * 1024) / 1024
    parts = (high, a - high) if exact else (a,)
    self._sums = [jnp.cumsum(part) for part in parts]
    self._ends = [jnp.sum(part) for part in parts]

  def from_start(self):
    """(Q,): from the state before the chunk to token i."""
    return _power(self._sums)

  def to_end(self):
    """(Q,): from token j to the state after the chunk."""
    return _power(map(operator.sub, self._ends, self._sums))

  def whole(self):
    """(): from the state before the chunk to the one after it."""
    return _power(self._ends)

  def between(self, i_axis, mask):
    """(Q, Q): from token j to token i along `i_axis`; 0 outside the mask."""
    i_sums, j_sums = (
      [jnp.expand_dims(part, axis) for part in self._sums]
      for axis in (1 - i_axis, i_axis)
    )
    return _power(map(operator.sub, i_sums, j_sums), mask)


def _power(parts, mask=None):
  """2 to the sum of `parts`, which is above 0 only by rounding."""
  exponent = jnp.minimum(functools.reduce(operator.add, parts), 0.0)
  if mask is not None:  # before the exponential, which could overflow
    exponent = jnp.where(mask, exponent, -jnp.inf)
  return jnp.exp2(exponent)
