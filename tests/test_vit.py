"""ViT: names, shapes, counts, positions, masking, precision, training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from linearizer_jax.models import create_model, transformer, vit
from linearizer_jax.models.layers import as_pair, resize_positions
from linearizer_jax.models.vit import ViT

# Without head. CLIP's towers, DINOv2 and SigLIP as published (DINOv2 without
# its mask token).
PARAMETERS = {
  'vit_tiny_patch16': 5_524_416,
  'vit_tiny_patch8': 5_526_720,
  'vit_small_patch16': 21_665_664,
  'vit_small_patch8': 21_670_272,
  'vit_base_patch16': 85_798_656,
  'vit_base_patch8': 85_807_872,
  'vit_large_patch16': 303_301_632,
  'clip_base_patch32': 87_849_216,
  'clip_base_patch16': 86_192_640,
  'clip_large_patch14': 303_966_208,
  'clip_large_patch14_336': 304_293_888,
  'openclip_base_patch32': 87_849_216,
  'openclip_base_patch16': 86_192_640,
  'openclip_large_patch14': 303_966_208,
  'dinov2_small_patch14': 22_056_192,
  'dinov2_base_patch14': 86_579_712,
  'dinov2_large_patch14': 304_367_616,
  'dinov2_small_patch14_registers': 22_057_728,
  'dinov2_base_patch14_registers': 86_582_784,
  'dinov2_large_patch14_registers': 304_371_712,
  'siglip_base_patch16': 92_884_224,
  'siglip_base_patch16_384': 93_176_064,
  'siglip_large_patch16_256': 315_956_224,
  'mae_base_patch16': 85_798_656,
  'mae_large_patch16': 303_301_632,
  'supervised_base_patch16': 85_798_656,
  'supervised_large_patch16': 303_301_632,
}

SMALL = dict(width=32, depth=2, num_heads=2, patch_size=4, image_size=16)


def random_images(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal((*shape, 3), np.float32)


def shapes_of(model):
  images = jax.ShapeDtypeStruct((1, *as_pair(model.image_size), 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), images)['params']


def test_every_variant_has_its_parameters():
  """Blocks are alike, so two shallow models tell the count of a deep one."""
  found = {}
  for name, fields in vit.VARIANTS.items():
    one, two = (
      sum(
        x.size
        for x in jax.tree.leaves(shapes_of(create_model(name, depth=depth)))
      )
      for depth in (1, 2)
    )
    found[name] = one + (fields['depth'] - 1) * (two - one)
  assert found == PARAMETERS


@pytest.mark.parametrize(
  'fields',
  [
    dict(num_classes=5),
    dict(class_token=False),
    dict(class_token=False, attention_pool=True),
    dict(num_registers=3, layer_scale=0.1),
    dict(pre_norm=True, patch_bias=False, projection_dim=8),
    dict(image_size=(16, 24)),
  ],
)
@pytest.mark.parametrize('size', [(16, 16), (8, 20)])
def test_outputs_have_names_and_shapes(fields, size):
  model = ViT(**{**SMALL, **fields})
  images = jax.ShapeDtypeStruct((3, *size, 3), jnp.float32)
  variables = {'params': shapes_of(model)}
  logits, out = jax.eval_shape(model.apply, variables, images)
  length = size[0] * size[1] // 16
  expected = {'block00': (3, length, 32), 'block01': (3, length, 32)}
  expected |= {'normed': (3, length, 32), 'class': (3, 32)}
  if fields.get('class_token', True):
    expected |= {'block00_class': (3, 32), 'block01_class': (3, 32)}
  if 'projection_dim' in fields:
    expected |= {'projected': (3, length, 8), 'projected_class': (3, 8)}
  assert {name: x.shape for name, x in out.items()} == expected
  assert (logits.shape if logits else None) == (
    (3, 5) if 'num_classes' in fields else None
  )


@pytest.mark.parametrize(
  ('old', 'new'),
  [
    ((14, 14), (24, 24)),
    ((14, 14), (28, 28)),
    ((28, 28), (14, 14)),
    ((16, 16), (14, 20)),
  ],
)
@pytest.mark.parametrize('antialias', [False, True])
def test_positions_resize_as_in_torch(old, new, antialias):
  torch = pytest.importorskip('torch')
  rng = np.random.default_rng(0)
  grid = rng.standard_normal((1, *old, 64), np.float32)
  ours = resize_positions(
    jnp.asarray(grid.reshape(1, -1, 64)), old, new, antialias
  )
  theirs = torch.nn.functional.interpolate(
    torch.from_numpy(grid).permute(0, 3, 1, 2),
    size=new,
    mode='bicubic',
    align_corners=False,
    antialias=antialias,
  )
  theirs = theirs.permute(0, 2, 3, 1).reshape(1, -1, 64).numpy()
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_masked_patches_cannot_be_seen():
  model = ViT(**SMALL, use_mask_token=True)
  images = random_images(2, 16, 16)
  variables = jax.jit(model.init)(jax.random.key(0), images)
  apply = jax.jit(model.apply)
  mask = np.zeros((2, 16), bool)
  mask[0, :4] = True  # the top row of patches of the first image
  mask[1, 5] = True
  changed = images.copy()
  changed[0, :4] += 7.0
  changed[1, 4:8, 4:8] -= 7.0
  _, out = apply(variables, images, mask)
  _, same = apply(variables, changed, mask)
  for name in out:
    np.testing.assert_array_equal(out[name], same[name], name)
  _, seen = apply(variables, changed)
  assert np.abs(seen['block00'] - out['block00']).max() > 0.1


def test_bad_masks_are_refused():
  model = ViT(**SMALL)
  images = random_images(1, 16, 16)
  mask = np.zeros((1, 16), bool)
  with pytest.raises(ValueError, match='use_mask_token=True'):
    jax.eval_shape(model.apply, {'params': shapes_of(model)}, images, mask)
  model = ViT(**SMALL, use_mask_token=True)
  with pytest.raises(ValueError, match=r'shape \(1, 1\), .* \(1, 16\) patch'):
    jax.eval_shape(
      model.apply, {'params': shapes_of(model)}, images, mask[:, :1]
    )


@pytest.mark.parametrize(
  ('fields', 'match'),
  [
    (dict(activation='relu'), "'relu' is not one of"),
    (dict(attention_implementation='flash'), "'flash' is not"),
    (dict(num_heads=3), 'width 32 cannot be split into 3 heads'),
    (dict(patch_size=5), 'multiples of 5'),
  ],
)
def test_bad_fields_are_refused(fields, match):
  model = ViT(**{**SMALL, **fields})
  with pytest.raises(ValueError, match=match):
    model.init(jax.random.key(0), random_images(1, 16, 16))


@pytest.mark.parametrize(
  ('dtype', 'tolerance'), [(jnp.float32, 1e-5), (jnp.bfloat16, 4e-3)]
)
def test_layer_norm_is_float32_inside(dtype, tolerance):
  """A planted channel 60 sigma high, and a mean far above the spread."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((4, 256), np.float32)
  x[:, 7] = 60.0
  x[2:] += 100.0
  norm = transformer.LayerNorm(1e-6, dtype)
  y = norm.apply(norm.init(jax.random.key(0), x), x)
  exact = x.astype(np.float64)
  exact -= exact.mean(-1, keepdims=True)
  exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
  assert y.dtype == dtype
  error = np.linalg.norm(y - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
  assert error.max() <= tolerance


def test_drop_path_drops_in_training_only():
  model = ViT(**SMALL, drop_path=0.5)
  images = np.repeat(random_images(1, 16, 16), 16, 0)
  variables = jax.jit(model.init)(jax.random.key(0), images)
  apply = jax.jit(model.apply, static_argnames='train')
  _, out = apply(variables, images)
  _, trained = apply(
    variables, images, train=True, rngs={'drop_path': jax.random.key(1)}
  )
  np.testing.assert_array_equal(trained['block00'], out['block00'])
  last = np.unique(np.asarray(trained['block01']).round(4), axis=0)
  assert len(last) == 4  # attention and MLP, each kept or not


def test_remat_changes_nothing_but_memory():
  images = random_images(2, 16, 16)
  plain, remat = ViT(**SMALL), ViT(**SMALL, remat='full')
  variables = jax.jit(plain.init)(jax.random.key(0), images)

  def gradient(model):
    def loss(variables):
      _, out = model.apply(variables, images, train=True)
      return (out['normed'] ** 3).sum()

    return jax.jit(jax.grad(loss))(variables)

  expected, found = gradient(plain), gradient(remat)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4),
    found,
    expected,
  )


def test_small_vit_learns():
  """Which quadrant is brighter? Chance is 1/4."""
  model = ViT(**{**SMALL, 'depth': 1}, num_classes=4)
  optimizer = optax.adam(3e-3)

  def batch(key):
    keys = jax.random.split(key)
    labels = jax.random.randint(keys[0], (64,), 0, 4)
    quadrants = jax.nn.one_hot(labels, 4).reshape(-1, 2, 2, 1)
    bright = jnp.repeat(jnp.repeat(quadrants, 8, 1), 8, 2)
    return bright + jax.random.normal(keys[1], (64, 16, 16, 3)), labels

  def loss_of(variables, images, labels):
    logits, _ = model.apply(variables, images, train=True)
    return optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, labels
    ).mean()

  def step(n, carry):
    variables, state = carry
    images, labels = batch(jax.random.key(n))
    gradients = jax.grad(loss_of)(variables, images, labels)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(variables, updates), state

  @jax.jit
  def trained_accuracy():
    images, labels = batch(jax.random.key(1000))
    variables = model.init(jax.random.key(0), images)
    carry = variables, optimizer.init(variables)
    variables, _ = jax.lax.fori_loop(0, 100, step, carry)
    logits, _ = model.apply(variables, images)
    return (logits.argmax(-1) == labels).mean()

  assert trained_accuracy() >= 0.9
