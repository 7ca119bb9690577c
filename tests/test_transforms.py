"""Crops, flips, colours and decoding of one image."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image
from test_data import encode, photo

from linearizer_jax.data import pipeline, transforms


@pytest.mark.parametrize('size', [(500, 375), (30, 200), (3, 3)])
def test_random_crop_stays_inside(size):
  rng = np.random.default_rng(0)
  for _ in range(500):
    left, top, right, bottom = transforms.random_crop_box(
      size, (0.2, 1.0), (3 / 4, 4 / 3), rng
    )
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]


def test_random_crop_is_uniform_in_area_and_log_ratio():
  rng = np.random.default_rng(0)
  areas, ratios = [], []
  for _ in range(2000):
    # Half of the area fits at any of these ratios: nothing is drawn again.
    left, top, right, bottom = transforms.random_crop_box(
      (400, 400), (0.2, 0.5), (3 / 4, 4 / 3), rng
    )
    areas.append((right - left) * (bottom - top) / 400**2)
    ratios.append(np.log((right - left) / (bottom - top)))
  for values, least, most in (
    (areas, 0.2, 0.5),
    (ratios, -np.log(4 / 3), np.log(4 / 3)),
  ):
    # Four standard deviations of a uniform mean; edges by one pixel.
    width = most - least
    assert abs(np.mean(values) - (least + most) / 2) < 0.026 * width
    assert least - 0.01 < min(values) < least + 0.02 * width
    assert most - 0.02 * width < max(values) < most + 0.01


def test_flip_happens_half_the_time():
  example = {'image': photo(16, 16), 'name': ''}
  config = pipeline.DataConfig(image_size=16, flip=True, eval_crop=1.0)
  rng = np.random.default_rng(0)
  flipped = 0
  for _ in range(400):
    image = transforms.train_image(example, config, rng)
    if (image == example['image'][:, ::-1]).all():
      flipped += 1
    else:
      np.testing.assert_array_equal(image, example['image'])
  assert 160 < flipped < 240  # four standard deviations


def test_evaluation_is_resize_then_center_crop():
  image = Image.fromarray(photo(128, 192))
  resized = np.asarray(image.resize((96, 64), Image.Resampling.BICUBIC))
  config = pipeline.DataConfig(image_size=56, eval_crop=0.875)
  example = {'image': np.asarray(image), 'name': ''}
  result = transforms.eval_image(example, config).astype(int)
  assert np.abs(result - resized[4:60, 20:76]).max() <= 1
  wide = pipeline.DataConfig(image_size=(32, 96), eval_crop=1.0)
  result = transforms.eval_image(example, wide).astype(int)
  assert np.abs(result - resized[16:48]).max() <= 1


def test_the_whole_image_is_a_crop_at_any_size():
  """(225 / 224) 224 is more than 225, by a rounding."""
  for side in range(200, 300):
    left, top, right, bottom = transforms.center_crop_box(
      (side, 300), (224, 224), 1.0
    )
    assert 0 <= left < right <= side
    assert 0 <= top < bottom <= 300
  config = pipeline.DataConfig(image_size=224, eval_crop=1.0)
  example = {'image': photo(225, 225), 'name': ''}
  assert transforms.eval_image(example, config).shape == (224, 224, 3)


def test_a_damaged_header_is_a_broken_image():
  encoded = b'\x89PNG\r\n\x1a\n' + (5).to_bytes(4, 'big') + b'IHDR' + 5 * b'a'
  encoded += zlib.crc32(encoded[-9:]).to_bytes(4, 'big')
  with pytest.raises(transforms.BrokenImageError, match='the image some'):
    transforms.open_image({'image': encoded, 'name': 'some.png'})


def test_scaled_jpeg_decoding_keeps_quality():
  encoded = encode(photo(800, 1200), quality=95)
  box, size = (100, 50, 900, 750), (64, 64)
  opened = transforms.open_image({'image': encoded, 'name': ''})
  result = transforms.crop_and_resize(opened, box, size, '')
  assert opened.size == (300, 200)  # it was decoded at a quarter
  whole = Image.open(io.BytesIO(encoded)).resize(
    (64, 64), Image.Resampling.BICUBIC, box
  )
  difference = np.asarray(result).astype(int) - np.asarray(whole)
  assert np.abs(difference).max() <= 3


@pytest.mark.parametrize('mode', ['L', 'P', 'CMYK', 'RGBA', 'I;16'])
def test_other_modes_become_rgb(mode):
  image = Image.fromarray(photo())
  if mode == 'I;16':
    image = Image.fromarray(np.full((40, 60), 300, np.uint16))
  else:
    image = image.convert(mode)
  encoded = encode(image, 'JPEG' if mode == 'CMYK' else 'PNG')
  config = pipeline.DataConfig(image_size=16)
  result = transforms.eval_image({'image': encoded, 'name': ''}, config)
  assert result.shape == (16, 16, 3)


def test_shift_is_exact_and_bounded():
  pixels = photo(9, 9)
  rng = np.random.default_rng(0)
  padded = np.pad(pixels, ((2, 2), (2, 2), (0, 0)))
  windows = {
    padded[y : y + 9, x : x + 9].tobytes() for x in range(5) for y in range(5)
  }
  seen = {
    np.asarray(
      transforms.shift_and_rotate(Image.fromarray(pixels), 2, 0.0, rng)
    ).tobytes()
    for _ in range(400)
  }
  assert seen == windows


def test_rotation_turns_about_the_center():
  class Draws:
    def random(self, count):
      return np.asarray([0.5, 0.5, 0.75][:count])

  pixels = photo(32, 32)
  image = Image.fromarray(pixels)
  # Draw 0.75 is half of the largest angle: a quarter turn.
  turned = transforms.shift_and_rotate(image, 0, 180.0, Draws())
  difference = np.asarray(turned).astype(int) - np.rot90(pixels, -1)
  assert np.abs(difference[1:-1, 1:-1]).max() <= 1


def test_color_jitter_is_bounded():
  image = Image.fromarray(photo())
  rng = np.random.default_rng(0)
  same = transforms.color_jitter(image, 0.0, rng)
  difference = np.asarray(same).astype(int) - np.asarray(image)
  assert np.abs(difference).max() <= 1
  means = [
    np.asarray(transforms.color_jitter(image, 0.4, rng)).mean()
    for _ in range(50)
  ]
  share = np.asarray(means) / np.asarray(image).mean()
  assert share.min() > 0.5
  assert share.max() < 1.45
  assert share.std() > 0.05


@pytest.mark.parametrize('name', sorted(transforms._RAND_AUGMENT))
def test_rand_augment_operations(name):
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 40, (40, 60, 3), dtype=np.uint8)
  image = Image.fromarray(photo() // 2 + 40 + noise)
  changes = []
  for share in (0.1, 0.9):
    for sign in (-1, 1):
      result = transforms._RAND_AUGMENT[name](image, share, sign)
      assert (result.size, result.mode) == (image.size, 'RGB')
      difference = np.asarray(result).astype(int) - np.asarray(image)
      changes.append(np.abs(difference).mean())
  assert min(changes[2:]) > 1
  assert max(changes[:2]) <= min(changes[2:])  # it grows with the magnitude


@pytest.mark.parametrize(
  ('name', 'share', 'levels'),
  [
    # What becomes of the greys 10, 100, 127, 128, 200.
    ('posterize', 0.9, (0, 0, 0, 128, 128)),  # one bit
    ('posterize', 1.0, (0, 0, 0, 128, 128)),
    ('posterize', 0.5, (0, 64, 64, 128, 192)),  # two bits
    ('solarize', 0.9, (10, 155, 128, 127, 55)),  # from 26 on
    ('solarize', 0.5, (10, 100, 127, 127, 55)),  # from 128 on
    ('solarize_add', 0.9, (109, 199, 226, 128, 200)),  # 99 more below 128
    ('invert', 0.9, (245, 155, 128, 127, 55)),
    ('brightness', 0.5, (14, 145, 184, 185, 255)),  # 1.45 of it
  ],
)
def test_rand_augment_strengths(name, share, levels):
  greys = np.array([[10, 100, 127, 128, 200]], np.uint8)
  image = Image.fromarray(np.repeat(greys[..., None], 3, 2))
  result = np.asarray(transforms._RAND_AUGMENT[name](image, share, 1))
  for channel in range(3):
    assert tuple(result[0, :, channel].tolist()) == levels


def test_rand_augment_moves_by_shares_of_the_side():
  image = Image.fromarray(photo(40, 60))
  for name, axis, pixels in (('translate_x', 1, 27), ('translate_y', 0, 18)):
    moved = np.asarray(transforms._RAND_AUGMENT[name](image, 1.0, 1))
    wanted = np.roll(np.asarray(image), -pixels, axis)
    keep = [slice(None), slice(None)]
    keep[axis] = slice(0, image.size[1 - axis] - pixels)
    np.testing.assert_array_equal(moved[tuple(keep)], wanted[tuple(keep)])
    keep[axis] = slice(-pixels + 1, None)  # what comes in is ImageNet's mean
    assert (moved[tuple(keep)] == (124, 116, 104)).all()


def test_three_augment_is_one_of_three():
  pixels = photo()
  image = Image.fromarray(pixels)
  rng = np.random.default_rng(0)
  counts = {'grey': 0, 'solarised': 0, 'blurred': 0}
  for _ in range(300):
    result = np.asarray(transforms.three_augment(image, rng))
    if (result == np.where(pixels < 128, pixels, 255 - pixels)).all():
      counts['solarised'] += 1
    elif (result == result[..., :1]).all():
      counts['grey'] += 1
      light = pixels @ [0.299, 0.587, 0.114]
      assert np.abs(result[..., 0] - light).max() <= 1
    else:
      counts['blurred'] += 1
      assert np.abs(result.mean((0, 1)) - pixels.mean((0, 1))).max() < 1
      edges = [np.diff(np.float32(x), axis=0).std() for x in (result, pixels)]
      assert edges[0] <= edges[1]
  assert min(counts.values()) > 67  # four standard deviations
  assert sum(counts.values()) == 300


@pytest.mark.parametrize(
  'fields',
  [
    {'crop_scale': (0.2, 1.0)},
    {'flip': True},
    {'shift_pixels': 2},
    {'rotate_degrees': 20.0},
    {'three_augment': True},
    {'color_jitter': 0.3},
    {'randaugment_ops': 2},
  ],
  ids=lambda fields: next(iter(fields)),
)
def test_augmentation_is_that_of_its_generator(fields):
  config = pipeline.DataConfig(image_size=16, **fields)
  example = {'image': photo(), 'name': ''}
  one, same, others = (
    [
      transforms.train_image(example, config, np.random.default_rng((0, seed)))
      for seed in seeds
    ]
    for seeds in (range(8), range(8), range(8, 16))
  )
  np.testing.assert_array_equal(one, same)
  assert any((a != b).any() for a, b in zip(one, others, strict=True))
  plain = transforms.eval_image(example, config)
  assert any((image != plain).any() for image in one)


def test_rand_augment_draws_operations():
  image = Image.fromarray(photo())
  rng = np.random.default_rng(0)
  results = [
    np.asarray(transforms.rand_augment(image, 2, 9.0, 0.5, rng)).tobytes()
    for _ in range(60)
  ]
  unchanged = results.count(np.asarray(image).tobytes())
  assert 4 < unchanged < 30  # a quarter of them
  assert len(set(results)) > 20
