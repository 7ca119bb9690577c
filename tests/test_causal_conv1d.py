"""The depthwise causal convolution against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linearizer_jax.kernels.causal_conv1d import causal_conv1d

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
