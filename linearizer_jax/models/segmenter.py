"""Segmentation: a backbone of this project under UperNet or a linear head.

Shape letters: B batch, H and W pixels, h and w patch rows and columns, D width,
C channels of the head, V classes.
"""

import math

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from linearizer_jax.models import layers

HEADS = ('upernet', 'linear')
STAGES = 4
POOL_SCALES = (1, 2, 3, 6)
# torch's defaults: running = 0.9 running + 0.1 batch.
NORM = dict(momentum=0.9, epsilon=1e-5)
_CONV_INIT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
_CLASSIFIER_INIT = nn.initializers.normal(0.01)


class Segmenter(nn.Module):
  """A class for every pixel, from the patch tokens of a backbone.

  `apply(variables, images, train=False) -> (logits, out)`:

    images: (B, H, W, 3) float, normalised; H and W multiples of the patch size.
    train: drop path, dropout and batch statistics of this batch; needs the
      random streams 'drop_path' and 'dropout' and `mutable=['batch_stats']`.

  Returns logits (B, H, W, V) float32, resized bilinearly from the stride of the
  head, and the `out` of the backbone; in training also 'auxiliary', logits like
  the first, where the head is 'upernet'.

  'upernet': UperNet (arXiv 1807.10221) as on plain ViTs (BEiT, arXiv
  2106.08254). The tokens after four evenly spaced blocks become maps of strides
  4, 8, 16 and 32 (for patches of 16); a convolutional head on the third stage
  gives the auxiliary logits. 'linear': one 1 x 1 convolution on the tokens
  after the final norm.

  Numerics: products in the backbone's dtype, batch statistics and logits in
  float32. Under jit with a batch cut over devices the statistics are those of
  the whole batch.

  Attributes:
    backbone: a model of this project without a head.
    num_classes: V.
    head: 'upernet' or 'linear'.
    channels, auxiliary_channels: width of UperNet, and of the head beside it.
    dropout: rate on whole channels before a classifier.

  Raises:
    ValueError: an unknown head, a backbone with too few blocks, sides that the
      patch size does not divide.
  """

  backbone: nn.Module
  num_classes: int
  head: str = 'upernet'
  channels: int = 512
  auxiliary_channels: int = 256
  dropout: float = 0.1

  @property
  def depth(self):
    return self.backbone.depth

  @property
  def patch_size(self):
    return self.backbone.patch_size

  @property
  def image_size(self):
    return self.backbone.image_size

  @nn.compact
  def __call__(self, images, train=False):
    if self.head not in HEADS:
      raise ValueError(
        f'the head is {self.head!r}; expected one of {HEADS}. Change '
        'config.segment.head.'
      )
    size = images.shape[1:3]
    rows, _ = layers.patch_grid(size, self.patch_size)
    _, out = self.backbone(images, train=train)

    def grid(name):
      tokens = out[name].astype(self.backbone.dtype)
      return einops.rearrange(tokens, 'b (h w) d -> b h w d', h=rows)

    if self.head == 'linear':
      logits = Classifier(self.num_classes, self.dropout, name='classifier')(
        grid('normed'), train
      )
      return resize(logits, size), out

    maps = [grid(name) for name in stage_blocks(self.depth)]
    logits = UperNet(
      self.num_classes,
      self.channels,
      self.dropout,
      math.log2(self.patch_size / 4),
      self.backbone.dtype,
      name='decoder',
    )(maps, train)
    if train or self.is_initializing():
      x = ConvNorm(
        self.auxiliary_channels, 3, self.backbone.dtype, name='auxiliary_conv'
      )(maps[2], train)
      x = Classifier(
        self.num_classes, self.dropout, name='auxiliary_classifier'
      )(x, train)
      out = out | {'auxiliary': resize(x, size)}
    return resize(logits, size), out


def from_config(config, backbone, num_classes):
  """The `Segmenter` of `config.segment` on a backbone."""
  options = config.segment
  return Segmenter(
    backbone,
    num_classes,
    options.head,
    options.channels,
    options.auxiliary_channels,
    options.dropout,
  )


def stage_blocks(depth):
  """Names of the blocks that end the four stages, round(k depth / 4) - 1.

  Raises:
    ValueError: fewer blocks than stages.
  """
  if depth < STAGES:
    raise ValueError(
      f'UperNet reads {STAGES} blocks, the backbone has {depth}; set '
      "config.segment.head='linear', or choose a deeper config.student."
    )
  return [f'block{round(k * depth / STAGES) - 1:02d}' for k in range(1, 5)]


class UperNet(nn.Module):
  """Four maps (B, h, w, D) of one stride -> logits at the finest of four.

  `doublings`, log2(patch size / 4), is how often the first map is enlarged
  twofold; each later one once less, then it is halved instead.
  """

  num_classes: int
  channels: int
  dropout: float
  doublings: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, maps, train):
    def conv(size, name, width=self.channels):
      layer = ConvNorm(width, size, self.dtype, name=name)
      return lambda x: layer(x, train)

    maps = [
      Rescale(round(self.doublings) - k, self.dtype, name=f'rescale_{k}')(
        x, train
      )
      for k, x in enumerate(maps)
    ]
    last = maps[-1]
    pooled = [last]
    for n, scale in enumerate(POOL_SCALES):
      x = conv(1, f'pool_{n}')(adaptive_pool(last, scale))
      pooled.append(resize(x, last.shape[1:3]))
    tops = [conv(1, f'lateral_{k}')(maps[k]) for k in range(STAGES - 1)]
    tops.append(conv(3, 'bottleneck')(jnp.concatenate(pooled, -1)))
    for k in reversed(range(STAGES - 1)):
      tops[k] = tops[k] + resize(tops[k + 1], tops[k].shape[1:3])
    for k in range(STAGES - 1):
      tops[k] = conv(3, f'fpn_{k}')(tops[k])
    finest = tops[0].shape[1:3]
    x = jnp.concatenate([resize(x, finest) for x in tops], -1)
    x = conv(3, 'fuse')(x)  # (B, H / 4, W / 4, C)
    return Classifier(self.num_classes, self.dropout, name='classifier')(
      x, train
    )


class Rescale(nn.Module):
  """(B, h, w, D), enlarged twofold `doublings` times or halved as often."""

  doublings: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, train):
    if self.doublings <= 0:
      return halve(x, -self.doublings)
    for n in range(self.doublings):
      if n:
        x = nn.BatchNorm(not train, dtype=self.dtype, name=f'norm_{n}', **NORM)(
          x
        )
        x = jax.nn.gelu(x, approximate=False)
      x = nn.ConvTranspose(
        x.shape[-1], (2, 2), (2, 2), dtype=self.dtype, name=f'up_{n}'
      )(x)
    return x


class ConvNorm(nn.Module):
  """Convolution without bias, batch norm, ReLU."""

  features: int
  size: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, train):
    x = nn.Conv(
      self.features,
      (self.size, self.size),
      use_bias=False,
      dtype=self.dtype,
      kernel_init=_CONV_INIT,
      name='conv',
    )(x)
    x = nn.BatchNorm(not train, dtype=self.dtype, name='norm', **NORM)(x)
    return jax.nn.relu(x)


class Classifier(nn.Module):
  """Dropout of whole channels, then a 1 x 1 convolution in float32."""

  num_classes: int
  dropout: float

  @nn.compact
  def __call__(self, x, train):
    x = nn.Dropout(self.dropout, broadcast_dims=(1, 2))(
      x, deterministic=not train
    )
    return nn.Conv(
      self.num_classes,
      (1, 1),
      kernel_init=_CLASSIFIER_INIT,
      name='conv',
    )(x.astype(jnp.float32))


def resize(x, size):
  """(B, h, w, C) to (B, *size, C), bilinear, pixel centres at half integers.

  Equal to torch's `interpolate(mode='bilinear', align_corners=False)`.
  """
  if x.shape[1:3] == tuple(size):
    return x
  return jax.image.resize(
    x,
    (x.shape[0], *size, x.shape[3]),
    'bilinear',
    antialias=False,
    precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
  )


def halve(x, times):
  """Largest value of every 2**times x 2**times pixels, or of a smaller side."""
  if not times:
    return x
  window = tuple(min(2**times, side) for side in x.shape[1:3])
  return nn.max_pool(x, window, window)


def adaptive_pool(x, bins):
  """Means over bins x bins overlapping cells, as torch's adaptive_avg_pool2d.

  Args:
    x: (B, h, w, C); a side may be shorter than `bins`.
    bins: cells along each side; cell i spans floor(i h / bins) to
      ceil((i + 1) h / bins).

  Returns:
    (B, bins, bins, C), x's dtype; sums in float32.
  """
  over_rows, over_columns = (_bin_weights(side, bins) for side in x.shape[1:3])
  return jnp.einsum(
    'bhwc,ih,jw->bijc',
    x.astype(jnp.float32),
    over_rows,
    over_columns,
    precision=jax.lax.Precision.HIGHEST,
  ).astype(x.dtype)


def _bin_weights(side, bins):
  """(bins, side) float32, rows that average a cell."""
  weights = np.zeros((bins, side), np.float32)
  for i in range(bins):
    first, last = i * side // bins, -(-(i + 1) * side // bins)
    weights[i, first:last] = 1 / (last - first)
  return weights
