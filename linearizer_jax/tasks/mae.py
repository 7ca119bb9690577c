"""Masked autoencoder: a teacher that learns without labels.

Source: He et al., CVPR 2022, arXiv 2111.06377.

Shape letters: B batch, H and W pixels, L patch tokens, M visible ones, m = L -
M masked ones, D width of the encoder, p side of a patch.
"""

import dataclasses
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from linearizer_jax import losses, masking
from linearizer_jax.models import layers, transformer, vit
from linearizer_jax.tasks import inputs


class Decoder(nn.Module):
  """Pixels of the masked patches from the tokens of the visible ones.

  A linear layer to the decoder's width, the mask token where a patch is masked,
  fixed sine-cosine positions, blocks of a ViT, a linear layer to pixels.

  Fields:
    width, depth, num_heads: of the blocks, whose MLP is 4 width.
    patch_size: p.
    dtype: of matrix products and activations; parameters are float32.
    residual_dtype: of the residual stream.
  """

  width: int
  depth: int
  num_heads: int
  patch_size: int
  dtype: jnp.dtype
  residual_dtype: jnp.dtype

  @nn.compact
  def __call__(self, tokens, class_token, mask, grid):
    """Predicts the patches that the encoder did not see.

    Args:
      tokens: (B, M, D), the visible patches in raster order.
      class_token: (B, D), or None where the encoder has none.
      mask: (B, L) bool, True = masked, M of a row are not.
      grid: (rows, columns) of the L patches.

    Returns:
      (B, m, 3 p p) in dtype, the masked patches in raster order; pixels in
      raster order, channels last.
    """
    embed = nn.Dense(self.width, dtype=self.dtype, name='embed')
    mask_token = self.param(
      'mask_token', transformer.embedding_init, (self.width,)
    )
    # The n-th visible token goes to the n-th visible patch; what a masked one
    # picks is replaced.
    nth = jnp.maximum(jnp.cumsum(~mask, 1) - 1, 0)
    x = embed(tokens).astype(self.residual_dtype)
    x = jnp.take_along_axis(x, nth[..., None], 1)  # (B, L, width)
    x = layers.replace_tokens(x, mask_token, mask)
    positions = vit.position_init(None, grid, self.width, class_token=False)
    x = x + positions.astype(x.dtype)
    if class_token is not None:
      front = embed(class_token).astype(x.dtype)[:, None]
      x = jnp.concatenate([front, x], 1)  # (B, 1 + L, width)
    for n in range(self.depth):
      x = transformer.Block(
        num_heads=self.num_heads,
        mlp_dim=4 * self.width,
        activation='gelu',
        layer_norm_eps=1e-6,
        layer_scale=None,
        drop_path=0.0,
        attention_implementation=None,
        out_std=(2 * self.depth * self.width) ** -0.5,
        dtype=self.dtype,
        name=f'blocks_{n}',  # not of the encoder's layers, for layer_decay
      )(x, train=False)
    length = mask.shape[1]
    _, masked = masking.split_indices(mask, length - tokens.shape[1])
    x = masking.gather_tokens(x[:, -length:], masked)  # (B, m, width)
    x = transformer.LayerNorm(1e-6, self.dtype, name='norm')(x)
    return nn.Dense(
      3 * self.patch_size**2,
      dtype=self.dtype,
      kernel_init=layers.EMBEDDING_INIT,
      name='pixels',
    )(x)


@dataclasses.dataclass(frozen=True)
class MaskedAutoencoder:
  """A ViT sees a few patches of an image, a decoder paints the others.

  The encoder takes the visible tokens alone, so an update costs a fraction of
  one on whole images. The decoder is left behind: a distillation or a
  fine-tuning takes 'teacher' from the checkpoint.

  Attributes:
    model: the encoder, a `ViT`; `role` its key in the parameters.
    role: 'teacher'.
    mean, std: of the network's input.
    config: with `mae.*`; see configs/common.py for the fields.
  """

  model: nn.Module
  role: str
  mean: tuple[float, ...]
  std: tuple[float, ...]
  config: Any

  @property
  def decoder(self):
    options = self.config.mae
    return Decoder(
      width=options.decoder_width,
      depth=options.decoder_depth,
      num_heads=options.decoder_num_heads,
      patch_size=self.model.patch_size,
      dtype=self.model.dtype,
      residual_dtype=self.model.residual_dtype,
    )

  def check(self, num_tokens):
    """Raises ValueError for fields of the config that do not fit."""
    options = self.config.mae
    if self.role != 'teacher' or not isinstance(self.model, vit.ViT):
      raise ValueError(
        f"config.task is 'mae', config.train_role {self.role!r} and its "
        f'network of the kind {type(self.model).__name__}: the encoder takes '
        'the visible tokens alone, which a ViT can and a causal network '
        "cannot. Set config.train_role='teacher' and config.teacher.name to a "
        'ViT.'
      )
    count = round(options.mask_ratio * num_tokens)
    if not 0 < count < num_tokens:
      raise ValueError(
        f'config.mae.mask_ratio is {options.mask_ratio}, which masks {count} '
        f'of {num_tokens} patches; at least one must be masked and one stay '
        'visible.'
      )
    for field in ('decoder_width', 'decoder_depth', 'decoder_num_heads'):
      if options[field] < 1:
        raise ValueError(
          f'config.mae.{field} is {options[field]}; expected 1 or more.'
        )
    if options.decoder_width % options.decoder_num_heads:
      raise ValueError(
        f'config.mae.decoder_width is {options.decoder_width}, which cannot be '
        f'split into {options.decoder_num_heads} heads; change it or '
        'config.mae.decoder_num_heads.'
      )

  def init(self, key, image_shape):
    """{role: encoder, 'heads': decoder} for uint8 images (H, W, 3)."""
    encoder_key, decoder_key = jax.random.split(key)
    images = jnp.zeros((1, *image_shape))
    grid = layers.patch_grid(image_shape[:2], self.model.patch_size)
    mask = jnp.arange(grid[0] * grid[1])[None] > 0
    token = jnp.zeros((1, self.model.width))
    class_token = token if self.model.class_token else None
    heads = self.decoder.init(
      decoder_key, token[:, None], class_token, mask, grid
    )
    return {
      self.role: self.model.init(encoder_key, images)['params'],
      'heads': heads['params'],
    }

  def init_frozen(self, key):
    """Nothing is frozen."""
    del key
    return {}

  def prepare(self, batch, key):
    """Normalises the images and draws each one's 'mask', bool (B, L)."""
    images = inputs.normalize(batch['image'], self.mean, self.std)
    rows, columns = layers.patch_grid(images.shape[1:3], self.model.patch_size)
    mask = masking.random_mask(
      jax.random.fold_in(key, inputs.MASK_STREAM),
      len(images),
      rows * columns,
      self.config.mae.mask_ratio,
    )
    return {'image': images, 'mask': mask}

  def loss(self, params, frozen, batch, key):
    """Mean squared error on the masked patches of a prepared batch.

    Returns:
      (loss, metrics).
    """
    del frozen
    loss = self._distance(*self._predict(params, batch, key))
    return loss, {'loss': loss}

  def evaluate(self, params, frozen, batch, key):
    """Per-image {'loss'}, (B,) float32."""
    del frozen
    pair = self._predict(params, self.prepare(batch, key), None)
    return {'loss': jax.vmap(self._distance)(*(x[:, None] for x in pair))}

  def _predict(self, params, batch, key):
    """Masked patches as they are predicted and as they are, (B, m, 3 p p)."""
    images, mask = batch['image'], batch['mask']
    patch = self.model.patch_size
    grid = layers.patch_grid(images.shape[1:3], patch)
    count = masking.num_masked(mask.shape[1], self.config.mae.mask_ratio)
    visible, masked = masking.split_indices(mask, count)
    rngs = {}
    if key is not None:
      rngs['drop_path'] = jax.random.fold_in(key, inputs.DROP_PATH_STREAM)
    _, out = self.model.apply(
      {'params': params[self.role]},
      images,
      train=key is not None,
      keep=visible,
      rngs=rngs,
    )
    prediction = self.decoder.apply(
      {'params': params['heads']},
      out['normed'],
      out['class'] if self.model.class_token else None,
      mask,
      grid,
    )
    patches = einops.rearrange(
      images, 'b (h p) (w q) c -> b (h w) (p q c)', p=patch, q=patch
    )
    return prediction, masking.gather_tokens(patches, masked)

  def _distance(self, prediction, patches):
    """The loss in float32; each patch by its own mean and deviation."""
    norm = 'layernorm' if self.config.mae.norm_pixels else 'none'
    return losses.masked_prediction(
      prediction, patches, loss='mse', target_norm=norm
    )
