"""Segmentation heads, and the segmenter in PyTorch."""

import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import segment_folder
from linearizer_jax import checkpoint, sharding, tasks
from linearizer_jax.convert import export, load, segmenter
from linearizer_jax.models import create_model, features
from linearizer_jax.models.segmenter import (
  Classifier,
  ConvNorm,
  Rescale,
  Segmenter,
  adaptive_pool,
  resize,
  stage_blocks,
)


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
