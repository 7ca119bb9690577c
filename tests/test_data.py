"""The data room: tables, order of examples, errors."""

import io

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
  error('num_classes is 3, but .* has 2 classes', num_classes=3)
  error("image_size is 'large', expected a side", image_size='large')
  error('image_size is 32.5, expected a side', image_size=32.5)
  error(r'image_size is \(-8, -8\), expected sides', image_size=-8)
  error(r'crop_scale is \(0.5,\), expected \(least, most\)', crop_scale=(0.5,))
  error(r'no folder .*test.*<data_dir>/test/<class>', eval_split='test')
  (tmp_path / 'train' / 'emu').mkdir()
  error(r"only in train: \['emu'\]")
  (tmp_path / 'val' / 'emu').mkdir()
  error('val/emu holds no file')
  (tmp_path / 'val' / 'fox').mkdir()
  error(r"only in val: \['fox'\]")
  error(
    'train/train: .* The folders in .*train: cat, dog, emu',
    data_dir=str(tmp_path / 'train'),
  )
  error('There is no .*nowhere either', data_dir=str(tmp_path / 'nowhere'))
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
