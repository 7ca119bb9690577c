"""The depthwise causal convolution against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from test_ssd_tpu import STRICT, tpu_sharding

from linearizer_jax.kernels import causal_conv1d as module
from linearizer_jax.kernels.causal_conv1d import causal_conv1d
from linearizer_jax.models.mamba2 import DepthwiseConv1D

# At most 4 taps and a bias are summed in float32; weight gradients are sums
# over a few hundred tokens.
TOLERANCE = {'float32': 1e-6, 'bfloat16': 2.0**-8}


def reference(x, weight, bias, activation):
  """The definition, token by token, in float64."""
  x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
  y = np.zeros_like(x)
  for t in range(x.shape[1]):
    for k in range(len(weight)):
      source = t - (len(weight) - 1) + k
      if source >= 0:
        y[:, t] += weight[k] * x[:, source]
  if bias is not None:
    y += np.asarray(bias, np.float64)
  return y / (1 + np.exp(-y)) if activation == 'silu' else y


def inputs(length, taps=4, dtype='float32'):
  rng = np.random.default_rng(length)
  return (
    jnp.asarray(rng.normal(size=(2, length, 6)), dtype),
    jnp.asarray(rng.normal(size=(taps, 6)), jnp.float32),
    jnp.asarray(rng.normal(size=6), jnp.float32),
  )


def assert_close(name, got, want, tolerance):
  difference = np.abs(np.asarray(got, np.float64) - want)
  relative = np.linalg.norm(difference) / np.linalg.norm(want)
  where = np.unravel_index(np.argmax(difference), difference.shape)
  assert got.shape == want.shape
  assert relative <= tolerance, (
    f'{name}: relative L2 {relative:.2e} > {tolerance:.0e}, largest '
    f'difference {difference.max():.2e} at {where}'
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('activation', [None, 'silu'])
@pytest.mark.parametrize(('length', 'taps'), [(1, 4), (3, 4), (33, 4), (9, 1)])
def test_values(length, taps, activation, dtype):
  x, weight, bias = inputs(length, taps, dtype)
  for b in (bias, None):
    y = causal_conv1d(x, weight, b, activation=activation)
    assert y.dtype == x.dtype
    want = reference(x, weight, b, activation)
    assert_close('y', y, want, TOLERANCE[dtype])


def test_gradients():
  args = inputs(length=7)
  cotangent = np.random.default_rng(1).normal(size=args[0].shape)

  def loss(*args):
    return jnp.sum(causal_conv1d(*args, activation='silu') * cotangent)

  def exact(*args):
    return np.sum(reference(*args, 'silu') * cotangent)

  step = 1e-5  # of a central difference in float64
  for i, got in enumerate(jax.grad(loss, argnums=(0, 1, 2))(*args)):
    want = np.zeros(got.shape)
    for index in np.ndindex(got.shape):
      ends = []
      for sign in (1, -1):
        moved = [np.array(a, np.float64) for a in args]
        moved[i][index] += sign * step
        ends.append(exact(*moved))
      want[index] = (ends[0] - ends[1]) / (2 * step)
    assert_close(('x', 'weight', 'bias')[i], got, want, TOLERANCE['float32'])


def test_causal_to_the_bit():
  x, weight, bias = inputs(length=20)
  later = x.at[:, 11:].multiply(-3.0)
  y = causal_conv1d(x, weight, bias, activation='silu')
  y_later = causal_conv1d(later, weight, bias, activation='silu')
  np.testing.assert_array_equal(y[:, :11], y_later[:, :11])
  assert not np.array_equal(y[:, 11:], y_later[:, 11:])


def test_no_grouped_convolution():
  args = inputs(length=20)
  loss = lambda *args: jnp.sum(causal_conv1d(*args))  # noqa: E731
  jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*args)
  assert 'conv_general_dilated' not in str(jaxpr)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'x': jnp.ones((2, 6))}, r'x must be .* got \(2, 6\)'),
    ({'weight': jnp.ones((6, 1, 4))}, r'weight .* \(6, 1, 4\), .* \(2, 5, 6\)'),
    ({'weight': jnp.ones((4, 5))}, r'weight .* \(4, 5\), expected \(K, 6\)'),
    ({'bias': jnp.ones(4)}, r'bias .* \(4,\), expected \(6,\)'),
    ({'activation': 'gelu'}, 'activation'),
  ],
)
def test_wrong_arguments(change, message):
  x, weight, bias = inputs(length=5)
  arguments = {'x': x, 'weight': weight, 'bias': bias} | change
  with pytest.raises(ValueError, match=message):
    causal_conv1d(**arguments)


@pytest.fixture(autouse=True)
def _reset_interpreter():
  yield
  pltpu.reset_tpu_interpret_mode_state()


def value_and_gradients(args, cotangent, **options):
  def run(*args):
    return causal_conv1d(*args, activation='silu', **options)

  y, pullback = jax.vjp(run, *args)
  return y, pullback(cotangent)


def wide(length, dtype, batch=2):
  rng = np.random.default_rng(length)
  shapes = (batch, length, 128), (4, 128), (128,), (batch, length, 128)
  x, *rest, dy = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
  return (x.astype(dtype), *rest), dy.astype(dtype)


# One token, one ragged block, and three blocks of which the last is ragged.
@pytest.mark.parametrize(
  ('length', 'dtype'), [(1, 'float32'), (22, 'bfloat16'), (70, 'float32')]
)
def test_tpu_kernels(length, dtype, monkeypatch):
  monkeypatch.setattr(module.causal_conv1d_tpu, 'BLOCK', 32)
  args, dy = wide(length, dtype)
  run = functools.partial(value_and_gradients, args, dy)
  y, got = run(implementation='pallas_tpu', interpret=STRICT)
  assert y.dtype == args[0].dtype
  assert_close('y', y, reference(*args, 'silu'), TOLERANCE[dtype])
  _, want = run(implementation='xla')
  for name, g, w in zip(('x', 'weight', 'bias'), got, want, strict=True):
    assert g.dtype == w.dtype
    # One rounding each of the gradient of x.
    tolerance = 2 * TOLERANCE[dtype if name == 'x' else 'float32']
    assert_close(name, g, np.asarray(w, np.float64), tolerance)


def test_tpu_kernels_on_a_mesh():
  args, dy = wide(9, 'float32', batch=8)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ('data',))
  options = dict(implementation='pallas_tpu', interpret=True)
  run = functools.partial(
    value_and_gradients, mesh=mesh, batch_axes='data', **options
  )
  split = jax.NamedSharding(mesh, jax.P('data'))
  placed = jax.device_put(args[0], split), *args[1:]
  compiled = jax.jit(run).lower(placed, jax.device_put(dy, split)).compile()
  assert 'all-gather' not in compiled.as_text()
  got = compiled(placed, jax.device_put(dy, split))
  want = value_and_gradients(args, dy, **options)
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5),
    got,
    want,
  )


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'x': jnp.ones((1, 5, 6))}, r'128 channels, got .* \(1, 5, 6\)'),
    ({'x': jnp.ones((1, 5, 6), 'float16')}, 'float16'),
    ({'x': jnp.ones((1, 5, 4096))}, '8192 bytes'),
    ({'weight': jnp.ones((8, 128))}, 'at most 7 taps, got 8'),
  ],
)
def test_what_the_tpu_kernels_cannot_do(change, message):
  x = change.get('x', jnp.ones((1, 5, 128)))
  weight = change.get('weight', jnp.ones((4, x.shape[-1])))
  with pytest.raises(NotImplementedError, match=message):
    causal_conv1d(x, weight, implementation='pallas_tpu')


def test_implementation_follows_the_platform():
  class Device:
    platform = 'tpu'

  class Mesh:
    devices = np.array([Device(), Device()])
    axis_names, shape = ('data',), {'data': 2}

  choose = functools.partial(module._choose, weight=jnp.ones((4, 128)))
  assert choose(jnp.ones((2, 5, 128)), mesh=None, batch_axes=None) == 'xla'
  for batch, channels, want in (
    (2, 128, 'pallas_tpu'),
    (1, 128, 'xla'),
    (2, 96, 'xla'),
  ):
    x = jnp.ones((batch, 5, channels))
    assert choose(x, mesh=Mesh(), batch_axes='data') == want


def test_mixer_splits_the_channels_alike_on_any_platform(monkeypatch):
  x = inputs(length=5)[0]
  conv = DepthwiseConv1D()
  params = conv.init(jax.random.key(0), x, [4])
  want = conv.apply(params, x, [4])
  monkeypatch.setattr(module.placement, 'platform', lambda x, mesh: 'tpu')
  got = conv.apply(params, x, [4])
  assert [y.shape[-1] for y in got] == [4, 2]
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-6, atol=1e-6)


@pytest.mark.tpu_compile
@pytest.mark.parametrize('length', [198, 786])
def test_compiles_for_v5e(length):
  sharding = tpu_sharding('v5e')
  args, dy = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
    wide(length, 'bfloat16'),
  )
  run = functools.partial(value_and_gradients, implementation='pallas_tpu')
  text = jax.jit(run).lower(args, dy).compile().as_text()
  assert text.count('tpu_custom_call') == 2
