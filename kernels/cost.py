"""What a Pallas call costs, for XLA's scheduler and for the benchmark.

XLA knows nothing about the inside of a Pallas call except its
`pl.CostEstimate`. The bytes are counted here, from the grid and the
BlockSpecs, so that they are what the pipeline moves and not a guess. What a
TPU kernel computes is counted by libtpu: the length of its schedule.
"""

import itertools
import math
import os
import pathlib
import re
from collections.abc import Sequence

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.extend.core import jaxprs_in_params


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


def pallas_calls(jaxpr):
  """Yields the equation of every Pallas call in a jaxpr, inner ones too."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'pallas_call':
      yield eqn
      continue
    for inner in jaxprs_in_params(eqn.params):
      yield from pallas_calls(inner)


def dump_schedules(folder) -> None:
  """Tells libtpu, which must not be loaded yet, to write its schedules."""
  flags = f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true'
  before = os.environ.get('LIBTPU_INIT_ARGS', '')
  os.environ['LIBTPU_INIT_ARGS'] = f'{before} {flags}'.strip()


def take_schedules(folder, jaxpr) -> dict[str, tuple[int, int]]:
  """Lengths of the schedules of a program's Pallas calls, just compiled.

  A TPU core issues one bundle of instructions a cycle, so that grid steps
  times bundles are its cycles: exact for a body without run-time loops, and
  without waits for memory. They depend on the chip and on the version of
  libtpu, and on nothing else.

  Args:
    folder: what `dump_schedules` was given; its files are removed.
    jaxpr: of the program.

  Returns:
    {name of the call: (grid steps, bundles of one step)}.

  Raises:
    FileNotFoundError: libtpu wrote no schedule of a call.
  """
  suffix = '-schedule-analysis_final_bundles.txt'
  texts = {
    path.name: path.read_text(errors='replace')
    for path in pathlib.Path(folder).glob(f'*{suffix}')
  }
  found = {}
  for eqn in pallas_calls(jaxpr):
    name = eqn.params['name']
    lengths = [
      int(re.search(r'total scheduled bundles:\s*(\d+)', text).group(1))
      for file, text in texts.items()
      if name in file
    ]
    if not lengths:
      raise FileNotFoundError(
        f'libtpu wrote no schedule of {name} to {folder}: it was loaded before '
        'dump_schedules, or its flags have changed'
      )
    found[name] = math.prod(eqn.params['grid_mapping'].grid), max(lengths)
  for path in pathlib.Path(folder).iterdir():
    path.unlink()
  return found
