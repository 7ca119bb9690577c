"""The table of data sets, and one random-access source for each kind.

A source has `len()`, `num_classes`, `labels()` (int64 (len,), without decoding
an image) and `source[i]`, a dict of

    image   encoded JPEG or PNG bytes, or uint8 (h, w, 3)
    label   int in [0, num_classes)
    name    where the image comes from, for error messages; `name(i)` gives it
            without reading the image
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from linearizer_jax.data import dense, listing, records, transforms

# A fifth of the digits, drawn once and for all: no seed of a run changes it.
_DIGITS_TEST_SHARE = 0.2
_DIGITS_SPLIT_SEED = 0


class Folder:
  """Image files of a folder, `paths` in it, `labels` int64."""

  def __init__(self, root, paths, labels, num_classes):
    # Arrays, because a million strings are slow to send to every worker.
    self.root, self._paths, self._labels = root, paths, labels
    self.num_classes = num_classes

  def __len__(self):
    return len(self._paths)

  def name(self, index):
    return str(self.root / os.fsdecode(self._paths[index]))

  def __getitem__(self, index):
    path = self.name(index)
    try:
      with open(path, 'rb') as file:
        image = file.read()
    except OSError as error:
      raise ValueError(
        f'Cannot read the image {path} ({error}): it was there when the run '
        'started. Bring it back, or start again without it (which changes the '
        'order of the examples); checkpoints written so far are kept.'
      ) from error
    return {'image': image, 'label': int(self._labels[index]), 'name': path}

  def labels(self):
    return self._labels


class Memory:
  """Images held as one uint8 array (n, h, w, 3)."""

  def __init__(self, images, labels, num_classes, name):
    self._images, self._labels, self._name = images, labels, name
    self.num_classes = num_classes

  def __len__(self):
    return len(self._images)

  def __getitem__(self, index):
    return {
      'image': self._images[index],
      'label': int(self._labels[index]),
      'name': self.name(index),
    }

  def name(self, index):
    return f'{self._name}[{index}]'

  def labels(self):
    return np.asarray(self._labels, np.int64)


class Generated:
  """Coloured gratings, one direction and colour per class, and noise."""

  def __init__(self, count, num_classes, image_size, offset):
    self._count, self._size, self._offset = count, image_size, offset
    self.num_classes = num_classes

  def __len__(self):
    return self._count

  def __getitem__(self, index):
    rng = np.random.default_rng(self._offset + index)
    height, width = self._size
    turn = index % self.num_classes / self.num_classes
    rows, columns = np.ogrid[:height, :width]
    along = np.cos(np.pi * turn) * rows + np.sin(np.pi * turn) * columns
    wave = np.sin(2 * np.pi * (4 * along / max(height, width) + rng.random()))
    colour = 1 + np.cos(2 * np.pi * (turn + np.arange(3) / 3))
    noise = rng.integers(-20, 21, (height, width, 1))
    image = np.clip(128 + 50 * colour * wave[..., None] + noise, 0, 255)
    return {
      'image': image.astype(np.uint8),
      'label': index % self.num_classes,
      'name': self.name(index),
    }

  def name(self, index):
    return f'generated[{index}]'

  def labels(self):
    return np.arange(self._count) % self.num_classes


class Tfds:
  """A split that TFDS prepared as ArrayRecord; images stay encoded."""

  def __init__(self, name, split, data_dir):
    import tensorflow_datasets as tfds

    try:
      self._records = tfds.data_source(
        name,
        split=split,
        data_dir=data_dir,
        download=False,
        decoders={'image': tfds.decode.SkipDecoding()},
      )
    except (NotImplementedError, LookupError, ValueError, OSError) as error:
      where = data_dir or 'the default folder of TFDS'
      option = f' --data_dir={data_dir}' if data_dir else ''
      raise ValueError(
        f'Cannot read split {split!r} of {name!r} in {where}: either it has no '
        'such split, or it is not prepared there as ArrayRecord. Nothing is '
        f'downloaded here: prepare it once with `tfds build {name} '
        f'--file_format=array_record{option}` (this step alone may ask for '
        'tensorflow), or point the config field data.data_dir to where it is.'
      ) from error
    self._arguments = name, split, data_dir
    self.num_classes = self._records.dataset_info.features['label'].num_classes

  def __len__(self):
    return len(self._records)

  def __getitem__(self, index):
    record = self._records[index]
    file = os.fsdecode(record.get('file_name', ''))
    return {
      'image': record['image'],
      'label': int(record['label']),
      'name': f'{self.name(index)} {file}'.strip(),
    }

  def name(self, index):
    name, split, _ = self._arguments
    return f'{name} {split}[{index}]'

  def __reduce__(self):
    # A worker opens the files itself instead of receiving TFDS' builder.
    return Tfds, self._arguments

  def labels(self):
    # One pass over the records: they hold the label beside the image.
    return np.asarray([record['label'] for record in self._records], np.int64)


class Subset:
  """The examples `indices` of another source."""

  def __init__(self, source, indices):
    self._source, self._indices = source, indices
    self.num_classes = source.num_classes

  def __len__(self):
    return len(self._indices)

  def __getitem__(self, index):
    return self._source[int(self._indices[index])]

  def name(self, index):
    return self._source.name(int(self._indices[index]))

  def labels(self):
    return self._source.labels()[self._indices]


class Cached:
  """Another source, each of whose images is decoded once, on first use.

  Held as uint8 (h, w, 3), the shorter side `pixels`; smaller images stay as
  they are. A worker process decodes for itself: nothing is sent to it.
  """

  def __init__(self, source, pixels):
    self._source, self._pixels = source, pixels
    self._examples = {}
    self.num_classes = source.num_classes

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    if index not in self._examples:
      example = self._source[index]
      image = transforms.shrink(example, self._pixels)
      self._examples[index] = example | {'image': image}
    return self._examples[index]

  def __reduce__(self):
    return Cached, (self._source, self._pixels)

  def name(self, index):
    return self._source.name(index)

  def labels(self):
    return self._source.labels()


def labels_per_class(source, count, seed):
  """Keeps `count` random examples of each class, the same ones for a seed."""
  labels = source.labels()
  order = np.random.default_rng(seed).permutation(len(labels))
  shuffled, kept = labels[order], []
  for label in range(source.num_classes):
    members = order[shuffled == label][:count]
    if len(members) < count:
      raise ValueError(
        f'data.labels_per_class is {count}, but class {label} has only '
        f'{len(members)} training examples: lower it.'
      )
    kept.append(members)
  return Subset(source, np.sort(np.concatenate(kept)))


def folder_classes(data_dir, splits):
  """Class names of an image folder; its two splits must have the same ones."""
  train, evaluation = splits
  layout = (
    f'expected <data_dir>/{train}/<class>/*.jpg and <data_dir>/{evaluation}/'
    '<class>/*.jpg, or a flat folder of images and its '
    f'<data_dir>/{evaluation}_labels.txt; set the config fields data.data_dir, '
    'data.train_split and data.eval_split.'
  )
  if not data_dir:
    raise ValueError(f'data.data_dir is empty: {layout}')
  classes = []
  for split in splits:
    root = pathlib.Path(data_dir).expanduser()
    folder = root / split
    if not folder.is_dir():
      raise ValueError(f'There is no folder {folder}: {layout}{_found(root)}')
    if _labels_file(root, split).is_file():
      names = set(_flat_labels(root, split).values())
    else:
      with os.scandir(folder) as entries:
        names = {e.name for e in entries if e.name[0] != '.' and e.is_dir()}
    if not names:
      raise ValueError(f'{folder} has no class folders: {layout}')
    classes.append(names)
  only_train = sorted(classes[0] - classes[1])
  only_eval = sorted(classes[1] - classes[0])
  if only_train or only_eval:
    raise ValueError(
      f'Class folders differ in {data_dir}: only in {train}: {only_train}; '
      f'only in {evaluation}: {only_eval}. Labels are places in the sorted '
      'list of class folders, so both splits need the same ones.'
    )
  return sorted(classes[0])


def _found(root):
  """What a folder holds, for who is a level too high or too low."""
  if not root.is_dir():
    return f' There is no {root} either.'
  names = sorted(
    path.name
    for path in root.iterdir()
    if path.is_dir() and path.name[0] != '.'
  )
  shown = ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')
  return f' The folders in {root}: {shown or "none"}.'


def _labels_file(root, split):
  return root / f'{split}_labels.txt'


def _flat_labels(root, split):
  """{file: class} of a flat folder, from lines 'class' or 'file class'."""
  path, files = _labels_file(root, split), listing.image_names(root / split)
  # From the right: names of files may hold spaces.
  lines = [line.rsplit(None, 1) for line in path.read_text().splitlines()]
  lines = list(filter(None, lines))
  if all(len(line) == 1 for line in lines) and len(lines) == len(files):
    return {file: name for file, (name,) in zip(files, lines, strict=True)}
  named = dict(line for line in lines if len(line) == 2)
  if sorted(named) != files:
    raise ValueError(
      f'{path} has {len(lines)} lines, {root / split} {len(files)} images. '
      'Expected the class of each image in the order of their names, one a '
      "line, or lines 'file class'."
    )
  return {file: named[file] for file in files}


def open_folder(data_dir, splits, split):
  """Images in `data_dir/split/class/`, classes in sorted order; or flat.

  Args:
    data_dir: folder.
    splits: (training, evaluation), which must have the same classes.
    split: one of them, or another of the same classes.

  Returns:
    `Folder`.
  """
  root = pathlib.Path(data_dir or '').expanduser()
  classes = folder_classes(data_dir, splits)
  if _labels_file(root, split).is_file():
    label_of = {name: label for label, name in enumerate(classes)}
    flat = _flat_labels(root, split)
    paths = np.asarray([os.fsencode(file) for file in flat])
    labels = np.asarray([label_of[name] for name in flat.values()], np.int64)
    return Folder(root / split, paths, labels, len(classes))
  paths, counts = listing.list_images(root, split, classes)
  if not counts.all():
    raise ValueError(
      f'Class folder {root / split / classes[np.argmin(counts)]} holds no file '
      f'that ends in {", ".join(listing.IMAGE_SUFFIXES)}. Put images of this '
      'class there, or remove the folder from both splits.'
    )
  labels = np.repeat(np.arange(len(classes)), counts)
  return Folder(root / split, paths, labels, len(classes))


def _folder(row, config, split):
  splits = config.train_split, config.eval_split
  return open_folder(config.data_dir, splits, split)


def _records(row, config, split):
  return records.Records(config.data_dir or '', split)


def _tfds(row, config, split):
  return Tfds(row.tfds_name, split, config.data_dir)


def _is_train(row, split):
  if split not in (row.train_split, row.eval_split):
    raise ValueError(
      f'Split {split!r} is neither {row.train_split!r} nor '
      f'{row.eval_split!r}: change data.train_split or data.eval_split.'
    )
  return split == row.train_split


def _digits(row, config, split):
  """8x8 greys of scikit-learn, enlarged to the image size, RGB."""
  from sklearn.datasets import load_digits

  digits = load_digits()
  rng = np.random.default_rng(_DIGITS_SPLIT_SEED)
  test = np.zeros(len(digits.target), bool)
  for label in range(row.num_classes):
    members = rng.permutation(np.flatnonzero(digits.target == label))
    test[members[: round(_DIGITS_TEST_SHARE * len(members))]] = True
  chosen = ~test if _is_train(row, split) else test
  height, width = config.image_size
  grey = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
  large = [
    Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    for image in grey
  ]
  images = np.stack([np.asarray(image.convert('RGB')) for image in large])
  return Memory(images, digits.target[chosen], row.num_classes, 'digits')


def _generated(row, config, split, kind=Generated):
  offset = 0 if _is_train(row, split) else config.num_examples
  return kind(
    config.num_examples, config.num_classes, config.image_size, offset
  )


def _generated_dense(row, config, split):
  return _generated(row, config, split, dense.GeneratedPairs)


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A row of the table; None means: known once the data are opened."""

  # (row, config, split) -> source; None: the data have no such labels.
  load: Callable[..., Any] | None
  train_split: str
  eval_split: str
  num_classes: int | None = None
  num_train_examples: int | None = None
  tfds_name: str | None = None
  load_dense: Callable[..., Any] | None = None  # with a label for each pixel


DATASETS = {
  'imagenet2012': Dataset(
    _tfds, 'train', 'validation', 1000, 1281167, 'imagenet2012'
  ),
  'imagenette': Dataset(
    _tfds, 'train', 'validation', 10, 9469, 'imagenette/full-size-v2'
  ),
  'folder': Dataset(_folder, 'train', 'val', load_dense=dense.folder),
  'records': Dataset(_records, 'train', 'val'),  # of data/prepare.py
  'digits': Dataset(_digits, 'train', 'test', 10, 1438),
  'generated': Dataset(
    _generated, 'train', 'test', load_dense=_generated_dense
  ),
  'ade20k': Dataset(
    *(None, 'training', 'validation', 150, 20210), load_dense=dense.ade20k
  ),
  'cityscapes': Dataset(
    *(None, 'train', 'val', 19, 2975), load_dense=dense.cityscapes
  ),
}
