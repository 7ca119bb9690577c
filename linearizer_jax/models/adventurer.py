"""Adventurer, the causal image model that learns from the teacher.

Source: Adventurer (CVPR 2025, arXiv 2410.07599); every detail follows the
released model, so that its checkpoints load and ours load there. Shape
letters: B batch, L patch tokens, D width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from linearizer_jax.models import layers
from linearizer_jax.models.mamba2 import Mamba2

HEADING_TOKENS = ('all', 'visible')
REMAT = ('none', 'full', 'dots')


class SwiGLU(nn.Module):
  """w3(silu(w1 x) * (w2 x)), hidden width int(2.5 D)."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    width = x.shape[-1]

    def dense(features, name):
      return nn.Dense(
        features,
        dtype=self.dtype,
        kernel_init=layers.uniform_fan_in(),
        name=name,
      )

    hidden = int(2.5 * width)
    gate = jax.nn.silu(dense(hidden, 'w1')(x))
    return dense(width, 'w3')(gate * dense(hidden, 'w2')(x))


class Block(nn.Module):
  """h += mixer(norm(h)); h += mlp(norm_mlp(h)), class token last.

  The mixer sees [mean of all tokens, patch tokens, class token], the patch
  tokens in reverse order where `flip`; what comes back is in raster order.
  """

  flip: bool
  drop_path: float
  dtype: jnp.dtype
  mixer: dict[str, Any]

  @nn.compact
  def __call__(self, h, heading_weights, train):
    u = layers.RMSNorm(name='norm')(h)
    if heading_weights is None:
      heading = u.mean(1, keepdims=True)
    else:
      heading = jnp.sum(u * heading_weights, 1, keepdims=True)  # (B, 1, D)
    u = self._flip(u)
    u = jnp.concatenate([heading, u], axis=1).astype(self.dtype)
    mixed = Mamba2(dtype=self.dtype, name='mixer', **self.mixer)(u)
    mixed = self._flip(mixed[:, 1:]).astype(h.dtype)  # (B, L + 1, D)
    h = h + layers.DropPath(self.drop_path)(mixed, train)

    r = layers.RMSNorm(dtype=self.dtype, name='norm_mlp')(h)
    r = SwiGLU(dtype=self.dtype, name='mlp')(r).astype(h.dtype)
    return h + layers.DropPath(self.drop_path)(r, train)

  def _flip(self, x):
    if not self.flip:
      return x
    return jnp.concatenate([x[:, -2::-1], x[:, -1:]], axis=1)


class Adventurer(nn.Module):
  """Linear-time vision model of Mamba-2 blocks.

  `apply(variables, images, token_mask=None, train=False) -> (logits, out)`:

    images: (B, H, W, 3) float, normalised; H and W multiples of `patch_size`.
      Positions are resized when the grid is not that of `image_size`.
    token_mask: bool (B, L), True where a patch is replaced by the mask token;
      needs `use_mask_token`.
    train: drop path on; needs the random stream 'drop_path'.

  Returns logits (B, num_classes) float32, or None when `num_classes` is 0, and
  `out`, all in `residual_dtype`: 'blockNN' (B, L, D) patch tokens in raster
  order after block NN, 'blockNN_class' (B, D) the class token there, 'normed'
  (B, L, D) and 'class' (B, D) after the final norm.

  Numerics: matrix products and the scan's operands in `dtype`; norms, dt,
  decay and state in float32; the residual stream in `residual_dtype`
  (float32, as the released model).

  Attributes:
    width, depth, patch_size, image_size: image_size is an int or (H, W).
    num_classes: 0 means no head.
    flip_blocks: 'released' (blocks 2 and 3, what the released code computes),
      'alternate' (odd blocks, what the paper says), or the block numbers.
    heading_tokens: 'all' or 'visible' (the mean in front skips masked tokens).
    use_mask_token: adds the parameter `mask_token`.
    drop_path: rate at the end of the linear schedule.
    remat: 'none', 'full' (recompute each block in the backward pass) or
      'dots' (keep matrix products only).
    head_dim, state_dim, num_groups, expand, chunk_size, ssd_implementation,
      mesh, batch_axes: see `Mamba2`.

  Raises:
    ValueError: sizes that do not fit, naming the field to change.
  """

  width: int = 768
  depth: int = 12
  patch_size: int = 16
  image_size: int | tuple[int, int] = 224
  num_classes: int = 1000
  flip_blocks: str | tuple[int, ...] = 'released'
  heading_tokens: str = 'all'
  use_mask_token: bool = False
  drop_path: float = 0.0
  remat: str = 'none'
  head_dim: int = 64
  state_dim: int = 64
  num_groups: int = 1
  expand: int = 2
  chunk_size: int | None = None
  ssd_implementation: str | None = None
  mesh: Any = None
  batch_axes: tuple[str, ...] | None = None
  dtype: Any = jnp.float32
  residual_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images, token_mask=None, train=False):
    h = self._embed(images, token_mask)
    heading = self._heading_weights(token_mask)
    block = self._block_class()
    flips = flip_schedule(self.flip_blocks, self.depth)
    rates = layers.drop_path_rates(self.drop_path, self.depth)
    mixer = dict(
      head_dim=self.head_dim,
      state_dim=self.state_dim,
      num_groups=self.num_groups,
      expand=self.expand,
      chunk_size=self.chunk_size,
      depth=self.depth,
      ssd_implementation=self.ssd_implementation,
      mesh=self.mesh,
      batch_axes=self.batch_axes,
    )
    out = {}
    for n in range(self.depth):
      h = block(
        flip=n in flips,
        drop_path=rates[n],
        dtype=self.dtype,
        mixer=mixer,
        name=f'layers_{n}',
      )(h, heading, train)
      out[f'block{n:02d}'] = h[:, :-1]
      out[f'block{n:02d}_class'] = h[:, -1]

    normed = layers.RMSNorm(name='norm_f')(h)
    out['normed'], out['class'] = normed[:, :-1], normed[:, -1]
    if not self.num_classes:
      return None, out
    logits = nn.Dense(
      self.num_classes,
      dtype=self.dtype,
      kernel_init=layers.EMBEDDING_INIT,
      name='head',
    )(out['class'])
    return logits.astype(jnp.float32), out

  def _embed(self, images, token_mask):
    """Patch tokens, masked where asked, class token last, with positions."""
    stem = PatchStem(
      self.width, self.patch_size, self.dtype, name='patch_embed'
    )
    tokens = stem(images).astype(self.residual_dtype)  # (B, L, D)
    normal = layers.EMBEDDING_INIT
    mask_token = None
    if self.use_mask_token:
      mask_token = self.param('mask_token', normal, (1, 1, self.width))
    if token_mask is not None:
      tokens = layers.replace_tokens(tokens, mask_token, token_mask)
    class_token = self.param('cls_token', normal, (1, 1, self.width))
    tokens = jnp.concatenate(
      [
        tokens,
        jnp.broadcast_to(class_token, (len(tokens), 1, self.width)),
      ],
      axis=1,
      dtype=self.residual_dtype,
    )  # (B, L + 1, D)

    own_grid = layers.patch_grid(
      layers.as_pair(self.image_size), self.patch_size
    )
    grid = layers.patch_grid(images.shape[1:3], self.patch_size)
    size = own_grid[0] * own_grid[1]
    positions = self.param('pos_embed', normal, (1, size + 1, self.width))
    patches, last = positions[:, :-1], positions[:, -1:]
    patches = layers.resize_positions(patches, own_grid, grid)
    positions = jnp.concatenate([patches, last], axis=1)
    return tokens + positions.astype(self.residual_dtype)

  def final_norm(self, params, tokens):
    """The final norm alone, as `apply` computes out['normed']."""
    norm = layers.RMSNorm(parent=None)
    return norm.apply({'params': params['norm_f']}, tokens)

  def _heading_weights(self, token_mask):
    """Weights (B, L + 1, 1) of the heading average, None for a plain mean."""
    if self.heading_tokens not in HEADING_TOKENS:
      raise ValueError(
        f'heading_tokens is {self.heading_tokens!r}; expected one of '
        f'{HEADING_TOKENS}. Change config.student.heading_tokens.'
      )
    if self.heading_tokens == 'all' or token_mask is None:
      return None
    seen = jnp.pad(~token_mask, ((0, 0), (0, 1)), constant_values=True)
    seen = seen.astype(jnp.float32)[..., None]
    return seen / seen.sum(1, keepdims=True)

  def _block_class(self):
    if self.remat not in REMAT:
      raise ValueError(
        f'remat is {self.remat!r}; expected one of {REMAT}. Change '
        'config.student.remat.'
      )
    if self.remat == 'none':
      return Block
    policy = None
    if self.remat == 'dots':
      policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    # Argument 0 is the module; `train` is a Python bool.
    return nn.remat(Block, policy=policy, static_argnums=(3,))


class PatchStem(nn.Module):
  """Names the patch convolution as the released model: patch_embed.proj."""

  width: int
  patch_size: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, images):
    embed = layers.PatchEmbed(
      self.width, self.patch_size, dtype=self.dtype, name='proj'
    )
    return embed(images)


def flip_schedule(flip_blocks, depth):
  """The numbers of the blocks that read the image backwards.

  Args:
    flip_blocks: 'released' = {2, 3}, the released code's `n // 2 == 1`, at any
      depth; 'alternate' = odd blocks; or block numbers.
    depth: number of blocks.

  Returns:
    A frozenset of block numbers below `depth`.

  Raises:
    ValueError: another word, or a number that is no block.
  """
  if flip_blocks == 'released':
    return frozenset(n for n in range(depth) if n // 2 == 1)
  if flip_blocks == 'alternate':
    return frozenset(range(1, depth, 2))
  if isinstance(flip_blocks, str) or not all(
    isinstance(n, int) and 0 <= n < depth for n in flip_blocks
  ):
    raise ValueError(
      f"flip_blocks is {flip_blocks!r}; expected 'released', 'alternate' or "
      f'block numbers from 0 to {depth - 1}. Change config.student.flip_blocks.'
    )
  return frozenset(flip_blocks)


def _sizes():
  sizes = {
    'tiny': dict(width=256, depth=12),
    'small': dict(width=512, depth=12),
    'base': dict(width=768, depth=12),
    'large': dict(width=1024, depth=24),
  }
  return {
    f'adventurer_{size}_patch{patch}': dict(patch_size=patch, **fields)
    for size, fields in sizes.items()
    for patch in (16, 8)
  }


VARIANTS = _sizes()
