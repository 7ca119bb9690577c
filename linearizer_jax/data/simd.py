"""Crops of JPEG images by SIMD libraries: `data.decoder='simd'`.

simplejpeg decodes with libjpeg-turbo, as Pillow does, without Pillow's copies;
cykooz-resizer is Pillow's resampling in vector instructions. Both come with the
extra `[simd]`. `data.bench` measures what they gain.
"""

import importlib.util

from PIL import Image

_MODULES = ('simplejpeg', 'cykooz_resizer')


def is_installed():
  """Whether both libraries of the extra are there."""
  return all(importlib.util.find_spec(name) for name in _MODULES)


def crop_and_resize(encoded, image_size, box, size):
  """Decodes a JPEG, cuts `box` and resizes it, bicubic with antialiasing.

  Args:
    encoded: bytes.
    image_size: (width, height) at full size, from the header.
    box: (left, top, right, bottom) in its pixels, floats.
    size: (H, W) of the result.

  Returns:
    PIL image, RGB, (H, W); within a few grey levels of
    `transforms.crop_and_resize`. None where simplejpeg refuses the file, which
    Pillow may still read.
  """
  import cykooz_resizer as resizer
  import simplejpeg

  height, width = size
  left, top, right, bottom = box
  try:
    # As `draft` in transforms: never below twice the wanted size.
    pixels = simplejpeg.decode_jpeg(
      encoded,
      'RGB',
      min_height=-int(-2 * height * image_size[1] // (bottom - top)),
      min_width=-int(-2 * width * image_size[0] // (right - left)),
      min_factor=2,
    )
  except ValueError:
    return None
  rows, columns = pixels.shape[:2]
  x, y = columns / image_size[0], rows / image_size[1]
  left, top, right, bottom = left * x, top * y, right * x, bottom * y
  kind = resizer.PixelType.U8x3
  source = resizer.ImageData(columns, rows, kind, pixels.tobytes())
  target = resizer.ImageData(width, height, kind)
  resizer.Resizer().resize(
    source,
    target,
    resizer.ResizeOptions(
      resize_alg=resizer.ResizeAlg.convolution(
        resizer.FilterType.catmull_rom  # the bicubic of Pillow
      ),
      # A crop beyond the image, were it by a rounding, is refused.
      crop_box=resizer.CropBox(
        *(left, top, min(right, columns) - left, min(bottom, rows) - top)
      ),
    ),
  )
  return Image.frombuffer('RGB', (width, height), target.get_buffer())
