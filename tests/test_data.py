"""The data room: tables, transforms, order of examples, errors."""

import io
import subprocess
import sys
import zlib

import grain
import ml_collections
import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from linearizer_jax.data import datasets, pipeline, prepare, transforms

# One class per example, so that a label tells which example it is.
GENERATED = {
  'name': 'generated',
  'image_size': (12, 20),
  'num_classes': 20,
  'num_examples': 20,
  'crop_scale': (0.3, 1.0),
  'flip': True,
}


def photo(height=40, width=60, seed=0):
  """A smooth random image, uint8 (height, width, 3)."""
  rng = np.random.default_rng(seed)
  small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
  return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def encode(image, fmt='JPEG', **options):
  file = io.BytesIO()
  image = image if isinstance(image, Image.Image) else Image.fromarray(image)
  image.save(file, fmt, **options)
  return file.getvalue()


@pytest.fixture
def folder(tmp_path):
  """Two classes, three training and two evaluation images each."""
  for split, count in (('train', 3), ('val', 2)):
    for label, name in enumerate(('cat', 'dog')):
      place = tmp_path / split / name
      place.mkdir(parents=True)
      for i in range(count):
        image = photo(seed=10 * label + i)
        (place / f'{i}.jpg').write_bytes(encode(image))
  (tmp_path / 'train' / 'dog' / '0.jpg').rename(
    tmp_path / 'train' / 'dog' / '0.JPEG'
  )
  (tmp_path / 'train' / 'cat' / '9.png').write_bytes(encode(photo(), 'PNG'))
  (tmp_path / 'train' / 'cat' / 'notes.txt').write_text('not an image')
  (tmp_path / 'train' / '.cache').mkdir()
  return {'name': 'folder', 'data_dir': str(tmp_path), 'image_size': 16}


def train_batches(config, count, **kwargs):
  kwargs = {'batch_size': 8, 'seed': 3, **kwargs}
  iterator = pipeline.make_train_iterator(config, **kwargs)
  batches = [next(iterator) for _ in range(count)]
  iterator.close()
  return batches


def assert_same(ours, theirs):
  assert len(ours) == len(theirs)
  for a, b in zip(ours, theirs, strict=True):
    assert sorted(a) == sorted(b)
    for key in a:
      np.testing.assert_array_equal(a[key], b[key], err_msg=key)


# The order of examples.


def test_batch_shapes_and_types():
  config = ml_collections.ConfigDict(GENERATED)
  (batch,) = train_batches(config, 1)
  assert batch['image'].shape == (8, 12, 20, 3)
  assert batch['image'].dtype == np.uint8
  assert batch['label'].shape == (8,)
  assert batch['label'].dtype == np.int32
  assert batch['image'].std() > 10


@pytest.mark.parametrize(
  'field', [{'num_threads': 0}, {'num_threads': 3}, {'num_workers': 2}]
)
def test_workers_do_not_change_batches(field):
  expected = train_batches(GENERATED, 7)
  assert_same(train_batches({**GENERATED, **field}, 7), expected)


@pytest.mark.parametrize('count', [2, 4])
def test_processes_share_the_global_batch(count):
  parts = [
    train_batches(GENERATED, 6, process_index=i, process_count=count)
    for i in range(count)
  ]
  joined = [
    {key: np.concatenate([part[key] for part in step]) for key in step[0]}
    for step in zip(*parts, strict=True)
  ]
  assert_same(joined, train_batches(GENERATED, 6))


def test_seed_decides_order_and_augmentation():
  a, b = train_batches(GENERATED, 1)[0], train_batches(GENERATED, 1, seed=4)[0]
  assert (a['label'] != b['label']).any()
  fixed = {**GENERATED, 'shuffle': False}
  a, b = train_batches(fixed, 1)[0], train_batches(fixed, 1, seed=4)[0]
  np.testing.assert_array_equal(a['label'], b['label'])
  assert (a['image'] != b['image']).any()


@pytest.mark.parametrize('batch_size', [4, 8])
def test_each_epoch_shows_each_example_once_in_a_new_order(batch_size):
  # 8 does not divide 20: a batch then holds the end and the next beginning.
  batches = train_batches(GENERATED, 40 // batch_size, batch_size=batch_size)
  labels = np.concatenate([batch['label'] for batch in batches])
  first, second = labels[:20], labels[20:]
  np.testing.assert_array_equal(np.sort(first), np.arange(20))
  np.testing.assert_array_equal(np.sort(second), np.arange(20))
  assert (first != second).any()


def test_augmentation_is_new_in_each_epoch():
  fixed = {**GENERATED, 'shuffle': False}
  first, second = train_batches(fixed, 2, batch_size=20)
  np.testing.assert_array_equal(first['label'], second['label'])
  changed = (first['image'] != second['image']).any(axis=(1, 2, 3))
  assert changed.all()


def test_resume_from_a_state():
  expected = train_batches(GENERATED, 9)
  iterator = pipeline.make_train_iterator(GENERATED, batch_size=8, seed=3)
  assert_same([next(iterator) for _ in range(4)], expected[:4])
  state = iterator.get_state()
  for _ in range(3):
    next(iterator)
  iterator.set_state(state)  # after prefetching beyond the state
  assert_same([next(iterator) for _ in range(5)], expected[4:])
  iterator.close()
  with pytest.raises(ValueError, match='closed'):
    next(iterator)
  other = pipeline.make_train_iterator(
    {**GENERATED, 'num_threads': 2},
    batch_size=8,
    seed=3,
    process_index=1,
    process_count=2,
  )
  other.set_state(state)
  np.testing.assert_array_equal(next(other)['label'], expected[4]['label'][4:])
  other.close()


def test_grain_checkpoint_round_trip(tmp_path):
  handler = grain.checkpoint.CheckpointHandler()
  directory = epath.Path(tmp_path)
  iterator = pipeline.make_train_iterator(GENERATED, batch_size=8, seed=3)
  next(iterator)
  handler.save(directory, iterator)
  expected = next(iterator)
  iterator.close()
  restored = pipeline.make_train_iterator(GENERATED, batch_size=8, seed=3)
  assert handler.restore(directory, restored) is restored
  assert_same([next(restored)], [expected])
  restored.close()


@pytest.mark.parametrize('process_count', [1, 2])
@pytest.mark.parametrize('batch_size', [4, 8, 64])
def test_evaluation_counts_each_example_once(batch_size, process_count):
  seen, lengths = [], set()
  for index in range(process_count):
    batches = pipeline.make_eval_batches(
      GENERATED,
      batch_size=batch_size,
      process_index=index,
      process_count=process_count,
    )
    first = list(batches)
    assert_same(first, list(batches))  # can be walked again
    lengths.add(len(first))
    for batch in first:
      local = batch_size // process_count
      assert batch['image'].shape == (local, 12, 20, 3)
      assert batch['valid'].shape == (local,)
      assert not batch['image'][~batch['valid']].any()
      seen += batch['label'][batch['valid']].tolist()
  assert sorted(seen) == list(range(20))
  assert lengths == {-(-20 // batch_size)}


# Data sets.


# Training examples and classes.
EXPECTED = {
  'imagenet2012': (1281167, 1000),
  'imagenette': (9469, 10),
  'folder': (7, 2),
  'records': (7, 2),
  'digits': (1438, 10),
  'generated': (256, 10),
}


@pytest.mark.parametrize(
  'name', sorted(name for name, row in datasets.DATASETS.items() if row.load)
)
def test_every_row(name, folder, tmp_path):
  row = datasets.DATASETS[name]
  config = folder if name == 'folder' else {'name': name, 'image_size': 16}
  if name == 'records':
    prepare.prepare_folder(folder['data_dir'], tmp_path / 'shards')
    config['data_dir'] = str(tmp_path / 'shards')
  assert pipeline.num_train_examples(config) == EXPECTED[name][0]
  assert pipeline.num_classes(config) == EXPECTED[name][1]
  if row.tfds_name:
    # What TFDS knows about it without having it.
    info = tfds.builder(row.tfds_name, data_dir=tmp_path).info
    assert info.features['label'].num_classes == row.num_classes
    return
  labels = np.concatenate(
    [
      batch['label'][batch['valid']]
      for batch in pipeline.make_eval_batches(
        config, batch_size=100, split=row.train_split
      )
    ]
  )
  assert len(labels) == EXPECTED[name][0]
  assert set(labels) == set(range(EXPECTED[name][1]))


@pytest.mark.parametrize('name', ['imagenet2012', 'imagenette'])
def test_unprepared_tfds_says_how_to_prepare_it(name, tmp_path):
  config = {'name': name, 'data_dir': str(tmp_path)}
  command = f'tfds build {name}.* --file_format=array_record --data_dir='
  for _ in range(2):  # the second time TFDS raises another error
    with pytest.raises(ValueError, match=command):
      pipeline.make_train_iterator(config, batch_size=8, seed=0)
  assert not list(tmp_path.iterdir())


def test_tfds_array_record_round_trip(tmp_path, monkeypatch):
  images = [photo(seed=i) for i in range(6)]

  class TinyPhotos(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      features = {
        'image': tfds.features.Image(encoding_format='png'),
        'label': tfds.features.ClassLabel(num_classes=3),
      }
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, dl_manager):
      return {
        'train': self._generate_examples(6),
        'validation': self._generate_examples(2),
      }

    def _generate_examples(self, count):
      for i in range(count):
        file = io.BytesIO(encode(images[i], 'PNG'))
        yield i, {'image': file, 'label': i % 3}

  tfds.disable_progress_bar()
  builder = TinyPhotos(data_dir=tmp_path, file_format='array_record')
  builder.download_and_prepare()
  row = datasets.Dataset(
    datasets.DATASETS['imagenette'].load,
    'train',
    'validation',
    tfds_name='tiny_photos',
  )
  monkeypatch.setitem(datasets.DATASETS, 'tiny_photos', row)
  config = {
    'name': 'tiny_photos',
    'data_dir': str(tmp_path),
    'image_size': (40, 60),
    'eval_crop': 1.0,
  }
  assert pipeline.num_classes(config) == 3
  assert pipeline.num_train_examples(config) == 6
  half = {**config, 'train_split': 'train[:50%]'}
  assert pipeline.num_train_examples(half) == 3
  budget = {**config, 'labels_per_class': 1}
  assert pipeline.num_train_examples(budget) == 3
  (batch,) = train_batches(config, 1, batch_size=6)
  # TFDS stores the examples in an order of its own.
  pairs = zip(batch['image'], batch['label'], strict=True)
  found = {image.tobytes(): label for image, label in pairs}
  assert found == {image.tobytes(): i % 3 for i, image in enumerate(images)}
  (batch,) = pipeline.make_eval_batches(config, batch_size=4)
  np.testing.assert_array_equal(batch['valid'], [True, True, False, False])
  in_workers = {**config, 'num_workers': 1}
  assert_same(train_batches(in_workers, 2), train_batches(config, 2))
  source = datasets.Tfds('tiny_photos', 'train', str(tmp_path))
  assert source[4]['name'] == 'tiny_photos train[4]'
  with pytest.raises(ValueError, match='Cannot read split'):
    datasets.Tfds('tiny_photos', 'test', str(tmp_path))


def all_of(config, split):
  batches = list(pipeline.make_eval_batches(config, batch_size=50, split=split))
  valid = np.concatenate([batch['valid'] for batch in batches])
  return tuple(
    np.concatenate([batch[key] for batch in batches])[valid]
    for key in ('image', 'label')
  )


def test_digits_split_is_stratified_and_whole():
  from sklearn.datasets import load_digits

  config = {'name': 'digits', 'image_size': 8, 'eval_crop': 1.0}
  images, labels = all_of(config, 'train')
  test_images, test_labels = all_of(config, 'test')
  assert (len(labels), len(test_labels)) == (1438, 359)
  share = np.bincount(test_labels) / np.bincount(load_digits().target)
  np.testing.assert_allclose(share, 0.2, atol=0.003)
  # At 8 x 8 nothing is interpolated: both splits together are the data set.
  grey = np.concatenate([images, test_images])[..., 0].reshape(1797, 64)
  whole = np.round(load_digits().data * (255 / 16)).astype(np.uint8)
  np.testing.assert_array_equal(
    sorted(grey.tolist()), sorted(whole.astype(int).tolist())
  )


@pytest.mark.parametrize('count', [1, 10])
def test_label_budget(count):
  config = {'name': 'digits', 'image_size': 8, 'labels_per_class': count}
  images, labels = all_of(config, 'train')
  np.testing.assert_array_equal(np.bincount(labels), [count] * 10)
  assert pipeline.num_train_examples(config) == 10 * count
  np.testing.assert_array_equal(images, all_of(config, 'train')[0])
  other, _ = all_of({**config, 'labels_seed': 1}, 'train')
  assert (images != other).any()
  assert len(all_of(config, 'test')[1]) == 359
  # The training stream holds these examples and no other.
  (batch,) = train_batches(config, 1, batch_size=10 * count)
  assert sorted(batch['label']) == sorted(labels)


def test_label_budget_above_a_class(folder):
  config = {**folder, 'labels_per_class': 4}
  with pytest.raises(ValueError, match='class 1 has only 3'):
    pipeline.num_train_examples(config)


def test_folder_reads_files_in_order(folder):
  images, labels = all_of(folder, 'val')
  np.testing.assert_array_equal(labels, [0, 0, 1, 1])
  config = pipeline.DataConfig(**folder)
  path = f'{folder["data_dir"]}/val/dog/1.jpg'
  with open(path, 'rb') as file:
    example = {'image': file.read(), 'name': path}
  expected = transforms.eval_image(example, config)
  np.testing.assert_array_equal(images[3], expected)


@pytest.mark.parametrize('num_workers', [0, 1])
def test_broken_image_names_its_file(folder, tmp_path, num_workers):
  path = tmp_path / 'train' / 'dog' / '1.jpg'
  path.write_bytes(path.read_bytes()[:300])
  config = {**folder, 'num_workers': num_workers}
  with pytest.raises(ValueError, match=f'decode the image {path}'):
    train_batches(config, 1)
  path = tmp_path / 'val' / 'cat' / '0.jpg'
  path.write_bytes(b'no image')
  with pytest.raises(ValueError, match=f'decode the image {path}'):
    list(pipeline.make_eval_batches(config, batch_size=8))


@pytest.mark.parametrize('num_workers', [0, 2])
def test_cached_images_are_decoded_once(folder, num_workers, monkeypatch):
  """Large enough, a cache changes nothing; then the files are not needed."""
  plain = folder | {'crop_scale': (0.3, 1.0), 'eval_crop': 1.0}
  cached = plain | {'cache_pixels': 64, 'num_workers': num_workers}
  assert_same(train_batches(cached, 3), train_batches(plain, 3))
  small = plain | {'cache_pixels': 20}
  source = pipeline._source(pipeline.DataConfig(**small), 'train')
  assert {x['image'].shape for x in source} == {(20, 30, 3)}
  monkeypatch.setattr(datasets.Folder, '__getitem__', None)
  assert len(train_batches(small, 1)[0]['image']) == 8
  few = small | {'labels_per_class': 1}
  assert pipeline.num_train_examples(few) == 2
  assert len(train_batches(few, 1)[0]['image']) == 8


def test_folder_errors(folder, tmp_path):
  def error(match, **fields):
    with pytest.raises(ValueError, match=match):
      pipeline.num_classes({**folder, **fields})

  error('data_dir is empty', data_dir=None)
  error(r'no folder .*test.*<data_dir>/test/<class>', eval_split='test')
  (tmp_path / 'train' / 'emu').mkdir()
  error(r"only in train: \['emu'\]")
  (tmp_path / 'val' / 'emu').mkdir()
  error('val/emu holds no file')
  (tmp_path / 'val' / 'fox').mkdir()
  error(r"only in val: \['fox'\]")
  (tmp_path / 'bare').mkdir()
  error('has no class folders', train_split='bare')


@pytest.mark.parametrize(
  ('fields', 'match'),
  [
    ({'image_sise': 8}, 'data.image_sise; did you mean image_size'),
    ({'name': 'mnist'}, "'mnist', expected one of"),
    ({'crop_scale': (0.5, 1.5)}, 'crop_scale'),
    ({'crop_ratio': (4 / 3, 3 / 4)}, 'data.crop_ratio'),
    ({'eval_crop': 0.0}, 'eval_crop'),
    ({'train_split': 'all'}, "Split 'all' is neither"),
  ],
)
def test_bad_fields(fields, match):
  with pytest.raises(ValueError, match=match):
    train_batches({**GENERATED, **fields}, 1)


def test_batch_size_not_divisible_by_processes():
  with pytest.raises(ValueError, match='8 is not divisible by the 3'):
    train_batches(GENERATED, 1, process_count=3)


# Transforms.


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


def test_import_is_light():
  heavy = ['tensorflow', 'tensorflow_datasets', 'torch', 'sklearn']
  code = (
    'import sys; import linearizer_jax.data.pipeline; '
    f'print([name for name in {heavy} if name in sys.modules])'
  )
  result = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert result.stdout.strip() == '[]'
