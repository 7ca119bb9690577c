"""Depthwise causal convolution over tokens, as shifted adds."""

import functools

import jax
import jax.numpy as jnp


def causal_conv1d(
  x: jax.Array,
  weight: jax.Array,
  bias: jax.Array | None = None,
  *,
  activation: str | None = None,
) -> jax.Array:
  """Depthwise causal convolution along the tokens.

    y_t = f(bias + sum_k weight_k * x_{t - (K - 1) + k}),  x_t = 0 for t < 0,

  so that the last tap meets the token itself. It equals
  `jax.lax.conv_general_dilated` with K - 1 zeros on the left and one group
  per channel, which XLA runs slowly on CPU; K shifted multiply-adds fuse into
  one pass over x.

  Source: the `conv1d` of Mamba-2's block, arXiv 2405.21060, section 7.

  Args:
    x: (B, L, channels), float32 or bfloat16; any L from 1.
    weight: (K, channels). The released (channels, 1, K) is its transpose.
    bias: (channels,), or None for zero.
    activation: None or 'silu'.

  Returns:
    y (B, L, channels) in x's dtype.

  Numerics: products, sum, bias and activation in float32, rounded once. The
  gradient recomputes the sum and keeps only x.

  Raises:
    ValueError: for a shape or an activation that does not fit.
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
  return _shifted_adds(x, weight, bias, activation)


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
