"""The causal convolution on a TPU: one Mosaic kernel each way.

XLA cuts x into K shifted copies that lie in memory beside it, forward and
again backward; here x is read once, shifted in registers and written once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .cost import cost_estimate

LANES = 128
HALO = 16  # tokens before a block that it sees: a bfloat16 tile has 16 rows
BLOCK = 256  # tokens of a grid step
SUMS = 8  # rows of the gradients of weight and bias, taps and bias first
TOKEN_BYTES = 8192  # of a token of x, at most: blocks must fit into VMEM


def check(x, weight):
  """Raises NotImplementedError for what the kernels cannot do."""
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(
      f'pallas_tpu computes in bfloat16 or float32, got x of {x.dtype}'
    )
  if x.shape[-1] % LANES:
    raise NotImplementedError(
      f'pallas_tpu needs a multiple of {LANES} channels, got x of shape '
      f'{x.shape}'
    )
  if x.shape[-1] * x.dtype.itemsize > TOKEN_BYTES:
    raise NotImplementedError(
      f'pallas_tpu has room for {TOKEN_BYTES} bytes of a token, got x of shape '
      f'{x.shape} and {x.dtype}'
    )
  if weight.shape[0] >= SUMS:
    raise NotImplementedError(
      f'pallas_tpu has at most {SUMS - 1} taps, got {weight.shape[0]}'
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def conv_pallas_tpu(x, weight, bias, activation, interpret=False):
  """`causal_conv1d` of checked arguments; weight and bias (C,) float32."""
  grid, specs = _grid_and_specs(x)
  operands = [x, *_before(x), weight, bias[None]]
  in_specs = [
    specs['x'],
    *_before(x, specs['before']),
    _whole(weight.shape),
    _whole((1, x.shape[-1])),
  ]
  kernel = functools.partial(_forward_kernel, grid, activation)
  return pl.pallas_call(
    kernel,
    grid=grid,
    in_specs=in_specs,
    out_specs=specs['x'],
    out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel')
    ),
    cost_estimate=cost_estimate(
      grid,
      [*in_specs, specs['x']],
      [*operands, x],
      **_step_work(x, weight, backward=False),
    ),
    interpret=interpret,
    name='conv_fwd',
  )(*operands)


def _conv_forward(x, weight, bias, activation, interpret):
  y = conv_pallas_tpu(x, weight, bias, activation, interpret)
  return y, (x, weight, bias)


def _conv_backward(activation, interpret, saved, dy):
  """Walks the blocks of an image in reverse; sums per image, then over them."""
  x, weight, bias = saved
  batch, length, channels = x.shape
  grid, specs = _grid_and_specs(x, reverse=True)
  operands = [x, *_before(x), dy, weight, bias[None]]
  in_specs = [
    specs['x'],
    *_before(x, specs['before']),
    specs['x'],
    _whole(weight.shape),
    _whole((1, channels)),
  ]
  sums = jax.ShapeDtypeStruct((batch, SUMS, channels), jnp.float32)
  out_specs = [
    specs['x'],
    pl.BlockSpec((None, SUMS, channels), lambda i, k: (i, 0, 0)),
  ]
  out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype), sums]
  dx, sums = pl.pallas_call(
    functools.partial(_backward_kernel, grid, length, activation),
    grid=grid,
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=out_shape,
    scratch_shapes=[pltpu.VMEM((SUMS, channels), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary')
    ),
    cost_estimate=cost_estimate(
      grid,
      in_specs + out_specs,
      operands + out_shape,
      **_step_work(x, weight, backward=True),
    ),
    interpret=interpret,
    name='conv_bwd',
  )(*operands)
  sums = sums.sum(0)
  taps = weight.shape[0]
  return dx, sums[:taps].astype(weight.dtype), sums[taps].astype(bias.dtype)


conv_pallas_tpu.defvjp(_conv_forward, _conv_backward)


def _grid_and_specs(x, reverse=False):
  """(images, blocks), and the BlockSpecs of x and of the tokens before."""
  batch, length, channels = x.shape
  block = min(length, BLOCK)
  blocks = -(-length // block)

  def at(k):
    return blocks - 1 - k if reverse else k

  def before(i, k):
    # The first block has none, and does not look at what it is given.
    return i, at(k) * (BLOCK // HALO) - 1 + (at(k) == 0), 0

  specs = {
    'x': pl.BlockSpec((None, block, channels), lambda i, k: (i, at(k), 0)),
    'before': pl.BlockSpec((None, HALO, channels), before),
  }
  return (batch, blocks), specs


def _before(x, what=None):
  """[what, or x], the operand of tokens before a block; [] in a single one."""
  return [x if what is None else what] if x.shape[1] > BLOCK else []


def _whole(shape):
  return pl.BlockSpec(shape, lambda i, k: (0, 0))


def _step_work(x, weight, backward):
  """FLOPs and exponentials of a grid step."""
  values = min(x.shape[1], BLOCK) * x.shape[2]
  taps = weight.shape[0]
  flops = (6 * taps + 8 if backward else 2 * taps + 4) * values
  return {'flops': flops, 'transcendentals': values}


def _columns(ref):
  """Slices of 128 channels: one fits in registers."""
  channels = ref.shape[-1]
  return [slice(i, i + LANES) for i in range(0, channels, LANES)]


def _shifted(x, before, weight, bias):
  """[x_t, x_{t-1}, ...] and the sum over taps, all (tokens, 128) float32."""
  taps, length = weight.shape[0], x.shape[0]
  rows = jnp.concatenate([before, x])
  start = before.shape[0]
  shifted = [rows[start - s : start - s + length] for s in range(taps)]
  total = bias + sum(weight[taps - 1 - s] * v for s, v in enumerate(shifted))
  return shifted, total


def _tokens_before(first, ref, lanes):
  """The last 8 tokens before a block (8, 128) float32: 0 before the image."""
  if ref is None:
    return jnp.zeros((8, LANES), jnp.float32)
  rows = ref[HALO - 8 :, lanes].astype(jnp.float32)
  return jnp.where(first, 0.0, rows)


def _forward_kernel(grid, activation, x_ref, *refs):
  *before_ref, weight_ref, bias_ref, y_ref = refs
  before_ref = before_ref[0] if before_ref else None
  first = pl.program_id(1) == 0
  del grid
  for lanes in _columns(x_ref):
    before = _tokens_before(first, before_ref, lanes)
    x = x_ref[:, lanes].astype(jnp.float32)
    _, y = _shifted(x, before, weight_ref[:, lanes], bias_ref[:, lanes])
    if activation == 'silu':
      y = jax.nn.silu(y)
    y_ref[:, lanes] = y.astype(y_ref.dtype)


def _backward_kernel(grid, length, activation, x_ref, *refs):
  *before_ref, dy_ref, weight_ref, bias_ref, dx_ref, sums_ref, after_ref = refs
  before_ref = before_ref[0] if before_ref else None
  step = pl.program_id(1)
  index = grid[1] - 1 - step
  block, taps = x_ref.shape[0], weight_ref.shape[0]

  @pl.when(step == 0)
  def _():
    sums_ref[...] = jnp.zeros_like(sums_ref)
    after_ref[...] = jnp.zeros_like(after_ref)

  rows = jax.lax.broadcasted_iota(jnp.int32, (block, LANES), 0)
  inside = rows < length - index * block
  for lanes in _columns(x_ref):
    weight = weight_ref[:, lanes]
    before = _tokens_before(index == 0, before_ref, lanes)
    x, dy = (r[:, lanes].astype(jnp.float32) for r in (x_ref, dy_ref))
    if length % block:  # what lies behind the image may be anything
      x, dy = (jnp.where(inside, v, 0.0) for v in (x, dy))
    shifted, y = _shifted(x, before, weight, bias_ref[:, lanes])
    if activation == 'silu':
      gate = jax.nn.sigmoid(y)
      dy = dy * gate * (1 + y * (1 - gate))
    sums = [jnp.sum(dy * v, 0, keepdims=True) for v in reversed(shifted)]
    sums += [jnp.sum(dy, 0, keepdims=True)]
    sums += [jnp.zeros((SUMS - len(sums), LANES), jnp.float32)]
    sums_ref[:, lanes] += jnp.concatenate(sums)
    later = jnp.concatenate([dy, after_ref[:, lanes]])
    dx = sum(weight[taps - 1 - s] * later[s : s + block] for s in range(taps))
    dx_ref[:, lanes] = dx.astype(dx_ref.dtype)
    after_ref[:, lanes] = later[:SUMS]
