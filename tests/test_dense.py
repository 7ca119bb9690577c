"""Images with a label for each pixel: crops, lists, published folders."""

import numpy as np
import pytest
from PIL import Image

from linearizer_jax.data import datasets, dense, pipeline

IGNORED = 255


def write_png(path, array, palette=False):
  path.parent.mkdir(parents=True, exist_ok=True)
  image = Image.fromarray(np.asarray(array, np.uint8))
  if palette:
    image = Image.fromarray(np.asarray(array, np.uint8), mode='P')
    image.putpalette([7, 0, 0, 9, 9, 9, 200, 1, 1] + [0] * 759)
  image.save(path)


def image_of(label):
  """An image that tells the class of each pixel."""
  return np.repeat(np.where(label < 9, label, 0)[..., None] * 50, 3, -1)


LABEL = np.repeat(np.repeat([[0, 1, 2], [2, 0, 1]], 20, 0), 20, 1)  # 40 x 60
LABEL[:2] = IGNORED


@pytest.fixture
def folder(tmp_path):
  for split, n in (('train', 5), ('val', 3)):
    for i in range(n):
      write_png(tmp_path / split / 'images' / f'{i}.png', image_of(LABEL))
      write_png(tmp_path / split / 'labels' / f'{i}.png', LABEL, i % 2)
  return {
    'name': 'folder',
    'dense': True,
    'data_dir': str(tmp_path),
    'image_size': (32, 48),
    'num_classes': 3,
  }


@pytest.mark.parametrize('scale', [(0.5, 0.5), (1.0, 2.0)])
def test_crops_of_image_and_labels_agree(folder, scale):
  config = folder | {'scale_range': scale, 'flip': True}
  batches = pipeline.make_train_iterator(config, batch_size=4, seed=1)
  batch = next(batches)
  batches.close()
  assert batch['image'].shape == (4, 32, 48, 3)
  assert batch['label'].shape == (4, 32, 48)
  assert batch['label'].dtype == np.uint8
  label, image = batch['label'], batch['image'][..., 0] / 50
  known = label != IGNORED
  agree = np.abs(image - label)[known] < 0.2  # borders are blurred
  assert agree.mean() > 0.85
  if scale[0] == 0.5:  # 20 x 30 pixels of image, the rest is filled up
    assert known.sum(2).max() == 30
    assert known.sum(1).max() <= 20
    assert (batch['image'][0, -1, -1] == (124, 116, 104)).all()


def test_crops_of_one_class_are_drawn_again(folder):
  config = pipeline.DataConfig(
    **folder | {'image_size': 16, 'scale_range': (1.0, 1.0)}
  )
  source = datasets.DATASETS['folder'].load_dense(None, config, 'train')

  def one_class(ratio):
    changed = pipeline.DataConfig(
      **folder
      | {'image_size': 16, 'scale_range': (1.0, 1.0)}
      | {'category_max_ratio': ratio}
    )
    rng = np.random.default_rng(0)
    labels = [dense.train_pair(source[0], changed, rng)[1] for _ in range(50)]
    return sum(len(set(np.unique(x)) - {IGNORED}) == 1 for x in labels)

  assert one_class(0.75) < one_class(1.0)


def test_every_image_is_evaluated_once(folder, tmp_path):
  wide = np.zeros((20, 70), np.uint8)
  write_png(tmp_path / 'val' / 'images' / 'wide.jpg', image_of(wide))
  write_png(tmp_path / 'val' / 'labels' / 'wide.png', wide)
  config = folder | {'eval_window': 32, 'short_side': 20}
  batches = list(pipeline.make_eval_batches(config, batch_size=2))
  shapes = [b['image'].shape + b['label'].shape[1:] for b in batches]
  # 40 x 60 at half size sees 20 x 30, whole; 20 x 70 slides along 96.
  assert shapes == [(2, 20, 30, 3, 48, 64)] * 2 + [(2, 20, 96, 3, 20, 96)]
  assert [b['valid'].sum() for b in batches] == [2, 1, 1]
  np.testing.assert_array_equal(batches[0]['label'][0, :40, :60], LABEL)
  assert (batches[0]['label'][0, 40:] == IGNORED).all()
  assert batches[2]['size'][0].tolist() == [20, 70]
  assert batches[0]['label_size'][0].tolist() == [40, 60]


def test_evaluation_leaves_broken_images_out(folder, tmp_path):
  images = tmp_path / 'val' / 'images'
  (images / '0.png').write_bytes(b'no image')  # not even a header
  (images / '2.png').write_bytes((images / '2.png').read_bytes()[:-60])
  batches = pipeline.make_eval_batches(folder | {'max_broken': 2}, batch_size=3)
  (batch,) = [b for b in batches if b['valid'].any()]
  (index,) = np.flatnonzero(batch['valid'])
  np.testing.assert_array_equal(batch['label'][index], LABEL)
  assert 'broken' not in batch
  batches = pipeline.make_eval_batches(folder | {'max_broken': 1}, batch_size=3)
  with pytest.raises(ValueError, match='max_broken allows 1'):
    list(batches)


def test_a_list_names_the_images_of_a_split(folder, tmp_path):
  root = tmp_path / 'listed'
  for i in (0, 1, 'number 2'):
    write_png(root / 'images' / f'{i}.png', image_of(LABEL))
    write_png(root / 'labels' / f'{i}.png', LABEL)
  (root / 'train.txt').write_text('number 2.png\n\n0\n')
  (root / 'val.txt').write_text('1\n9\n')
  config = folder | {'data_dir': str(root)}
  assert pipeline.num_train_examples(config) == 2
  with pytest.raises(ValueError, match="'9'"):
    pipeline.make_eval_batches(config, batch_size=1)


def test_ade20k_as_published(tmp_path):
  label = np.zeros((4, 6), np.uint8)
  label[0] = range(145, 151)
  for split in ('training', 'validation'):
    write_png(tmp_path / 'images' / split / 'a.jpg', np.zeros((4, 6, 3)))
    write_png(tmp_path / 'annotations' / split / 'a.png', label)
  config = {'name': 'ade20k', 'dense': True, 'data_dir': str(tmp_path)}
  (batch,) = pipeline.make_eval_batches(config, batch_size=1)
  assert batch['label'][0, 0].tolist() == list(range(144, 150))
  assert (batch['label'][0, 1:] == IGNORED).all()
  assert pipeline.num_train_examples(config) == 20210
  assert pipeline.num_classes(config) == 150


def test_cityscapes_as_published(tmp_path):
  label = np.resize(np.arange(34), (4, 9))
  name = 'bonn_000000_000019'
  write_png(
    tmp_path / 'leftImg8bit' / 'val' / 'bonn' / f'{name}_leftImg8bit.png',
    np.zeros((4, 9, 3)),
  )
  write_png(
    tmp_path / 'gtFine' / 'val' / 'bonn' / f'{name}_gtFine_labelIds.png', label
  )
  config = {'name': 'cityscapes', 'dense': True, 'data_dir': str(tmp_path)}
  (batch,) = pipeline.make_eval_batches(config, batch_size=1)
  found = dict(zip(label.ravel(), batch['label'].ravel(), strict=True))
  # road, sidewalk, ..., bicycle; 0 to 6, 9, 10, 14 to 16, 18, 29, 30 are void.
  scored = [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]
  assert [found[i] for i in scored] == list(range(19))
  assert all(v == IGNORED for i, v in found.items() if i not in scored)
  assert pipeline.num_train_examples(config) == 2975
  with pytest.raises(ValueError, match='leftImg8bit/train'):
    pipeline.make_train_iterator(config, batch_size=1, seed=0)


def test_bad_labels_are_named(folder, tmp_path):
  path = tmp_path / 'val' / 'labels' / '1.png'

  def refused(words, **changes):
    with pytest.raises(ValueError, match=words):
      list(pipeline.make_eval_batches(folder | changes, batch_size=3))

  bad = LABEL.copy()
  bad[5, 5] = 11
  write_png(path, bad)
  refused(r'1\.png holds the value 11')
  list(
    pipeline.make_eval_batches(
      folder | {'ignore_labels': (11, IGNORED)}, batch_size=3
    )
  )
  write_png(path, LABEL[:-1])
  refused(r'labels/1\.png is 39 x 60 .*images/1\.png 40 x 60')
  write_png(path, image_of(LABEL))
  refused(r'1\.png has mode RGB')
  path.write_bytes(b'no image')
  refused(r'labels/1\.png')
  path.unlink()
  refused(r'no label file .*1\.png')
  refused(r'data\.labels_per_class', labels_per_class=3)
  refused(r'data\.eval_stride', eval_window=16, eval_stride=17)
  refused(r'data\.num_classes', num_classes=256)
  refused(r'data\.num_classes is None', num_classes=None)
  refused(r'data\.ignore_labels', ignore_labels=(256,))
  refused('no label for each pixel', name='digits')
  refused(r'data\.dense=True', name='ade20k', dense=False)
