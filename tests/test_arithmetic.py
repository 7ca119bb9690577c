"""Arithmetic of traced programs, against what it must be."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import pallas as pl

from linearizer_jax import arithmetic, steps

X = jnp.ones((4, 4))
PRODUCT = 2 * 4**3


def count(function, *args):
  return arithmetic.count(jax.jit(function).trace(*args).jaxpr)


def repeated(x):
  return jax.lax.scan(lambda x, _: (x @ x, None), x, length=5)[0]


def either(x):
  return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)


def recomputed(x):
  return jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(x @ X))(x).sum())(
    x
  )


def kernel(estimate):
  def square(x_ref, out_ref):
    out_ref[...] = x_ref[...] @ x_ref[...]

  return pl.pallas_call(
    square, out_shape=X, grid=(3,), interpret=True, cost_estimate=estimate
  )


@pytest.mark.parametrize(
  ('function', 'products'),
  [
    (lambda x: jnp.tanh(x) + x, 0),
    (lambda x: x @ x, 1),
    (repeated, 5),
    (either, 2),
    (recomputed, 3),  # forward, again in the backward pass, the gradient
    (jax.vmap(lambda row: X @ row), 1),
    (kernel(None), 3),
    (kernel(pl.CostEstimate(7 * PRODUCT, 0, 0)), 7),
  ],
)
def test_products_are_counted(function, products):
  assert count(function, X) == products * PRODUCT


def test_a_convolution_counts_its_taps():
  images, taps = jnp.ones((2, 8, 8, 3)), jnp.ones((4, 4, 3, 5))

  def patches(images, taps):
    return jax.lax.conv_general_dilated(
      images, taps, (4, 4), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )

  forward = 2 * (2 * 2 * 2 * 5) * (4 * 4 * 3)
  assert count(patches, images, taps) == forward
  gradient = jax.grad(lambda taps: patches(images, taps).sum())
  assert count(gradient, taps) == 2 * forward


def test_every_device_of_a_shard_map_counts():
  devices = jax.devices()[:2]
  mesh = jax.sharding.Mesh(devices, ('data',))

  def rows(x):
    return jax.shard_map(
      lambda x: x @ X,
      mesh=mesh,
      in_specs=jax.P('data'),
      out_specs=jax.P('data'),
    )(x)

  assert count(rows, X) == PRODUCT


def test_micro_batches_leave_the_arithmetic_of_a_step():
  """XLA's analysis counts one of them."""

  class Task:
    def prepare(self, batch, key):
      return batch

    def loss(self, params, frozen, batch, key):
      loss = jnp.square(batch @ params).mean()
      return loss, {'loss': loss}

  params = jnp.ones((4, 4))
  state = steps.TrainState(0, params, optax.sgd(1.0).init(params), None)
  arguments = state, {}, jnp.ones((8, 4)), jax.random.key(0), jnp.ones(())
  whole, parts = (
    count(steps.make_train_step(Task(), optax.sgd(1.0), **options), *arguments)
    for options in ({}, {'accumulate_steps': 4})
  )
  assert whole == parts == 2 * (2 * 8 * 4 * 4)
