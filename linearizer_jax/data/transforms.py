"""Pure functions from an example to an image: decode, crop, flip, colour.

Images are PIL images until the last line. Whatever is random takes a
`np.random.Generator`, so that an image depends on its generator alone.
"""

import io
import math

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from linearizer_jax.data import simd

GREY = (124, 116, 104)  # the mean of ImageNet: fills what no image covers
_BICUBIC = Image.Resampling.BICUBIC
# What Pillow raises on damaged files, and on damaged headers.
_DECODING_ERRORS = (OSError, SyntaxError, Image.DecompressionBombError)
_OPENING_ERRORS = (*_DECODING_ERRORS, ValueError)


class BrokenImageError(ValueError):
  """An image cannot be decoded; the message names its file."""


def train_image(example, config, rng):
  """Decodes and augments one training example.

  Random-resized-crop, flip, shift and rotation, 3-Augment, colour, RandAugment,
  in this order. A step whose field in `config.DataConfig` is off draws
  nothing.

  Args:
    example: dict of `image` (encoded bytes or uint8 (h, w, 3)), `name`.
    config: `config.DataConfig`.
    rng: `np.random.Generator`.

  Returns:
    uint8 (H, W, 3) with (H, W) = `config.image_size`.

  Raises:
    BrokenImageError: the image cannot be decoded; names the file.
  """
  image = open_image(example)
  if config.crop_scale:
    box = random_crop_box(image.size, config.crop_scale, config.crop_ratio, rng)
  else:
    box = center_crop_box(image.size, config.image_size, config.eval_crop)
  image = _train_crop(image, example, box, config)
  if config.flip and rng.random() < 0.5:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  if config.shift_pixels or config.rotate_degrees:
    image = shift_and_rotate(
      image, config.shift_pixels, config.rotate_degrees, rng
    )
  if config.three_augment:
    image = three_augment(image, rng)
  if config.color_jitter:
    image = color_jitter(image, config.color_jitter, rng)
  if config.randaugment_ops:
    image = rand_augment(
      image,
      config.randaugment_ops,
      config.randaugment_magnitude,
      config.randaugment_std,
      rng,
    )
  return np.asarray(image)


def eval_image(example, config):
  """Decodes one example; resize and center crop by `config.eval_crop`.

  Equals resizing so that the image just covers `image_size / eval_crop`, then
  cutting `image_size` out of its center, in one resampling.

  Args:
    example: dict of `image` (encoded bytes or uint8 (h, w, 3)), `name`.
    config: `config.DataConfig`.

  Returns:
    uint8 (H, W, 3) with (H, W) = `config.image_size`.

  Raises:
    BrokenImageError: the image cannot be decoded; names the file.
  """
  image = open_image(example)
  box = center_crop_box(image.size, config.image_size, config.eval_crop)
  image = crop_and_resize(
    image, box, config.image_size, example['name'], exact=True
  )
  return np.asarray(image)


def open_image(example):
  """The PIL image of an example; encoded bytes are not decoded yet."""
  image = example['image']
  if not isinstance(image, bytes):
    return Image.fromarray(image)
  try:
    return Image.open(io.BytesIO(image))
  except _OPENING_ERRORS as error:
    raise BrokenImageError(_broken(example['name'], error)) from error


def decoded(example, mode=None):
  """The PIL image of an example, decoded, in its own or another mode.

  Raises:
    BrokenImageError: the image cannot be decoded; names the file.
  """
  image = open_image(example)
  try:
    image.load()
    return image.convert(mode) if mode else image
  except _DECODING_ERRORS as error:
    raise BrokenImageError(_broken(example['name'], error)) from error


def image_size(path):
  """(height, width) of an image file, from its header.

  Raises:
    BrokenImageError: it is no image; names the file.
  """
  try:
    with Image.open(path) as image:
      return image.height, image.width
  except _OPENING_ERRORS as error:
    raise BrokenImageError(_broken(path, error)) from error


def shrink(example, pixels):
  """Decodes an example; its shorter side becomes `pixels` where it is longer.

  Args:
    example: dict of `image` (encoded bytes or uint8 (h, w, 3)), `name`.
    pixels: int.

  Returns:
    uint8 (h, w, 3).

  Raises:
    BrokenImageError: the image cannot be decoded; names the file.
  """
  image = open_image(example)
  width, height = image.size
  scale = min(1, pixels / min(width, height))
  size = round(scale * height), round(scale * width)
  image = crop_and_resize(image, (0, 0, width, height), size, example['name'])
  return np.asarray(image)


def _train_crop(image, example, box, config):
  """`crop_and_resize` by the decoder of the config."""
  if (
    config.decoder == 'simd'
    and image.format == 'JPEG'
    and image.mode in ('RGB', 'L')
  ):
    crop = simd.crop_and_resize(
      example['image'], image.size, box, config.image_size
    )
    if crop is not None:
      return crop
  return crop_and_resize(image, box, config.image_size, example['name'])


def crop_and_resize(image, box, size, name, exact=False):
  """Decodes, cuts `box` (left, top, right, bottom) and resizes it, bicubic.

  Args:
    image: PIL image, decoded or not.
    box: floats, in pixels of the image at its full size.
    size: (H, W) of the result.
    name: for the error message.
    exact: decode at the full size, also where a smaller one would do.

  Returns:
    PIL image, RGB, (H, W).

  Raises:
    BrokenImageError: the image cannot be decoded; names the file.
  """
  height, width = size
  left, top, right, bottom = box
  full_width, full_height = image.size
  # JPEG can be decoded at 1/2, 1/4, 1/8, which averages pixels. Staying at
  # twice the wanted size or above leaves the last halving to the bicubic.
  if not exact:
    image.draft(
      'RGB',
      (
        math.ceil(2 * width * full_width / (right - left)),
        math.ceil(2 * height * full_height / (bottom - top)),
      ),
    )
  try:
    image = image if image.mode == 'RGB' else image.convert('RGB')
    x, y = image.width / full_width, image.height / full_height
    box = (left * x, top * y, right * x, bottom * y)
    return image.resize((width, height), _BICUBIC, box)
  except _DECODING_ERRORS as error:
    raise BrokenImageError(_broken(name, error)) from error


def random_crop_box(image_size, scale, ratio, rng):
  """A crop of random area and shape, uniform in area and in log ratio.

  Inception's crop, as torchvision's RandomResizedCrop draws it: ten tries, then
  the largest central crop within `ratio`.

  Args:
    image_size: (width, height), as PIL has it.
    scale: (least, most) share of the area, in (0, 1].
    ratio: (least, most) width / height.
    rng: `np.random.Generator`.

  Returns:
    (left, top, right, bottom), ints inside the image.
  """
  width, height = image_size
  area = width * height
  log_ratio = math.log(ratio[0]), math.log(ratio[1])
  for _ in range(10):
    target = area * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(*log_ratio))
    w = round(math.sqrt(target * aspect))
    h = round(math.sqrt(target / aspect))
    if 0 < w <= width and 0 < h <= height:
      left = int(rng.integers(width - w + 1))
      top = int(rng.integers(height - h + 1))
      return left, top, left + w, top + h
  w = min(width, round(height * ratio[1]))
  h = min(height, round(width / ratio[0]))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def center_crop_box(image_size, size, fraction):
  """The central crop with the shape of `size`, `fraction` of what would fit.

  Args:
    image_size: (width, height), as PIL has it.
    size: (H, W) of the result.
    fraction: in (0, 1].

  Returns:
    (left, top, right, bottom), floats inside the image.
  """
  width, height = image_size
  scale = fraction * min(width / size[1], height / size[0])
  # The longer side of the crop may be longer than the image by a rounding.
  left = max(0.0, (width - scale * size[1]) / 2)
  top = max(0.0, (height - scale * size[0]) / 2)
  return left, top, width - left, height - top


def shift_and_rotate(image, shift_pixels, rotate_degrees, rng):
  """Moves by whole pixels, turns about the center, bilinear; black comes in.

  Args:
    image: PIL image.
    shift_pixels: the largest shift in each direction, int.
    rotate_degrees: the largest angle to each side.
    rng: `np.random.Generator`.

  Returns:
    PIL image of the same size.
  """
  dx, dy, turn = rng.random(3).tolist()
  dx = math.floor(dx * (2 * shift_pixels + 1)) - shift_pixels
  dy = math.floor(dy * (2 * shift_pixels + 1)) - shift_pixels
  angle = math.radians(rotate_degrees * (2 * turn - 1))
  cos, sin = math.cos(angle), math.sin(angle)
  cx, cy = image.width / 2, image.height / 2
  # The inverse map, from a place in the result to its place in `image`.
  matrix = (
    *(cos, sin, cx - cos * (cx + dx) - sin * (cy + dy)),
    *(-sin, cos, cy + sin * (cx + dx) - cos * (cy + dy)),
  )
  # Without rotation every place is a pixel's center: nothing to interpolate.
  kinds = Image.Resampling
  method = kinds.BILINEAR if rotate_degrees else kinds.NEAREST
  return image.transform(image.size, Image.Transform.AFFINE, matrix, method)


def color_jitter(image, strength, rng):
  """Brightness, contrast and saturation in random order.

  Args:
    image: PIL image, RGB.
    strength: each factor is uniform in [1 - strength, 1 + strength].
    rng: `np.random.Generator`.

  Returns:
    PIL image.
  """
  enhancers = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
  for index in rng.permutation(len(enhancers)):
    factor = rng.uniform(max(0, 1 - strength), 1 + strength)
    image = enhancers[index](image).enhance(factor)
  return image


def three_augment(image, rng):
  """One of grey, solarised or blurred, with equal chance.

  Source: DeiT III (arXiv 2204.07118), section 3.2: grey; every value from 128
  on inverted; a Gaussian of 0.1 to 2 pixels. Its colour jitter of 0.3 is
  `color_jitter`, which follows.

  Args:
    image: PIL image, RGB.
    rng: `np.random.Generator`.

  Returns:
    PIL image, RGB, of the same size.
  """
  kind = rng.integers(3)
  if kind == 0:
    return ImageOps.grayscale(image).convert('RGB')
  if kind == 1:
    return ImageOps.solarize(image)
  return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))


def rand_augment(image, num_ops, magnitude, magnitude_std, rng):
  """Applies `num_ops` random rows of `_RAND_AUGMENT`, each with chance 1/2.

  RandAugment (arXiv 1909.13719) as recipes write it, "rand-m9-mstd0.5-inc1":
  operations drawn with replacement, every one growing with the magnitude. One
  thing differs: at magnitude 10 posterizing keeps one bit of a pixel, not none,
  which would give a black image.

  Args:
    image: PIL image, RGB.
    num_ops: operations drawn per image.
    magnitude: in [0, 10].
    magnitude_std: the magnitude is normal with this deviation, then clipped.
    rng: `np.random.Generator`.

  Returns:
    PIL image of the same size.
  """
  for name in rng.choice(list(_RAND_AUGMENT), num_ops):
    if rng.random() < 0.5:
      share = np.clip(rng.normal(magnitude, magnitude_std), 0, 10) / 10
      sign = 1 if rng.random() < 0.5 else -1
      image = _RAND_AUGMENT[name](image, float(share), sign)
  return image


def _affine(image, *matrix):
  return image.transform(
    image.size, Image.Transform.AFFINE, matrix, _BICUBIC, fillcolor=GREY
  )


def _solarize_add(image, share, sign):
  add = int(110 * share)
  return image.point(
    [min(255, v + add) if v < 128 else v for v in range(256)] * 3
  )


def _enhance(kind):
  return lambda image, share, sign: kind(image).enhance(1 + 0.9 * share * sign)


# (image, share of the full strength, sign) -> image.
_RAND_AUGMENT = {
  'autocontrast': lambda image, share, sign: ImageOps.autocontrast(image),
  'equalize': lambda image, share, sign: ImageOps.equalize(image),
  'invert': lambda image, share, sign: ImageOps.invert(image),
  'posterize': lambda image, share, sign: ImageOps.posterize(
    image, max(1, 4 - int(4 * share))
  ),
  'solarize': lambda image, share, sign: ImageOps.solarize(
    image, 256 - int(256 * share)
  ),
  'solarize_add': _solarize_add,
  'color': _enhance(ImageEnhance.Color),
  'contrast': _enhance(ImageEnhance.Contrast),
  'brightness': _enhance(ImageEnhance.Brightness),
  'sharpness': _enhance(ImageEnhance.Sharpness),
  'rotate': lambda image, share, sign: image.rotate(
    30 * share * sign, _BICUBIC, fillcolor=GREY
  ),
  'shear_x': lambda image, share, sign: _affine(
    image, 1, 0.3 * share * sign, 0, 0, 1, 0
  ),
  'shear_y': lambda image, share, sign: _affine(
    image, 1, 0, 0, 0.3 * share * sign, 1, 0
  ),
  'translate_x': lambda image, share, sign: _affine(
    image, 1, 0, 0.45 * share * sign * image.width, 0, 1, 0
  ),
  'translate_y': lambda image, share, sign: _affine(
    image, 1, 0, 0, 0, 1, 0.45 * share * sign * image.height
  ),
}


def _broken(name, error):
  return (
    f'Cannot decode the image {name} ({error}). Replace it by a whole JPEG or '
    'PNG, remove it (which changes the order of the examples), or raise '
    'data.max_broken to pass it over, and start again; checkpoints written so '
    'far are kept.'
  )
