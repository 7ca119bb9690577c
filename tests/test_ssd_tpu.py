"""The TPU kernels of `ssd`, without a TPU: interpreted, and compiled ahead."""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from test_ssd import BFLOAT16, FLOAT32, assert_close, exact, run_sharded

from linearizer_jax.kernels.cost import block_bytes, pallas_calls
from linearizer_jax.kernels.ssd.pallas_tpu import choose_blocks, ssd_pallas_tpu
from linearizer_jax.kernels.ssd.shapes import SHAPES

# Reads of memory that nothing wrote give NaN, reads outside an array and two
# cores that touch the same memory are errors.
STRICT = pltpu.InterpretParams(
  num_cores_or_threads=2,
  detect_races=True,
  uninitialized_memory='nan',
  out_of_bounds_reads='raise',
)
TOPOLOGIES = {
  'v5e': 'v5e:2x2',
  'v6e': 'v6e:2x2',
  'v4': 'v4:2x2x1',
  'v5p': 'v5p:2x2x1',
  'tpu7x': 'tpu7x:2x2x1',
}
NAMED = [name for name in SHAPES if not name.startswith('cpu')]


@pytest.fixture(autouse=True)
def _reset_interpreter():
  yield
  pltpu.reset_tpu_interpret_mode_state()


@functools.cache
def make_case(length, groups=1, dtype='float32', state=True, kind='normal'):
  """Arguments and cotangents; 64-wide heads, two of which fill the lanes."""
  rng = np.random.default_rng(length + 7 * groups)
  # two images where they are short: strict interpretation is slow
  batch = 2 if length <= 66 else 1
  heads, head_dim, state_dim = 4, 64, 16

  def normal(*shape, dtype='float32'):
    return np.asarray(jnp.asarray(rng.normal(size=shape), dtype))

  dt = np.exp(rng.uniform(np.log(1e-3), np.log(0.3), (batch, length, heads)))
  scale = np.float32(state)
  args = {
    'x': normal(batch, length, heads, head_dim, dtype=dtype),
    'dt': dt.astype(np.float32),
    'A': np.float32([-16, -1, -4, -9]),
    'B': normal(batch, length, groups, state_dim, dtype=dtype),
    'C': normal(batch, length, groups, state_dim, dtype=dtype),
    'D': normal(heads, head_dim),
    'initial_state': scale * normal(batch, heads, head_dim, state_dim),
  }
  if kind == 'stress':  # with and without memory, huge and no steps
    args['A'] = np.float32([-16, -1, -1e-4, -1e-4])
    args['dt'] = rng.choice(np.float32([0, 1e-3, 0.3, 3]), args['dt'].shape)
    args['dt'][:, length // 3 : length // 2] = 0
    args['x'] = args['x'] * np.float32(1e4)
  dy = normal(batch, length, heads, head_dim, dtype=dtype)
  return args, (dy, scale * normal(batch, heads, head_dim, state_dim))


def make_run(state=True, interpret=STRICT, **options):
  """Jitted (args, cotangents) -> y, final state, gradients, by name."""

  def run(args, cotangents):
    args, (dy, dstate) = dict(args), cotangents
    if not state:
      del args['initial_state']

    def f(args):
      return ssd_pallas_tpu(
        **args, return_final_state=state, interpret=interpret, **options
      )

    (y, end), pullback = jax.vjp(f, args)
    found = pullback((dy, dstate if state else None))[0] | {'y': y}
    return found | {'state': end} if state else found

  return jax.jit(run)


@pytest.mark.parametrize(
  ('length', 'groups', 'dtype', 'state'),
  [
    (1, 1, 'float32', True),
    (3, 2, 'bfloat16', True),
    (66, 4, 'float32', True),
    (128, 1, 'bfloat16', True),
    (198, 2, 'bfloat16', False),
    (257, 1, 'float32', True),
    (257, 2, 'bfloat16', True),
  ],
)
def test_against_float64(length, groups, dtype, state):
  args, cotangents = make_case(length, groups, dtype, state)
  got = make_run(state)(args, cotangents)
  want = exact(args, *cotangents)
  tolerance = FLOAT32
  if dtype == 'bfloat16':
    # D and A are sums over everything; A's scale is their absolute sum
    tolerance = BFLOAT16 | {'A': 2e-2}
  else:
    tolerance = FLOAT32 | {'state': FLOAT32['gradient']}
  assert_close(got, want, tolerance)


def test_stress_is_finite():
  args, cotangents = make_case(130, kind='stress')
  for name, value in make_run()(args, cotangents).items():
    assert np.all(np.isfinite(np.float32(value))), name


def test_repeats_are_bit_equal():
  args, cotangents = make_case(3, 1, 'bfloat16')
  run = make_run()
  first, second = run(args, cotangents), run(args, cotangents)
  for name in first:
    np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'x': ((1, 8, 2, 12), 'bfloat16')}, 'P=12'),
    ({'x': ((1, 8, 2, 64), 'float16')}, 'float16'),
    ({'x': ((1, 8, 256, 16), 'bfloat16')}, 'H=256'),
    ({'b': ((1, 8, 1, 24), 'bfloat16')}, 'N=24'),
  ],
)
def test_what_it_cannot_do(change, message):
  sizes = {
    'x': ((1, 8, 2, 64), 'bfloat16'),
    'b': ((1, 8, 1, 16), 'bfloat16'),
  } | change
  x, b = (jnp.zeros(*sizes[name]) for name in 'xb')
  heads = x.shape[2]
  with pytest.raises(NotImplementedError, match=message):
    ssd_pallas_tpu(x, jnp.ones((1, 8, heads)), -jnp.ones(heads), b, b)


def arguments(shape, dtype='bfloat16', sharding=None):
  """ShapeDtypeStructs of x, dt, A, B, C, D of a named shape, and of dy."""
  wide = shape.batch, shape.length, shape.heads, shape.head_dim
  narrow = shape.batch, shape.length, shape.groups, shape.state_dim
  heads = (shape.heads,)
  make = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
  return [
    make(wide, dtype),
    make(wide[:3], 'float32'),
    make(heads, 'float32'),
    make(narrow, dtype),
    make(narrow, dtype),
    make(heads, 'float32'),
  ], make(wide, dtype)


def gradients(*args):
  *args, dy = args
  y, pullback = jax.vjp(
    lambda *args: ssd_pallas_tpu(*args, return_final_state=False)[0], *args
  )
  return y, pullback(dy)


def test_cost_estimate():
  """Bytes: everything once, states once each way; the rest is constants."""
  shape = SHAPES['base_1024_tokens']
  args, dy = arguments(shape)
  jaxpr = jax.make_jaxpr(gradients)(*args, dy).jaxpr
  costs = {
    eqn.params['name']: eqn.params['cost_estimate']
    for eqn in pallas_calls(jaxpr)
  }
  blocks = choose_blocks(args[0], args[3])
  tokens, channels = shape.batch * shape.length, blocks.channels
  wide, narrow, dt = tokens * channels * 2, tokens * 64 * 2, tokens * 24 * 4
  state = 64 * channels * 4 * tokens // blocks.backward
  rates, skip = 16 * 128 * 4, channels * 4
  inputs = wide + 2 * narrow + dt + rates + skip
  assert costs['ssd_fwd'].bytes_accessed == inputs + wide + state
  assert costs['ssd_bwd'].bytes_accessed == (
    2 * inputs - rates - skip + wide + state + shape.batch * (rates + skip)
  )
  # per chunk of 64 tokens: two products for 12 pairs of heads, and C B'
  products = (12 * (128 * 128 * 128 + 64 * 64 * 128) + 64 * 64 * 128) // 64
  assert costs['ssd_fwd'].flops == 2 * tokens * products
  exps = tokens * (12 * 256 + 2 * 16 * 128 // 64)
  assert costs['ssd_fwd'].transcendentals == exps


def test_block_bytes():
  """A block counts again when its index changes, a ragged one in part."""

  array = jax.ShapeDtypeStruct((2, 20, 8), 'float32')
  moving = pl.BlockSpec((None, 16, 8), lambda i, k: (i, k, 0))
  still = pl.BlockSpec((None, 16, 8), lambda i, k: (i, 0, 0))
  again = pl.BlockSpec((None, 16, 8), lambda i, k: (k, 0, 0))
  assert block_bytes((2, 2), moving, array) == 2 * 20 * 8 * 4
  assert block_bytes((2, 2), still, array) == 2 * 16 * 8 * 4
  assert block_bytes((2, 2), again, array) == 4 * 16 * 8 * 4


def test_batch_sharded_without_gathering():
  # The strict interpreter hangs inside shard_map on jax 0.10.
  make = functools.partial(make_run, interpret=True)
  got, whole = run_sharded(make, *make_case(66))
  for name, want in make()(*whole).items():
    np.testing.assert_allclose(got[name], want, rtol=1e-4, atol=1e-4)


def tpu_sharding(chip):
  """Sharding onto one chip that is not there."""
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu is not installed: pip install "jax[tpu]"')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  topology = topologies.get_topology_desc(
    platform='tpu', topology_name=TOPOLOGIES[chip]
  )
  return jax.sharding.SingleDeviceSharding(topology.devices[0])


def compile_gradients(shape, chip):
  args, dy = arguments(shape, sharding=tpu_sharding(chip))
  return jax.jit(gradients).lower(*args, dy).compile()


@pytest.mark.tpu_compile
def test_compiles_for_v5e():
  text = compile_gradients(SHAPES['base_224'], 'v5e').as_text()
  assert text.count('tpu_custom_call') == 2  # forward and backward


@pytest.mark.tpu_compile
@pytest.mark.slow
@pytest.mark.parametrize('chip', TOPOLOGIES)
@pytest.mark.parametrize('name', NAMED)
def test_compiles(name, chip):
  text = compile_gradients(SHAPES[name], chip).as_text()
  assert text.count('tpu_custom_call') == 2


@pytest.mark.tpu_compile
@pytest.mark.slow
def test_memory_is_linear_in_length():
  """Temporaries of the gradient: little more than one state per block."""
  shape = SHAPES['base_2048']
  temporaries = compile_gradients(shape, 'v5e').memory_analysis()
  args, _ = arguments(shape)
  blocks = choose_blocks(args[0], args[3])
  steps = -(-shape.length // blocks.forward) * blocks.saved
  states = steps * blocks.state_dim * blocks.channels * 4
  arrays = 2 * 3 * shape.length * blocks.channels * 2  # layouts of x, dy, dx
  assert temporaries.temp_size_in_bytes < states + arrays


@pytest.mark.tpu_compile
@pytest.mark.slow
def test_schedules_stay_short(tmp_path):
  """Bundles per head and 128 tokens, as `kernels/bench.py` counts them."""
  tpu_sharding('v5e')  # or skip
  out = tmp_path / 'bench.json'
  shape = SHAPES['base_1024_tokens']
  command = 'kernels/bench.py --chip v5e --bundles --shapes base_1024_tokens'
  subprocess.run(
    [sys.executable, *command.split(), '--implementations', 'pallas_tpu']
    + ['--out', str(out)],
    cwd=pathlib.Path(__file__).parent.parent,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    check=True,
  )
  rows = json.loads(out.read_text())['rows']
  units = shape.batch * shape.heads * shape.length / 128
  per_unit = {
    name: steps * bundles / units
    for name, (steps, bundles) in rows[-1]['bundles'].items()
  }
  assert per_unit['ssd_fwd'] < 75
  assert per_unit['ssd_bwd'] < 225
