"""Classification: cross-entropy of one network against labels.

Shape letters: B batch, H and W pixels, V classes.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from linearizer_jax.tasks import inputs


@dataclasses.dataclass(frozen=True)
class Classify:
  """Cross-entropy of one network against labels.

  Attributes:
    model: the network; `role` its key in the parameters.
    role: 'student' or 'teacher'.
    mean, std: of the network's input.
    config: with `classify.{label_smoothing, mixup, cutmix}`.
  """

  model: nn.Module
  role: str
  mean: tuple[float, ...]
  std: tuple[float, ...]
  config: Any

  def init(self, key, image_shape):
    """Parameters {role: ...} for uint8 images of shape (H, W, 3)."""
    images = jnp.zeros((1, *image_shape))
    return {self.role: self.model.init(key, images)['params']}

  def init_frozen(self, key):
    """Nothing is frozen."""
    del key
    return {}

  def prepare(self, batch, key):
    """Adds one-hot 'target' (B, V), smoothed, with mixup or cutmix."""
    options = self.config.classify
    target = jax.nn.one_hot(batch['label'], self.model.num_classes)
    target = optax.smooth_labels(target, options.label_smoothing)
    images = inputs.normalize(batch['image'], self.mean, self.std)
    if options.mixup or options.cutmix:
      images, target = mix_images(
        jax.random.fold_in(key, inputs.MIX_STREAM),
        images,
        target,
        options.mixup,
        options.cutmix,
      )
    return {'image': images, 'target': target}

  def loss(self, params, frozen, batch, key):
    """Mean cross-entropy of a prepared batch: (loss, metrics)."""
    del frozen
    logits, _ = self.model.apply(
      {'params': params[self.role]},
      batch['image'],
      train=True,
      rngs={'drop_path': jax.random.fold_in(key, inputs.DROP_PATH_STREAM)},
    )
    loss = optax.softmax_cross_entropy(logits, batch['target']).mean()
    hits = logits.argmax(-1) == batch['target'].argmax(-1)
    return loss, {'loss': loss, 'accuracy': 100 * hits.mean()}

  def evaluate(self, params, frozen, batch, key):
    """Per-image {'loss', 'accuracy', 'top5'}, (B,) float32, in percent."""
    del frozen, key
    images = inputs.normalize(batch['image'], self.mean, self.std)
    logits, _ = self.model.apply({'params': params[self.role]}, images)
    label = batch['label']
    top5 = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
    return {
      'loss': optax.softmax_cross_entropy_with_integer_labels(logits, label),
      'accuracy': 100.0 * (logits.argmax(-1) == label),
      'top5': 100.0 * (top5 == label[:, None]).any(-1),
    }

  def features(self, params, images):
    """What a probe sees of uint8 images (B, H, W, 3), after the final norm.

    Returns {'class': the class token, 'patches': the mean of the patch tokens},
    (B, D) float32 each.
    """
    images = inputs.normalize(images, self.mean, self.std)
    _, out = self.model.apply({'params': params[self.role]}, images)
    return {
      'class': out['class'].astype(jnp.float32),
      'patches': out['normed'].mean(1, dtype=jnp.float32),
    }


def mix_images(key, images, target, mixup, cutmix):
  """Mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899) of a batch.

  Each image is mixed with its mirror in the batch, by one share drawn for the
  whole batch; where both are on, one of them is picked with equal chance.

  Args:
    key: a JAX random key.
    images: float (B, H, W, 3).
    target: float (B, V), rows summing to 1.
    mixup, cutmix: alpha of the Beta distribution of the share; 0 turns it off.

  Returns:
    (images, target) mixed, same shapes.
  """
  pick_key, mixup_key, cutmix_key, box_key = jax.random.split(key, 4)
  use_cutmix = jnp.asarray(bool(cutmix))
  if mixup and cutmix:
    use_cutmix = jax.random.bernoulli(pick_key)
  height, width = images.shape[1:3]
  share = jax.random.beta(mixup_key, mixup or 1.0, mixup or 1.0)
  cut = jax.random.beta(cutmix_key, cutmix or 1.0, cutmix or 1.0)
  box = _random_box(box_key, height, width, cut)  # (H, W, 1), 1 = other image
  weight = jnp.where(use_cutmix, box, 1 - share)  # of the other image
  images = images * (1 - weight) + images[::-1] * weight
  other = weight.mean()
  return images, target * (1 - other) + target[::-1] * other


def _random_box(key, height, width, keep):
  """Float mask (H, W, 1), 1 in a box of about (1 - keep) of the area."""
  side = jnp.sqrt(1 - keep)
  sizes = jnp.array([height, width])
  center = jax.random.uniform(key, (2,)) * sizes
  low = jnp.clip(jnp.round(center - side * sizes / 2), 0, sizes)
  high = jnp.clip(jnp.round(center + side * sizes / 2), 0, sizes)
  rows, columns = jnp.arange(height), jnp.arange(width)
  rows = (rows >= low[0]) & (rows < high[0])
  columns = (columns >= low[1]) & (columns < high[1])
  return (rows[:, None] & columns)[..., None].astype(jnp.float32)
