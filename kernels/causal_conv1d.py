"""Depthwise causal convolution over tokens, as shifted adds."""

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

  y_t = f(bias + sum_k weight_k x_{t - (K-1) + k}), x before the start is 0:
  the last tap meets the token itself. K shifted multiply-adds that XLA fuses
  into one pass; its grouped convolution is slow on CPU.

  Source: the `conv1d` of Mamba-2, arXiv 2405.21060, section 7; it equals
  `jax.lax.conv_general_dilated` with K-1 zeros on the left and one group per
  channel.

  Args:
    x: (B, L, channels), float32 or bfloat16.
    weight: (K, channels). The released (channels, 1, K) is its transpose.
    bias: (channels,), or None.
    activation: None or 'silu'.

  Returns:
    (B, L, channels) in x's dtype.

  Numerics: products, sum, bias and activation in float32, rounded once.

  Raises:
    ValueError: for a shape or an activation that does not fit.
  """
  if x.ndim != 3:
    raise ValueError(f'x must be (B, L, channels), got {x.shape}')
  channels = x.shape[-1]
  if weight.ndim != 2 or weight.shape[1] != channels:
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

  taps, length = weight.shape[0], x.shape[1]
  weight = weight.astype(jnp.float32)
  padded = jnp.pad(x, ((0, 0), (taps - 1, 0), (0, 0)))
  y = sum(
    padded[:, k : k + length].astype(jnp.float32) * weight[k]
    for k in range(taps)
  )
  if bias is not None:
    y += bias.astype(jnp.float32)
  if activation == 'silu':
    y = jax.nn.silu(y)
  return y.astype(x.dtype)
