"""From a `data` section of a config to batches of uint8 images.

Position p of the endless training stream shows example
`order(seed, p // n)[p % n]`, augmented with a generator made of (seed, p). Step
t of a run with global batch B is positions t B to (t + 1) B - 1, in order, of
which each process takes its contiguous share. So a batch depends on the
config, the seed, the step and the process, not on workers or on what
was run before, and a position in the data is one integer.
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import sys
import threading

import grain
import numpy as np
from absl import flags

from linearizer_jax.data import datasets, dense, guard, transforms
from linearizer_jax.data.config import DataConfig, parse


def num_classes(data_config):
  """Number of classes; opens the data where the table does not know it.

  Raises:
    ValueError: `data.num_classes` is set to another number.
  """
  config = parse(data_config)
  number = (
    datasets.DATASETS[config.name].num_classes
    or _source(config, config.eval_split).num_classes
  )
  if config.num_classes not in (None, number):
    raise ValueError(
      f'data.num_classes is {config.num_classes}, but the data set '
      f'{config.name!r} has {number} classes: leave the field out.'
    )
  return number


def num_train_examples(data_config):
  """Training examples per epoch; opens the data only where it must."""
  config = parse(data_config)
  row = datasets.DATASETS[config.name]
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
  config = parse(data_config)
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
  config = parse(data_config)
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
    # A walk that stops early ends its workers, without waiting for collection.
    with contextlib.closing(iter(self._batches)) as iterator:
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
      'processes: change config.batch_size or config.eval_batch_size.'
    )
  local = batch_size // process_count
  return batch_size, process_index * local, (process_index + 1) * local


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
  row = datasets.DATASETS[config.name]
  return datasets.Cached(row.load(row, config, split), config.cache_pixels)


def _source(config, split):
  row = datasets.DATASETS[config.name]
  if config.dense:
    return row.load_dense(row, config, split)
  if config.cache_pixels:
    images = {name: getattr(config, name) for name in _SOURCE_FIELDS}
    source = _cached_source(DataConfig(**images), split)
  else:
    source = row.load(row, config, split)
  if config.labels_per_class is None or split != config.train_split:
    return source
  return datasets.labels_per_class(
    source, config.labels_per_class, config.labels_seed
  )
