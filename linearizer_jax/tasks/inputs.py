"""Images as a network takes them, on the devices.

Shape letters: B batch, H and W pixels.
"""

import jax
import jax.numpy as jnp

# A task folds these into the step's key, so that streams never meet.
MASK_STREAM, DROP_PATH_STREAM, MIX_STREAM, DROPOUT_STREAM = range(4)


def normalize(images, mean, std):
  """uint8 (B, H, W, 3) to float32, (image / 255 - mean) / std per channel."""
  mean, std = jnp.asarray(mean) * 255, jnp.asarray(std) * 255
  return (images.astype(jnp.float32) - mean) / std


def resize_images(images, size):
  """Bicubic, antialiased resize of float images (B, H, W, 3) to (h, w)."""
  if images.shape[1:3] == tuple(size):
    return images
  shape = (images.shape[0], *size, images.shape[3])
  return jax.image.resize(images, shape, 'cubic', antialias=True)
