"""Losses of masked features, of the logits and of the class token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_losses import TOLERANCE, assert_close, features

from linearizer_jax import losses


def layer_norm(x):
  x = np.asarray(x, np.float64)
  variance = x.var(-1, keepdims=True)
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(variance + 1e-6)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('target_norm', ['layernorm', 'none'])
def test_prediction_losses_are_their_definitions(target_norm, dtype):
  prediction = jnp.asarray(features(27), dtype)
  target = features(28)
  target[..., 3] += 60 * target.std()
  target = jnp.asarray(target, dtype)
  x = np.asarray(prediction, np.float64)
  y = np.asarray(target, np.float64)
  y = layer_norm(y) if target_norm == 'layernorm' else y
  d = np.abs(x - y)
  expected = {
    'smooth_l1': np.mean(np.where(d < 1, d**2 / 2, d - 0.5)),
    'mse': np.mean(d**2),
    'cosine': np.mean(
      1
      - np.sum(x * y, -1)
      / np.linalg.norm(x, axis=-1)
      / np.linalg.norm(y, axis=-1)
    ),
  }
  for name, value in expected.items():
    got = losses.masked_prediction(
      prediction, target, loss=name, target_norm=target_norm
    )
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, value, rtol=TOLERANCE, err_msg=name)
  got = losses.feature_loss(prediction, target, target_norm=target_norm)
  np.testing.assert_allclose(got, expected['mse'], rtol=TOLERANCE)


def test_prediction_gradients_against_differences():
  """In float32 the loss is smooth enough for a step of 1e-2."""
  prediction, target = features(29), features(30)
  direction, step = features(31), np.float32(1e-2)
  for name in ('smooth_l1', 'cosine', 'mse'):
    loss = functools.partial(losses.masked_prediction, loss=name)
    loss_and_grad = jax.jit(jax.value_and_grad(loss))
    ends = [
      loss_and_grad(prediction + sign * step * direction, target)[0]
      for sign in (np.float32(1), np.float32(-1))
    ]
    slope = np.vdot(loss_and_grad(prediction, target)[1], direction)
    np.testing.assert_allclose(
      slope, (ends[0] - ends[1]) / (2 * step), rtol=2e-3, err_msg=name
    )


def test_normalized_target_has_no_mean_and_unit_variance():
  target = 100 + features(32, width=64)
  got = np.asarray(losses.normalize_target(target, 'layernorm'))
  np.testing.assert_allclose(got, layer_norm(target), atol=TOLERANCE)
  assert np.isfinite(losses.normalize_target(0 * target, 'layernorm')).all()
  np.testing.assert_array_equal(losses.normalize_target(target, 'none'), target)


def test_logit_loss_is_the_divergence_and_has_its_gradient():
  student, teacher = 5 * features(33)[:, 0], 5 * features(34)[:, 0]
  temperature = 2.0

  def softmax(x):
    weights = np.exp(x.astype(np.float64) / temperature)
    return weights / weights.sum(-1, keepdims=True)

  p, q = softmax(teacher), softmax(student)
  loss = jax.jit(jax.value_and_grad(losses.logit_loss, argnums=(0, 1)))
  value, gradients = loss(student, teacher, temperature)
  np.testing.assert_allclose(
    value, temperature**2 * np.mean(np.sum(p * np.log(p / q), -1)), rtol=1e-5
  )
  assert_close(gradients[0], temperature * (q - p) / len(p))
  np.testing.assert_array_equal(gradients[1], 0)
  assert abs(loss(teacher, teacher, 1.0)[0]) <= 1e-6

  # At temperature 1: cross-entropy with soft labels, less their entropy.
  def cross_entropy(x):
    labels = jax.nn.softmax(teacher)
    return optax.losses.softmax_cross_entropy(x, labels).mean()

  expected = jax.jit(jax.grad(cross_entropy))(student)
  assert_close(loss(student, teacher, 1.0)[1][0], expected)


def test_class_token_loss():
  x, y = features(35)[:, 0], features(36)[:, 0]
  cosine = np.sum(x * y, -1) / np.linalg.norm(x, axis=-1)
  cosine = cosine / np.linalg.norm(y, axis=-1)
  loss = jax.jit(jax.value_and_grad(losses.class_token_loss, argnums=(0, 1)))
  np.testing.assert_allclose(loss(x, y)[0], np.mean(1 - cosine), rtol=TOLERANCE)
  assert 0 <= loss(x, 2 * x)[0] <= 1e-6
  value, (student, teacher) = loss(0 * x, y)
  assert value == 1
  assert np.isfinite(student).all()
  np.testing.assert_array_equal(teacher, 0)
