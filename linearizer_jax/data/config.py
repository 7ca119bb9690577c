"""The `data` section of a config: its fields, defaults, and what is refused."""

import dataclasses
import difflib

from linearizer_jax.data import datasets, dense, simd


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The fields of a config's `data` section, with their defaults."""

  name: str = 'digits'  # row of datasets.DATASETS
  data_dir: str | None = None  # folder: the root; TFDS: its data_dir
  train_split: str | None = None  # None: the row's; TFDS slices are fine
  eval_split: str | None = None
  image_size: int | tuple[int, int] = 224  # side, or (height, width)

  # A 'folder' with a label for each pixel needs it, 'generated' takes 10 by
  # default. Other data know it: a number that is not theirs is refused.
  num_classes: int | None = None
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

  # The central share (per side) of an image that evaluation sees, and training
  # where `crop_scale` is None.
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

  # 'pillow', or 'simd': training crops by faster code, the libraries of the
  # extra [simd]. Evaluation and `cache_pixels` decode with Pillow.
  decoder: str = 'pillow'

  # Faults. Up to `max_broken` images that cannot be decoded are passed over:
  # training takes the next example instead, evaluation leaves them out. Each
  # host counts its own, of all its workers, and counts the two apart.
  max_broken: int = 0
  timeout_seconds: float = 600.0  # without a batch, after which to stop; 0: no

  # Neither changes a batch.
  num_workers: int = 0  # processes; 0: threads of this process
  num_threads: int = 1  # threads, when there are no worker processes

  def __post_init__(self):
    for field in ('image_size', 'eval_window', 'eval_stride'):
      size = getattr(self, field)
      size = tuple(size) if isinstance(size, tuple | list) else (size, size)
      if len(size) != 2 or not all(isinstance(side, int) for side in size):
        raise ValueError(
          f'data.{field} is {getattr(self, field)!r}, expected a side or '
          '(height, width) in pixels.'
        )
      object.__setattr__(self, field, size)
    if min(self.image_size) < 1:
      raise ValueError(
        f'data.image_size is {self.image_size}, expected sides of at least 1.'
      )
    for field in ('crop_scale', 'crop_ratio', 'scale_range'):
      value = getattr(self, field)
      if value is not None and len(value) != 2:
        raise ValueError(f'data.{field} is {value}, expected (least, most).')
    if self.name not in datasets.DATASETS:
      raise ValueError(
        f'data.name is {self.name!r}, expected one of '
        f'{sorted(datasets.DATASETS)}.'
      )
    row = datasets.DATASETS[self.name]
    if self.name == 'generated' and self.num_classes is None:
      object.__setattr__(self, 'num_classes', 10)
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
    if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
      raise ValueError(
        f'data.crop_ratio is {self.crop_ratio}, expected (least, most) with '
        '0 < least <= most.'
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
    classes = self.num_classes or row.num_classes
    if classes is None or not 1 <= classes <= dense.IGNORED:
      raise ValueError(
        f'data.num_classes is {self.num_classes}; labels of pixels are bytes, '
        f'so expected 1 to {dense.IGNORED}.'
      )
    if not all(0 <= label <= 255 for label in self.ignore_labels):
      raise ValueError(
        f'data.ignore_labels is {tuple(self.ignore_labels)}; labels of pixels '
        'are bytes, so expected 0 to 255.'
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


def parse(data_config):
  """`DataConfig` of a mapping; a field that does not exist is refused."""
  known = [field.name for field in dataclasses.fields(DataConfig)]
  for field in data_config:
    if field not in known:
      close = difflib.get_close_matches(field, known, 1) or known
      raise ValueError(
        f'Unknown config field data.{field}; did you mean {", ".join(close)}?'
      )
  return DataConfig(**data_config)
