"""Small students with random parameters, as released files and as runs."""

import json
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from safetensors.numpy import save_file

from configs import digits
from linearizer_jax import checkpoint
from linearizer_jax.convert import FAMILIES, tables
from linearizer_jax.models import from_config

(ADVENTURER,) = FAMILIES['adventurer']
SMALL = dict(
  width=64,
  depth=5,
  patch_size=4,
  image_size=32,
  num_classes=7,
  head_dim=16,
  state_dim=8,
)


def shapes_of(model):
  size = model.image_size
  height, width = (size, size) if isinstance(size, int) else size
  images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), images)['params']


def random_params(model, seed=0):
  """Like trained ones, and quicker than `init`: every array is random."""
  rng = np.random.default_rng(seed)

  def draw(path, x):
    value = rng.standard_normal(x.shape, np.float32)
    name = path[-1].key
    if name == 'kernel':
      return value / math.sqrt(math.prod(x.shape[:-1]))
    if name in ('scale', 'D'):
      return 1 + value / 10
    if name == 'A_log':
      return value / 2 + 1
    return value / 10 - 3 * (name == 'dt_bias')

  return jax.tree_util.tree_map_with_path(draw, shapes_of(model))


def write(folder, model, params, **more):
  """Weights as released, with a config where fields cannot be read off."""
  folder.mkdir(exist_ok=True)
  save_file(tables.to_state_dict(ADVENTURER, params), folder / 'a.safetensors')
  if more:
    (folder / 'config.json').write_text(json.dumps({'model': more}))
  return folder / 'a.safetensors'


def workdir_with(path, params, stage='finetune', step=3, **student):
  """A work directory of a digits run whose last stage holds `params`."""
  config = digits.get_config('smoke').to_dict()
  config['student'] |= student
  checkpoint.claim_workdir(path, config)
  directory = checkpoint.stage_dir(path, stage)
  checkpoint.save_params(directory / 'checkpoints', step, {'student': params})
  result = {'accuracy': 12.5, 'seconds': 1.0, 'steps': step}
  checkpoint.write_json(directory / 'result.json', result)
  resolved = checkpoint.resolve_stage(config, stage)
  return path, ml_collections.ConfigDict(resolved)


def digits_run(path):
  """(work directory, params, resolved config) of a small student."""
  config = checkpoint.resolve_stage(
    digits.get_config('smoke').to_dict(), 'finetune'
  )
  config = ml_collections.ConfigDict(config)
  model, _ = from_config(config, 'student', num_classes=10)
  params = random_params(model)
  workdir_with(path, params)
  return path, params, config
