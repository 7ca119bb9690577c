"""Tasks: what each loss sees, mixing of images, padded evaluation batches."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from configs import common
from linearizer_jax import losses, masking, steps
from linearizer_jax.models import create_model
from linearizer_jax.models.teachers import CLIP, IMAGENET
from linearizer_jax.tasks import classify, distill

SIZE, PATCH, TOKENS = 16, 4, 16


def make_task(**changes):
  """Distillation of a ViT of width 8 from one of width 12, two blocks each."""
  config = common.base()
  config.distill.num_stages = 2
  with config.unlocked():
    config.update_from_flattened_dict(
      {f'distill.{name}': value for name, value in changes.items()}
    )
  shared = dict(depth=2, num_heads=2, patch_size=PATCH, image_size=SIZE)
  task = distill.Distill(
    student=create_model(
      'vit_tiny_patch16', width=8, use_mask_token=True, num_classes=3, **shared
    ),
    teacher=create_model(
      'vit_tiny_patch16',
      width=12,
      num_classes=3,
      projection_dim=6,
      **shared,
    ),
    student_stats=IMAGENET,
    teacher_stats=CLIP,
    teacher_size=(SIZE, SIZE),
    config=config,
  )
  task.check(TOKENS)
  return task


def make_outputs(task, batch=3):
  """Random outputs of both networks and the mask, as `_forward` gives them."""
  rng = np.random.default_rng(0)

  def draw(width):
    out = {}
    for name in ('block00', 'block01', 'normed'):
      out[name] = rng.normal(size=(batch, TOKENS, width))
      out[f'{name}_class'] = rng.normal(size=(batch, width))
    out['class'] = rng.normal(size=(batch, width))
    out['logits'] = rng.normal(size=(batch, 3))
    return jax.tree.map(np.float32, out)

  t, s = draw(12), draw(8)
  t['projected'] = np.float32(rng.normal(size=(batch, TOKENS, 6)))
  t['projected_class'] = np.float32(rng.normal(size=(batch, 6)))
  ratio = task.config.distill.mask_ratio
  mask = masking.random_mask(jax.random.key(0), batch, TOKENS, ratio)
  return {'t': t, 's': s, 'full': s, 'mask': mask}


def head_params(task):
  rng = np.random.default_rng(1)
  return {
    name: {
      'kernel': rng.normal(size=(8, width)).astype(np.float32),
      'bias': np.zeros(width, np.float32),
    }
    for name, width in task._head_widths().items()
  }


def terms_of(task, outputs):
  return jax.jit(task._terms)(head_params(task), outputs)


def gradients(task):
  """Gradient of the loss with respect to every output of the student."""
  outputs, heads = make_outputs(task), head_params(task)

  def loss(s):
    return task._weigh(task._terms(heads, outputs | {'s': s, 'full': s}))[0]

  return jax.jit(jax.grad(loss))(outputs['s']), outputs


def test_matching_sees_visible_tokens_only():
  grads, outputs = gradients(make_task(mask_weight=0.0))
  mask = np.asarray(outputs['mask'])
  for name in ('block00', 'block01'):
    assert not np.asarray(grads[name])[mask].any()
    assert np.abs(np.asarray(grads[name])[~mask]).min() > 0
  assert not np.asarray(grads['normed']).any()


def test_prediction_sees_masked_tokens_only():
  grads, outputs = gradients(make_task(match_weight=0.0))
  mask = np.asarray(outputs['mask'])
  assert not np.asarray(grads['normed'])[~mask].any()
  assert np.abs(np.asarray(grads['normed'])[mask]).max() > 0
  assert not np.asarray(grads['block01']).any()


@pytest.mark.parametrize(
  ('match_tokens', 'match_class'),
  [('visible', False), ('visible', True), ('all', False), ('class', False)],
)
def test_matched_sets(match_tokens, match_class):
  task = make_task(match_tokens=match_tokens, match_class=match_class)
  outputs = make_outputs(task)
  mask = np.asarray(outputs['mask'])
  terms = terms_of(task, outputs)
  for stage, block in ((1, 'block00'), (2, 'block01')):
    rows = []
    for i in range(3):
      keep = slice(None) if match_tokens == 'all' else ~mask[i]
      maps = []
      for out in (outputs['t'], outputs['s']):
        tokens = np.asarray(out[block][i], np.float64)[keep]
        query = np.asarray(out[f'{block}_class'][i], np.float64)[None]
        if match_class:
          tokens = np.concatenate([tokens, query])
        unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
        if match_tokens == 'class':
          query = query / np.linalg.norm(query)
        else:
          query = unit
        maps.append(query @ unit.T)
      a, b = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in maps)
      rows.append(1 - (a * b).sum(1))
    np.testing.assert_allclose(
      terms[f'match_stage{stage}'], np.mean(rows), rtol=1e-5
    )


def test_the_loss_is_the_weighted_sum():
  weights = dict(
    match_weight=0.5,
    mask_weight=2.0,
    feature_weight=3.0,
    logit_weight=4.0,
    class_weight=5.0,
  )
  task = make_task(**weights)
  outputs, heads = make_outputs(task), head_params(task)
  loss, m = task._weigh(terms_of(task, outputs))
  want = (
    0.5 * (m['match_stage1'] + m['match_stage2']) / 2
    + 2 * m['predict']
    + 3 * m['feature']
    + 4 * m['logit']
    + 5 * m['class']
  )
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  head = heads['class']
  token = outputs['s']['class'] @ head['kernel'] + head['bias']
  np.testing.assert_allclose(
    m['class'],
    losses.class_token_loss(token, outputs['t']['projected_class']),
    rtol=1e-5,
  )


@pytest.mark.parametrize(
  ('target', 'width'), [('raw', 12), ('normed', 12), ('projected', 6)]
)
def test_targets(target, width):
  task = make_task(target=target, feature_weight=1.0)
  assert task._head_widths() == {'predict': width, 'feature': width}


def test_feature_loss_at_every_stage_has_a_head_each():
  task = make_task(
    feature_weight=1.0, feature_stages='all', mask_weight=0.0, mask_ratio=0.0
  )
  assert task._head_widths() == {'feature_stage1': 12, 'feature_stage2': 12}
  terms = terms_of(task, make_outputs(task))
  assert set(terms) == {'match_stage1', 'match_stage2', 'feature'}


@pytest.mark.parametrize(
  ('depth', 'stages', 'want'),
  [
    (12, 4, ['block02', 'block05', 'block08', 'block11']),
    (24, 4, ['block05', 'block11', 'block17', 'block23']),
    (12, 1, ['block11']),
    (4, 4, ['block00', 'block01', 'block02', 'block03']),
  ],
)
def test_stage_blocks(depth, stages, want):
  assert distill.stage_blocks(depth, stages, 'student') == want


def test_evaluation_equals_a_loop_over_single_images():
  task = make_task()
  params = jax.jit(lambda k: task.init(k, (SIZE, SIZE, 3)))(jax.random.key(0))
  frozen = jax.jit(task.init_frozen)(jax.random.key(1))
  images = np.random.default_rng(0).integers(
    0, 256, (4, SIZE, SIZE, 3), np.uint8
  )
  key = jax.random.key(2)
  batch = {'image': images, 'valid': np.array([True, True, True, False])}
  sums = jax.jit(steps.make_eval_step(task))(params, frozen, batch, key)
  values = jax.jit(task.evaluate)(params, frozen, batch, key)
  assert sums['count'] == 3
  for name, value in values.items():
    np.testing.assert_allclose(sums[name], value[:3].sum(), rtol=1e-5)
  # The mean over images is what training reports for the same masks.
  prepared = task.prepare(batch, key)
  _, metrics = jax.jit(task.loss)(params, frozen, prepared, key)
  for name in ('loss', 'match', 'predict'):
    np.testing.assert_allclose(metrics[name], values[name].mean(), rtol=1e-4)
  assert {'gradient_match', 'constant_student_stage2'} <= set(values)
  assert (np.asarray(values['gradient_predict']) > 0).all()


def test_mixing_keeps_shares_and_labels_together():
  images = np.zeros((2, 32, 32, 3), np.float32)
  images[1] = 1
  target = np.eye(2, dtype=np.float32)
  mix = jax.jit(classify.mix_images, static_argnums=(3, 4))
  for mixup, cutmix in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
    for seed in range(8):
      mixed, labels = mix(jax.random.key(seed), images, target, mixup, cutmix)
      # Image 0 shows as much white as its label says class 1.
      np.testing.assert_allclose(mixed.mean((1, 2, 3)), labels[:, 1], atol=1e-5)
      np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-6)
      if not mixup:
        assert set(np.unique(mixed)) <= {0, 1}


def test_classification_loss_is_smoothed_cross_entropy():
  config = common.base()
  config.classify.label_smoothing = 0.1
  model = create_model(
    'vit_tiny_patch16',
    width=8,
    depth=1,
    num_heads=2,
    patch_size=PATCH,
    image_size=SIZE,
    num_classes=3,
  )
  task = classify.Classify(model, 'student', *IMAGENET, config)
  assert isinstance(config, ml_collections.ConfigDict)
  params = jax.jit(lambda k: task.init(k, (SIZE, SIZE, 3)))(jax.random.key(0))
  batch = {
    'image': np.random.default_rng(0).integers(
      0, 256, (4, SIZE, SIZE, 3), np.uint8
    ),
    'label': np.array([0, 1, 2, 1], np.int32),
  }
  key = jax.random.key(0)
  loss, metrics = jax.jit(task.loss)(params, {}, task.prepare(batch, key), key)
  mean, std = (np.array(x) for x in IMAGENET)
  images = jnp.float32((batch['image'] / 255 - mean) / std)
  logits, _ = jax.jit(model.apply)({'params': params['student']}, images)
  target = np.eye(3)[batch['label']] * 0.9 + 0.1 / 3
  want = -(target * np.asarray(jax.nn.log_softmax(logits))).sum(1).mean()
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  values = jax.jit(task.evaluate)(params, {}, batch, key)
  np.testing.assert_allclose(
    values['loss'],
    optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']),
    rtol=1e-4,
  )
  assert metrics['accuracy'] == values['accuracy'].mean()
