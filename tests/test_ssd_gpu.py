"""The GPU kernels of `ssd`: interpreted, lowered for CUDA, and run on a GPU.

Without a GPU the last are skipped; with one they are

  JAX_PLATFORMS=cuda python -m pytest -m gpu tests/test_ssd_gpu.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from test_ssd import (
  BFLOAT16,
  FLOAT32,
  QUICK_COMPILE,
  assert_close,
  exact,
  run_sharded,
)
from test_ssd_api import chosen, fake_mesh  # noqa: F401 (a fixture)

from linearizer_jax.kernels.cost import pallas_calls
from linearizer_jax.kernels.ssd import api, pallas_gpu_call, ssd
from linearizer_jax.kernels.ssd.pallas_gpu import choose_blocks, ssd_pallas_gpu
from linearizer_jax.kernels.ssd.shapes import SHAPES

H100 = AbstractDevice(
  device_kind='NVIDIA H100 80GB HBM3', num_cores=132, platform='gpu'
)
# One partly filled chunk each, many images, a few, and one that is split.
LOWERED = ('base_224', 'base_512', 'base_2048')
# dA, whose terms cancel, is a sum over everything.
BFLOAT16_A = BFLOAT16 | {'A': 2e-2}


@functools.cache
def make_case(length, groups, dtype, kind='normal', head_dim=16, state_dim=32):
  """Arguments, cotangents of y and the state, and the exact results."""
  rng = np.random.default_rng(length + 7 * groups)
  batch, heads = 2, 4

  def normal(*shape, dtype='float32'):
    return np.asarray(jnp.asarray(rng.normal(size=shape), dtype))

  dt = np.exp(rng.uniform(np.log(1e-3), np.log(0.3), (batch, length, heads)))
  args = {
    'x': normal(batch, length, heads, head_dim, dtype=dtype),
    'dt': dt.astype(np.float32),
    'A': np.float32([-16, -1, -4, -9]),
    'B': normal(batch, length, groups, state_dim, dtype=dtype),
    'C': normal(batch, length, groups, state_dim, dtype=dtype),
    'D': normal(heads, head_dim),
    'initial_state': normal(batch, heads, head_dim, state_dim),
  }
  if kind == 'stress':  # with and without memory, huge and no steps
    args['A'] = np.float32([-16, -1, -1e-4, -1e-4])
    args['dt'] = rng.choice(np.float32([0, 1e-3, 0.3, 3]), args['dt'].shape)
    args['dt'][:, length // 3 : length // 2] = 0
    args['x'] = np.asarray(args['x'] * np.asarray(1e4, dtype))
  cotangents = (
    normal(batch, length, heads, head_dim, dtype=dtype),
    normal(batch, heads, head_dim, state_dim),
  )
  return args, cotangents, exact(args, *cotangents)


def make_run(interpret=True, **options):
  """Jitted (args, cotangents) -> y, final state, gradients, by name."""

  def run(args, cotangents):
    def f(args):
      return ssd_pallas_gpu(**args, interpret=interpret, **options)

    (y, end), pullback = jax.vjp(f, args)
    return pullback(cotangents)[0] | {'y': y, 'state': end}

  return jax.jit(run, compiler_options=QUICK_COMPILE if interpret else None)


@functools.cache
def interpreted(length, groups, dtype, segments, kind='normal'):
  args, cotangents, _ = make_case(length, groups, dtype, kind)
  return jax.device_get(make_run(segments=segments)(args, cotangents))


def slow(*values):
  return pytest.param(*values, marks=pytest.mark.slow)


# A chunk is 32 tokens in float32 and 64 in bfloat16.
@pytest.mark.parametrize(
  ('length', 'groups', 'dtype', 'segments'),
  [
    (1, 1, 'float32', None),
    slow(31, 2, 'float32', None),
    slow(32, 4, 'float32', None),
    (33, 2, 'float32', 1),
    (198, 1, 'float32', 1),
    (198, 1, 'float32', 3),
    slow(198, 2, 'float32', None),
    slow(65, 1, 'bfloat16', None),
    (198, 2, 'bfloat16', None),
  ],
)
def test_against_float64(length, groups, dtype, segments):
  got = interpreted(length, groups, dtype, segments)
  *_, want = make_case(length, groups, dtype)
  assert_close(got, want, FLOAT32 if dtype == 'float32' else BFLOAT16_A)
  assert got['x'].dtype == got['B'].dtype == got['y'].dtype == dtype


def test_split_is_the_whole():
  """Segments change the order of float32 sums, nothing else."""
  args, *_ = make_case(198, 1, 'float32')
  assert choose_blocks(args['x'], args['B'], 1).segments == 1
  assert choose_blocks(args['x'], args['B'], 3).segments == 3
  whole, split = (interpreted(198, 1, 'float32', s) for s in (1, 3))
  for name, value in whole.items():
    error = np.linalg.norm(split[name] - value) / np.linalg.norm(value)
    assert error < 1e-6, (name, error)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_stress(dtype):
  """Underflow, no decay, dt = 0 and x of 1e4: finite, and still exact."""
  got = interpreted(198, 1, dtype, None, 'stress')
  *_, want = make_case(198, 1, dtype, 'stress')
  for name, value in got.items():
    assert np.all(np.isfinite(np.float32(value))), name
  exact_limits = FLOAT32 | {'A': 1e-3}  # as in test_ssd.py
  assert_close(got, want, exact_limits if dtype == 'float32' else BFLOAT16_A)


def test_skip_and_states_may_be_missing():
  """D (H,) is D (H, P) with equal columns; None is zero, for both."""
  args, *_ = make_case(33, 2, 'float32')
  f = jax.jit(
    lambda D, initial_state, **options: ssd_pallas_gpu(
      **(args | {'D': D, 'initial_state': initial_state}),
      interpret=True,
      **options,
    ),
    static_argnames=('return_final_state', 'segments'),
    compiler_options=QUICK_COMPILE,
  )
  D = np.float32([1, -2, 0.5, 3])
  wide = np.repeat(D[:, None], args['x'].shape[-1], axis=1)
  zeros = np.zeros_like(args['initial_state'])
  y, end = f(D, None, segments=1)
  np.testing.assert_array_equal(y, f(wide, zeros, segments=1)[0])
  bare, none = f(None, None, return_final_state=False)
  assert none is None
  assert end.shape == args['initial_state'].shape
  skip = D[:, None] * args['x']
  np.testing.assert_allclose(y - bare, skip, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('x', 'b', 'message'),
  [
    (((1, 8, 2, 24), 'bfloat16'), ((1, 8, 1, 16), 'bfloat16'), 'P of .* 24'),
    (((1, 8, 2, 256), 'bfloat16'), ((1, 8, 1, 16), 'bfloat16'), 'P of .* 256'),
    (((1, 8, 2, 64), 'bfloat16'), ((1, 8, 1, 48), 'bfloat16'), 'N of .* 48'),
    (((1, 8, 2, 64), 'float16'), ((1, 8, 1, 16), 'float16'), 'float16'),
  ],
)
def test_what_it_cannot_do(x, b, message):
  x, b = jnp.zeros(*x), jnp.zeros(*b)
  dt, A = jnp.ones((1, 8, 2)), -jnp.ones(2)
  with pytest.raises(NotImplementedError, match=message):
    ssd_pallas_gpu(x, dt, A, b, b)
  if x.dtype != jnp.float16:
    with pytest.raises(NotImplementedError, match=message):
      ssd(x, dt, A, b, b, implementation='pallas_gpu')


def test_off_until_measured(monkeypatch, chosen):  # noqa: F811
  """None is XLA on a GPU; were it not, odd sizes would still be XLA's."""
  args, *_ = make_case(1, 1, 'float32')
  narrow = {k: args[k][..., :24] for k in ('B', 'C', 'initial_state')}
  gpu = {'mesh': fake_mesh('gpu')}
  ssd(**args, **gpu)
  monkeypatch.setitem(api.DEFAULT_IMPLEMENTATION, 'gpu', 'pallas_gpu')
  ssd(**args, **gpu)
  ssd(**(args | narrow), **gpu)
  assert chosen == ['xla', 'pallas_gpu', 'xla']


def arguments(shape, dtype='bfloat16'):
  """ShapeDtypeStructs of x, dt, A, B, C, D of a named shape, and of dy."""
  wide = shape.batch, shape.length, shape.heads, shape.head_dim
  narrow = shape.batch, shape.length, shape.groups, shape.state_dim
  shapes = [
    (wide, dtype),
    (wide[:3], 'float32'),
    (wide[2:3], 'float32'),
    (narrow, dtype),
    (narrow, dtype),
    (wide[2:3], 'float32'),
    (wide, dtype),
  ]
  return [jax.ShapeDtypeStruct(*row) for row in shapes]


def gradients(*args):
  *args, dy = args
  y, pullback = jax.vjp(
    lambda *args: ssd_pallas_gpu(*args, return_final_state=False)[0], *args
  )
  return y, pullback(dy)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('name', LOWERED)
def test_lowers_for_cuda(name, dtype):
  args = arguments(SHAPES[name], dtype)
  with jax.sharding.use_abstract_mesh(
    AbstractMesh((1,), ('x',), abstract_device=H100)
  ):
    text = (
      jax.jit(gradients)
      .trace(*args)
      .lower(lowering_platforms=('cuda',))
      .as_text()
    )
  # Where the sequence is split, both directions of states have two passes.
  split = choose_blocks(args[0], args[3]).segments > 1
  assert split == (name == 'base_2048')
  for kernel, calls in ('fwd', 1), ('states', 4 if split else 2), ('bwd', 1):
    assert text.count(f'name = "ssd_{kernel}"') == calls
  assert text.count('xla.gpu.triton') == (6 if split else 4)


@pytest.mark.parametrize('name', LOWERED)
def test_programs_fill_a_gpu(name):
  """No kernel leaves one of the 132 multiprocessors without a program."""
  args = arguments(SHAPES[name])
  for eqn in pallas_calls(jax.make_jaxpr(gradients)(*args).jaxpr):
    programs = np.prod(eqn.params['grid_mapping'].grid)
    assert programs >= pallas_gpu_call.FEWEST_PROGRAMS, eqn.params['name']


@pytest.mark.parametrize('name', LOWERED)
def test_memory_is_linear_in_length(name):
  """What the kernels write, y and dx included, against x."""
  args = arguments(SHAPES[name])
  written = sum(
    variable.aval.size * variable.aval.dtype.itemsize
    for eqn in pallas_calls(jax.make_jaxpr(gradients)(*args).jaxpr)
    for variable in eqn.outvars
  )
  assert written < 5.5 * args[0].size * 2


def test_batch_sharded_without_gathering():
  args, cotangents, _ = make_case(33, 2, 'float32')
  make = functools.partial(make_run, segments=1)
  got, _ = run_sharded(make, args, cotangents)
  for name, value in interpreted(33, 2, 'float32', 1).items():
    if name in 'AD':  # a sum over four times the images
      value = 4 * value
    elif value.ndim > 2:
      value = np.concatenate([value] * 4)
    np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize('segments', [1, 4])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_on_a_gpu(dtype, segments):
  """The tiles of training, compiled and run; the same bits when run again."""
  try:
    gpu = jax.devices('cuda')[0]
  except RuntimeError as error:
    pytest.skip(f'no CUDA device: {error}')
  args, cotangents, want = make_case(1026, 1, dtype, head_dim=64, state_dim=64)
  placed = jax.device_put((args, cotangents), gpu)
  run = make_run(interpret=False, segments=segments)
  got, again = jax.device_get((run(*placed), run(*placed)))
  assert_close(got, want, FLOAT32 if dtype == 'float32' else BFLOAT16_A)
  for name, value in got.items():
    np.testing.assert_array_equal(value, again[name], err_msg=name)
