"""What a Pallas call costs, for XLA's scheduler and for the benchmark.

XLA knows nothing about the inside of a Pallas call except its
`pl.CostEstimate`. The bytes are counted here, from the grid and the
BlockSpecs, so that they are what the pipeline moves and not a guess.
"""

import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax.experimental import pallas as pl


def block_bytes(grid, spec, array) -> int:
  """Bytes that one operand or result moves between HBM and VMEM.

  Walks the grid in its order, last dimension fastest. A block is moved again
  whenever its index differs from that of the step before; the part of a block
  that lies outside the array is not moved.

  Args:
    grid: the call's grid, a tuple of ints.
    spec: `pl.BlockSpec` whose index map takes and returns plain ints.
    array: anything with `shape` and `dtype`.

  Returns:
    The number of bytes.
  """
  sizes = [1 if size is None else size for size in spec.block_shape]
  total, last = 0, None
  for step in itertools.product(*map(range, grid)):
    index = tuple(spec.index_map(*step))
    if index != last:
      total += math.prod(
        min(size, dim - i * size)
        for size, dim, i in zip(sizes, array.shape, index, strict=True)
      )
    last = index
  return total * jnp.dtype(array.dtype).itemsize


def cost_estimate(
  grid: tuple[int, ...],
  specs: Sequence[pl.BlockSpec],
  arrays: Sequence,
  *,
  flops: int,
  transcendentals: int,
) -> pl.CostEstimate:
  """`pl.CostEstimate` of a whole call.

  Args:
    grid: the call's grid.
    specs: BlockSpecs of all operands and results.
    arrays: the operands and results themselves, or their ShapeDtypeStructs,
      in the same order.
    flops: floating point operations of one grid step.
    transcendentals: exponentials of one grid step.

  Returns:
    The estimate, with bytes counted by `block_bytes`.
  """
  steps = math.prod(grid)
  return pl.CostEstimate(
    flops=steps * flops,
    transcendentals=steps * transcendentals,
    bytes_accessed=sum(
      block_bytes(grid, spec, array)
      for spec, array in zip(specs, arrays, strict=True)
    ),
  )
