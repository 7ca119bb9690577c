"""The Mamba-2 token mixer, as Adventurer uses it."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from linearizer_jax.kernels import placement
from linearizer_jax.kernels.causal_conv1d import causal_conv1d
from linearizer_jax.kernels.ssd import ssd
from linearizer_jax.models import layers

CONV_TAPS = 4


class Mamba2(nn.Module):
  """Causal token mixer (B, L, D) -> (B, L, D), linear in L.

      [z, x, B, C, dt] = in_proj u        [x, B, C] = silu(conv1d([x, B, C]))
      y = ssd(x, softplus(dt + dt_bias), -exp(A_log), B, C, D)
      out = out_proj(RMSNorm(y * silu(z)))

  Source: Mamba-2 (arXiv 2405.21060) section 7, in the sizes and with the norm
  order of the released Adventurer (one group over all channels).

  Attributes:
    head_dim, state_dim, num_groups, expand: P, N, G and inner width / D.
    chunk_size: tokens per SSD chunk; None lets the implementation choose.
    depth: number of blocks of the model, which scales out_proj's start.
    dtype: of matrix products and of the scan's operands; dt, decay, state and
      the norm are float32.
    ssd_implementation, mesh, batch_axes: handed to `ssd`; the last two to
      `causal_conv1d` too.
  """

  head_dim: int = 64
  state_dim: int = 64
  num_groups: int = 1
  expand: int = 2
  chunk_size: int | None = None
  depth: int = 1
  dtype: jnp.dtype = jnp.float32
  ssd_implementation: str | None = None
  mesh: Any = None
  batch_axes: tuple[str, ...] | None = None

  @nn.compact
  def __call__(self, u):
    width = u.shape[-1]
    inner = self.expand * width
    num_heads = inner // self.head_dim
    if num_heads * self.head_dim != inner:
      raise ValueError(
        f'expand * width = {inner} is no multiple of head_dim '
        f'{self.head_dim}; change width, expand or head_dim of the model.'
      )
    state = self.num_groups * self.state_dim

    zxbcdt = nn.Dense(
      2 * inner + 2 * state + num_heads,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=layers.uniform_fan_in(),
      name='in_proj',
    )(u)
    z, xbc, dt = jnp.split(zxbcdt, [inner, 2 * inner + 2 * state], axis=-1)
    conv1d = DepthwiseConv1D(self.mesh, self.batch_axes, name='conv1d')
    x, bc = conv1d(xbc, [inner])
    b, c = jnp.split(bc, 2, axis=-1)

    dt_bias = self.param('dt_bias', init_dt_bias, (num_heads,))
    a_log = self.param('A_log', init_a_log, (num_heads,))
    skip = self.param('D', nn.initializers.ones, (num_heads,))
    heads = (*x.shape[:2], num_heads, self.head_dim)
    groups = (*x.shape[:2], self.num_groups, self.state_dim)
    y = ssd(
      x.reshape(heads),
      jax.nn.softplus(dt.astype(jnp.float32) + dt_bias),
      -jnp.exp(a_log),
      b.reshape(groups),
      c.reshape(groups),
      skip,
      chunk_size=self.chunk_size,
      implementation=self.ssd_implementation,
      mesh=self.mesh,
      batch_axes=self.batch_axes,
    )  # (B, L, H, P)
    y = y.reshape(x.shape).astype(jnp.float32)
    y = y * jax.nn.silu(z.astype(jnp.float32))
    y = layers.RMSNorm(dtype=self.dtype, name='norm')(y)
    return nn.Dense(
      width,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=layers.uniform_fan_in(1 / math.sqrt(self.depth)),
      name='out_proj',
    )(y)


class DepthwiseConv1D(nn.Module):
  """Causal depthwise convolution over L and SiLU, split along the channels.

  (B, L, C) -> what `jnp.split(y, sections, axis=-1)` gives. For a TPU the
  parts are convolved one by one: it holds B and C with the tokens on the lanes,
  and would otherwise transpose x with them and back.
  """

  mesh: Any = None
  batch_axes: tuple[str, ...] | None = None

  @nn.compact
  def __call__(self, x, sections):
    shape = (CONV_TAPS, x.shape[-1])
    # fan_in of a depthwise kernel is its number of taps.
    kernel = self.param('kernel', layers.uniform_fan_in(), shape)
    bias = self.param('bias', init_conv_bias, shape[1:])
    conv = functools.partial(
      causal_conv1d,
      activation='silu',
      mesh=self.mesh,
      batch_axes=self.batch_axes,
    )
    if placement.platform(x, self.mesh) != 'tpu':
      return jnp.split(conv(x, kernel, bias), sections, axis=-1)
    parts = (jnp.split(a, sections, axis=-1) for a in (x, kernel, bias))
    return [conv(*part) for part in zip(*parts, strict=True)]


def init_conv_bias(key, shape, dtype=jnp.float32):
  """Uniform +-1/sqrt(taps), as for the kernel: +-0.5."""
  bound = 1 / math.sqrt(CONV_TAPS)
  return jax.random.uniform(key, shape, dtype, -bound, bound)


def init_a_log(key, shape, dtype=jnp.float32):
  """log A with A uniform in [1, 16]."""
  return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


def init_dt_bias(key, shape, dtype=jnp.float32):
  """Inverse softplus of dt, log-uniform in [1e-3, 1e-1], floored at 1e-4."""
  low, high = math.log(1e-3), math.log(1e-1)
  dt = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
  dt = jnp.maximum(dt, 1e-4)
  return dt + jnp.log(-jnp.expm1(-dt))
