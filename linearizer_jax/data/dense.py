"""Images with a class for every pixel: sources, joint augmentation, batches.

A source here has `len()`, `num_classes`, `size(i)` (height, width) read from
the header of the image, and `source[i]`, a dict of

    image   encoded JPEG or PNG bytes, or uint8 (h, w, 3)
    label   uint8 (h, w), classes from 0, 255 where ignored
    name    where the image comes from, for error messages
"""

import contextlib
import functools
import os
import pathlib

import numpy as np
from PIL import Image

from linearizer_jax.data import guard, listing, transforms

IGNORED = 255
# Ids of Cityscapes' labelIds files that its benchmark trains and scores, in the
# order of its trainIds (cityscapesScripts, helpers/labels.py).
CITYSCAPES_IDS = (
  *(7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33),
)
_OUTSIDE = -1
_CROP_TRIES = 10


class Pairs:
  """Image files and label files of ids, PNG, one id a pixel or a palette.

  Args:
    root: folder of both.
    pairs: (image, label) paths below it.
    classes: int (256,): the class of each id in the files, 255 to ignore it, -1
      where there must be none.
    num_classes: V.
  """

  def __init__(self, root, pairs, classes, num_classes):
    # Arrays, because many strings are slow to send to every worker.
    self._root = root
    self._paths = np.asarray([[os.fsencode(p) for p in pair] for pair in pairs])
    self._classes = classes
    self.num_classes = num_classes

  def __len__(self):
    return len(self._paths)

  def _files(self, index):
    return [self._root / os.fsdecode(path) for path in self._paths[index]]

  def size(self, index):
    return transforms.image_size(self._files(index)[0])

  def name(self, index):
    return str(self._files(index)[0])

  def __getitem__(self, index):
    path, label_path = self._files(index)
    label, size = self._read_label(label_path), self.size(index)
    if label.shape != size:
      raise ValueError(
        f'The label file {label_path} is {label.shape[0]} x {label.shape[1]} '
        f'pixels, its image {path} {size[0]} x {size[1]}: both must be of one '
        'size.'
      )
    return {'image': path.read_bytes(), 'label': label, 'name': str(path)}

  def _read_label(self, path):
    label = transforms.decoded({'image': path.read_bytes(), 'name': path})
    if label.mode not in ('1', 'L', 'P', 'I', 'I;16'):
      raise ValueError(
        f'The label file {path} has mode {label.mode}; expected one class id a '
        'pixel, as a grey PNG or one with a palette.'
      )
    ids = np.asarray(label).astype(np.int64)
    known = (ids >= 0) & (ids < len(self._classes))
    found = np.where(known, self._classes[np.where(known, ids, 0)], _OUTSIDE)
    if (found == _OUTSIDE).any():
      raise ValueError(
        f'The label file {path} holds the value {ids[found == _OUTSIDE][0]}, '
        f'which is none of the {self.num_classes} classes and not ignored. '
        'Correct the file, or change data.num_classes or data.ignore_labels.'
      )
    return found.astype(np.uint8)


class GeneratedPairs:
  """A grating for each class of the left, and of the right half."""

  def __init__(self, count, num_classes, image_size, offset):
    self._count, self._size, self._offset = count, image_size, offset
    self.num_classes = num_classes

  def __len__(self):
    return self._count

  def size(self, index):
    del index
    return self._size

  def name(self, index):
    return f'generated[{index}]'

  def __getitem__(self, index):
    rng = np.random.default_rng(self._offset + index)
    height, width = self._size
    label = np.zeros((height, width), np.uint8)
    edge = int(rng.integers(width // 4, width - width // 4 + 1))
    label[:, :edge], label[:, edge:] = rng.integers(self.num_classes, size=2)
    label[0] = IGNORED
    turn = label / self.num_classes
    rows, columns = np.ogrid[:height, :width]
    along = np.cos(np.pi * turn) * rows + np.sin(np.pi * turn) * columns
    colour = np.cos(2 * np.pi * (turn[..., None] + np.arange(3) / 3))
    image = 128 + 40 * np.sin(along)[..., None] + 60 * colour
    image = image + rng.integers(-20, 21, (height, width, 1))
    return {
      'image': np.clip(image, 0, 255).astype(np.uint8),
      'label': label,
      'name': self.name(index),
    }


# ------------------------------------------------------------ published layouts


def folder(row, config, split):
  """`<root>/<split>/images` and `labels`, or a list `<root>/<split>.txt`.

  A label has the name of its image, with .png. With a list, which names an
  image a line, both folders lie in the root.
  """
  del row
  layout = (
    'expected <data_dir>/<split>/images/* and labels/*.png, or '
    '<data_dir>/images, <data_dir>/labels and a list <data_dir>/<split>.txt; '
    'set data.data_dir, data.train_split and data.eval_split.'
  )
  root = _root(config, layout)
  listed = root / f'{split}.txt'
  base = pathlib.Path() if listed.is_file() else pathlib.Path(split)
  images, labels = base / 'images', base / 'labels'
  for path in (images, labels):
    if not (root / path).is_dir():
      raise ValueError(f'There is no folder {root / path}: {layout}')
  names = listing.image_names(root / images)
  if listed.is_file():
    by_stem = {pathlib.Path(name).stem: name for name in names}
    lines = listed.read_text(encoding='utf-8').splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    missing = [x for x in lines if pathlib.Path(x).stem not in by_stem]
    if missing:
      raise ValueError(
        f'{listed} names {missing[0]!r}, but {root / images} has no such image.'
      )
    names = [by_stem[pathlib.Path(line).stem] for line in lines]
  pairs = [
    (images / name, labels / f'{pathlib.Path(name).stem}.png') for name in names
  ]
  return _pairs(root, pairs, _folder_ids(config), config.num_classes, layout)


def files(pairs, config):
  """`Pairs` of files, with the ids of a 'folder'.

  Args:
    pairs: iterable of (image, label) paths.
    config: `config.DataConfig`.

  Raises:
    ValueError: the config is of other data, whose ids mean something else.
  """
  if config.name != 'folder':
    raise ValueError(
      f"data.name is {config.name!r}; expected 'folder': only its label files "
      'can be read one by one.'
    )
  return Pairs(pathlib.Path(), pairs, _folder_ids(config), config.num_classes)


def _folder_ids(config):
  """The class of each id, as `Pairs` takes it."""
  classes = np.full(256, _OUTSIDE)
  classes[: config.num_classes] = np.arange(config.num_classes)
  classes[list(config.ignore_labels)] = IGNORED
  return classes


def ade20k(row, config, split):
  """ADEChallengeData2016: `images/<split>/*.jpg`, `annotations/<split>/*.png`.

  Id 0 is "other", which is ignored; ids 1 to 150 are classes 0 to 149.
  """
  layout = (
    'expected ADEChallengeData2016 as published: '
    f'<data_dir>/images/{split}/*.jpg and <data_dir>/annotations/{split}/*.png.'
  )
  root = _root(config, layout)
  images = pathlib.Path('images', split)
  labels = pathlib.Path('annotations', split)
  if not (root / images).is_dir():
    raise ValueError(f'There is no folder {root / images}: {layout}')
  pairs = [
    (images / name, labels / f'{pathlib.Path(name).stem}.png')
    for name in listing.image_names(root / images)
  ]
  classes = np.full(256, _OUTSIDE)
  classes[0] = IGNORED
  classes[1 : row.num_classes + 1] = np.arange(row.num_classes)
  return _pairs(root, pairs, classes, row.num_classes, layout)


def cityscapes(row, config, split):
  """`leftImg8bit/<split>/<city>/*.png` and `gtFine/<split>/<city>/*labelIds*`.

  Ids that the benchmark does not train are ignored.
  """
  layout = (
    'expected Cityscapes as published: '
    f'<data_dir>/leftImg8bit/{split}/<city>/*_leftImg8bit.png and '
    f'<data_dir>/gtFine/{split}/<city>/*_gtFine_labelIds.png.'
  )
  root = _root(config, layout)
  ending = '_leftImg8bit.png'
  files = sorted((root / 'leftImg8bit' / split).glob(f'*/*{ending}'))
  pairs = []
  for file in files:
    image = file.relative_to(root)
    name = image.name.removesuffix(ending) + '_gtFine_labelIds.png'
    pairs.append((image, pathlib.Path('gtFine', *image.parts[1:-1], name)))
  classes = np.full(256, IGNORED)
  classes[list(CITYSCAPES_IDS)] = np.arange(row.num_classes)
  return _pairs(root, pairs, classes, row.num_classes, layout)


def _root(config, layout):
  if not config.data_dir:
    raise ValueError(f'data.data_dir is empty: {layout}')
  return pathlib.Path(config.data_dir).expanduser()


def _pairs(root, pairs, classes, num_classes, layout):
  """`Pairs` of files that are all there."""
  if not pairs:
    raise ValueError(f'{root} holds no such images: {layout}')
  for image, label in pairs:
    if not (root / label).is_file():
      raise ValueError(
        f'The image {root / image} has no label file {root / label}: {layout}'
      )
  return Pairs(root, pairs, classes, num_classes)


# ----------------------------------------------------------------- augmentation


def train_pair(example, config, rng):
  """A random crop of an image at a random scale, and the same of its labels.

  Scale uniform in `data.scale_range`, of the image brought to
  `data.short_side`; a crop of `data.image_size`, drawn again up to ten times
  while none of its pixels is labelled, or one class has more than
  `data.category_max_ratio` of those that are; flip; colour jitter. Where the
  scaled image is smaller than the crop, it is filled up with grey, and with
  ignored labels.

  Args:
    example: of a source of this file.
    config: `config.DataConfig`.
    rng: `np.random.Generator`.

  Returns:
    (uint8 (H, W, 3), uint8 (H, W)).

  Raises:
    ValueError: the image cannot be decoded; names the file.
  """
  image = transforms.decoded(example, 'RGB')
  label = Image.fromarray(example['label'])
  size = np.asarray(scaled_size((image.height, image.width), config.short_side))
  size = np.round(size * rng.uniform(*config.scale_range)).astype(int)
  size = np.maximum(1, size)
  crop = np.minimum(config.image_size, size)
  ratio = np.asarray((image.height, image.width)) / size
  for _ in range(_CROP_TRIES):
    top, left = (int(rng.integers(room + 1)) for room in size - crop)
    box = (
      *(left * ratio[1], top * ratio[0]),
      *((left + crop[1]) * ratio[1], (top + crop[0]) * ratio[0]),
    )
    part = label.resize(
      (int(crop[1]), int(crop[0])), Image.Resampling.NEAREST, box
    )
    counts = np.bincount(np.asarray(part).ravel(), minlength=256)[:IGNORED]
    if 0 < counts.max() <= config.category_max_ratio * counts.sum():
      break
  image = image.resize(part.size, Image.Resampling.BILINEAR, box)
  if config.flip and rng.random() < 0.5:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  if config.color_jitter:
    image = transforms.color_jitter(image, config.color_jitter, rng)
  height, width = config.image_size
  whole = np.full((height, width, 3), transforms.GREY, np.uint8)
  labels = np.full((height, width), IGNORED, np.uint8)
  whole[: crop[0], : crop[1]] = np.asarray(image)
  labels[: crop[0], : crop[1]] = np.asarray(part)
  return whole, labels


def scaled_size(size, short_side):
  """(height, width) with the shorter one `short_side`; 0 leaves it."""
  if not short_side:
    return size
  scale = short_side / min(size)
  return tuple(round(side * scale) for side in size)


# ------------------------------------------------------------------- evaluation


def eval_plan(source, config, batch_size):
  """Which examples share a batch, and the canvases they are put on.

  A side of at most `data.eval_window` (of any length, where that is 0) is its
  own canvas, for the network sees it whole; a longer one goes on a canvas of
  2^k or 3 2^k pixels, so that few programs are compiled. Sizes are read from
  the headers of all images; one that cannot be read goes with the image before
  it, and `eval_batch` leaves it out.

  Returns:
    List of (indices, canvas of the images, canvas of the labels).
  """
  groups, own = {}, config.image_size
  for index in range(len(source)):
    with contextlib.suppress(transforms.BrokenImageError):
      own = source.size(index)
    size = scaled_size(own, config.short_side)
    canvas = tuple(
      side if not w or side <= w else _rounded_up(side)
      for side, w in zip(size, config.eval_window, strict=True)
    )
    labels = canvas if size == own else tuple(map(_rounded_up, own))
    groups.setdefault((canvas, labels), []).append(index)
  return [
    (members[first : first + batch_size], *canvases)
    for canvases, members in sorted(groups.items())
    for first in range(0, len(members), batch_size)
  ]


def _rounded_up(side):
  """The next 2^k or 3 2^k."""
  power = 1 << max(side - 1, 1).bit_length()
  return power * 3 // 4 if side <= power * 3 // 4 else power


def eval_batch(source, config, plan, start, stop, step):
  """Rows `start` to `stop` of the batch `step` of a plan.

  Returns:
    dict of 'image' uint8 (b, H, W, 3) and 'label' uint8 (b, R, S), each at the
    top left of its canvas, 'size' and 'label_size' int32 (b, 2), the pixels
    they reach, and bool 'valid' (b,), False where the last batch is filled up
    or an image is broken.
  """
  indices, canvas, label_canvas = plan[step]
  count = stop - start
  batch = {
    'image': np.zeros((count, *canvas, 3), np.uint8),
    'size': np.zeros((count, 2), np.int32),
    'label': np.full((count, *label_canvas), IGNORED, np.uint8),
    'label_size': np.zeros((count, 2), np.int32),
    'valid': np.zeros(count, bool),
    guard.BROKEN: {},
  }
  for i, index in enumerate(indices[start:stop]):
    try:
      example = source[index]
      image, label = transforms.decoded(example, 'RGB'), example['label']
    except transforms.BrokenImageError as error:
      batch[guard.BROKEN][source.name(index)] = str(error)
      continue
    size = scaled_size(label.shape, config.short_side)
    if size != label.shape:
      image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    batch['image'][i, : size[0], : size[1]] = np.asarray(image)
    batch['label'][i, : label.shape[0], : label.shape[1]] = label
    batch['size'][i], batch['label_size'][i] = size, label.shape
    batch['valid'][i] = True
  return batch


def eval_steps(source, config, batch_size, start, stop):
  """(number of batches, step -> batch, step -> indices of its examples)."""
  plan = eval_plan(source, config, batch_size)
  batch = functools.partial(eval_batch, source, config, plan, start, stop)
  return len(plan), batch, lambda step: plan[step][0][start:stop]
