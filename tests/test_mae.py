"""Masked autoencoder: decoder, loss, what it may see, and what comes of it."""

import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from tiny import get_config

from configs import common, imagenette
from linearizer_jax import (
  checkpoint,
  masking,
  results,
  sharding,
  start,
  steps,
  train,
)
from linearizer_jax.models import create_model
from linearizer_jax.models.teachers import IMAGENET
from linearizer_jax.tasks import mae

SIZE, PATCH, GRID, TOKENS = 16, 4, (4, 4), 16


def make_task(dtype='float32', **changes):
  config = common.base()
  config.mae.update(decoder_width=8, decoder_depth=1, decoder_num_heads=2)
  config.mae.update(changes)
  fields = dict(width=12, depth=1, num_heads=2, patch_size=PATCH, dtype=dtype)
  model = create_model('vit_tiny_patch16', image_size=SIZE, **fields)
  task = mae.MaskedAutoencoder(model, 'teacher', *IMAGENET, config)
  task.check(TOKENS)
  return task


def random_images(count):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


@pytest.fixture(scope='module')
def started():
  """(task, params, prepared batch of three images, its loss)."""
  task, key = make_task(), jax.random.key(1)
  init = jax.jit(
    lambda key: task.init(key, (SIZE, SIZE, 3)),
    compiler_options={'xla_backend_optimization_level': 0},
  )
  params = init(jax.random.key(0))
  batch = task.prepare({'image': random_images(3)}, key)
  return task, params, batch, jax.jit(task.loss)(params, {}, batch, key)


def layer_norm(x, params):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  return x * params['scale'] + params['bias']


def dense(x, params):
  return x @ params['kernel'] + params['bias']


def block(x, params, heads):
  """A transformer block on (T, D), one head and one query at a time."""
  q, k, v = np.split(
    dense(layer_norm(x, params['ln_1']), params['attn']['in_proj']), 3, -1
  )
  y, size = np.zeros_like(x), x.shape[-1] // heads
  for h in range(heads):
    part = slice(h * size, (h + 1) * size)
    for t in range(len(x)):
      weights = np.exp(k[:, part] @ q[t, part] / math.sqrt(size))
      y[t, part] = weights @ v[:, part] / weights.sum()
  x = x + dense(y, params['attn']['out_proj'])
  y = dense(layer_norm(x, params['ln_2']), params['mlp']['c_fc'])
  y = y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2
  return x + dense(y, params['mlp']['c_proj'])


def test_decoder_and_loss_equal_a_loop_over_patches(started):
  task, params, batch, (found, metrics) = started
  images, mask = np.asarray(batch['image']), np.asarray(batch['mask'])
  assert (mask.sum(1) == 12).all()
  visible, _ = masking.split_indices(batch['mask'], 12)
  apply = jax.jit(task.model.apply)
  _, out = apply({'params': params['teacher']}, images, keep=visible)
  heads, out = jax.tree.map(np.float64, (params['heads'], out))
  waves = 100.0 ** -np.linspace(0, 1, 2)
  loss = []
  for b in range(3):
    tokens, seen = [dense(out['class'][b], heads['embed'])], 0
    for i in range(TOKENS):
      if mask[b, i]:
        token = heads['mask_token']
      else:
        token = dense(out['normed'][b, seen], heads['embed'])
        seen += 1
      row, column = divmod(i, GRID[1])
      position = [f(p * waves) for p in (column, row) for f in (np.sin, np.cos)]
      tokens.append(token + np.concatenate(position) / 2)
    tokens = block(np.stack(tokens), heads['blocks_0'], 2)
    for i in range(TOKENS):
      if mask[b, i]:
        y, x = (PATCH * n for n in divmod(i, GRID[1]))
        patch = np.float64(images[b, y : y + PATCH, x : x + PATCH])
        target = (patch - patch.mean()) / np.sqrt(patch.var() + 1e-6)
        normed = layer_norm(tokens[1 + i], heads['norm'])
        pixels = dense(normed, heads['pixels']).reshape(PATCH, PATCH, 3)
        loss.append(((pixels - target) ** 2).mean())
  np.testing.assert_allclose(found, np.mean(loss), rtol=1e-5)
  assert metrics['loss'] == found
  assert abs(found - 1) < 0.05  # a fresh decoder predicts next to nothing


def test_encoder_does_not_see_masked_patches(started):
  task, params, batch, _ = started
  visible, _ = masking.split_indices(batch['mask'], 12)

  def sums(images):
    _, out = task.model.apply(
      {'params': params['teacher']}, images, keep=visible
    )
    return sum((x**3).sum() for x in out.values())

  gradient = np.abs(jax.jit(jax.grad(sums))(batch['image']))
  patches = gradient.reshape(3, 4, PATCH, 4, PATCH, 3).sum((2, 4, 5))
  np.testing.assert_array_equal(
    patches.reshape(3, TOKENS) == 0, np.asarray(batch['mask'])
  )


def test_prediction_does_not_depend_on_masked_patches(started):
  task, params, batch, _ = started
  predict = jax.jit(task._predict)
  pixels = np.repeat(np.asarray(batch['mask']).reshape(3, 4, 4), PATCH, 1)
  pixels = np.repeat(pixels, PATCH, 2)[..., None]
  changed = batch | {'image': jnp.where(pixels, 0.5, batch['image'])}
  before, patches = predict(params, batch, None)
  after, grey = predict(params, changed, None)
  np.testing.assert_array_equal(before, after)
  assert (grey == 0.5).all()
  assert not (patches == 0.5).any()
  plain = make_task(norm_pixels=False)._distance(before, patches)
  np.testing.assert_allclose(plain, ((before - patches) ** 2).mean(), rtol=1e-6)


def test_all_tokens_kept_is_the_vit(started):
  task, params, batch, _ = started
  apply = jax.jit(task.model.apply)
  everything = jnp.broadcast_to(jnp.arange(TOKENS), (3, TOKENS))
  variables = {'params': params['teacher']}
  _, whole = apply(variables, batch['image'])
  _, kept = apply(variables, batch['image'], keep=everything)
  assert whole.keys() == kept.keys()
  for name in whole:
    np.testing.assert_allclose(kept[name], whole[name], rtol=0, atol=1e-6)


def test_evaluation_counts_every_image_once(started):
  task, params, _, (loss, _) = started
  step = jax.jit(steps.make_eval_step(task))

  def sums(*valid):
    batch = {'image': random_images(3), 'valid': np.array(valid)}
    found = step(params, {}, batch, jax.random.key(1))
    assert found['count'] == sum(valid)
    return float(found['loss'])

  two, one = sums(True, True, False), sums(False, False, True)
  assert sums(True, True, True) == pytest.approx(two + one, rel=1e-6)
  assert (two + one) / 3 == pytest.approx(float(loss), rel=1e-6)


def test_bfloat16_gives_nearly_the_same_loss(started):
  _, params, batch, (loss, _) = started
  task = make_task('bfloat16')
  rough, _ = jax.jit(task.loss)(params, {}, batch, jax.random.key(1))
  assert rough.dtype == jnp.float32
  np.testing.assert_allclose(rough, loss, rtol=1e-2)


def test_eight_devices_give_the_losses_of_one(started):
  task, params, _, _ = started
  mesh, whole = sharding.make_mesh(fsdp=2), {'image': random_images(8)}
  split = sharding.global_batch(mesh, whole)
  evaluate, key = jax.jit(task.evaluate), jax.random.key(2)
  params_there = jax.device_put(params, sharding.replicated(mesh))
  np.testing.assert_allclose(
    evaluate(params_there, {}, split, key)['loss'],
    evaluate(params, {}, whole, key)['loss'],
    rtol=1e-5,
  )


def test_loss_falls(started):
  """On images that are one slope of brightness each."""
  task, params, _, _ = started
  slopes = np.random.default_rng(0).uniform(-1, 1, (32, 2))
  y, x = (grid[None, ..., None] for grid in np.mgrid[:SIZE, :SIZE] / SIZE - 0.5)
  brightness = slopes[:, :1, None, None] * y + slopes[:, 1:, None, None] * x
  images = np.uint8(128 + 120 * brightness).repeat(3, -1)
  optimizer = optax.adam(5e-3)

  @jax.jit
  def losses(params):
    def step(carry, key):
      params, state = carry
      batch = task.prepare({'image': images}, key)
      (loss, _), gradients = jax.value_and_grad(task.loss, has_aux=True)(
        params, {}, batch, key
      )
      updates, state = optimizer.update(gradients, state)
      return (optax.apply_updates(params, updates), state), loss

    keys = jax.random.split(jax.random.key(1), 150)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[1]

  found = losses(params)
  assert found[-10:].mean() < 0.5 * found[:3].mean()


@pytest.mark.slow
def test_a_student_and_a_classifier_learn_from_its_checkpoint(tmp_path):
  config = get_config('mae')
  config.teacher.weights = 'stage:mae'
  config.student.depth = config.teacher.depth = config.distill.num_stages = 1
  config.stages = ('mae', 'distill', 'teacher')
  config.per_stage = {
    'mae': dict(train_role='teacher'),
    'distill': dict(task='distill', distill=common.LOSSES['features']),
    'teacher': dict(task='classify', train_role='teacher', init='stage:mae'),
  }
  config = config.to_dict()
  checkpoint.claim_workdir(tmp_path, config)
  resolved = [checkpoint.resolve_stage(config, s) for s in config['stages']]
  one = jax.devices()[:1]
  first, second = (train.run_stage(s, tmp_path, one) for s in resolved[:2])
  assert set(first) == {'loss', 'count', 'seconds', 'steps'}
  assert first['count'] == 32
  assert 0 < second['loss'] < math.inf
  # A classifier starts from the encoder, with a head of its own.
  classify = ml_collections.ConfigDict(resolved[2])
  program = train.shared_programs(classify, sharding.make_mesh(one), 10)
  state = start.start_state(classify, program, tmp_path, jax.random.key(0))
  encoder, _ = checkpoint.load_params(tmp_path, stage='mae', role='teacher')
  params = dict(state.params['teacher'])
  assert params.pop('head')['kernel'].shape == (16, 10)
  jax.tree.map(np.testing.assert_array_equal, params, encoder)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'train_role': 'student'}, 'config.train_role'),
    ({'teacher.name': 'adventurer_tiny_patch16'}, 'config.teacher.name'),
    ({'mae.mask_ratio': 0.0}, 'config.mae.mask_ratio is 0.0, .* 0 of 16'),
    ({'mae.mask_ratio': 0.99}, 'config.mae.mask_ratio is 0.99, .* 16 of 16'),
    ({'mae.decoder_depth': 0}, 'config.mae.decoder_depth is 0'),
    ({'mae.decoder_num_heads': 3}, 'config.mae.decoder_width is 32'),
  ],
)
def test_bad_configs_are_refused(changes, words):
  config = get_config('mae')
  config.train_role, config.teacher.num_heads = 'teacher', None
  config.update_from_flattened_dict(changes)
  resolved = checkpoint.resolve_stage(config.to_dict(), 'stage')
  with pytest.raises(ValueError, match=words):
    train.check_stage(resolved)


def test_a_run_from_before_there_was_the_task_goes_on(tmp_path):
  config = get_config().to_dict()
  old = {name: value for name, value in config.items() if name != 'mae'}
  checkpoint.claim_workdir(tmp_path, old)
  checkpoint.claim_workdir(tmp_path, config)
  changed = config | {'mae': config['mae'] | {'mask_ratio': 0.5}}
  with pytest.raises(ValueError, match=r'mae\.mask_ratio was 0\.75, is 0\.5'):
    checkpoint.claim_workdir(tmp_path, changed)


def test_rows_of_the_table_of_teachers(tmp_path):
  config = imagenette.get_config('table=teachers,seeds=1').to_dict()
  rows = dict(config['report']['tables'])['teachers']
  assert 'teacher_mae' in rows
  assert {'from_mae', 'features_from_mae'} < set(rows)
  for row in ('from_mae', 'features_from_mae'):
    stage = checkpoint.resolve_stage(config, f'distill_{row}_s0')
    assert stage['teacher']['weights'] == 'stage:mae'  # without a label
    by_paper = stage['distill'] == config['distill']
    assert by_paper == (row == 'from_mae')
  checkpoint.claim_workdir(tmp_path, config)
  for stage, result in (
    ('mae', {'loss': 0.5, 'seconds': 60.0, 'steps': 600}),
    ('teacher_mae', {'accuracy': 70.0, 'seconds': 5.0, 'steps': 50}),
    ('few_from_mae_s0', {'accuracy': 40.0, 'seconds': 1.0, 'steps': 1}),
  ):
    checkpoint.stage_dir(tmp_path, stage).mkdir()
    path = checkpoint.stage_dir(tmp_path, stage) / 'result.json'
    checkpoint.write_json(path, result)
  _, note, teacher, student = results.collect(tmp_path)
  assert 'without labels' in note['note']
  assert (teacher['row'], teacher['accuracy']) == ('teacher_mae', 70.0)
  assert (teacher['updates'], teacher['seconds']) == (650, 65.0)
  assert student['row'] == 'from_mae'
