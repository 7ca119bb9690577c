"""Segmentation: cross-entropy of every labelled pixel, mIoU of a data set.

Shape letters: B batch, H and W pixels of the images, R and S of the labels,
V classes.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from linearizer_jax.models import layers
from linearizer_jax.models.segmenter import Segmenter
from linearizer_jax.tasks import inputs

IGNORED = 255
# Rows of labels scored at once: the logits of a large image at the size of its
# labels would not fit beside the network.
ROWS_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Segment:
  """A `Segmenter` against label maps uint8 (B, H, W), 255 where ignored.

  Attributes:
    model: the segmenter; `role` the key of its backbone in the parameters, what
      lies above it is 'heads'.
    role: 'student' or 'teacher'.
    mean, std: of the network's input.
    config: with `segment.auxiliary_weight`, `data.{eval_window, eval_stride}`.
  """

  model: Segmenter
  role: str
  mean: tuple[float, ...]
  std: tuple[float, ...]
  config: Any

  def init(self, key, image_shape):
    """{role: ..., 'heads': ...}, and 'batch_stats' where the head has any."""
    variables = self.model.init(key, jnp.zeros((1, *image_shape)))
    params = dict(variables['params'])
    found = {self.role: params.pop('backbone'), 'heads': params}
    stats = {k: v for k, v in variables.items() if k == 'batch_stats'}
    return found | stats

  def init_frozen(self, key):
    """Nothing is frozen."""
    del key
    return {}

  def prepare(self, batch, key):
    """Normalises the images; labels stay as they are."""
    del key
    images = inputs.normalize(batch['image'], self.mean, self.std)
    return {'image': images, 'label': batch['label']}

  def loss(self, params, frozen, batch, key):
    """Cross-entropy of a prepared batch, auxiliary head included.

    The mean is over the labelled pixels of the batch.

    Returns:
      (loss, metrics); metrics hold the new 'batch_stats' where there are any.
    """
    (logits, out), updated = self.model.apply(
      self._variables(params, frozen),
      batch['image'],
      train=True,
      rngs={
        'drop_path': jax.random.fold_in(key, inputs.DROP_PATH_STREAM),
        'dropout': jax.random.fold_in(key, inputs.DROPOUT_STREAM),
      },
      mutable=['batch_stats'],
    )
    label = batch['label']
    labelled = label != IGNORED
    pixels = jnp.maximum(labelled.sum(), 1)
    loss = pixel_losses(logits, label).sum() / pixels
    hits = (logits.argmax(-1) == label) & labelled
    metrics = {'pixel_accuracy': 100 * hits.sum() / pixels}
    weight = self.config.segment.auxiliary_weight
    if weight and 'auxiliary' in out:
      auxiliary = pixel_losses(out['auxiliary'], label).sum() / pixels
      metrics['auxiliary'] = auxiliary
      loss = loss + weight * auxiliary
    return loss, {'loss': loss} | metrics | updated

  def evaluate(self, params, frozen, batch, key):
    """Per image the mean 'loss' (B,) and the 'confusion' (B, V, V) int32.

    `batch` is one of `data.dense.eval_batch`: images and labels lie at the top
    left of canvases that all images of the batch share, 'size' and 'label_size'
    (B, 2) say how far they reach. The logits, averaged where windows overlap,
    are brought to the size of the labels.
    """
    del key
    logits = self.logits(params, frozen, batch)
    return score(logits, batch['size'], batch['label'], batch['label_size'])

  def logits(self, params, frozen, batch):
    """(B, H, W, V) for 'image' and 'size' of a batch that `evaluate` takes."""
    variables = self._variables(params, frozen)
    images = inputs.normalize(batch['image'], self.mean, self.std)
    data = self.config.data
    window = layers.as_pair(data.eval_window)
    stride = layers.as_pair(data.eval_stride)
    return window_logits(
      lambda x: self._logits(variables, x),
      images,
      batch['size'],
      window,
      tuple(s or w for s, w in zip(stride, window, strict=True)),
    )

  def _logits(self, variables, images):
    """Logits of images of any size, filled up with grey to whole patches."""
    height, width = images.shape[1:3]
    patch = self.model.patch_size
    pad = (0, 0), (0, -height % patch), (0, -width % patch), (0, 0)
    logits, _ = self.model.apply(variables, jnp.pad(images, pad))
    return logits[:, :height, :width]

  def _variables(self, params, frozen):
    stats = {k: v for k, v in frozen.items() if k == 'batch_stats'}
    return {'params': params['heads'] | {'backbone': params[self.role]}} | stats


def pixel_losses(logits, label):
  """Cross-entropy of each pixel, 0 where ignored: (..., V), (...) -> (...)."""
  labelled = label != IGNORED
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits, jnp.where(labelled, label, 0).astype(jnp.int32)
  )
  return jnp.where(labelled, losses, 0)


def window_logits(forward, images, size, window, stride):
  """Logits of images through windows that slide over them.

  Windows start at multiples of the stride; the last of a row or column ends at
  the border of the image. Where a window is as large as the canvas, the network
  sees the canvas whole along that side.

  Args:
    forward: (B, h, w, 3) -> logits (B, h, w, V) float32.
    images: (B, H, W, 3) float, each at the top left of its canvas.
    size: int (B, 2), height and width of the images; a side of the canvas that
      is longer than the window must be as long as the longest image or longer,
      any other exactly as long as the images.
    window, stride: (height, width) in pixels; a window of 0 is the canvas.

  Returns:
    (B, H, W, V) float32, the mean over the windows that saw a pixel; zero
    beyond the images.
  """
  canvas = images.shape[1:3]
  window = tuple(
    min(w or side, side) for w, side in zip(window, canvas, strict=True)
  )
  if window == canvas:
    return forward(images)
  counts = [
    math.ceil((side - w) / step) + 1 if side > w else 1
    for side, w, step in zip(canvas, window, stride, strict=True)
  ]
  room = jnp.maximum(size - jnp.asarray(window), 0)  # (B, 2)

  def add(sums, index):
    place = jnp.stack([index // counts[1], index % counts[1]])
    steps = place * jnp.asarray([s or 1 for s in stride])
    used = (steps - jnp.asarray(stride) < room) | (place == 0)  # (B, 2)
    used = used.all(1).astype(jnp.float32)[:, None, None, None]
    start = jnp.minimum(steps, room)
    crops = jax.vmap(
      lambda x, at: jax.lax.dynamic_slice(x, (*at, 0), (*window, x.shape[-1]))
    )(images, start)
    logits = forward(crops)
    seen = jnp.ones((*logits.shape[:-1], 1))
    added = jnp.concatenate([logits, seen], -1) * used

    def paste(total, part, at):
      at = (*at, 0)
      old = jax.lax.dynamic_slice(total, at, part.shape)
      return jax.lax.dynamic_update_slice(total, old + part, at)

    return jax.vmap(paste)(sums, added, start), None

  shape = jax.eval_shape(
    forward, jax.ShapeDtypeStruct((len(images), *window, 3), images.dtype)
  )
  sums = jnp.zeros((len(images), *canvas, shape.shape[-1] + 1))
  sums, _ = jax.lax.scan(add, sums, jnp.arange(counts[0] * counts[1]))
  return sums[..., :-1] / jnp.maximum(sums[..., -1:], 1)


def score(logits, size, label, label_size):
  """Loss and confusion matrix of each image at the size of its labels.

  Logits are resized bilinearly, as torch's `interpolate(mode='bilinear',
  align_corners=False)` does, a few rows at a time.

  Args:
    logits: (B, H, W, V) float32, valid in the first `size` pixels.
    size: int (B, 2).
    label: uint8 (B, R, S), 255 ignored, and beyond `label_size`.
    label_size: int (B, 2).

  Returns:
    {'loss': (B,) mean over labelled pixels, 'confusion': (B, V, V) int32, rows
    the labels, columns the predictions}.
  """
  num_classes = logits.shape[-1]
  height, width = label.shape[1:]
  rows = min(ROWS_AT_ONCE, height)
  fill = (0, 0), (0, -height % rows), (0, 0)
  label = jnp.pad(label, fill, constant_values=IGNORED)
  columns = _sources(jnp.arange(width), size[:, 1], label_size[:, 1])

  def add(sums, first):
    loss, pixels, confusion = sums
    part = jax.lax.dynamic_slice_in_dim(label, first, rows, 1)
    lines = _sources(first + jnp.arange(rows), size[:, 0], label_size[:, 0])
    x = _between(logits, lines, axis=0)
    x = _between(x, columns, axis=1)  # (B, rows, S, V)
    ours = jax.nn.one_hot(x.argmax(-1), num_classes)
    theirs = jax.nn.one_hot(part, num_classes)  # zero where ignored
    # Exact: a part of an image has fewer than 2**24 pixels.
    found = jnp.einsum('brsv,brsu->bvu', theirs, ours)
    return (
      loss + pixel_losses(x, part).sum((1, 2)),
      pixels + (part != IGNORED).sum((1, 2)),
      confusion + found.astype(jnp.int32),
    ), None

  count = len(logits)
  sums = (
    jnp.zeros(count),
    jnp.zeros(count, jnp.int32),
    jnp.zeros((count, num_classes, num_classes), jnp.int32),
  )
  firsts = jnp.arange(0, label.shape[1], rows)
  (loss, pixels, confusion), _ = jax.lax.scan(add, sums, firsts)
  return {'loss': loss / jnp.maximum(pixels, 1), 'confusion': confusion}


def _sources(places, old, new):
  """Where pixels of a side of `new` lie on one of `old`: float (B, places)."""
  ratio = old / jnp.maximum(new, 1)
  at = (places + 0.5) * ratio[:, None] - 0.5
  return jnp.clip(at, 0, jnp.maximum(old - 1, 0)[:, None])


def _between(x, at, axis):
  """x (B, H, W, V) at the places `at` (B, n) along an axis of one image."""
  low = jnp.floor(at).astype(jnp.int32)
  take = jax.vmap(lambda image, i: jnp.take(image, i, axis, mode='clip'))
  share = jnp.expand_dims(at - low, (2, 3) if axis == 0 else (1, 3))
  below = take(x, low)
  return below + share * (take(x, low + 1) - below)
