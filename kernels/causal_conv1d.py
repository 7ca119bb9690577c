"""Depthwise causal convolution over tokens: shifted adds, or a TPU kernel."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from . import causal_conv1d_tpu, placement

IMPLEMENTATIONS = (None, 'xla', 'pallas_tpu')


def causal_conv1d(
  x: jax.Array,
  weight: jax.Array,
  bias: jax.Array | None = None,
  *,
  activation: str | None = None,
  implementation: str | None = None,
  mesh: Mesh | None = None,
  batch_axes: str | Sequence[str] | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Depthwise causal convolution along the tokens.

    y_t = f(bias + sum_k weight_k * x_{t - (K - 1) + k}),  x_t = 0 for t < 0,

  so that the last tap meets the token itself. It equals
  `jax.lax.conv_general_dilated` with K - 1 zeros on the left and one group
  per channel, which XLA runs slowly on CPU; K shifted multiply-adds fuse into
  one pass over x there. For a TPU it makes K copies of x, so that there the
  passes forward and backward are kernels.

  Source: the `conv1d` of Mamba-2's block, arXiv 2405.21060, section 7.

  Args:
    x: (B, L, channels), float32 or bfloat16; any L from 1.
    weight: (K, channels). The released (channels, 1, K) is its transpose.
    bias: (channels,), or None for zero.
    activation: None or 'silu'.
    implementation: 'xla', 'pallas_tpu', or None to choose by the platform of
      the devices: of `mesh`, else of a concrete x, else of the default device.
    mesh: the mesh that x is spread over, if any.
    batch_axes: axis or axes of `mesh` over which B is split.
    interpret: False, True or `pltpu.InterpretParams`: run without a TPU.

  Returns:
    y (B, L, channels) in x's dtype.

  Numerics: products, sum, bias and activation in float32, rounded once. The
  gradient recomputes the sum and keeps only x.

  Raises:
    ValueError: for a shape, a name or a mesh axis that does not fit.
    NotImplementedError: where 'pallas_tpu', asked for, cannot do it.
  """
  if x.ndim != 3:
    raise ValueError(f'x must be (B, L, channels), got {x.shape}')
  channels = x.shape[-1]
  if weight.ndim != 2 or 0 in weight.shape or weight.shape[1] != channels:
    raise ValueError(
      f'weight has shape {weight.shape}, expected (K, {channels}) for x of '
      f'shape {x.shape}'
    )
  if bias is not None and bias.shape != (channels,):
    raise ValueError(
      f'bias has shape {bias.shape}, expected ({channels},) for x of shape '
      f'{x.shape}'
    )
  if activation not in (None, 'silu'):
    raise ValueError(f"activation must be None or 'silu', got {activation!r}")
  placement.check_mesh(mesh, batch_axes)
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f'implementation={implementation!r} is not one of {IMPLEMENTATIONS}'
    )
  if implementation is None:
    implementation = _choose(x, weight, mesh, batch_axes)
  if implementation == 'xla':
    return _shifted_adds(x, weight, bias, activation)

  causal_conv1d_tpu.check(x, weight)
  if bias is None:
    bias = jnp.zeros(channels)
  weight, bias = weight.astype(jnp.float32), bias.astype(jnp.float32)

  def run(x, weight, bias):
    return causal_conv1d_tpu.conv_pallas_tpu(
      x, weight, bias, activation, interpret
    )

  return placement.over_batch(
    run,
    {'x': x, 'weight': weight, 'bias': bias},
    mesh,
    batch_axes,
    whole=('weight', 'bias'),
  )


def _choose(x, weight, mesh, batch_axes):
  """What `implementation=None` means for these arguments."""
  if placement.platform(x, mesh) != 'tpu':
    return 'xla'
  if x.shape[0] % placement.shards(mesh, batch_axes):
    return 'xla'  # the one image that a model starts from
  try:
    causal_conv1d_tpu.check(x, weight)
  except NotImplementedError:
    return 'xla'
  return 'pallas_tpu'


@functools.partial(jax.checkpoint, static_argnums=3)
def _shifted_adds(x, weight, bias, activation):
  """The sum over taps, then the activation."""
  taps, length = weight.shape[0], x.shape[1]
  weight = weight.astype(jnp.float32)
  y = x.astype(jnp.float32) * weight[-1]
  for shift in range(1, min(taps, length)):
    earlier = jnp.pad(x[:, :-shift], ((0, 0), (shift, 0), (0, 0)))
    y += earlier.astype(jnp.float32) * weight[taps - 1 - shift]
  if bias is not None:
    y += bias.astype(jnp.float32)
  if activation == 'silu':
    y = jax.nn.silu(y)
  return y.astype(x.dtype)
