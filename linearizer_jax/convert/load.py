"""Any weights, as a model that is ready to use."""

import dataclasses
import json
import logging
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import traverse_util
from PIL import Image, ImageOps

from linearizer_jax import checkpoint, models
from linearizer_jax.convert import (
  FAMILIES,
  adventurer,
  segmenter,
  tables,
  weights,
)
from linearizer_jax.models.layers import as_pair, patch_grid, resize_positions
from linearizer_jax.models.segmenter import Segmenter
from linearizer_jax.models.segmenter import from_config as head_from_config
from linearizer_jax.models.teachers import IMAGENET, TEACHERS

# Students that come with the package: a name and what its card has to add.
PACKAGED = {
  'adventurer_imagenette': (
    'Trained on Imagenette, ten classes of ImageNet, in this order: tench, '
    'English springer, cassette player, chain saw, church, French horn, '
    'garbage truck, gas pump, golf ball, parachute. The code is under '
    'Apache-2.0; the images are under the terms of ImageNet, for research and '
    'education that is not commercial, and whoever uses these weights should '
    'keep to them.'
  ),
}
WEIGHTS_FOLDER = pathlib.Path(__file__).parent.parent / 'weights'
# Of the folder of one of them: it is in every installation.
PACKAGED_BYTES = 8_000_000

_log = logging.getLogger('linearizer_jax')


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """What a model's images go through before it.

  Attributes:
    image_size: (height, width) that a PIL image is brought to.
    mean, std: per RGB channel, where white is 1.
    eval_crop: central share of a PIL image, per side, that is kept.
  """

  image_size: tuple[int, int]
  mean: tuple[float, ...] = IMAGENET[0]
  std: tuple[float, ...] = IMAGENET[1]
  eval_crop: float = 0.875

  def __call__(self, images):
    """Images as a model takes them.

    Args:
      images: a PIL image, which is cropped and resized; or uint8 (B, H, W, 3),
        which keeps its size.

    Returns:
      float32 NumPy array (B, H, W, 3), (x / 255 - mean) / std.
    """
    if isinstance(images, Image.Image):
      height, width = self.image_size
      images = ImageOps.fit(
        images.convert('RGB'),
        (width, height),
        Image.Resampling.BICUBIC,
        bleed=(1 - self.eval_crop) / 2,
      )
      images = np.asarray(images)[None]
    mean, std = np.float32(self.mean), np.float32(self.std)
    return (np.asarray(images, np.float32) / 255 - mean) / std


class Loaded(NamedTuple):
  """A model ready to use: `model.apply(variables, preprocess(images))`.

  model: linen Module, a `Segmenter` where a segmentation was trained.
  variables: {'params': ...}, and its 'batch_stats', NumPy arrays on the host.
  preprocess: `Preprocessing`.
  """

  model: Any
  variables: Any
  preprocess: Preprocessing


def load(
  source,
  *,
  name=None,
  role=None,
  stage=None,
  step=None,
  ema=True,
  legacy_positions=False,
  **overrides,
):
  """A model from any weights this project knows.

  Args:
    source: the work directory of a run; an exported folder; a released
      Adventurer, .pth or safetensors, whose sizes are read off its tensors; a
      name in `models.teachers.TEACHERS` or its hub id, whose published weights
      are fetched; other weights of such a teacher, with `name`; or a name in
      `PACKAGED`, whose weights are part of the package.
    name: the teacher that a file, a folder or another hub id holds.
    role, stage, step: of a work directory; see `checkpoint.load_params`.
    ema: the average instead of the raw weights, where there is one.
    legacy_positions: for an `image_size` that differs from that of a released
      Adventurer, resize its positions as the released fine-tuning code does
      (off by one patch).
    **overrides: fields of the model, such as dtype='bfloat16',
      flip_blocks='alternate', num_classes=0, which leaves the head out, of a
      segmenter too, or image_size=448, for which positions are resized.

  Returns:
    `Loaded`.

  Raises:
    ValueError: no such thing, or weights that do not fit; names what is
      missing, extra or of another shape.
    FileNotFoundError: no such file, or no network.
  """
  if not name and str(source) in PACKAGED:
    source = packaged_folder(source)
  path = pathlib.Path(source).expanduser()
  if checkpoint.is_workdir(path):
    return _from_workdir(path, role, stage, step, ema, overrides)
  rows = {row.source: name for name, row in TEACHERS.items() if row.source}
  if not name and str(source) in {*TEACHERS, *rows}:
    name, source = rows.get(str(source), str(source)), None
  if name:
    size = overrides.pop('image_size', None)
    published, variables, row = load_teacher(name, source, **overrides)
    model = published.clone(image_size=size or published.image_size)
    params = fit_positions(variables['params'], published, model)
    size = as_pair(model.image_size)
    preprocess = Preprocessing(size, row.mean, row.std)
    return Loaded(model, {'params': params}, preprocess)
  path = weights.find_weights(source)
  tensors = weights.read_tensors(path, ema=ema)
  if not adventurer.is_adventurer(tensors):
    raise ValueError(
      f'{path} holds no Adventurer. If it is a teacher, say which one: '
      f'load({str(source)!r}, name=...), one of {", ".join(TEACHERS)}.'
    )
  return _from_tensors(path, tensors, legacy_positions, overrides)


def packaged_folder(name):
  """The folder of a student that comes with the package.

  Raises:
    FileNotFoundError: this installation lacks it; says how to make it.
  """
  folder = WEIGHTS_FOLDER / name
  if not (folder / 'model.safetensors').is_file():
    raise FileNotFoundError(
      f'this installation has no weights of {name}: there is no {folder}. Make '
      'it from a run with `python -m linearizer_jax.convert export '
      f'--checkpoint=RUN --out={folder}`, where RUN is the work directory of '
      'configs/imagenette.py.'
    )
  return folder


def load_teacher(name, source=None, *, key=None, **overrides):
  """A teacher with its weights.

  Args:
    name: a row of `models.teachers.TEACHERS`.
    source: a file, a folder or a hub repository (`weights.find_weights`), None
      for the repository of the row, or 'random' for initialised parameters.
    key: of the random parameters; None means jax.random.key(0).
    **overrides: fields of the model, such as dtype='bfloat16'.

  Returns:
    (model, variables, row): the linen Module; {'params': ...} as numpy arrays
    on the host, or jax arrays for 'random'; and the row, which has mean, std
    and image_size. Activation, heads and image size are those that a config
    file beside the weights names, where there is one.

  Raises:
    ValueError: unknown name, no weights to be had, or weights that do not fit.
    FileNotFoundError: no such file, or no network.
  """
  if name not in TEACHERS:
    raise ValueError(
      f'there is no teacher {name!r}; config.teacher.name can be one of '
      f'{", ".join(TEACHERS)}.'
    )
  row = TEACHERS[name]
  if source == 'random':
    model = models.create_model(row.model, **overrides)
    images = jnp.zeros((1, *as_pair(model.image_size), 3))
    key = jax.random.key(0) if key is None else key
    return model, jax.jit(model.init)(key, images), row
  if row.family is None:
    raise ValueError(
      f'teacher {name} has no published weights. Set config.teacher.weights to '
      "a checkpoint of this project, or to 'random'."
    )
  path = weights.find_weights(source or row.source)
  fields = weights.published_fields(path) | overrides
  model = models.create_model(row.model, **fields)
  params = weights.load_weights(
    path, row.family, _shapes(model), archive=row.archive
  )
  return model, {'params': params}, row


def _shapes(model):
  """Parameter tree of a model, of ShapeDtypeStructs."""
  return _variable_shapes(model)['params']


def _variable_shapes(model):
  size = (1, *as_pair(model.image_size), 3)
  images = jax.ShapeDtypeStruct(size, jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), images)


def _from_workdir(path, role, stage, step, ema, overrides):
  params, info = checkpoint.load_params(
    path, stage=stage, step=step, role=role, ema=ema
  )
  config = ml_collections.ConfigDict(info['config'])
  role = role or info['role']
  # Chosen for the machine that trained it.
  config[role].ssd_implementation = None
  params.pop('mask_token', None)
  classes = params['head']['kernel'].shape[1] if 'head' in params else 0
  fields = {'num_classes': classes} | overrides
  if not fields['num_classes']:
    params.pop('head', None)
  trained, (mean, std) = models.from_config(config, role)
  model, _ = models.from_config(config, role, **fields)
  params = fit_positions(params, trained, model)
  params = merge_params(_shapes(model), params, path, may_lack=())
  size = as_pair(overrides.get('image_size', config.data.image_size))
  crop = config.data.eval_crop
  preprocess = Preprocessing(size, mean, std, crop)
  variables = {'params': params}
  if config.task == 'segment' and overrides.get('num_classes') != 0:
    heads, _ = checkpoint.load_params(
      path, stage=info['stage'], step=info['step'], role='heads', ema=ema
    )
    (last,) = [heads[k] for k in ('decoder', 'classifier') if k in heads]
    last = last.get('classifier', last)
    model = head_from_config(config, model, len(last['conv']['bias']))
    variables = {'params': heads | {'backbone': params}}
    if info['batch_stats']:
      variables['batch_stats'] = info['batch_stats']
  return Loaded(model, variables, preprocess)


def _from_tensors(path, tensors, legacy, overrides):
  """An Adventurer under the released names."""
  found, preprocess, head = {}, {}, {}
  config = path.parent / 'config.json'
  if config.is_file():
    config = json.loads(config.read_text(encoding='utf-8'))
    found, preprocess, head = (
      {k: tuple(v) if isinstance(v, list) else v for k, v in part.items()}
      for part in (
        config.get(name, {}) for name in ('model', 'preprocessing', 'segment')
      )
    )
  fields = adventurer.fields(tensors, found.get('image_size')) | found
  positions_of = as_pair(fields['image_size'])
  fields |= overrides
  model = models.create_model('adventurer_base_patch16', **fields)
  size = as_pair(model.image_size)
  if size != positions_of:
    grids = (patch_grid(s, model.patch_size) for s in (positions_of, size))
    resized = resize_pos_embed(tensors['pos_embed'], *grids, legacy=legacy)
    tensors = tensors | {'pos_embed': resized}
  preprocess = Preprocessing(**preprocess | {'image_size': size})
  if head and overrides.get('num_classes') != 0:
    model = Segmenter(model, **head)
    variables = segmenter.from_tensors(tensors, _variable_shapes(model), path)
    return Loaded(model, variables, preprocess)
  params = tables.from_state_dict(
    FAMILIES['adventurer'], tensors, _shapes(model), path
  )
  return Loaded(model, {'params': params}, preprocess)


def merge_params(target, loaded, source, may_lack=('head',)):
  """Loaded parameters completed by fresh ones, where that is meant to be.

  Args:
    target: parameter tree of the network that will run: arrays, or shapes
      where nothing may be lacking.
    loaded: parameter tree from elsewhere.
    source: where from, for the error.
    may_lack: top-level names taken from `target` where `loaded` lacks them or
      holds another shape. A head and a mask token left over are dropped.

  Returns:
    A tree like `target`.

  Raises:
    ValueError: other differences, all of them by name.
  """
  target, found = (
    traverse_util.flatten_dict(tree, keep_empty_nodes=True, sep='/')
    for tree in (target, loaded)
  )
  merged, missing, wrong = {}, [], []
  for name, leaf in target.items():
    fits = name in found and np.shape(found[name]) == leaf.shape
    if fits:
      merged[name] = found[name]
    elif name.split('/')[0] in may_lack:
      merged[name] = leaf
      _log.info('%s has no fitting %s: it starts fresh', source, name)
    elif name in found:
      wrong.append(f'{name} {np.shape(found[name])}, expected {leaf.shape}')
    else:
      missing.append(name)
  extra = [
    name
    for name in found.keys() - target.keys()
    if name.split('/')[0] not in ('head', 'mask_token')
  ]
  if missing or extra or wrong:
    shown = lambda names: tables.listed(sorted(names)) or 'none'  # noqa: E731
    raise ValueError(
      f'{source} does not fit the model. Missing: {shown(missing)}; extra: '
      f'{shown(extra)}; of another shape: {shown(wrong)}. Choose the model '
      'these weights were made for (config.student, config.teacher) or other '
      'weights.'
    )
  return traverse_util.unflatten_dict(merged, sep='/')


def fit_positions(params, old, new):
  """Brings position embeddings to the grid of another image size.

  Bicubic, as `layers.resize_positions`; the class token keeps its own.

  Args:
    params: of `old`, NumPy arrays.
    old, new: networks of one family, of whatever image and patch size.

  Returns:
    `params`, with positions for the image size of `new`.
  """
  grids = [
    patch_grid(as_pair(model.image_size), model.patch_size)
    for model in (old, new)
  ]
  if grids[0] == grids[1]:
    return params
  _log.info('positions are resized from %s to %s patches', *grids)
  if 'pos_embed' in params:
    positions = resize_pos_embed(params['pos_embed'], *grids)
    return params | {'pos_embed': positions}
  positions = params['positional_embedding']
  first = int(old.class_token)
  patches = resize_positions(
    positions[None, first:], *grids, old.position_antialias
  )[0]
  positions = np.concatenate([positions[:first], patches])
  return params | {'positional_embedding': positions}


def resize_pos_embed(positions, old_grid, grid, *, legacy=False):
  """Positions of another grid, the class token's row staying the last.

  Source: PyTorch's bicubic, `layers.resize_positions`. The released
  fine-tuning code splits the class row off the front instead of the end, which
  shifts every patch by one.

  Args:
    positions: (1, rows * columns + 1, D) array.
    old_grid: (rows, columns) that `positions` was made for.
    grid: (rows, columns) wanted.
    legacy: do as the released fine-tuning code.

  Returns:
    NumPy array (1, rows * columns + 1, D), float32.
  """
  one, rest = slice(0, 1), slice(1, None)
  if not legacy:
    one, rest = slice(-1, None), slice(None, -1)
  patches = resize_positions(
    np.asarray(positions[:, rest], np.float32), old_grid, grid
  )
  parts = [np.asarray(patches), np.asarray(positions[:, one], np.float32)]
  return np.concatenate(parts[::-1] if legacy else parts, axis=1)
