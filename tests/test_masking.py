"""Masks: exact share, uniform, and the gather that follows them."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linearizer_jax import masking


@pytest.mark.parametrize(
  ('num_tokens', 'ratio', 'expected'),
  [(196, 0.75, 147), (196, 0.0, 0), (4, 0.5, 2), (49, 0.6, 29), (2, 0.7, 1)],
)
def test_num_masked_rounds_the_share(num_tokens, ratio, expected):
  assert masking.num_masked(num_tokens, ratio) == expected


@pytest.mark.parametrize(
  ('num_tokens', 'ratio'),
  [(196, 1.0), (196, -0.1), (196, math.nan), (4, 0.1), (4, 0.9), (1, 0.5)],
)
def test_num_masked_names_value_and_field(num_tokens, ratio):
  with pytest.raises(ValueError, match=r'config\.distill\.mask_ratio') as error:
    masking.num_masked(num_tokens, ratio)
  assert str(ratio) in str(error.value)


@pytest.mark.parametrize('ratio', [0.0, 0.25, 0.6, 0.75, 0.99])
def test_exactly_the_asked_share_is_masked_in_every_image(ratio):
  mask = masking.random_mask(jax.random.key(0), 64, 196, ratio)
  assert mask.shape == (64, 196)
  assert mask.dtype == jnp.bool_
  np.testing.assert_array_equal(mask.sum(1), round(ratio * 196))


def test_every_subset_is_equally_likely_and_images_differ():
  num_images = 12_000
  mask = np.asarray(masking.random_mask(jax.random.key(1), num_images, 5, 0.4))
  codes, counts = np.unique(mask @ (1 << np.arange(5)), return_counts=True)
  subsets = [
    (1 << i) + (1 << j) for i, j in itertools.combinations(range(5), 2)
  ]
  assert sorted(codes) == sorted(subsets)
  # Chi-square with 9 degrees of freedom: above 27.9 once in a thousand keys.
  expected = num_images / len(subsets)
  assert np.sum((counts - expected) ** 2 / expected) < 27.9


def test_mask_depends_on_the_key_alone():
  def draw(seed):
    return masking.random_mask(jax.random.key(seed), 4, 49, 0.5)

  np.testing.assert_array_equal(draw(0), draw(0))
  np.testing.assert_array_equal(draw(0), jax.jit(draw, static_argnums=0)(0))
  assert (draw(0) != draw(1)).any()


@pytest.mark.parametrize('ratio', [0.0, 0.3, 0.75])
def test_split_indices_are_ascending_and_complete(ratio):
  mask = masking.random_mask(jax.random.key(2), 16, 49, ratio)
  split = jax.jit(masking.split_indices, static_argnums=1)
  visible, masked = split(mask, masking.num_masked(49, ratio))
  assert visible.dtype == masked.dtype == jnp.int32
  for row, seen, hidden in zip(np.asarray(mask), visible, masked, strict=True):
    np.testing.assert_array_equal(seen, np.flatnonzero(~row))
    np.testing.assert_array_equal(hidden, np.flatnonzero(row))


def test_gather_and_its_gradient_touch_the_indexed_tokens_only():
  mask = masking.random_mask(jax.random.key(3), 4, 12, 0.5)
  visible, _ = masking.split_indices(mask, 6)
  x = np.random.default_rng(4).normal(size=(4, 12, 3)).astype(np.float32)
  weight = np.random.default_rng(5).normal(size=(4, 6, 3)).astype(np.float32)

  def weighted(x):
    return jnp.sum(masking.gather_tokens(x, visible) * weight)

  np.testing.assert_array_equal(
    masking.gather_tokens(x, visible),
    np.take_along_axis(np.asarray(x), np.asarray(visible)[..., None], 1),
  )
  expected = np.zeros(x.shape, np.float32)
  np.put_along_axis(expected, np.asarray(visible)[..., None], weight, 1)
  np.testing.assert_array_equal(jax.jit(jax.grad(weighted))(x), expected)
