"""Activation matching against float64 NumPy: guards, memory, precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params

from linearizer_jax import losses, masking

FORMS = ['pairwise', 'linear']
# Float32 sums of unit vectors, whose rounding does not grow with the length.
TOLERANCE = 1e-5
# One rounding of the gradient to bfloat16, 2^-9, beside that.
BFLOAT16_TOLERANCE = 2.0**-9 + TOLERANCE


def features(seed, num_tokens=13, width=8, batch=2, alike=0.5):
  """Tokens with a common direction, as those of trained networks have."""
  rng = np.random.default_rng(seed)
  common = alike * rng.normal(size=(batch, 1, width))
  tokens = common + rng.normal(size=(batch, num_tokens, width))
  return (2 * tokens).astype(np.float32)


def reference_matching(f, g, p=None, q=None, center=False):
  """The definition in float64, image by image, with explicit maps."""

  def unit(x):
    return x / np.sqrt(np.maximum(np.sum(x * x, -1, keepdims=True), 1e-12))

  def one_map(tokens, query):
    tokens = np.asarray(tokens, np.float64)
    query = tokens if query is None else np.asarray(query, np.float64)
    if center:
      tokens, query = tokens - tokens.mean(0), query - tokens.mean(0)
    return unit(unit(query) @ unit(tokens).T)

  rows = []
  for b in range(len(f)):
    a = one_map(f[b], None if p is None else p[b])
    s = one_map(g[b], None if q is None else q[b])
    rows.append(1 - np.sum(a * s, -1))
  return np.mean(rows)


def differences(function, x, step=1e-5):
  """Central differences of a float64 function."""
  x = np.asarray(x, np.float64)
  gradient = np.zeros_like(x)
  for index in np.ndindex(x.shape):
    ends = []
    for sign in (1, -1):
      moved = x.copy()
      moved[index] += sign * step
      ends.append(function(moved))
    gradient[index] = (ends[0] - ends[1]) / (2 * step)
  return gradient


@functools.partial(jax.jit, static_argnames=('form', 'center'))
def value_and_grad(f, g, *, form, center=False):
  """Jitted once for all tests: equal shapes share a compilation."""
  loss = functools.partial(
    losses.activation_matching, f, form=form, center=center
  )
  return jax.value_and_grad(loss)(g)


@functools.partial(jax.jit, static_argnames=('form', 'center'))
def diagnostics(f, p=None, *, form='auto', center=False):
  return losses.matching_diagnostics(
    f, teacher_query=p, form=form, center=center
  )


def assert_close(actual, expected, tolerance=TOLERANCE):
  """Relative L2, with the largest difference and its place on failure."""
  actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
  error = np.linalg.norm(actual - expected)
  difference = np.abs(actual - expected)
  where = np.unravel_index(difference.argmax(), difference.shape)
  assert error <= tolerance * np.linalg.norm(expected), (
    f'relative L2 {error / np.linalg.norm(expected):.2e} > {tolerance:.2e}; '
    f'largest difference {difference.max():.2e} at {where}: '
    f'{actual[where]} instead of {expected[where]}'
  )


@pytest.mark.parametrize('center', [False, True])
@pytest.mark.parametrize('form', FORMS)
def test_matching_is_the_definition(form, center):
  f, g = features(0, width=6), features(1, width=10)
  value, gradient = value_and_grad(f, g, form=form, center=center)
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(
    value, reference_matching(f, g, center=center), atol=TOLERANCE
  )
  expected = differences(lambda g: reference_matching(f, g, center=center), g)
  assert_close(gradient, expected)


# With a mean cosine of 0.8 the loss is 1e-3 and its gradient what is left of
# terms a hundred times larger: float32 keeps 1e-5 of it in the pairwise form
# (against float64) and 1e-4 in the linear form. Centring removes the cause.
@pytest.mark.parametrize(
  ('alike', 'center', 'tolerance'),
  [
    (0, False, TOLERANCE),
    (0, True, TOLERANCE),
    (1, False, TOLERANCE),
    (1, True, TOLERANCE),
    (2, False, 1e-4),
    (2, True, TOLERANCE),
  ],
)
def test_linear_equals_pairwise(alike, center, tolerance):
  f = features(2, 300, 64, alike=alike)
  g = features(3, 300, 64, alike=alike)
  value, gradient = value_and_grad(f, g, form='linear', center=center)
  expected = value_and_grad(f, g, form='pairwise', center=center)
  np.testing.assert_allclose(value, expected[0], atol=TOLERANCE)
  assert_close(gradient, expected[1], tolerance)
  np.testing.assert_allclose(
    value, reference_matching(f, g, center=center), atol=TOLERANCE
  )


@pytest.mark.parametrize('center', [False, True])
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('num_rows', [1, 3])
def test_queries_are_the_rows(form, center, num_rows):
  f, g = features(4), features(5, width=6)
  p, q = features(6, num_rows), features(7, num_rows, width=6)

  def loss(g, q):
    return losses.activation_matching(
      f, g, teacher_query=p, student_query=q, form=form, center=center
    )

  def reference(g, q):
    return reference_matching(f, g, p, q, center)

  value, (d_g, d_q) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(g, q)
  np.testing.assert_allclose(value, reference(g, q), atol=TOLERANCE)
  assert_close(d_g, differences(lambda g: reference(g, q), g))
  assert_close(d_q, differences(lambda q: reference(g, q), q))


def test_tokens_given_as_queries_change_nothing():
  f, g = features(8), features(9)
  for form in FORMS:
    expected, _ = value_and_grad(f, g, form=form)
    matching = jax.jit(functools.partial(losses.activation_matching, form=form))
    actual = matching(f, g, teacher_query=f, student_query=g)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize('center', [False, True])
@pytest.mark.parametrize('form', FORMS)
def test_no_gradient_where_student_is_teacher(form, center):
  for num_tokens, width in [(13, 8), (300, 64)]:
    f = features(10, num_tokens, width)
    value, gradient = value_and_grad(f, f, form=form, center=center)
    assert 0 <= value <= 1e-6
    assert np.abs(gradient).max() <= 1e-6


@pytest.mark.parametrize('form', FORMS)
def test_value_is_never_below_zero_and_its_gradient_is_not_clipped(form):
  f = features(11, 300, 64)
  for scale in (1.0, 1.1, 3.3):
    value, _ = value_and_grad(f, np.float32(scale) * f, form=form)
    assert value >= 0
  cut = jax.value_and_grad(lambda x: losses._not_negative(3 * x))
  value, gradient = cut(jnp.float32(-1e-7))
  assert (value, gradient) == (0, 3)


def test_teacher_is_a_constant():
  f, g = features(12), features(13)
  p, q = f[:, :1], g[:, :1]
  for form in FORMS:

    def loss(f, p, form=form):
      return losses.activation_matching(
        f, g, teacher_query=p, student_query=q, form=form
      )

    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1)))(f, p):
      np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('form', FORMS)
def test_zero_rows_count_one_and_stay_finite(form, dtype):
  f, g = features(14), features(15)
  f[0, 3], g[0, 5], g[1, 0], f[1, 0] = 0, 0, 0, 0
  f, g = jnp.asarray(f, dtype), jnp.asarray(g, dtype)
  value, gradient = value_and_grad(f, g, form=form)
  np.testing.assert_allclose(value, reference_matching(f, g), atol=TOLERANCE)
  assert np.isfinite(gradient.astype(np.float32)).all()
  # The definition has no derivative at a zero row, and has one elsewhere.
  smooth = np.any(np.asarray(g, np.float32), -1)
  tolerance = TOLERANCE if dtype == 'float32' else BFLOAT16_TOLERANCE
  expected = differences(lambda g: reference_matching(f, g), g)
  assert_close(np.asarray(gradient)[smooth], expected[smooth], tolerance)


@pytest.mark.parametrize('center', [False, True])
@pytest.mark.parametrize('form', FORMS)
def test_a_collapsed_student_stays_finite(form, center):
  f, g = features(16), np.ones((2, 13, 8), np.float32)
  value, gradient = value_and_grad(f, g, form=form, center=center)
  np.testing.assert_allclose(
    value, reference_matching(f, g, center=center), atol=TOLERANCE
  )
  assert np.isfinite(gradient).all()
  value, gradient = value_and_grad(f, 0 * g, form=form, center=center)
  assert value == 1
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize('center', [False, True])
@pytest.mark.parametrize('form', FORMS)
def test_a_planted_60_sigma_channel_in_bfloat16(form, center):
  f, g = features(17, 300, 64, alike=0), features(18, 300, 64, alike=0)
  f[..., 7] += 60 * f.std()
  g[..., 7] += 60 * g.std()
  f, g = jnp.asarray(f, jnp.bfloat16), jnp.asarray(g, jnp.bfloat16)
  value, gradient = value_and_grad(f, g, form=form, center=center)
  np.testing.assert_allclose(
    value, reference_matching(f, g, center=center), atol=TOLERANCE
  )
  # Differences along a few directions: 38,400 coordinates are too many.
  rng = np.random.default_rng(19)
  step = 1e-4
  for _ in range(4):
    direction = rng.normal(size=g.shape)
    ends = [
      reference_matching(
        f, np.asarray(g, np.float64) + sign * step * direction, center=center
      )
      for sign in (1, -1)
    ]
    slope = np.vdot(np.asarray(gradient, np.float64), direction)
    # The roundings of the gradient's entries are independent.
    noise = BFLOAT16_TOLERANCE * np.linalg.norm(
      np.asarray(gradient, np.float64)
    )
    np.testing.assert_allclose(
      slope, (ends[0] - ends[1]) / (2 * step), atol=4 * noise
    )


def test_auto_takes_the_form_with_less_work():
  def chosen(num_rows, num_tokens, teacher_width, width):
    p, f, q = (
      jax.ShapeDtypeStruct((1, m, d), jnp.float32)
      for m, d in (
        (num_rows, teacher_width),
        (num_tokens, teacher_width),
        (num_rows, width),
      )
    )
    return losses._choose_form('auto', p, f, q)

  assert chosen(49, 49, 768, 768) == 'pairwise'
  assert chosen(1920, 1920, 768, 768) == 'pairwise'
  assert chosen(1921, 1921, 768, 768) == 'linear'
  assert chosen(1280, 1280, 256, 768) == 'pairwise'
  assert chosen(1281, 1281, 256, 768) == 'linear'
  assert chosen(1, 16_384, 768, 768) == 'pairwise'


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('center', [False, True])
def test_memory_of_one_stage_of_a_2048_pixel_image(center, dtype):
  def loss(g, f):
    return losses.activation_matching(f, g, center=center)

  tokens = jax.ShapeDtypeStruct((1, 16_384, 768), dtype)
  compiled = jax.jit(jax.value_and_grad(loss)).lower(tokens, tokens).compile()
  assert compiled.memory_analysis().temp_size_in_bytes <= 400e6


def equations(jaxpr):
  """All equations, those of nested jaxprs included."""
  for equation in jaxpr.eqns:
    yield equation
    for nested in jaxprs_in_params(equation.params):
      yield from equations(nested)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('form', FORMS)
def test_every_product_is_float32_at_highest(form, dtype):
  def loss(g, f):
    set_loss = losses.activation_matching(f, g, form=form, center=True)
    query_loss = losses.activation_matching(
      f, g, teacher_query=f[:, :1], student_query=g[:, :1], form=form
    )
    diagnostics = losses.matching_diagnostics(f, form=form)
    others = [
      losses.masked_prediction(g, f, loss=name)
      for name in ('smooth_l1', 'cosine', 'mse')
    ]
    return (
      set_loss
      + query_loss
      + sum(diagnostics.values())
      + sum(others)
      + losses.feature_loss(g, f)
      + losses.class_token_loss(g[:, 0], f[:, 0])
      + losses.logit_loss(g[:, 0], f[:, 0])
    )

  tokens = jax.ShapeDtypeStruct((2, 6, 4), dtype)
  jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(tokens, tokens).jaxpr
  products = [e for e in equations(jaxpr) if e.primitive.name == 'dot_general']
  # Forward and backward of the set and of the query, and the diagnostics.
  assert len(products) >= (2 * 4 + 1 if form == 'pairwise' else 2 * 10 + 2)
  for product in products:
    assert {v.aval.dtype for v in product.invars} == {jnp.dtype('float32')}
    assert product.params['precision'] == (lax.Precision.HIGHEST,) * 2


def test_matching_sends_no_gradient_to_masked_tokens():
  mask = masking.random_mask(jax.random.key(0), 2, 16, 0.75)
  visible, _ = masking.split_indices(mask, 12)
  f, g = features(20, 16), features(21, 16)
  for form in FORMS:

    def loss(g, form=form):
      return losses.activation_matching(
        masking.gather_tokens(f, visible),
        masking.gather_tokens(g, visible),
        form=form,
      )

    gradient = np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(g)))
    mask = np.asarray(mask)
    np.testing.assert_array_equal(gradient[mask], 0)
    assert np.abs(gradient[~mask]).max(-1).min() > 0


@pytest.mark.parametrize('name', ['smooth_l1', 'cosine', 'mse'])
def test_prediction_sends_no_gradient_to_visible_tokens(name):
  mask = masking.random_mask(jax.random.key(0), 2, 16, 0.75)
  _, masked = masking.split_indices(mask, 12)
  f, g = features(22, 16), features(23, 16)

  def loss(g, f):
    return losses.masked_prediction(
      masking.gather_tokens(g, masked),
      masking.gather_tokens(f, masked),
      loss=name,
    )

  student, teacher = jax.jit(jax.grad(loss, argnums=(0, 1)))(g, f)
  mask = np.asarray(mask)
  np.testing.assert_array_equal(np.asarray(student)[~mask], 0)
  assert np.abs(np.asarray(student)[mask]).max(-1).min() > 0
  np.testing.assert_array_equal(teacher, 0)


@pytest.mark.parametrize('with_query', [False, True])
@pytest.mark.parametrize('center', [False, True])
@pytest.mark.parametrize('form', FORMS)
def test_diagnostics(form, center, with_query):
  f = features(24, 40, 8, alike=1)
  p = features(25, 1, 8) if with_query else None
  got = diagnostics(f, p, form=form, center=center)
  constant = np.ones((2, 40, 5), np.float32)
  query = constant[:, :1] if with_query else None
  np.testing.assert_allclose(
    got['constant_student'],
    reference_matching(f, constant, p, query, center),
    atol=TOLERANCE,
  )
  unit = f.astype(np.float64) / np.linalg.norm(f, axis=-1, keepdims=True)
  cosines = unit @ unit.swapaxes(1, 2)
  np.testing.assert_allclose(
    got['teacher_cosine'],
    np.mean([c[~np.eye(40, dtype=bool)] for c in cosines]),
    atol=TOLERANCE,
  )


def test_diagnostics_of_tokens_that_are_all_alike():
  """The weakness: with mean cosine 0.8 a constant student looks matched."""
  f = features(26, 196, 768, alike=2)
  got = diagnostics(f)
  np.testing.assert_allclose(got['teacher_cosine'], 0.8, atol=0.02)
  assert 0 < got['constant_student'] < 0.003
  gradient = jax.grad(lambda f: sum(diagnostics(f).values()))(f)
  np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda x: losses.activation_matching(x, x, form='fast'), "'fast'"),
    (lambda x: losses.activation_matching(x, x[:, 1:]), r'\(2, 12, 8\)'),
    (lambda x: losses.activation_matching(x, x, student_query=x), 'neither'),
    (
      lambda x: losses.activation_matching(
        x, x, teacher_query=x[:, :2], student_query=x[:, :1]
      ),
      'rows must agree',
    ),
    (lambda x: losses.masked_prediction(x, x[..., 1:]), r'\(2, 13, 7\)'),
    (
      lambda x: losses.masked_prediction(x[:, :0], x[:, :0]),
      r'config\.distill\.mask_ratio',
    ),
    (
      lambda x: losses.masked_prediction(x, x, loss='l1'),
      r"'l1'.*config\.distill\.mask_loss",
    ),
    (
      lambda x: losses.normalize_target(x, 'batch'),
      r"'batch'.*config\.distill\.target_norm",
    ),
    (lambda x: losses.logit_loss(x, x[:1]), r'\(1, 13, 8\)'),
  ],
)
def test_bad_input_says_what_to_change(call, message):
  with pytest.raises(ValueError, match=message):
    call(features(37))
