"""Activation maps and the trade-off of speed and resolution, as pictures."""

import json

import jax
import numpy as np
import pytest
from matplotlib import figure
from PIL import Image
from test_benchmark import results  # noqa: F401 (a fixture)

from linearizer_jax import figures, maps, models
from linearizer_jax.convert import load
from linearizer_jax.models.teachers import IMAGENET


@pytest.fixture(scope='module')
def networks():
  """Two small networks whose patches differ in size."""
  sizes = {'vit_tiny_patch16': 8, 'adventurer_tiny_patch16': 16}
  small = {
    'vit_tiny_patch16': dict(width=48, num_heads=3),
    'adventurer_tiny_patch16': dict(width=64, head_dim=16),
  }
  found = {}
  for name, patch in sizes.items():
    model = models.create_model(
      name, depth=2, patch_size=patch, image_size=32, num_classes=0,
      **small[name],
    )  # fmt: skip
    images = np.zeros((1, 32, 32, 3), np.float32)
    params = jax.jit(model.init)(jax.random.key(0), images)['params']
    found[name.split('_')[0]] = model, params, IMAGENET
  return found


def pictures(n=2):
  random = np.random.default_rng(0)
  return random.integers(0, 256, (n, 32, 48, 3), np.uint8)


def test_similarity_is_the_cosine_of_features(networks):
  model, params, stats = networks['vit']
  images = pictures(1)
  found = maps.similarity(images, model, params, stats, blocks=(0, -1))
  assert list(found) == [0, 1]
  assert found[1].shape == (1, 4, 6, 4, 6)
  mean, std = np.float32(stats[0]), np.float32(stats[1])
  features = models.features(
    model, {'params': params}, (images / np.float32(255) - mean) / std
  )
  features = features['block01'][0]
  a, b = features[2, 5], features[0, 1]
  cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
  assert found[1][0, 2, 5, 0, 1] == pytest.approx(float(cosine), abs=1e-5)
  with pytest.raises(ValueError, match=r'blocks \[2\] .* of 2'):
    maps.similarity(images, model, params, stats, blocks=(2,))


def test_maps_of_stages_and_queries(networks, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(load, 'load', lambda source, **_: load.Loaded(
    networks[source][0],
    {'params': networks[source][1]},
    load.Preprocessing((32, 48)),
  ))  # fmt: skip
  files = []
  for n, picture in enumerate(pictures()):
    files.append(str(tmp_path / f'{n}.png'))
    Image.fromarray(picture).save(files[-1])
  out = tmp_path / 'maps.png'
  arguments = ['maps', 'a=vit', 'b=adventurer', '--images', *files]
  arguments += ['--blocks', '0', '-1', '--queries', '1,5', '3,0']
  assert not figures.main([*arguments, f'--out={out}'])
  with Image.open(out) as drawn:
    # Four rows of five columns.
    assert drawn.width > 5 * 150
    assert drawn.height > 4 * 150
  arguments[-1] = '4,0'
  assert 'query (4, 0) is not in the grid of 4 rows' in figures.main(arguments)
  assert 'no NAME=SOURCE' in figures.main(['maps', 'x', '--images', files[0]])


def test_tradeoff(results, tmp_path, capsys):  # noqa: F811 (the fixture)
  file, out = tmp_path / 'a.json', tmp_path / 'trade.png'
  file.write_text(json.dumps(results))
  names = ('adventurer_base_patch16', 'vit_base_patch16')
  accuracy = [f'{name}={value}' for name, value in zip(names, (84.3, 84.7))]  # noqa: B905
  arguments = ['tradeoff', str(file), f'--out={out}']
  assert not figures.main([*arguments, '--accuracy', *accuracy])
  with Image.open(out) as drawn:
    assert drawn.width > 1000  # speed and memory side by side
  with pytest.raises(SystemExit):
    figures.main([*arguments, '--accuracy', 'vit'])
  assert "--accuracy: invalid percent value: 'vit'" in capsys.readouterr().err
  text = figures.main([*arguments, '--accuracy', 'other=1'])
  assert "--accuracy names ['other']" in text
  assert 'nothing was timed with --load=one' in figures.main(
    [*arguments, '--load', 'one']
  )


def test_accuracy_is_drawn_against_inference(tmp_path, capsys):
  row = {'model': 'a', 'variant': 'student', 'load': 'full', 'batch': 2}
  row |= {'size': '32x32', 'pixels': 1024, 'memory_gib': None}
  row |= {'direction': 'training', 'images_per_second': 3.0}
  file = tmp_path / 'a.json'
  file.write_text(
    json.dumps({'framework': 'jax', 'platform': 'cpu', 'rows': [row]})
  )
  arguments = ['tradeoff', str(file), f'--out={tmp_path}/a.png']
  assert not figures.main(arguments)
  assert 'inference' in figures.main([*arguments, '--accuracy', 'a=80'])


def test_what_was_compiled_and_not_timed_has_no_panel(tmp_path):
  row = {'model': 'a', 'variant': 'student', 'load': 'full', 'batch': 2}
  row |= {'size': '32x32', 'pixels': 1024, 'memory_gib': 0.1}
  timed = row | {'direction': 'inference', 'images_per_second': 3.0}
  only_compiled = row | {'direction': 'training', 'images_per_second': None}
  file = tmp_path / 'a.json'
  result = {'framework': 'jax', 'platform': 'cpu'}
  heights = []
  for rows in ([timed], [timed, only_compiled]):
    file.write_text(json.dumps(result | {'rows': rows}))
    figures.tradeoff([file], tmp_path / 'a.png')
    with Image.open(tmp_path / 'a.png') as drawn:
      heights.append(drawn.height)
  assert heights[0] == heights[1]
  file.write_text('{}')
  with pytest.raises(ValueError, match='no file of `linearizer_jax'):
    figures.tradeoff([file], tmp_path / 'a.png')


def test_a_single_loss_is_seen_and_none_is_not_drawn(tmp_path):
  metrics, picture = tmp_path / 'metrics.jsonl', tmp_path / 'losses.png'
  record = {'stage': 'a', 'step': 1, 'loss': 1.0}
  metrics.write_text(json.dumps(record | {'split': 'eval'}) + '\n')
  figures.loss_curves(tmp_path, picture)
  assert not picture.exists()
  metrics.write_text(json.dumps(record | {'split': 'train'}) + '\n')
  figures.loss_curves(tmp_path, picture)
  with Image.open(picture) as drawn:
    inside = np.asarray(drawn.convert('RGB')).astype(int)
  inside = inside[80:-80, 80:-80]  # of the axes, below the legend
  assert (inside[..., 2] - inside[..., 0] > 60).any()  # something blue


@pytest.mark.parametrize('top', [1.1, 3.0, 30.0])
def test_an_axis_has_two_numbers_at_least(top):
  axis = figure.Figure().subplots()
  axis.plot([1, 2], [0.97, top])
  axis.set_yscale('log')
  figures.plain_numbers(axis.yaxis)
  low, high = axis.yaxis.get_view_interval()
  assert sum(low <= tick <= high for tick in axis.get_yticks()) >= 2
