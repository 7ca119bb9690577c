"""Segmentation: heads, windows, metrics, pixel labels, runs, PyTorch."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as reference

from configs import segment_folder
from linearizer_jax import (
  checkpoint,
  evaluate,
  recorder,
  sharding,
  start,
  tasks,
  train,
)
from linearizer_jax.convert import export, load, segmenter
from linearizer_jax.data import datasets, dense, pipeline
from linearizer_jax.models import create_model, features
from linearizer_jax.models.layers import PatchEmbed
from linearizer_jax.models.segmenter import (
  Classifier,
  ConvNorm,
  Rescale,
  Segmenter,
  adaptive_pool,
  resize,
  stage_blocks,
)
from linearizer_jax.tasks import segment

IGNORED = 255


# -------------------------------------------------------------------- metrics


def test_one_matrix_gives_the_metrics_of_scikit_learn():
  rng = np.random.default_rng(0)
  classes, shape = 6, (3, 70, 9)  # rows in two parts
  label = rng.choice([0, 1, 2, 4, IGNORED], shape).astype(np.uint8)
  predicted = rng.choice([0, 1, 2, 3], shape)  # 3 is called, 5 never is
  size = np.array([shape[1:]] * 3)
  logits = jax.nn.one_hot(predicted, classes) * 9
  found = jax.jit(segment.score)(logits, size, label, size)
  confusion = np.asarray(found['confusion'])
  kept = label != IGNORED
  np.testing.assert_array_equal(confusion.sum((1, 2)), kept.sum((1, 2)))
  ours = evaluate.segmentation_metrics(confusion.sum(0))
  y, z = label[kept], predicted[kept]
  iou = reference.jaccard_score(y, z, labels=[0, 1, 2, 3, 4], average=None)
  assert ours['mIoU'] == pytest.approx(100 * iou.mean())
  assert [ours[f'iou_{n:03d}'] for n in range(5)] == pytest.approx(100 * iou)
  assert 'iou_005' not in ours
  assert ours['classes'] == 5
  assert ours['pixel_accuracy'] == pytest.approx(
    100 * reference.accuracy_score(y, z)
  )
  recall = reference.recall_score(y, z, labels=[0, 1, 2, 4], average='macro')
  assert ours['mean_accuracy'] == pytest.approx(100 * recall)


def test_no_label_at_all_is_refused():
  with pytest.raises(ValueError, match=r'data\.ignore_labels'):
    evaluate.segmentation_metrics(np.zeros((3, 3)))


def test_counts_of_many_images_stay_exact():
  step = lambda *args: {  # noqa: E731
    'confusion': np.array([[2**24, 1], [0, 0]], np.int32),
    'loss': np.float32(3),
    'count': 2,
  }
  found = evaluate.evaluate(
    step, {}, {}, range(3), jax.random.key(0), lambda x: x
  )
  # In float32 the one pixel would be lost.
  assert found['pixel_accuracy'] == pytest.approx(100 - 100 / 2**24, abs=1e-9)
  assert found['loss'] == 1.5
  assert found['count'] == 6


def test_scores_are_those_at_the_size_of_the_labels():
  """Against jax.image.resize of the image without its canvas."""
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(2, 8, 9, 4)).astype(np.float32)
  label = np.full((2, 16, 12), IGNORED, np.uint8)
  size, label_size = np.array([[5, 7], [8, 9]]), np.array([[11, 9], [7, 12]])
  losses, matrices = [], []
  for i, ((h, w), (r, s)) in enumerate(zip(size, label_size, strict=True)):
    label[i, :r, :s] = rng.integers(0, 4, (r, s))
    label[i, 0, :s] = IGNORED
    whole = jax.image.resize(
      logits[i, :h, :w], (r, s, 4), 'bilinear', antialias=False
    )
    part = label[i, 1:r, :s].ravel()
    log = np.asarray(jax.nn.log_softmax(whole)[1:].reshape(-1, 4))
    losses.append(-log[np.arange(len(part)), part].mean())
    matrices.append(
      reference.confusion_matrix(part, log.argmax(-1), labels=range(4))
    )
  found = jax.jit(segment.score)(logits, size, label, label_size)
  np.testing.assert_allclose(found['loss'], losses, rtol=1e-5)
  np.testing.assert_array_equal(found['confusion'], matrices)


# -------------------------------------------------------------------- windows


def test_windows_see_every_pixel_and_no_canvas():
  """Against a loop; what a window says depends on all it sees."""
  rng = np.random.default_rng(2)
  sizes, window, stride = [(13, 9), (9, 17)], (8, 8), (5, 6)
  images = np.full((2, 16, 24, 3), np.nan, np.float32)
  expected = np.zeros((2, 16, 24, 2), np.float32)

  def forward(x):
    return x[..., :2] + x.mean((1, 2), keepdims=True)[..., 2:]

  for i, (h, w) in enumerate(sizes):
    images[i, :h, :w] = rng.normal(size=(h, w, 3))
    total, seen = np.zeros((h, w, 2)), np.zeros((h, w, 1))
    for top in {min(t, h - 8) for t in range(0, h, 5) if t < h - 8 + 5}:
      for left in {min(t, w - 8) for t in range(0, w, 6) if t < w - 8 + 6}:
        part = (slice(top, top + 8), slice(left, left + 8))
        total[part] += forward(images[i][part][None])[0]
        seen[part] += 1
    assert seen.min() > 0
    expected[i, :h, :w] = total / seen
  images = np.nan_to_num(images, nan=1e6)  # would be seen in the mean
  found = jax.jit(
    lambda x, size: segment.window_logits(forward, x, size, window, stride)
  )(images, np.array(sizes))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('window', [(0, 0), (16, 24), (99, 24)])
def test_a_window_that_covers_the_image_is_the_whole_image(window):
  images = np.random.default_rng(3).normal(size=(2, 16, 24, 3))
  found = segment.window_logits(
    lambda x: 2 * x, images, np.array([[16, 24]] * 2), window, window
  )
  np.testing.assert_array_equal(found, 2 * images)


# ---------------------------------------------------------------------- heads


@pytest.mark.parametrize(
  ('patch', 'sides'), [(16, (32, 16, 8, 4)), (8, (16, 8, 4, 2))]
)
def test_maps_have_strides_4_8_16_32(patch, sides):
  x = jax.ShapeDtypeStruct((1, 8, 8, 6), jnp.float32)
  for k, side in enumerate(sides):
    layer = Rescale(round(np.log2(patch / 4)) - k, jnp.float32)
    shape, _ = jax.eval_shape(
      lambda x, layer=layer: layer.init_with_output(jax.random.key(0), x, True),
      x,
    )
    assert shape.shape == (1, side, side, 6)
  names = ['block02', 'block05', 'block08', 'block11']
  assert stage_blocks(12) == names
  with pytest.raises(ValueError, match=r"config\.segment\.head='linear'"):
    stage_blocks(3)


def shapes_of(model, size):
  images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
  return jax.eval_shape(
    lambda x: model.init_with_output(jax.random.key(0), x), images
  )


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def test_parameters_of_upernet():
  """Counted by hand from the paper's layers, for 768 wide, 512 channels."""
  d, c, v, a = 768, 512, 150, 256
  model = Segmenter(create_model('adventurer_base_patch16', num_classes=0), v)
  (logits, out), variables = shapes_of(model, (64, 96))
  assert logits.shape == out['auxiliary'].shape == (1, 64, 96, v)
  params = dict(variables['params'])
  assert count(params.pop('backbone')) == 98657608 - (768 * 1000 + 1000)
  enlarge = 3 * (4 * d * d + d) + 2 * d  # twice, once
  pool = 4 * (d * c + 2 * c) + 9 * (d + 4 * c) * c + 2 * c
  pyramid = 3 * (d * c + 2 * c) + 3 * (9 * c * c + 2 * c)
  fuse = 9 * 4 * c * c + 2 * c + c * v + v
  assert count(params.pop('decoder')) == enlarge + pool + pyramid + fuse
  assert count(params) == 9 * d * a + 2 * a + a * v + v
  linear = Segmenter(model.backbone, v, 'linear')
  (logits, out), variables = shapes_of(linear, (64, 96))
  assert logits.shape == (1, 64, 96, v)
  assert 'batch_stats' not in variables
  assert count(variables['params']['classifier']) == d * v + v
  with pytest.raises(ValueError, match='multiples of 16'):
    shapes_of(linear, (64, 90))
  with pytest.raises(ValueError, match=r'config\.segment\.head'):
    shapes_of(Segmenter(model.backbone, v, 'fpn'), (64, 96))


# ----------------------------------------------------------------------- data


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
  refused(r'data\.ignore_labels', ignore_labels=(256,))
  refused('no label for each pixel', name='digits')
  refused(r'data\.dense=True', name='ade20k', dense=False)


# ----------------------------------------------------------------------- runs


def tiny(**changes):
  """A run of a ViT under a small UperNet on generated images."""
  config = segment_folder.get_config('smoke').unlock()
  config.student.update(
    dict(name='vit_tiny_patch16', width=16, num_heads=2, depth=4)
  )
  config.student.head_dim = config.student.state_dim = None
  config.segment.channels = config.segment.auxiliary_channels = 8
  config.steps = 4
  config.data.num_examples = 12  # the last batch of evaluation is half empty
  config.optimizer.ema_decay = 0.9
  config.update_from_flattened_dict(changes)
  return config.to_dict()


def run(config, workdir):
  checkpoint.claim_workdir(workdir, config)
  stage = checkpoint.resolve_stage(config, config['stages'][0])
  return train.run_stage(stage, workdir, jax.devices()[:1])


class KilledError(Exception):
  pass


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('segment') / 'whole'
  return workdir, run(tiny(), workdir)


def state_of(workdir):
  student, info = checkpoint.load_params(workdir, role='student')
  heads, _ = checkpoint.load_params(workdir, role='heads')
  return student, heads, info['batch_stats']


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(finished, tmp_path, monkeypatch):
  whole, result = finished
  assert result['count'] == 12
  assert {'mIoU', 'ema_mIoU', 'pixel_accuracy', 'mean_accuracy'} <= set(result)
  add = recorder.Recorder.add

  def dying(self, at, values):
    add(self, at, values)
    if at == 3:
      raise KilledError

  with monkeypatch.context() as patch:
    patch.setattr(recorder.Recorder, 'add', dying)
    with pytest.raises(KilledError):
      run(tiny(), tmp_path)
  again = run(tiny(), tmp_path)
  assert again['loss'] == result['loss']
  jax.tree.map(
    np.testing.assert_array_equal, state_of(whole), state_of(tmp_path)
  )
  stats = jax.tree.leaves(state_of(whole)[2])
  assert stats
  assert not all(np.isin(x, (0, 1)).all() for x in stats)


@pytest.mark.slow
def test_a_run_is_evaluated_again_or_refused(finished, tmp_path):
  whole, result = finished
  config = tiny(
    **{'task': 'evaluate_segment', 'init': str(whole), 'data.eval_window': 99}
  )
  config['optimizer']['ema_decay'] = 0.0
  found = run(config, tmp_path)  # of the average, as `load` takes it
  assert found['mIoU'] == result['ema_mIoU']
  assert found['loss'] == pytest.approx(result['ema_loss'], rel=1e-6)

  for change, name in (
    ({'segment.channels': 4}, 'decoder/bottleneck/conv/kernel'),
    ({'data.num_classes': 5}, 'decoder/classifier/conv/bias'),
  ):
    config = ml_collections.ConfigDict(tiny(**change))
    mesh = sharding.make_mesh()
    task = tasks.make_task(config, mesh, config.data.num_classes)
    params = jax.eval_shape(
      lambda key, task=task: task.init(key, (32, 32, 3)), jax.random.key(0)
    )
    with pytest.raises(ValueError, match=f'heads of .*{name}'):
      start.load_segment_head(params, str(whole), tmp_path)


class Patches(nn.Module):
  """The least that a segmenter takes for a backbone."""

  depth: int = 4
  patch_size: int = 8
  image_size: int = 32
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, images, train=False):
    x = PatchEmbed(6, self.patch_size)(images)
    return None, {f'block{n:02d}': (n + 1) * x for n in range(self.depth)}


def test_batch_statistics_are_those_of_the_whole_batch():
  """On one device and on eight, and not those of a part of the batch."""
  model = Segmenter(Patches(), 3, 'upernet', 4, 4, dropout=0.0)
  images = np.random.default_rng(6).normal(size=(8, 32, 32, 3))
  images = images.astype(np.float32) * np.arange(1, 9)[:, None, None, None]
  variables = random_variables(model, (32, 32))

  def apply(variables, images):
    return model.apply(variables, images, train=True, mutable=['batch_stats'])

  found = []
  for devices in (jax.devices()[:1], jax.devices()):
    mesh = sharding.make_mesh(devices)
    place = sharding.batch_sharding(mesh)
    program = jax.jit(apply, in_shardings=(sharding.replicated(mesh), place))
    (logits, _), updated = program(variables, jax.device_put(images, place))
    found.append(jax.device_get((logits, updated)))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found
  )
  # The first norm, by hand.
  tokens = images.reshape(8, 4, 8, 4, 8, 3).transpose(0, 1, 3, 2, 4, 5)
  embed = variables['params']['backbone']['PatchEmbed_0']
  x = tokens.reshape(8, 4, 4, -1) @ embed['kernel'].reshape(-1, 6)
  x = (x + embed['bias']) * 2  # block 1 has the stride 8
  kernel = variables['params']['decoder']['lateral_1']['conv']['kernel'][0, 0]
  old = variables['batch_stats']['decoder']['lateral_1']['norm']['var']
  new = found[1][1]['batch_stats']['decoder']['lateral_1']['norm']['var']
  expected = 0.9 * old + 0.1 * (x @ kernel).var((0, 1, 2))
  np.testing.assert_allclose(new, expected, rtol=1e-4)


def test_tasks_and_labels_have_to_agree():
  for changes in ({'task': 'classify'}, {'data.dense': False}):
    config = checkpoint.resolve_stage(tiny(**changes), 'segment')
    with pytest.raises(ValueError, match=r'config\.data\.dense'):
      train.check_stage(config)


# ------------------------------------------------------------------- PyTorch


def random_variables(model, size):
  """Like trained ones: every array is random, variances are positive."""
  rng = np.random.default_rng(0)

  def draw(path, x):
    value = rng.standard_normal(x.shape, np.float32)
    name = path[-1].key
    if name == 'kernel':
      return value / np.float32(np.sqrt(np.prod(x.shape[:-1])))
    if name in ('scale', 'D', 'var'):
      return 1 + np.abs(value) / 10
    return value / 10

  return jax.tree_util.tree_map_with_path(draw, shapes_of(model, size)[1])


def segmentation_run(workdir, **changes):
  """A work directory of a segmenter with random parameters."""
  config = segment_folder.get_config('smoke').unlock()
  config.student.update(dict(width=32, patch_size=16, image_size=64))
  config.data.image_size = 64
  config.update_from_flattened_dict(changes)
  config = config.to_dict()
  resolved = checkpoint.resolve_stage(config, 'segment')
  task = tasks.make_task(
    ml_collections.ConfigDict(resolved), sharding.make_mesh(), 3
  )
  model = task.model.clone(
    backbone=task.model.backbone.clone(mesh=None, batch_axes=None)
  )
  variables = random_variables(model, (64, 64))
  heads = dict(variables['params'])
  params = {'student': heads.pop('backbone'), 'heads': heads}
  checkpoint.claim_workdir(workdir, config)
  checkpoint.save_params(
    checkpoint.stage_dir(workdir, 'segment') / 'checkpoints',
    3,
    params,
    variables.get('batch_stats'),
  )
  return model, variables


@pytest.mark.parametrize('head', ['upernet', 'linear'])
def test_torch_computes_the_same_and_comes_back(head, tmp_path):
  torch = pytest.importorskip('torch')
  run, out, back = (tmp_path / name for name in ('run', 'out', 'back'))
  model, variables = segmentation_run(run, **{'segment.head': head})
  differences = export.export(run, out)
  assert differences[export.WEIGHTS] <= 1e-5
  assert json.loads((out / 'config.json').read_text())['segment'] == {
    'num_classes': 3,
    'head': head,
    'channels': 16,
    'auxiliary_channels': 16,
    'dropout': 0.1,
  }
  assert 'gives each pixel one of 3 classes' in (out / 'README.md').read_text()
  export.import_folder(out, back)
  for source in (run, out, back):
    loaded = load.load(source)
    assert loaded.model.clone(backbone=model.backbone) == model
    jax.tree.map(
      np.testing.assert_array_equal, dict(loaded.variables), variables
    )
    backbone = load.load(source, num_classes=0)
    jax.tree.map(
      np.testing.assert_array_equal,
      backbone.variables['params'],
      variables['params']['backbone'],
    )
  if head == 'linear':
    return
  images = np.random.default_rng(4).normal(size=(1, 48, 80, 3))
  images = images.astype(np.float32)
  other = export._load_torch(out)
  nchw = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
  with torch.no_grad():
    theirs = [x.permute(0, 2, 3, 1) for x in other(nchw, auxiliary=True)]
  logits, found = jax.jit(model.apply)(variables, images)
  assert export.relative_difference(theirs[0].numpy(), logits) <= 1e-5
  maps = jax.eval_shape(lambda x: features(model, variables, x), images)
  assert maps['block03'].shape == (1, 3, 5, 32)
  # The auxiliary logits, which ours gives in training, from its parts.
  x = found['block02'].reshape(1, 3, 5, 32)
  for name, layer in (
    ('auxiliary_conv', ConvNorm(16, 3, jnp.float32)),
    ('auxiliary_classifier', Classifier(3, 0.1)),
  ):
    own = {k: v[name] for k, v in variables.items() if name in v}
    x = layer.apply(own, x, False)
  x = resize(x, (48, 80))
  assert export.relative_difference(theirs[1].numpy(), x) <= 1e-5
  assert 'auxiliary' not in found


def test_every_array_of_a_segmenter_has_a_name():
  """Patches of 8 and of 32 pixels: all that `Rescale` may hold."""
  for patch in (8, 32):
    backbone = create_model(
      'adventurer_tiny_patch16',
      **dict(width=32, depth=4, num_classes=0, head_dim=16, state_dim=8),
      patch_size=patch,
      image_size=2 * patch,
    )
    model = Segmenter(backbone, 3, channels=4, auxiliary_channels=4)
    variables = random_variables(model, (2 * patch, 2 * patch))
    tensors = segmenter.to_tensors(variables)
    assert len(tensors) == len(jax.tree.leaves(variables))
    again = segmenter.from_tensors(
      tensors, shapes_of(model, (2 * patch,) * 2)[1], 'x'
    )
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_pooling_is_that_of_torch():
  torch = pytest.importorskip('torch')
  x = np.random.default_rng(5).normal(size=(2, 5, 4, 3)).astype(np.float32)
  for bins in (1, 2, 3, 6):
    theirs = torch.nn.functional.adaptive_avg_pool2d(
      torch.from_numpy(x.transpose(0, 3, 1, 2)), bins
    )
    np.testing.assert_allclose(
      adaptive_pool(jnp.asarray(x), bins),
      theirs.permute(0, 2, 3, 1),
      rtol=1e-5,
      atol=1e-6,
    )
