"""Layers that the student and the teachers share.

Shape letters: B batch, H and W pixels or patches, L patch tokens, D width.
"""

import math
from collections.abc import Callable

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

# "Truncated normal 0.02" of the released code is cut at +-2, 100 deviations
# away; JAX's initialiser of that name cuts at two deviations and gives 0.0176.
EMBEDDING_INIT = nn.initializers.normal(0.02)


def patch_grid(image_shape, patch_size):
  """Number of patches along height and width.

  Args:
    image_shape: (height, width) in pixels.
    patch_size: side of a square patch in pixels.

  Returns:
    (rows, columns) of the token grid.

  Raises:
    ValueError: a side is not a multiple of the patch size.
  """
  height, width = image_shape
  if height % patch_size or width % patch_size or not height or not width:
    raise ValueError(
      f'an image of {height} x {width} pixels cannot be cut into patches of '
      f'{patch_size} x {patch_size}: both sides must be multiples of '
      f'{patch_size}. Change config.data.image_size or the patch size of the '
      'model.'
    )
  return height // patch_size, width // patch_size


def as_pair(size):
  """An int or a pair of ints, as (height, width)."""
  if isinstance(size, int):
    return size, size
  height, width = size
  return int(height), int(width)


def resize_positions(positions, old_grid, new_grid, antialias=False):
  """Resizes a grid of position embeddings as PyTorch's bicubic does.

  Equal to `torch.nn.functional.interpolate(mode='bicubic',
  align_corners=False, antialias=antialias)` on the grid.

  Args:
    positions: (1, rows * columns, D) float, raster order, no class row.
    old_grid: (rows, columns) that `positions` was made for.
    new_grid: (rows, columns) wanted.
    antialias: low-pass filter when the grid shrinks.

  Returns:
    (1, new rows * new columns, D), same dtype; `positions` itself when the
    grids agree. Computed in float32.
  """
  if tuple(old_grid) == tuple(new_grid):
    return positions
  grid = einops.rearrange(
    positions.astype(jnp.float32), '1 (h w) d -> h w d', h=old_grid[0]
  )
  grid = jax.image.resize(
    grid,
    (*new_grid, grid.shape[-1]),
    jax.image.ResizeMethod.CUBIC_PYTORCH,
    antialias=antialias,
    precision=jax.lax.Precision.HIGHEST,
  )
  grid = einops.rearrange(grid, 'h w d -> 1 (h w) d')
  return grid.astype(positions.dtype)


def replace_tokens(tokens, mask_token, token_mask):
  """Puts the mask token where `token_mask` is True.

  Args:
    tokens: (B, L, D).
    mask_token: an array that broadcasts to them; None where the model has none.
    token_mask: (B, L) bool.

  Returns:
    (B, L, D) in the dtype of `tokens`.

  Raises:
    ValueError: no mask token, or a mask of another shape.
  """
  if mask_token is None:
    raise ValueError(
      'token_mask was given to a model without a mask token: set the model '
      'field use_mask_token=True, or do not mask this network.'
    )
  if token_mask.shape != tokens.shape[:2]:
    raise ValueError(
      f'token_mask has shape {token_mask.shape}, the image has '
      f'{tokens.shape[:2]} patch tokens.'
    )
  return jnp.where(token_mask[..., None], mask_token, tokens).astype(
    tokens.dtype
  )


class PatchEmbed(nn.Module):
  """Cuts an image into patches and maps each linearly to a token.

  Equals a convolution whose stride is its kernel size, written as one matrix
  product: (B, H, W, 3) -> (B, L, D), raster order. The kernel has the
  convolution's shape, (patch, patch, 3, D).
  """

  width: int
  patch_size: int
  use_bias: bool = True
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, images):
    p = self.patch_size
    patch_grid(images.shape[1:3], p)
    kernel = self.param(
      'kernel',
      nn.initializers.lecun_normal(),
      (p, p, images.shape[-1], self.width),
    )
    patches = einops.rearrange(
      images.astype(self.dtype), 'b (h p) (w q) c -> b (h w) (p q c)', p=p, q=p
    )  # (B, L, p * p * 3)
    tokens = patches @ kernel.reshape(-1, self.width).astype(self.dtype)
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, (self.width,))
      tokens = tokens + bias.astype(self.dtype)
    return tokens  # (B, L, D)


class RMSNorm(nn.Module):
  """x * rsqrt(mean(x^2) + eps) * scale over the last axis, in float32.

  Returns `dtype`, or x's dtype when that is None.
  """

  epsilon: float = 1e-5
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.epsilon)
    return (y * scale).astype(self.dtype or x.dtype)


class DropPath(nn.Module):
  """Stochastic depth: drops a residual branch for whole samples.

  Kept samples are scaled by 1 / (1 - rate), so the expectation stays. Draws
  from the 'drop_path' random stream, and only while training at a rate > 0.
  """

  rate: float

  @nn.compact
  def __call__(self, x, train):
    if not train or self.rate == 0.0:
      return x
    keep = 1.0 - self.rate
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    kept = jax.random.bernoulli(self.make_rng('drop_path'), keep, shape)
    return jnp.where(kept, x / keep, jnp.zeros_like(x))


def drop_path_rates(rate, depth):
  """Rate of each block: [0] + linspace(0, rate, depth) without its last entry.

  The released Adventurer's list: the first two blocks never drop, the last one
  has rate * (depth - 2) / (depth - 1).
  """
  return (0.0,) + tuple(rate * i / (depth - 1) for i in range(depth - 1))


def uniform_fan_in(scale: float = 1.0) -> Callable:
  """Initialiser uniform(+-scale / sqrt(fan_in)) for kernels (fan_in, out)."""

  def init(key, shape, dtype=jnp.float32):
    bound = scale / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init
