"""The student against an independent float64 NumPy forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linearizer_jax.models import adventurer, create_model, layers, list_models

# Float32 against float64: rounding of about 30 operations a block.
FLOAT32 = 2e-5

# Of the released models, 1000 classes, 224 px, patches of 16 (method, sec. 3);
# patches of 8 have 588 more positions and a smaller patch kernel.
PARAMETERS = {
  'adventurer_tiny_patch16': 11_608_840,
  'adventurer_small_patch16': 44_491_816,
  'adventurer_base_patch16': 98_657_608,
  'adventurer_large_patch16': 346_196_200,
}
for _name, _width in (
  ('tiny', 256),
  ('small', 512),
  ('base', 768),
  ('large', 1024),
):
  PARAMETERS[f'adventurer_{_name}_patch8'] = (
    PARAMETERS[f'adventurer_{_name}_patch16']
    + 588 * _width
    - (16 * 16 - 8 * 8) * 3 * _width
  )

SMALL = dict(
  width=32,
  depth=4,
  patch_size=4,
  image_size=16,
  num_classes=7,
  head_dim=16,
  state_dim=8,
)


def run(model, params, images, **kwargs):
  """`apply` under jit: op by op it would take minutes."""
  return jax.jit(model.apply)({'params': params}, images, **kwargs)


def count(tree):
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  'name', [n for n in list_models() if n.startswith('adventurer')]
)
def test_parameter_counts(name):
  model = create_model(name)
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  assert count(shapes) == PARAMETERS[name]


def make(**overrides):
  """(model, random parameters around 0, around 1 for scales, images)."""
  model = create_model('adventurer_tiny_patch16', **SMALL | overrides)
  rng = np.random.default_rng(0)
  images = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)['params']

  def draw(path, leaf):
    around = float(path[-1].key in ('scale', 'D'))
    return (around + 0.2 * rng.normal(size=leaf.shape)).astype(leaf.dtype)

  return model, jax.tree_util.tree_map_with_path(draw, shapes), images


def numpy_forward(p, images, model, flips, mask=None, visible_heading=False):
  """The released forward pass, token by token, in float64."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
  images = np.asarray(images, np.float64)
  silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731

  def rms(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale

  n, size = model.patch_size, images.shape[1] // model.patch_size
  tokens = np.zeros((len(images), size * size, model.width))
  for row in range(size):
    for column in range(size):
      patch = images[:, row * n : row * n + n, column * n : column * n + n]
      kernel = p['patch_embed']['proj']['kernel']
      tokens[:, row * size + column] = (
        np.einsum('bhwc,hwcd->bd', patch, kernel)
        + p['patch_embed']['proj']['bias']
      )
  if mask is not None:
    tokens = np.where(mask[..., None], p['mask_token'], tokens)
  cls = np.broadcast_to(p['cls_token'], (len(images), 1, model.width))
  h = np.concatenate([tokens, cls], 1) + p['pos_embed']
  seen = np.ones(h.shape[:2])
  if visible_heading:
    seen[:, :-1] = ~mask
  out = {}
  for i in range(model.depth):
    q = p[f'layers_{i}']
    m = q['mixer']
    u = rms(h, q['norm']['scale'])
    mean = (u * seen[..., None]).sum(1) / seen.sum(1)[:, None]
    order = list(range(u.shape[1] - 1))
    if i in flips:
      order.reverse()
    u = np.concatenate([mean[:, None], u[:, order], u[:, -1:]], 1)
    inner, state = model.expand * model.width, model.state_dim
    zxbcdt = u @ m['in_proj']['kernel']
    z = zxbcdt[..., :inner]
    xbc = zxbcdt[..., inner : 2 * inner + 2 * state]
    dt = zxbcdt[..., 2 * inner + 2 * state :]
    conv = np.zeros_like(xbc) + m['conv1d']['bias']
    for t in range(xbc.shape[1]):
      for k in range(4):
        if t - 3 + k >= 0:
          conv[:, t] += xbc[:, t - 3 + k] * m['conv1d']['kernel'][k]
    xbc = silu(conv)
    dt = np.log1p(np.exp(dt + m['dt_bias']))
    heads = inner // model.head_dim
    S = np.zeros((len(u), heads, model.head_dim, state))
    y = np.zeros((*u.shape[:2], inner))
    for t in range(u.shape[1]):
      x = xbc[:, t, :inner].reshape(len(u), heads, model.head_dim)
      B = xbc[:, t, inner : inner + state]
      C = xbc[:, t, inner + state :]
      decay = np.exp(-np.exp(m['A_log']) * dt[:, t])
      S = S * decay[..., None, None] + np.einsum(
        'bh,bhp,bn->bhpn', dt[:, t], x, B
      )
      yt = np.einsum('bhpn,bn->bhp', S, C) + m['D'][:, None] * x
      y[:, t] = yt.reshape(len(u), inner)
    y = rms(y * silu(z), m['norm']['scale']) @ m['out_proj']['kernel']
    y = y[:, 1:]
    back = np.argsort(order)
    h = h + np.concatenate([y[:, back], y[:, -1:]], 1)
    r = rms(h, q['norm_mlp']['scale'])
    w = q['mlp']
    lin = lambda x, name, w=w: x @ w[name]['kernel'] + w[name]['bias']  # noqa: E731
    h = h + lin(silu(lin(r, 'w1')) * lin(r, 'w2'), 'w3')
    out[f'block{i:02d}'], out[f'block{i:02d}_class'] = h[:, :-1], h[:, -1]
  normed = rms(h, p['norm_f']['scale'])
  out['normed'], out['class'] = normed[:, :-1], normed[:, -1]
  return out['class'] @ p['head']['kernel'] + p['head']['bias'], out


def assert_close(got, want, tolerance):
  got, want = np.asarray(got, np.float64), np.asarray(want)
  error = np.abs(got - want).max() / np.abs(want).max()
  assert error < tolerance, f'largest error {error:.2e} of the largest value'


@pytest.mark.parametrize(
  ('flip_blocks', 'flips'),
  [('released', {2, 3}), ('alternate', {1, 3}), ((0, 3), {0, 3})],
)
def test_forward_equals_numpy(flip_blocks, flips):
  model, params, images = make(flip_blocks=flip_blocks)
  logits, out = run(model, params, images)
  want_logits, want = numpy_forward(params, images, model, flips)
  assert set(out) == set(want)
  for name in want:
    assert_close(out[name], want[name], FLOAT32)
  assert_close(logits, want_logits, FLOAT32)


@pytest.mark.parametrize('heading_tokens', ['all', 'visible'])
def test_masked_forward_equals_numpy(heading_tokens):
  model, params, images = make(
    use_mask_token=True, heading_tokens=heading_tokens
  )
  mask = np.arange(32).reshape(2, 16) % 3 == 1
  _, out = run(model, params, images, token_mask=mask)
  _, want = numpy_forward(
    params, images, model, {2, 3}, mask, heading_tokens == 'visible'
  )
  assert_close(out['normed'], want['normed'], FLOAT32)


def test_masked_pixels_do_not_matter():
  model, params, images = make(use_mask_token=True)
  mask = np.zeros((2, 16), bool)
  mask[:, 5] = True  # the patch in row 1, column 1
  changed = images.copy()
  changed[:, 4:8, 4:8] = 7
  one = run(model, params, images, token_mask=mask)
  two = run(model, params, changed, token_mask=mask)
  np.testing.assert_array_equal(one[1]['normed'], two[1]['normed'])


def test_bfloat16_keeps_float32_where_the_method_says():
  model, params, images = make(dtype='bfloat16')
  logits, out = run(model, params, images)
  assert logits.dtype == jnp.float32
  assert {x.dtype for x in out.values()} == {jnp.dtype('float32')}
  want, _ = numpy_forward(params, images, model, {2, 3})
  # Eight bits of mantissa through five blocks.
  assert_close(logits, want, 5e-2)


@pytest.mark.parametrize('remat', ['full', 'dots'])
def test_remat_changes_nothing(remat):
  model, params, images = make()
  other, _, _ = make(remat=remat)

  def loss(params, model):
    return (model.apply({'params': params}, images)[0] ** 2).sum()

  gradient = jax.jit(jax.grad(loss), static_argnums=1)
  for a, b in zip(
    jax.tree.leaves(gradient(params, model)),
    jax.tree.leaves(gradient(params, other)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * abs(b).max())


def test_other_image_sizes_resize_the_positions():
  model, params, _ = make()
  images = jax.random.normal(jax.random.key(3), (1, 24, 8, 3))
  _, out = run(model, params, images)
  assert out['normed'].shape == (1, 12, 32)
  positions = params['pos_embed']
  resized = layers.resize_positions(positions[:, :-1], (4, 4), (6, 2))
  other = create_model(
    'adventurer_tiny_patch16', **SMALL | {'image_size': (24, 8)}
  )
  own = params | {'pos_embed': jnp.concatenate([resized, positions[:, -1:]], 1)}
  _, want = run(other, own, images)
  np.testing.assert_allclose(out['normed'], want['normed'], rtol=1e-6)


def test_drop_path_rates_and_scaling():
  # [0] + linspace(0, 0.4, 5), whose last entry is not used.
  np.testing.assert_allclose(
    layers.drop_path_rates(0.4, 5), [0, 0, 0.1, 0.2, 0.3]
  )
  assert layers.drop_path_rates(0.4, 1) == (0.0,)
  x = jnp.ones((4000, 2, 3))
  rngs = {'drop_path': jax.random.key(0)}
  y = np.asarray(layers.DropPath(0.25).apply({}, x, True, rngs=rngs))
  assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
  assert np.ptp(y, (1, 2)).max() == 0  # a sample is kept or dropped whole
  assert abs(y.mean() - 1) < 0.03  # four standard deviations


def test_start_values():
  model = create_model('adventurer_small_patch16', depth=4)
  images = jnp.zeros((1, 224, 224, 3))
  params = jax.jit(model.init)(jax.random.key(0), images)['params']
  mixer = params['layers_1']['mixer']
  A = np.exp(mixer['A_log'])
  assert A.min() >= 1
  assert A.max() <= 16
  dt = np.log1p(np.exp(np.asarray(mixer['dt_bias'], np.float64)))
  assert dt.min() > 0.99e-3
  assert dt.max() < 1.01e-1
  bound = 512**-0.5
  assert 0.95 * bound < abs(mixer['in_proj']['kernel']).max() <= bound
  bound = 1024**-0.5 / 4**0.5
  assert 0.95 * bound < abs(mixer['out_proj']['kernel']).max() <= bound
  assert abs(mixer['conv1d']['kernel']).max() <= 0.5
  assert abs(mixer['conv1d']['bias']).max() > 0.4
  np.testing.assert_array_equal(mixer['D'], 1)
  assert abs(np.std(params['pos_embed']) - 0.02) < 2e-3


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'flip_blocks': 'odd'}, 'flip_blocks'),
    ({'flip_blocks': (9,)}, '0 to 3'),
    ({'heading_tokens': 'some'}, 'heading_tokens'),
    ({'remat': 'half'}, 'remat'),
    ({'head_dim': 24}, 'head_dim'),
    ({'patch_size': 5}, 'multiples of 5'),
  ],
)
def test_bad_fields_are_named(fields, words):
  with pytest.raises(ValueError, match=words):
    make(**fields)


def test_bad_masks_are_named():
  model, params, images = make()
  with pytest.raises(ValueError, match='use_mask_token'):
    run(model, params, images, token_mask=np.ones((2, 16), bool))
  model, params, images = make(use_mask_token=True)
  with pytest.raises(ValueError, match='16'):
    run(model, params, images, token_mask=np.ones((2, 9), bool))


def test_create_model_names_what_it_does_not_know():
  with pytest.raises(ValueError, match='adventurer_base_patch16'):
    create_model('adventurer_huge')
  with pytest.raises(ValueError, match='heading_tokens'):
    create_model('adventurer_base_patch16', heads=3)


def test_flip_schedule():
  assert adventurer.flip_schedule('released', 24) == {2, 3}
  assert adventurer.flip_schedule('alternate', 6) == {1, 3, 5}
