"""Segmentation: metrics, windows, runs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from sklearn import metrics as reference
from test_segmenter import random_variables

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
from linearizer_jax.models.layers import PatchEmbed
from linearizer_jax.models.segmenter import Segmenter
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


@pytest.mark.parametrize(
  ('data', 'said'),
  [
    ({'name': 'ade20k', 'num_classes': None}, r"'ade20k' .*_channels=8$"),
    ({'name': 'folder', 'num_classes': 3}, r"'folder' .*data\.num_classes=3$"),
  ],
)
def test_another_head_is_refused_with_its_flags(
  data, said, tmp_path, monkeypatch
):
  """A number of classes that the data set knows is no flag to give."""
  config = {'task': 'segment', 'segment': tiny()['segment'], 'data': data}
  info = {'config': config, 'batch_stats': None}
  heads = {'classifier': np.zeros(3)}
  monkeypatch.setattr(checkpoint, 'describe', lambda *_, **__: info)
  monkeypatch.setattr(checkpoint, 'load_params', lambda *_, **__: (heads, info))
  (tmp_path / 'stage/checkpoints').mkdir(parents=True)
  params = {'heads': {'classifier': np.zeros(5)}}
  with pytest.raises(ValueError, match=f'They were made on {said}'):
    start.load_segment_head(params, str(tmp_path), tmp_path)


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
