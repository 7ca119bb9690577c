"""Vision transformer: every teacher, and a plain ViT that is trained here.

One module with fields for what differs between CLIP's image tower, DINOv2,
SigLIP, MAE and supervised ViTs. Parameters carry the names of OpenAI's CLIP.

Shape letters: B batch, H and W pixels, h and w patch rows and columns, L = h w
patch tokens, T = L plus class token and registers, D width, E projection.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from linearizer_jax.models.layers import (
  EMBEDDING_INIT,
  PatchEmbed,
  as_pair,
  patch_grid,
  replace_tokens,
  resize_positions,
)
from linearizer_jax.models.transformer import (
  ACTIVATIONS,
  ATTENTIONS,
  AttentionPool,
  Block,
  LayerNorm,
  embedding_init,
)


def position_init(key, grid, width, class_token):
  """Positions to start from: waves over the grid, (T, D) float32.

  Sines and cosines of a patch's column and row at width / 4 frequencies between
  1 and 1 / 100, times 1/2; 0 for the class token. They are trained like any
  parameter: from noise a small ViT first spends hundreds of updates on finding
  out which patches are neighbours.
  """
  del key
  frequencies = 100.0 ** -np.linspace(0, 1, width // 4)
  rows, columns = (y.reshape(-1, 1) for y in np.mgrid[: grid[0], : grid[1]])
  waves = np.concatenate(
    [f(x * frequencies) for x in (columns, rows) for f in (np.sin, np.cos)], 1
  )  # (L, D), less what 4 does not divide
  padding = ((int(class_token), 0), (0, width - waves.shape[1]))
  return jnp.asarray(np.pad(waves / 2, padding), jnp.float32)


class ViT(nn.Module):
  """Vision transformer with named intermediates.

  tokens = [class, registers, patches]; positions are added to class token and
  patches; `ln_pre` if `pre_norm`; `depth` blocks; `ln_post` on every token;
  head. Source: Dosovitskiy et al., arXiv 2010.11929; CLIP, arXiv 2103.00020;
  DINOv2 (layer scale, registers), arXiv 2304.07193 and 2309.16588; SigLIP
  (attention pool), arXiv 2303.15343.

  Fields:
    width, depth, num_heads, mlp_dim: mlp_dim None means 4 width.
    patch_size, image_size: pixels; image_size (int or (height, width)) is the
      size the position embeddings are made for, not the only one accepted.
    num_classes: 0 means no head, and logits None.
    class_token: without one, 'class' is the pooled embedding.
    attention_pool: pool with a learned query instead of the mean; for models
      without class token.
    num_registers: tokens after the class token, dropped from every output.
    pre_norm: CLIP's `ln_pre` between embedding and blocks.
    patch_bias: bias of the patch convolution.
    activation: a key of ACTIVATIONS.
    layer_norm_eps: added to the variance in every layer norm.
    layer_scale: initial value of the learned scales of each branch, or None.
    projection_dim: 0 means no projection (CLIP's `proj`).
    position_antialias: low-pass filter where positions shrink (DINOv2 with
      registers), as torch's `interpolate(antialias=True)`.
    use_mask_token: the learned vector that replaces masked patch tokens.
    drop_path: rate of the last block, growing linearly from 0 at the first.
    attention_implementation: None or 'xla' is plain XLA on any device; 'cudnn'
      is the fused kernel of CUDA devices (bfloat16 only).
    remat: 'none', or 'full' to recompute each block in the backward pass.
    dtype: of matrix products and activations; parameters are float32.
    residual_dtype: of the residual stream. At the last block of random CLIP
      B/16 and L/14 with dtype bfloat16, a float32 stream is off by 0.4 and 0.4
      percent, a bfloat16 stream by 0.9 and 1.2; of 8.9 GB that a v5e chip moves
      for 32 images of B/16, the bfloat16 stream saves 1.4.
  """

  width: int = 768
  depth: int = 12
  num_heads: int = 12
  mlp_dim: int | None = None
  patch_size: int = 16
  image_size: int | tuple[int, int] = 224
  num_classes: int = 0
  class_token: bool = True
  attention_pool: bool = False
  num_registers: int = 0
  pre_norm: bool = False
  patch_bias: bool = True
  activation: str = 'gelu'
  layer_norm_eps: float = 1e-6
  layer_scale: float | None = None
  projection_dim: int = 0
  position_antialias: bool = False
  use_mask_token: bool = False
  drop_path: float = 0.0
  attention_implementation: str | None = None
  remat: str = 'none'
  dtype: jnp.dtype = jnp.float32
  residual_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, images, token_mask=None, train=False, keep=None):
    """Images to logits and named intermediates.

    Args:
      images: (B, H, W, 3) float, normalised; sides multiples of patch_size.
        Where the patch grid is not that of image_size, the position embeddings
        are resized (bicubic) to fit.
      token_mask: (B, L) bool, True = replaced by the mask token before the
        position embedding is added; needs use_mask_token.
      train: drop path on; needs the 'drop_path' random stream where it is > 0.
      keep: (B, M) int, positions of the only patch tokens that enter the
        blocks, for a masked autoencoder; all when None. L is M in what
        comes back.

    Returns:
      (logits, out): logits (B, num_classes) or None; out a dict with
        'blockNN' (B, L, D): patch tokens in raster order after block NN,
        'blockNN_class' (B, D): class token there, if the model has one,
        'normed' (B, L, D): the patch tokens after the final norm,
        'class' (B, D): the class token after the final norm; without class
          token the attention-pooled or mean normed token,
        'projected' (B, L, E) and 'projected_class' (B, E): those two through
          the projection, if there is one.

    Numerics: layer norms and softmax in float32; 'blockNN' in residual_dtype,
    the rest in dtype; logits float32.

    Raises:
      ValueError: image not divisible into patches, token_mask without a mask
        token or of another shape, or a field that is not one of its choices.
    """
    self.check_fields()
    x = self.embed(images, token_mask, keep)  # (B, T, D)
    skipped = self.class_token + self.num_registers
    norm = partial(LayerNorm, self.layer_norm_eps)
    if self.pre_norm:
      x = norm(self.residual_dtype, name='ln_pre')(x)

    out = {}
    block_class = Block
    if self.remat == 'full':
      block_class = nn.remat(Block, static_argnums=(2,))
    for n in range(self.depth):
      x = block_class(
        num_heads=self.num_heads,
        mlp_dim=self.mlp_dim or 4 * self.width,
        activation=self.activation,
        layer_norm_eps=self.layer_norm_eps,
        layer_scale=self.layer_scale,
        drop_path=self.drop_path * n / max(self.depth - 1, 1),
        attention_implementation=self.attention_implementation,
        out_std=(2 * self.depth * self.width) ** -0.5,
        dtype=self.dtype,
        name=f'resblocks_{n}',
      )(x, train)
      out[f'block{n:02d}'] = x[:, skipped:]  # (B, L, D)
      if self.class_token:
        out[f'block{n:02d}_class'] = x[:, 0]  # (B, D)

    x = norm(self.dtype, name='ln_post')(x)
    out['normed'] = x[:, skipped:]
    out['class'] = x[:, 0] if self.class_token else self.pooled(out['normed'])
    if self.projection_dim:
      init = nn.initializers.normal(self.width**-0.5)
      proj = self.param('proj', init, (self.width, self.projection_dim))
      out['projected'] = out['normed'] @ proj.astype(self.dtype)
      out['projected_class'] = out['class'] @ proj.astype(self.dtype)
    if not self.num_classes:
      return None, out
    head = nn.Dense(self.num_classes, kernel_init=EMBEDDING_INIT, name='head')
    return head(out['class'].astype(jnp.float32)), out

  def final_norm(self, params, tokens):
    """The final norm alone, as `apply` computes out['normed']."""
    norm = LayerNorm(self.layer_norm_eps, self.dtype, parent=None)
    return norm.apply({'params': params['ln_post']}, tokens)

  def check_fields(self):
    """Refuses what would otherwise fail late or pass unnoticed."""
    if self.activation not in ACTIVATIONS:
      raise ValueError(
        f'activation {self.activation!r} is not one of {sorted(ACTIVATIONS)}.'
      )
    if self.attention_implementation not in ATTENTIONS:
      raise ValueError(
        f'attention_implementation {self.attention_implementation!r} is not '
        f'one of {ATTENTIONS}.'
      )
    if self.remat not in ('none', 'full'):
      raise ValueError(
        f"remat is {self.remat!r}; expected 'none' or 'full'. Change "
        'config.teacher.remat.'
      )
    if self.width % self.num_heads:
      raise ValueError(
        f'width {self.width} cannot be split into {self.num_heads} heads; '
        'change the model fields width or num_heads.'
      )

  def embed(self, images, token_mask, keep):
    """Patches, mask token, positions, class token, registers: (B, T, D)."""
    grid = patch_grid(images.shape[1:3], self.patch_size)
    old_grid = patch_grid(as_pair(self.image_size), self.patch_size)
    x = PatchEmbed(
      self.width, self.patch_size, self.patch_bias, self.dtype, name='conv1'
    )(images).astype(self.residual_dtype)  # (B, L, D)
    mask_token = None
    if self.use_mask_token:
      mask_token = self.param('mask_token', embedding_init, (self.width,))
    if token_mask is not None:
      x = replace_tokens(x, mask_token, token_mask)

    positions = self.param(
      'positional_embedding',
      position_init,
      old_grid,
      self.width,
      self.class_token,
    )
    patch_positions = resize_positions(
      positions[None, int(self.class_token) :],
      old_grid,
      grid,
      self.position_antialias,
    )
    x = x + patch_positions.astype(x.dtype)
    if keep is not None:
      x = jnp.take_along_axis(x, keep[..., None], 1)  # (B, M, D)
    front = []  # tokens before the patches, (n, D) each
    if self.class_token:
      token = self.param('class_embedding', embedding_init, (self.width,))
      front.append(token + positions[:1])
    if self.num_registers:
      shape = (self.num_registers, self.width)
      front.append(self.param('registers', embedding_init, shape))
    front = [
      jnp.broadcast_to(y.astype(x.dtype), (x.shape[0], *y.shape)) for y in front
    ]
    return jnp.concatenate([*front, x], 1)  # (B, T, D)

  def pooled(self, x):
    """One embedding of the patch tokens: (B, L, D) -> (B, D)."""
    if not self.attention_pool:
      return jnp.mean(x, 1, dtype=jnp.float32).astype(x.dtype)
    return AttentionPool(
      self.num_heads,
      self.mlp_dim or 4 * self.width,
      self.activation,
      self.layer_norm_eps,
      self.dtype,
      name='attnpool',
    )(x)


TINY = dict(width=192, depth=12, num_heads=3)
SMALL = dict(width=384, depth=12, num_heads=6)
BASE = dict(width=768, depth=12, num_heads=12)
LARGE = dict(width=1024, depth=24, num_heads=16)

CLIP = dict(
  pre_norm=True, patch_bias=False, activation='quick_gelu', layer_norm_eps=1e-5
)
CLIP_BASE = dict(BASE, projection_dim=512, **CLIP)
CLIP_LARGE = dict(LARGE, patch_size=14, projection_dim=768, **CLIP)
# OpenCLIP trained its own weights with the exact GELU.
GELU = dict(activation='gelu')
DINOV2 = dict(patch_size=14, image_size=518, layer_scale=1.0)
REGISTERS = dict(DINOV2, num_registers=4, position_antialias=True)
SIGLIP = dict(
  patch_size=16, class_token=False, attention_pool=True, activation='gelu_tanh'
)
# Hugging Face's ViT and ViTMAE.
HF = dict(layer_norm_eps=1e-12)

# name -> fields of ViT. Every name has a row in the test of parameter counts.
VARIANTS = {
  'vit_tiny_patch16': dict(TINY, patch_size=16),
  'vit_tiny_patch8': dict(TINY, patch_size=8),
  'vit_small_patch16': dict(SMALL, patch_size=16),
  'vit_small_patch8': dict(SMALL, patch_size=8),
  'vit_base_patch16': dict(BASE, patch_size=16),
  'vit_base_patch8': dict(BASE, patch_size=8),
  'vit_large_patch16': dict(LARGE, patch_size=16),
  'clip_base_patch32': dict(CLIP_BASE, patch_size=32),
  'clip_base_patch16': dict(CLIP_BASE, patch_size=16),
  'clip_large_patch14': dict(CLIP_LARGE),
  'clip_large_patch14_336': dict(CLIP_LARGE, image_size=336),
  'openclip_base_patch32': dict(CLIP_BASE, patch_size=32) | GELU,
  'openclip_base_patch16': dict(CLIP_BASE, patch_size=16) | GELU,
  'openclip_large_patch14': dict(CLIP_LARGE) | GELU,
  'dinov2_small_patch14': dict(SMALL, **DINOV2),
  'dinov2_base_patch14': dict(BASE, **DINOV2),
  'dinov2_large_patch14': dict(LARGE, **DINOV2),
  'dinov2_small_patch14_registers': dict(SMALL, **REGISTERS),
  'dinov2_base_patch14_registers': dict(BASE, **REGISTERS),
  'dinov2_large_patch14_registers': dict(LARGE, **REGISTERS),
  'siglip_base_patch16': dict(BASE, **SIGLIP),
  'siglip_base_patch16_384': dict(BASE, **SIGLIP, image_size=384),
  'siglip_large_patch16_256': dict(LARGE, **SIGLIP, image_size=256),
  'mae_base_patch16': dict(BASE, patch_size=16, **HF),
  'mae_large_patch16': dict(LARGE, patch_size=16, **HF),
  'supervised_base_patch16': dict(BASE, patch_size=16, **HF),
  'supervised_large_patch16': dict(LARGE, patch_size=16, **HF),
}
