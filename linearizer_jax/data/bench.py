"""How fast images come, and whether that feeds a training.

python -m linearizer_jax.data.bench --data=FOLDER --workers=2
python -m linearizer_jax.data.bench --config=configs/distill_base.py \\
    --config.data.data_dir=DIR --workers=16 --step_seconds=0.25
python -m linearizer_jax.data.bench --data=FOLDER --enlarge --against_torch

Loaders take turns, in one run, with the same number of workers. Images a second
are by the wall clock, which other work on the machine slows down; milliseconds
of processor time an image, of this process and its workers, suffer less, and
images a second a core are one over them. Times start when every loader has
handed out batches for a while. Memory is that of the workers, a page that
several share counted once (PSS), at the start and at its most.
"""

import math
import pathlib
import statistics
import tempfile
import time

import numpy as np
import psutil
from absl import app, flags
from ml_collections import config_flags
from PIL import Image

from linearizer_jax.data import datasets, pipeline, simd, transforms

_CONFIG = config_flags.DEFINE_config_file('config', None, 'a file of configs/')
_DATA = flags.DEFINE_string('data', None, 'folder with train/ and val/')
_WORKERS = flags.DEFINE_integer('workers', 2, 'processes; 0: none')
_IMAGES = flags.DEFINE_integer('images', 4096, 'measured in each round')
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'of all loaders in turns')
_BATCH = flags.DEFINE_integer('batch_size', 64, 'images in an update')
_STEP = flags.DEFINE_float('step_seconds', 0.0, 'of an update, to be fed')
_TORCH = flags.DEFINE_bool('against_torch', False, "also torch's DataLoader")
_ENLARGE = flags.DEFINE_bool(
  'enlarge', False, 'of --data, 2000 images made 500 x 375, like ImageNet'
)


def measure(batches, count, batch_size):
  """Takes `count` batches of an endless iterator.

  Returns:
    dict of 'images_per_second', 'cpu_ms' an image, and 'memory_mb', PSS of the
    workers at five times.
  """
  for _ in range(max(4, count // 4)):  # workers started, buffers filled
    next(batches)
  memory = [_workers_memory()]
  cpu, start = _cpu_seconds(), time.perf_counter()
  for i in range(1, count + 1):
    next(batches)
    if i % max(1, count // 4) == 0:
      memory.append(_workers_memory())
  seconds, cpu = time.perf_counter() - start, _cpu_seconds() - cpu
  images = count * batch_size
  return {
    'images_per_second': images / seconds,
    'cpu_ms': 1000 * cpu / images,
    'memory_mb': memory,
  }


def enlarge(data_dir, out, count=2000, size=(500, 375)):
  """Writes random training images at another size, quality 90, by class.

  Args:
    data_dir: folder with train/ and val/.
    out: folder to write; its val/ has one image a class.
    count: images.
    size: (width, height).
  """
  source = datasets.open_folder(data_dir, ('train', 'val'), 'train')
  chosen = np.random.default_rng(0).permutation(len(source))[:count]
  for number, i in enumerate(chosen):
    example = source[int(i)]
    image = transforms.open_image(example).convert('RGB')
    image = image.resize(size, Image.Resampling.BICUBIC)
    for split in ('train', 'val'):
      place = pathlib.Path(out, split, f'{example["label"]:04d}')
      place.mkdir(parents=True, exist_ok=True)
      if split == 'train' or not any(place.iterdir()):
        image.save(place / f'{number}.jpg', quality=90)


class TorchImages:
  """What a torch training does with Pillow: decode, crop, resize, flip."""

  def __init__(self, source, config):
    self._source, self._config = source, config

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    import torch

    example, config = self._source[index], self._config
    rng = np.random.default_rng(index)
    image = transforms.open_image(example).convert('RGB')
    box = transforms.random_crop_box(
      image.size, config.crop_scale, config.crop_ratio, rng
    )
    image = image.crop(box).resize(
      config.image_size[::-1], Image.Resampling.BICUBIC
    )
    if config.flip and rng.random() < 0.5:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)), example['label']


def torch_batches(data, batch_size, num_workers):
  """Endless shuffled batches of a torch DataLoader over the same images."""
  import torch

  config = pipeline.DataConfig(**data)
  row = datasets.DATASETS[config.name]
  images = TorchImages(row.load(row, config, config.train_split), config)
  sampler = torch.utils.data.RandomSampler(images, num_samples=10**9)
  loader = torch.utils.data.DataLoader(
    images, batch_size, sampler=sampler, num_workers=num_workers
  )
  return iter(loader)


def compare(data, names, batch_size, num_workers, images, rounds):
  """Measures loaders in turns.

  Args:
    data: mapping, a `data` section.
    names: of 'pillow', 'simd', 'torch'.
    batch_size, num_workers, images, rounds: ints; `images` of one round.

  Returns:
    {name: medians over the rounds of what `measure` returns}; of the memory
    (at the start of a round, at its most), MB.
  """
  found = {name: [] for name in names}
  for _ in range(rounds):
    for name in names:
      if name == 'torch':
        batches = torch_batches(data, batch_size, num_workers)
      else:
        batches = pipeline.make_train_iterator(
          data | {'decoder': name, 'num_workers': num_workers},
          batch_size=batch_size,
          seed=0,
        )
      count = max(1, images // batch_size)
      found[name].append(measure(batches, count, batch_size))
      if name != 'torch':
        batches.close()
      del batches
  middle = statistics.median
  return {
    name: {
      'images_per_second': middle(r['images_per_second'] for r in results),
      'cpu_ms': middle(r['cpu_ms'] for r in results),
      'memory_mb': (
        middle(r['memory_mb'][0] for r in results),
        middle(max(r['memory_mb']) for r in results),
      ),
    }
    for name, results in found.items()
  }


def verdict(cpu_ms, images_per_second, batch_size, step_seconds):
  """Whether a step of `step_seconds` would wait for its batch, in words."""
  needed = batch_size / step_seconds
  cores = math.ceil(needed * cpu_ms / 1000)
  word = 'feeds' if images_per_second >= needed else 'starves'
  return f'{word} {needed:.0f} images/s, which take {cores} cores'


def _workers_memory():
  """MB of all child processes; shared pages count once in all of them."""
  total = 0
  for process in psutil.Process().children(recursive=True):
    info = process.memory_full_info()
    total += getattr(info, 'pss', info.uss)  # PSS is known on Linux alone
  return total / 1e6


def _cpu_seconds():
  """User and system time of this process and its children."""
  own = psutil.Process()
  times = [p.cpu_times() for p in [own, *own.children(recursive=True)]]
  return sum(t.user + t.system for t in times)


def main(_):
  if bool(_DATA.value) == bool(_CONFIG.value):
    raise app.UsageError('give one of --data and --config')
  if _CONFIG.value:
    data = _CONFIG.value.data.to_dict()
  else:
    data = dict(name='folder', crop_scale=(0.2, 1.0), flip=True)
    data['data_dir'] = _DATA.value
  names = ['pillow']
  names += ['simd'] if simd.is_installed() else []
  names += ['torch'] if _TORCH.value else []
  with tempfile.TemporaryDirectory() as scratch:
    if _ENLARGE.value:
      enlarge(data['data_dir'], scratch)
      data['data_dir'] = scratch
    sizes = _BATCH.value, _WORKERS.value, _IMAGES.value, _ROUNDS.value
    results = compare(data, names, *sizes)
  print(f'{_WORKERS.value} workers, batches of {_BATCH.value}')
  print(
    'loader  images/s  CPU ms/image  images/s/core  workers, MB (start, top)'
  )
  for name, result in results.items():
    speed, cpu = result['images_per_second'], result['cpu_ms']
    first, top = result['memory_mb']
    print(
      f'{name:6} {speed:9.0f} {cpu:13.2f} {1000 / cpu:14.0f} '
      f'{first:12.0f} {top:11.0f}'
    )
    if _STEP.value:
      print('       ' + verdict(cpu, speed, _BATCH.value, _STEP.value))


if __name__ == '__main__':
  app.run(main)
