"""Arithmetic of a forward pass, counted from a model's fields.

XLA's cost analysis counts the body of a loop once and knows nothing of a fused
attention; this count is of the method. Shape letters: D width, N state, Q chunk
length, T tokens.
"""

from linearizer_jax.models.adventurer import Adventurer
from linearizer_jax.models.layers import patch_grid
from linearizer_jax.models.mamba2 import CONV_TAPS

CHUNK = 128  # tokens in a chunk of the scan, where nothing else is measured
BACKWARD = 2  # a backward pass is two products for each one of the forward


def forward(model, size):
  """FLOPs of one image, two for each multiplication with addition.

  Products alone: norms, activations, softmax and decays are left out. Attention
  is counted whole, the scan in its chunked form (arXiv 2405.21060, section 6)
  with Q = 128: per token Q (N G + d) for what tokens of a chunk give each other
  and 2 N d for the states, d = expand D.

  Args:
    model: `Adventurer` or `ViT`.
    size: (height, width) in pixels.

  Returns:
    int.

  Raises:
    ValueError: sides that are no multiples of the patch size.
  """
  rows, columns = patch_grid(size, model.patch_size)
  patches, d = rows * columns, model.width
  stem = patches * 3 * model.patch_size**2 * d
  head = d * model.num_classes
  if isinstance(model, Adventurer):
    tokens = patches + 2  # class token and heading average
    inner = model.expand * d
    state = model.num_groups * model.state_dim
    conv = inner + 2 * state
    mixer = d * (inner + conv + inner // model.head_dim) + CONV_TAPS * conv
    scan = min(CHUNK, tokens) * (state + inner)
    if tokens > CHUNK:
      scan += 2 * model.state_dim * inner
    mlp = 3 * d * int(2.5 * d)
    block = tokens * (mixer + scan + inner * d) + (tokens - 1) * mlp
  else:
    tokens = patches + model.class_token + model.num_registers
    mlp = 2 * d * (model.mlp_dim or 4 * d)
    block = tokens * (4 * d * d + mlp + 2 * tokens * d)
  return 2 * (stem + model.depth * block + head)


def count(model, size, direction):
  """FLOPs of one image in a 'training' step or an 'inference'."""
  passes = 1 + BACKWARD if direction == 'training' else 1
  return passes * forward(model, size)
