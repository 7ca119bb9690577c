"""From a `data` section of a config to batches of uint8 images.

Position p of the endless training stream shows example
`order(seed, p // n)[p % n]`, augmented with a generator made of (seed, p). Step
t of a run with global batch B is positions t B to (t + 1) B - 1, in order, of
which each process takes its contiguous share. So a batch depends on the
config, the seed, the step and the process, not on workers or on what
was run before, and a position in the data is one integer.
"""

import dataclasses
import difflib
import functools
import itertools
import multiprocessing
import os
import signal
import sys
import threading

import grain
import numpy as np

from linearizer_jax.data import datasets, dense, guard, simd, transforms


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The fields of a config's `data` section, with their defaults."""

  name: str = 'digits'  # row of datasets.DATASETS
  data_dir: str | None = None  # folder: the root; TFDS: its data_dir
  train_split: str | None = None  # None: the row's; TFDS slices are fine
  eval_split: str | None = None
  image_size: int | tuple[int, int] = 224  # side, or (height, width)

  # Of 'generated', and of a 'folder' with a label for each pixel.
  num_classes: int = 10
  num_examples: int = 256  # 'generated' only

  # Keeps decoded images in memory, this long at the shorter side; 0: none.
  cache_pixels: int = 0

  # Label budget: train on n random examples per class (None: on all).
  labels_per_class: int | None = None
  labels_seed: int = 0

  # Augmentation, in this order. None, False and 0 turn a step off.
  crop_scale: tuple[float, float] | None = None  # share of the area
  crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
  flip: bool = False
  shift_pixels: int = 0
  rotate_degrees: float = 0.0
  three_augment: bool = False  # grey, solarised or blurred
  color_jitter: float = 0.0  # brightness, contrast, saturation
  randaugment_ops: int = 0
  randaugment_magnitude: float = 9.0  # of 10
  randaugment_std: float = 0.5
  shuffle: bool = True

  # Evaluation: the central share (per side) of the image.
  eval_crop: float = 0.875

  # A label for each pixel (data/dense.py). Images are brought to `short_side`
  # (0: left as they are), training crops of `image_size` are taken from them at
  # a scale in `scale_range`, with at most `category_max_ratio` of one class.
  dense: bool = False
  ignore_labels: tuple[int, ...] = (255,)  # ids in the files of a 'folder'
  short_side: int = 0
  scale_range: tuple[float, float] = (0.5, 2.0)
  category_max_ratio: float = 0.75
  # Evaluation: side or (height, width) of the windows that slide over an image,
  # and their stride (0: the window); a window of 0 is the whole image.
  eval_window: int | tuple[int, int] = 0
  eval_stride: int | tuple[int, int] = 0
  # 'pillow', or 'simd': training crops by faster code, the libraries of
  # the extra [simd]. Evaluation decodes with Pillow, at full size, always.
  decoder: str = 'pillow'

  # Faults. Up to `max_broken` images that cannot be decoded are passed over:
  # training takes the next example instead, evaluation leaves them out.
  max_broken: int = 0
  timeout_seconds: float = 600.0  # without a batch, after which to stop; 0: no

  # Neither changes a batch.
  num_workers: int = 0  # processes; 0: threads of this process
  num_threads: int = 1  # threads, when there are no worker processes

  def __post_init__(self):
    for field in ('image_size', 'eval_window', 'eval_stride'):
      size = getattr(self, field)
      size = (size, size) if isinstance(size, int) else tuple(size)
      object.__setattr__(self, field, size)
    row = _row(self.name)
    if self.dense:
      self._check_dense(row)
    elif row.load is None:
      raise ValueError(
        f'data.name is {self.name!r}, which has a label for each pixel: set '
        'data.dense=True and config.task to a segmentation.'
      )
    for split in ('train_split', 'eval_split'):
      value = getattr(self, split) or getattr(row, split)
      object.__setattr__(self, split, value)
    if (
      self.crop_scale and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1
    ):
      raise ValueError(
        f'data.crop_scale is {self.crop_scale}, expected (least, most) with '
        '0 < least <= most <= 1, or None.'
      )
    if self.labels_per_class is not None and self.labels_per_class < 1:
      raise ValueError(
        f'data.labels_per_class is {self.labels_per_class}, expected at least '
        '1, or None.'
      )
    if self.decoder not in ('pillow', 'simd'):
      raise ValueError(
        f"data.decoder is {self.decoder!r}, expected 'pillow' or 'simd'."
      )
    if self.decoder == 'simd' and not simd.is_installed():
      raise ValueError(
        "data.decoder is 'simd', but simplejpeg or cykooz-resizer is not "
        "installed: `pip install 'linearizer_jax[simd]'`, or set "
        "data.decoder to 'pillow', which is slower."
      )
    if not 0 < self.eval_crop <= 1:
      raise ValueError(f'data.eval_crop is {self.eval_crop}, expected (0, 1].')

  def _check_dense(self, row):
    """Raises ValueError for fields that segmentation cannot take."""
    if row.load_dense is None:
      raise ValueError(
        f'data.dense is True, but {self.name!r} has no label for each pixel; '
        'choose another data.name.'
      )
    if self.labels_per_class is not None:
      raise ValueError(
        'data.labels_per_class is set, but images with a label for each pixel '
        'have no class of their own: leave it None.'
      )
    if not 1 <= self.num_classes <= dense.IGNORED:
      raise ValueError(
        f'data.num_classes is {self.num_classes}; labels of pixels are bytes, '
        f'so expected 1 to {dense.IGNORED}.'
      )
    windows = zip(self.eval_window, self.eval_stride, strict=True)
    if any(w < 0 or not 0 <= step <= (w or step) for w, step in windows):
      raise ValueError(
        f'data.eval_stride is {self.eval_stride}, data.eval_window '
        f'{self.eval_window}; expected a stride of at most the window, and '
        'neither below 0.'
      )
    low, high = self.scale_range
    if not 0 < low <= high or not 0 < self.category_max_ratio <= 1:
      raise ValueError(
        f'data.scale_range is {self.scale_range}, data.category_max_ratio '
        f'{self.category_max_ratio}; expected 0 < least <= most, and (0, 1].'
      )


def num_classes(data_config):
  """Number of classes; opens the data where the table does not know it."""
  config = _parse(data_config)
  return (
    _row(config.name).num_classes
    or _source(config, config.eval_split).num_classes
  )


def num_train_examples(data_config):
  """Training examples per epoch; opens the data only where it must."""
  config = _parse(data_config)
  row = _row(config.name)
  if row.num_train_examples and config.train_split == row.train_split:
    if config.labels_per_class is None:
      return row.num_train_examples
    return config.labels_per_class * row.num_classes
  return len(_source(config, config.train_split))


def make_train_iterator(
  data_config, *, batch_size, seed, process_index=0, process_count=1
):
  """Endless shuffled and augmented batches, this process's share of each.

  Args:
    data_config: mapping with fields of `DataConfig`.
    batch_size: global batch size, a multiple of `process_count`.
    seed: int >= 0; decides order and augmentation.
    process_index: int in [0, process_count).
    process_count: number of processes that train together.

  Returns:
    A `TrainIterator` over dicts of `image` uint8 (b, H, W, 3) and `label` int32
    (b,), or uint8 (b, H, W) where `dense`, with b = batch_size / process_count.
    Close it to end its workers.

  Raises:
    ValueError: a field is unknown or out of range, the data are not there, or
      (from `next`) an image cannot be decoded.
  """
  config = _parse(data_config)
  share = _share(batch_size, process_index, process_count)
  source = _source(config, config.train_split)
  return TrainIterator(source, config, seed, share)


class TrainIterator(grain.DatasetIterator):
  """Iterates over steps; its state is the number of steps handed out.

  The state is valid for any number of workers and of processes.
  `grain.checkpoint.CheckpointSave(iterator)` saves it.
  """

  def __init__(self, source, config, seed, share):
    super().__init__()
    arguments = source, config, seed, *share
    self._config = config
    self._batch_of_step = functools.partial(_train_batch, *arguments)
    self._guard = guard.Guard(
      config,
      lambda step: [
        source.name(i) for _, i in _train_indices(*arguments, step)
      ],
    )
    self._step = 0
    self._batches = None

  @property
  def broken(self):
    """Broken images passed over since the start, {name: message}."""
    return self._guard.broken

  def __next__(self):
    self._assert_not_closed()
    self.start_prefetch()
    batch = self._guard.next(self._batches, self._step)
    self._step += 1
    return batch

  def start_prefetch(self):
    if self._batches is None:
      steps = grain.MapDataset.range(self._step, sys.maxsize)
      self._batches = iter(
        _prefetch(self._config, steps.map(self._batch_of_step))
      )
      self._batches.start_prefetch()

  def get_state(self):
    return {'step': self._step}

  def set_state(self, state):
    self._stop()
    self._step = state['step']

  def close(self):
    self._stop()
    super().close()

  def _stop(self):
    if self._batches is not None:
      self._batches.close()
      self._batches = None


def make_eval_batches(
  data_config, *, batch_size, split=None, process_index=0, process_count=1
):
  """Every example of a split once, in a fixed order, without augmentation.

  Args:
    data_config: mapping with fields of `DataConfig`.
    batch_size: global batch size, a multiple of `process_count`.
    split: name of the split; None is `eval_split`. The label budget holds for
      `train_split` here too.
    process_index: int in [0, process_count).
    process_count: number of processes that evaluate together.

  Returns:
    An iterable, as often as needed, of dicts of `image` uint8 (b, H, W, 3),
    `label` int32 (b,) and `valid` bool (b,), which is False (image and label 0)
    where the last batch is filled up or an image is broken. Each process gets
    the same number of batches. Where `dense`, of what
    `dense.eval_batch` says.

  Raises:
    ValueError: as `make_train_iterator`.
  """
  config = _parse(data_config)
  share = _share(batch_size, process_index, process_count)
  source = _source(config, split or config.eval_split)
  if config.dense:
    count, batch_of_step, indices = dense.eval_steps(source, config, *share)
  else:
    count = -(-len(source) // batch_size)
    batch_of_step = functools.partial(_eval_batch, source, config, *share)
    indices = functools.partial(_eval_indices, len(source), *share)
  batches = _prefetch(config, grain.MapDataset.range(count).map(batch_of_step))

  def names(step):
    return [source.name(i) for i in indices(step)]

  return EvalBatches(batches, guard.Guard(config, names))


class EvalBatches:
  """The batches of an evaluation, to be walked as often as needed."""

  def __init__(self, batches, watch):
    self._batches, self._guard = batches, watch

  def __iter__(self):
    iterator = iter(self._batches)
    for step in itertools.count():
      batch = self._guard.next(iterator, step)
      if batch is None:
        return
      yield batch


def _train_indices(source, config, seed, batch_size, start, stop, step):
  """(position in the stream, index in the source) of each row of a batch."""
  for position in range(step * batch_size + start, step * batch_size + stop):
    epoch, index = divmod(position, len(source))
    if config.shuffle:
      index = _epoch_order(len(source), seed, epoch)[index]
    yield position, int(index)


def _train_batch(source, config, seed, *share_and_step):
  examples, broken = [], {}
  for position, index in _train_indices(source, config, seed, *share_and_step):

    def make(example, position=position):
      rng = np.random.default_rng((seed, 0, position))
      if config.dense:
        return dense.train_pair(example, config, rng)
      image = transforms.train_image(example, config, rng)
      return image, np.int32(example['label'])

    examples.append(
      guard.first_whole(source, index, make, config.max_broken, broken)
    )
  images, labels = zip(*examples, strict=True)
  return {
    'image': np.stack(images),
    'label': np.stack(labels),
    guard.BROKEN: broken,
  }


def _eval_indices(count, batch_size, start, stop, step):
  first = step * batch_size
  return range(min(first + start, count), min(first + stop, count))


def _eval_batch(source, config, batch_size, start, stop, step):
  images = np.zeros((stop - start, *config.image_size, 3), np.uint8)
  labels = np.zeros(stop - start, np.int32)
  valid = np.zeros(stop - start, bool)
  broken = {}
  indices = _eval_indices(len(source), batch_size, start, stop, step)
  for i, index in enumerate(indices):
    try:
      example = source[index]
      images[i] = transforms.eval_image(example, config)
      labels[i], valid[i] = example['label'], True
    except transforms.BrokenImageError as error:
      broken[source.name(index)] = str(error)
  return {
    'image': images,
    'label': labels,
    'valid': valid,
    guard.BROKEN: broken,
  }


# A batch may reach into the next epoch, hence two.
@functools.lru_cache(maxsize=2)
def _epoch_order(count, seed, epoch):
  return np.random.default_rng((seed, 1, epoch)).permutation(count)


def _prefetch(config, batches):
  """Computes batches ahead of time, in order, in threads or processes."""
  if not config.num_workers:
    read = grain.ReadOptions(config.num_threads, 2 * config.num_threads)
    return batches.to_iter_dataset(read)
  from absl import flags

  # grain hands absl's flags to its workers; only absl.app.run parses them.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  return batches.to_iter_dataset(grain.ReadOptions(0, 0)).mp_prefetch(
    grain.MultiprocessingOptions(config.num_workers, per_worker_buffer_size=2),
    worker_init_fn=_live_and_die_with_parent,
  )


def _live_and_die_with_parent(worker_index, worker_count):
  """Leaves signals to the parent; ends when the parent is gone, even killed."""
  del worker_index, worker_count
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)

  def wait():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()


def _share(batch_size, process_index, process_count):
  """(batch_size, start, stop): the rows of a global batch that are ours."""
  if batch_size % process_count or batch_size < process_count:
    raise ValueError(
      f'Batch size {batch_size} is not divisible by the {process_count} '
      'processes: change the config field batch_size.'
    )
  local = batch_size // process_count
  return batch_size, process_index * local, (process_index + 1) * local


def _row(name):
  if name not in datasets.DATASETS:
    raise ValueError(
      f'data.name is {name!r}, expected one of {sorted(datasets.DATASETS)}.'
    )
  return datasets.DATASETS[name]


def _parse(data_config):
  """`DataConfig` of a mapping; a field that does not exist is refused."""
  known = [field.name for field in dataclasses.fields(DataConfig)]
  for field in data_config:
    if field not in known:
      close = difflib.get_close_matches(field, known, 1) or known
      raise ValueError(
        f'Unknown config field data.{field}; did you mean {", ".join(close)}?'
      )
  return DataConfig(**data_config)


# What decides the images that a source holds.
_SOURCE_FIELDS = (
  'name',
  'data_dir',
  'train_split',
  'eval_split',
  'image_size',
  'num_classes',
  'num_examples',
  'cache_pixels',
)


# Two splits: later stages of a run find what earlier ones decoded.
@functools.lru_cache(maxsize=2)
def _cached_source(config, split):
  row = _row(config.name)
  return datasets.Cached(row.load(row, config, split), config.cache_pixels)


def _source(config, split):
  if config.dense:
    row = _row(config.name)
    return row.load_dense(row, config, split)
  if config.cache_pixels:
    images = {name: getattr(config, name) for name in _SOURCE_FIELDS}
    source = _cached_source(DataConfig(**images), split)
  else:
    row = _row(config.name)
    source = row.load(row, config, split)
  if config.labels_per_class is None or split != config.train_split:
    return source
  return datasets.labels_per_class(
    source, config.labels_per_class, config.labels_seed
  )
