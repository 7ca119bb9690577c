"""Pictures of segmentations, from a run that was saved untrained."""

import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image
from test_segment import tiny

from linearizer_jax import checkpoint, figures, label_maps, sharding, tasks
from linearizer_jax.data import dense

SIZE = (40, 56)
CLASSES = 3


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """SOURCE of a work directory: images at 32 px, through windows."""
  workdir = tmp_path_factory.mktemp('run')
  config = tiny(**{
    'data.name': 'folder',
    'data.ignore_labels': (7, 255),
    'data.short_side': 32,
    'data.eval_window': (32, 32),
    'data.eval_stride': (32, 8),
    'segment.head': 'linear',
    'student.depth': 1,
  })  # fmt: skip
  checkpoint.claim_workdir(workdir, config)
  stage = checkpoint.resolve_stage(config, 'segment')
  task = tasks.make_task(
    ml_collections.ConfigDict(stage), sharding.make_mesh(), CLASSES
  )
  params = jax.jit(lambda key: task.init(key, (32, 32, 3)))(jax.random.key(0))
  # So that all classes are called.
  kernel = params['heads']['classifier']['conv']['kernel']
  params['heads']['classifier']['conv']['kernel'] = 100 * kernel
  directory = checkpoint.stage_dir(workdir, 'segment') / 'checkpoints'
  checkpoint.save_params(directory, 1, params)
  return str(workdir)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """(images, labels), two of each."""
  folder, rng = tmp_path_factory.mktemp('frames'), np.random.default_rng(0)
  images, labels = [], []
  for n in range(2):
    pixels = rng.integers(0, 256, (5, 7, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    ids = rng.choice([0, 1, 2, 7], SIZE).astype(np.uint8)
    images.append(str(folder / f'{n}.png'))
    labels.append(str(folder / f'{n}_label.png'))
    Image.fromarray(pixels).save(images[-1])
    Image.fromarray(ids).save(labels[-1])
  return images, labels


def test_what_is_drawn_is_what_an_evaluation_counts(run, files):
  found = label_maps.load_run(run, 'segment')
  source = dense.files(list(zip(*files, strict=True)), found.data)
  predicted = label_maps.predict(found, source)
  assert set(np.unique(predicted)) == set(range(CLASSES))
  batch = dense.eval_batch(
    source, found.data, dense.eval_plan(source, found.data, 2), 0, 2, 0
  )
  counted = found.task.evaluate(
    found.params, found.frozen, batch, jax.random.key(0)
  )['confusion']
  for n, panel in enumerate(predicted):
    label = source[n]['label']
    assert panel.shape == SIZE
    expected = np.zeros((CLASSES, CLASSES), int)
    kept = label != dense.IGNORED
    np.add.at(expected, (label[kept], panel[kept]), 1)
    np.testing.assert_array_equal(counted[n], expected)
    accuracy = 100 * np.diag(expected).sum() / expected.sum()
    found_scores = label_maps.scores(label, panel, CLASSES)
    assert found_scores['pixel_accuracy'] == pytest.approx(accuracy)


def test_the_picture_and_what_it_refuses(run, files, tmp_path, capsys):
  images, labels = files
  out = tmp_path / 'labels.png'

  def draw(images, labels, *more):
    return figures.main([
      *('segmentation', f'a={run}:segment', f'b={run}'),
      *('--images', *images, '--labels', *labels, f'--out={out}', *more),
    ])  # fmt: skip

  assert not draw(images, labels, '--names', 'sky', 'road', 'tree')
  with Image.open(out) as drawn:
    # Two rows of four columns.
    assert drawn.width == round(4 * label_maps.FRAME_WIDTH * 150)
    assert drawn.height > 2 * 150 * label_maps.FRAME_WIDTH * SIZE[0] / SIZE[1]
    colors = {
      tuple(c)
      for c in np.asarray(drawn.convert('RGB'))[::3, ::3].reshape(-1, 3)
    }
  assert {tuple(c) for c in label_maps.palette(CLASSES)[:CLASSES]} <= colors
  assert '2 files, --labels 1' in draw(images, labels[:1])
  assert '--names has 1 names' in draw(images, labels, '--names', 'sky')
  assert 'no NAME=SOURCE' in figures.main(
    ['segmentation', 'x', '--images', *images, '--labels', *labels]
  )
  small = tmp_path / 'small.png'
  Image.new('L', (8, 8)).save(small)
  assert 'both must be of one size' in draw(images, [labels[0], str(small)])


def test_a_stage_of_another_kind_and_other_data_are_refused(run, tmp_path):
  config = tiny(**{'task': 'classify', 'data.dense': False})
  checkpoint.claim_workdir(tmp_path, config)
  directory = checkpoint.stage_dir(tmp_path, 'segment') / 'checkpoints'
  checkpoint.save_params(directory, 1, {'student': {'x': np.zeros(1)}})
  with pytest.raises(ValueError, match='is no segmentation'):
    label_maps.load_run(tmp_path)
  found = label_maps.load_run(run)
  other = found.data.__class__(name='ade20k', dense=True)
  with pytest.raises(ValueError, match=r"data\.name is 'ade20k'"):
    dense.files([], other)


# Machado, Oliveira and Fernandes (2009), table 1, severity 1, on linear RGB.
VISIONS = {
  'all': np.eye(3),
  'red_blind': [
    [0.152286, 1.052583, -0.204868],
    [0.114503, 0.786281, 0.099216],
    [-0.003882, -0.048116, 1.051998],
  ],
  'green_blind': [
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.011820, 0.042940, 0.968881],
  ],
  'blue_blind': [
    [1.255528, -0.076749, -0.178779],
    [-0.078411, 0.930809, 0.147602],
    [0.004733, 0.691367, 0.303900],
  ],
}


@pytest.mark.parametrize('vision', VISIONS)
def test_colours_are_told_apart_with_any_vision(vision):
  """CIE 1976 differences of 15 and more; 2 can just be seen side by side."""
  colors = label_maps.palette(len(label_maps.COLORS))
  shown = np.concatenate([colors[: len(label_maps.COLORS)], colors[-1:]]) / 255
  linear = np.where(
    shown <= 0.04045, shown / 12.92, ((shown + 0.055) / 1.055) ** 2.4
  )
  seen = np.clip(linear @ np.asarray(VISIONS[vision]).T, 0, 1)
  to_xyz = [
    [0.4124564, 0.3575761, 0.1804375],
    [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
  ]
  xyz = seen @ np.transpose(to_xyz) / (0.95047, 1, 1.08883)
  f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
  lab = np.stack(
    [116 * f[:, 1], 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], -1
  )
  apart = np.linalg.norm(lab[:, None] - lab, axis=-1)
  assert apart[~np.eye(len(lab), dtype=bool)].min() > 15
