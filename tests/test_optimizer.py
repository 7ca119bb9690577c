"""Schedule, decay groups and layer-wise rates against their definitions."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import common
from linearizer_jax import optimizer
from linearizer_jax.models import create_model


def make_config(**changes):
  config = common.base()
  config.update_from_flattened_dict(changes)
  return config


def student_params():
  model = create_model(
    'adventurer_tiny_patch16', depth=3, use_mask_token=True, num_classes=4
  )
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), images)['params']


def by_path(tree):
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {'/'.join(k.key for k in path): leaf for path, leaf in leaves}


def test_decay_groups():
  decays = by_path(optimizer.decay_mask({'student': student_params()}))
  kept = {name.rsplit('/', 1)[-1] for name, on in decays.items() if not on}
  assert kept == {
    'scale',
    'bias',
    'dt_bias',
    'A_log',
    'D',
    'pos_embed',
    'cls_token',
    'mask_token',
  }
  assert decays['student/layers_0/mixer/conv1d/kernel']
  assert decays['student/head/kernel']


def test_layer_rates():
  rates = by_path(optimizer.layer_rates({'student': student_params()}, 0.5))
  assert rates['student/patch_embed/proj/kernel'] == 0.5**4
  assert rates['student/pos_embed'] == 0.5**4
  assert rates['student/layers_0/mixer/D'] == 0.5**3
  assert rates['student/layers_2/mlp/w1/bias'] == 0.5
  assert rates['student/norm_f/scale'] == 1
  assert rates['student/head/kernel'] == 1


def teacher_params(name):
  model = create_model(name, depth=12, num_classes=4)
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), images)['params']


@pytest.mark.parametrize(
  'name',
  [
    'clip_base_patch16',
    'dinov2_base_patch14_registers',
    'siglip_base_patch16',
  ],
)
def test_teachers_have_the_same_groups(name):
  params = {'teacher': teacher_params(name)}
  decays = by_path(optimizer.decay_mask(params))
  rates = by_path(optimizer.layer_rates(params, 0.75))
  embeddings = ('conv1', 'class_embedding', 'positional_embedding', 'ln_pre')
  above = ('ln_post', 'head', 'proj', 'attnpool')
  for path, leaf in by_path(params).items():
    first, last = path.split('/')[1], path.split('/')[-1]
    embedding = last in ('class_embedding', 'positional_embedding', 'registers')
    assert decays[path] == (leaf.ndim > 1 and not embedding), path
    if first in (*embeddings, 'registers'):
      layer = 0
    elif first in above:
      layer = 13
    else:
      layer = int(first.removeprefix('resblocks_')) + 1
    assert rates[path] == pytest.approx(0.75 ** (13 - layer)), path
  assert rates['teacher/resblocks_11/attn/in_proj/kernel'] == 0.75
  assert rates['teacher/resblocks_0/ln_1/scale'] == pytest.approx(0.75**12)


def test_schedule():
  config = make_config(
    **{
      'optimizer.learning_rate': 2.0,
      'schedule.warmup_epochs': 2.0,
      'schedule.final_lr': 0.5,
    }
  )
  rates = optimizer.learning_rates(config, 101, 5.0)
  assert rates.shape == (101,)
  half = (101 - 10) / 2 + 10  # of the cosine
  want = {0: 0.0, 5: 1.0, 10: 2.0, half: 1.25}
  for step, rate in want.items():
    found = np.interp(step, np.arange(101), rates)
    np.testing.assert_allclose(found, rate, rtol=1e-6, atol=1e-7)
  assert 0.5 < rates[-1] < 0.501
  with pytest.raises(ValueError, match='warmup_epochs'):
    optimizer.learning_rates(config, 10, 5.0)


def test_one_update_equals_adamw_by_hand():
  config = make_config(
    **{
      'optimizer.weight_decay': 0.1,
      'optimizer.clip_norm': 1.0,
      'optimizer.layer_decay': 0.5,
    }
  )
  params = {
    'layers_0': {'kernel': jnp.full((2, 2), 2.0), 'scale': jnp.full(2, 3.0)},
    'head': {'kernel': jnp.full((2, 2), 1.0)},
  }
  grads = jax.tree.map(lambda x: jnp.full_like(x, 5.0), params)
  tx = optimizer.make_optimizer(config)
  updates, _ = tx.update(grads, tx.init(params), params)
  # The first Adam step is the sign of the (clipped) gradient.
  want = {
    'layers_0': {'kernel': -0.5 * 1.2, 'scale': -0.5},
    'head': {'kernel': -1.1},
  }
  for name, value in by_path(want).items():
    np.testing.assert_allclose(by_path(updates)[name], value, rtol=1e-5)


def test_config_is_locked():
  assert isinstance(common.base(), ml_collections.ConfigDict)
  with pytest.raises(KeyError):
    make_config(**{'optimizer.lr': 1.0})
