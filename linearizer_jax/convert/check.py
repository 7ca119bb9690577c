"""Published weights against their PyTorch implementation, block by block.

The first thing to run where there is network: what no test here can see is
whether the files on the hub are what we take them for.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from linearizer_jax import losses, models
from linearizer_jax.convert import load, weights
from linearizer_jax.models.layers import as_pair
from linearizer_jax.models.teachers import TEACHERS

TOLERANCE = 1e-5  # relative L2 of a block's output, float32
# family -> class of transformers; AutoModel where it gives the image tower.
CLASSES = {'clip': 'CLIPVisionModel', 'siglip': 'SiglipVisionModel'}


def check(teacher, *, name=None, steps=3, batch_size=4):
  """Compares, describes and tries a teacher; prints what it finds.

  Args:
    teacher: name in `TEACHERS`, its hub repository, or a folder of the same
      layout (config.json and weights).
    name: the row of TEACHERS that a folder is of; found by its repository or
      its folder's name where that is one.
    steps: updates of a tiny student to try on random images.
    batch_size: random images.

  Returns:
    {'blocks': [relative L2 error of each], 'losses': [of each update]}.

  Raises:
    ValueError: no such teacher, or a block that differs by more than 1e-5.
    ImportError: torch or transformers is missing.
    FileNotFoundError: nothing there, or no network.
  """
  name = name or _row_of(teacher)
  published = [key for key, row in TEACHERS.items() if row.family]
  if name not in published:
    raise ValueError(
      f'no weights of {name!r} are published; expected one of '
      f'{", ".join(published)}.'
    )
  row = TEACHERS[name]
  path = weights.find_weights(row.source if teacher == name else teacher)
  model, variables, _ = load.load_teacher(name, path)
  images = np.random.default_rng(0).standard_normal(
    (batch_size, *as_pair(model.image_size), 3), np.float32
  )
  _, out = jax.jit(model.apply)(variables, images)
  errors = _errors(model, out, _torch_blocks(row, path.parent, images))
  print(f'{path}\n{name}: {"block":>8}{"error":>12}{"cosine":>9}{"largest":>9}')
  for n, error in enumerate(errors):
    tokens = np.asarray(out[f'block{n:02d}'])
    cosine, largest = map_statistics(tokens)
    print(f'{n:{len(name) + 10}}{error:12.1e}{cosine:9.2f}{largest:8.0f}s')
  print(
    'error: relative L2 against transformers; cosine: mean over pairs of '
    'tokens; largest: channel, in standard deviations.'
  )
  worst = int(np.argmax(errors))  # unlike max, finds a NaN
  if not errors[worst] <= TOLERANCE:
    raise ValueError(
      f'block {worst} of {path} differs from transformers by '
      f'{errors[worst]:.1e}, more than {TOLERANCE:.0e}. Do not distil from it; '
      'please report it with the versions of transformers and jax.'
    )
  found = try_matching(model, out, images, steps)
  print('activation matching, updates of a tiny student: ', end='')
  print(' '.join(f'{loss:.4f}' for loss in found))
  return {'blocks': errors, 'losses': found}


def _row_of(teacher):
  """The name in TEACHERS that a name, a repository or a folder stands for."""
  last = str(teacher).rstrip('/').rpartition('/')[2]
  for name, row in TEACHERS.items():
    if teacher in (name, row.source) or (
      row.source and last == row.source.rpartition('/')[2]
    ):
      return name
  sources = [row.source for row in TEACHERS.values() if row.source]
  raise ValueError(
    f'{teacher} is not a teacher that is known here. Give --name, the row of '
    f'models/teachers.py it is of, or one of {", ".join(sources)}.'
  )


def _torch_blocks(row, folder, images):
  """Hidden states of every block of transformers' model, (B, T, D)."""
  try:
    import torch
    import transformers
  except ImportError as error:
    raise ImportError(
      f'the comparison needs {error.name}: pip install torch transformers.'
    ) from error
  kind = getattr(transformers, CLASSES.get(row.family, 'AutoModel'))
  model = kind.from_pretrained(folder).eval()
  extra = {}
  if type(model).__name__ == 'ViTMAEModel':  # keeps all tokens, in order
    model.config.mask_ratio = 0.0
    count = (images.shape[1] // model.config.patch_size) ** 2
    extra['noise'] = torch.arange(count).expand(len(images), count).float()
  pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
  with torch.no_grad():
    states = model(pixels, output_hidden_states=True, **extra).hidden_states
  return [state.numpy() for state in states[1:]]


def _errors(model, out, theirs):
  """Relative L2 error of the patch tokens after each block."""
  if len(theirs) != model.depth:
    raise ValueError(
      f'transformers has {len(theirs)} blocks, our model {model.depth}.'
    )
  errors = []
  for n, state in enumerate(theirs):
    ours = np.asarray(out[f'block{n:02d}'], np.float64)
    state = state[:, -ours.shape[1] :]  # class token and registers come first
    errors.append(np.linalg.norm(ours - state) / np.linalg.norm(state))
  return [float(error) for error in errors]


def map_statistics(tokens):
  """How alike tokens are, and how much one channel stands out.

  Args:
    tokens: (B, L, D) after a block.

  Returns:
    (mean cosine between different tokens of an image, largest deviation of a
    channel from the mean of its token, in standard deviations of the token).
  """
  unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
  length = tokens.shape[1]
  pairs = np.square(np.linalg.norm(unit.sum(1), axis=-1)) - length
  centred = tokens - tokens.mean(-1, keepdims=True)
  largest = np.abs(centred).max(-1) / tokens.std(-1)
  return float((pairs / (length * (length - 1))).mean()), float(largest.max())


def try_matching(model, out, images, steps):
  """Losses of a tiny student that matches the last block's activation map."""
  rows = images.shape[1] // model.patch_size
  student = models.create_model(
    'adventurer_tiny_patch16', depth=2, num_classes=0, image_size=rows * 16
  )
  teacher = out[f'block{model.depth - 1:02d}']
  shape = (len(images), rows * 16, rows * 16, 3)
  inputs = jax.image.resize(images, shape, 'cubic')
  params = jax.jit(student.init)(jax.random.key(0), inputs)
  tx = optax.adamw(1e-3)

  def loss(params, teacher):
    _, features = student.apply(params, inputs)
    return losses.activation_matching(
      teacher.astype(jnp.float32), features['block01']
    )

  @jax.jit
  def update(params, state, teacher):
    value, gradient = jax.value_and_grad(loss)(params, teacher)
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value

  state, found = tx.init(params), []
  for _ in range(steps):
    params, state, value = update(params, state, teacher)
    found.append(float(value))
  return found
