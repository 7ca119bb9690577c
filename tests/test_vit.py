"""ViT: shapes, names, counts, position resizing, training."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from linearizer_jax.models import vit
from linearizer_jax.models.layers import resize_positions
from linearizer_jax.models.vit import ViT

# Parameters without head. B/16 of supervised ViT and CLIP's towers are the
# published counts.
PARAMETERS = {
  'vit_tiny_patch16': 5_524_416,
  'vit_tiny_patch8': 5_534_784 + 0,
  'vit_small_patch16': 21_665_664,
  'vit_small_patch8': 21_670_272 + 0,
  'vit_base_patch16': 85_798_656,
  'vit_base_patch8': 85_807_872 + 0,
  'vit_large_patch16': 303_301_632,
  'vit_large_patch8': 0,
  'clip_base_patch32': 87_849_216,
  'clip_base_patch16': 86_192_640,
  'clip_large_patch14': 303_966_208,
  'clip_large_patch14_336': 304_293_888,
}
