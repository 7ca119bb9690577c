"""Names of the released Adventurer, and what its tensors say of the model."""

import math

import numpy as np

_LAYER = 'layers.{n}.'

# The class token's position is the last row of pos_embed.
ADVENTURER = {
  'prefix': '',
  # Heads that our model does without.
  'ignored': ('head.*', 'segment.*'),
  'rows': (
    ('cls_token', 'cls_token', 'same'),
    ('pos_embed', 'pos_embed', 'same'),
    ('patch_embed/proj', 'patch_embed.proj', 'conv'),
    ('layers_{n}/norm', _LAYER + 'norm', 'norm'),
    ('layers_{n}/mixer/in_proj', _LAYER + 'mixer.in_proj', 'linear'),
    ('layers_{n}/mixer/conv1d', _LAYER + 'mixer.conv1d', 'depthwise'),
    ('layers_{n}/mixer/dt_bias', _LAYER + 'mixer.dt_bias', 'same'),
    ('layers_{n}/mixer/A_log', _LAYER + 'mixer.A_log', 'same'),
    ('layers_{n}/mixer/D', _LAYER + 'mixer.D', 'same'),
    ('layers_{n}/mixer/norm', _LAYER + 'mixer.norm', 'norm'),
    ('layers_{n}/mixer/out_proj', _LAYER + 'mixer.out_proj', 'linear'),
    ('layers_{n}/norm_mlp', _LAYER + 'norm_mlp', 'norm'),
    ('layers_{n}/mlp/w1', _LAYER + 'mlp.w1', 'linear'),
    ('layers_{n}/mlp/w2', _LAYER + 'mlp.w2', 'linear'),
    ('layers_{n}/mlp/w3', _LAYER + 'mlp.w3', 'linear'),
    ('norm_f', 'norm_f', 'norm'),
    ('head', 'head', 'linear'),
  ),
}


def is_adventurer(tensors):
  """Whether these are an Adventurer's, by one name."""
  return 'layers.0.mixer.A_log' in tensors


def fields(tensors, image_size=None):
  """Fields of `models.adventurer.Adventurer` that the tensors settle.

  The mixer is taken to have one group; what the tensors cannot tell is
  `flip_blocks`.

  Args:
    tensors: {name: array} under the released names.
    image_size: that the positions are made for; a square when None.

  Returns:
    dict of width, depth, patch_size, image_size, num_classes, head_dim,
    state_dim, expand.

  Raises:
    ValueError: a tensor that this takes a size from is missing, or the
      positions are not those of a square image.
  """
  try:
    width = tensors['cls_token'].shape[-1]
    patch = tensors['patch_embed.proj.weight'].shape[-1]
    tokens = tensors['pos_embed'].shape[1] - 1
    inner = tensors['layers.0.mixer.norm.weight'].shape[0]
    heads = tensors['layers.0.mixer.A_log'].shape[0]
    channels = tensors['layers.0.mixer.conv1d.bias'].shape[0]
  except KeyError as error:
    raise ValueError(
      f'these are not the weights of an Adventurer: {error} is missing.'
    ) from error
  side = math.isqrt(tokens)
  if image_size is None and side * side != tokens:
    raise ValueError(
      f'pos_embed has {tokens} rows beside the class token: no square image '
      'has so many patches. Name it in a config.json beside the weights.'
    )
  depth = 0
  while f'layers.{depth}.norm.weight' in tensors:
    depth += 1
  head = tensors.get('head.weight', np.zeros((0, width)))
  return {
    'width': width,
    'depth': depth,
    'patch_size': patch,
    'image_size': image_size or side * patch,
    'num_classes': head.shape[0],
    'head_dim': inner // heads,
    'state_dim': (channels - inner) // 2,
    'expand': inner // width,
  }
