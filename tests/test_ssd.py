"""Every implementation of `ssd` against a float64 recurrence."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from linearizer_jax.kernels.ssd import api, ssd
from linearizer_jax.kernels.ssd.shapes import SHAPES

# Kernels are put to the same figures in test_ssd_tpu.py and test_ssd_gpu.py.
ALL = tuple(name for name in api.IMPLEMENTATIONS if 'pallas' not in name)
CHUNKED = tuple(name for name in ALL if name != 'reference')

# Relative L2 per head, without a factor for the length, which would hide a
# decay in low precision. dA is measured against sum |dt da|, because its
# terms cancel.
FLOAT32 = {'y': 5e-6, 'gradient': 1e-5}
# Operands are rounded to bfloat16 once, y and gradients again: 2^-9 each.
BFLOAT16 = {'y': 4e-3, 'state': 3e-3, 'gradient': 8e-3}

# Between chunk sizes: float32 sums of the same terms in another order.
CHUNK_DIFFERENCE = 1e-6

# Axes that a relative difference sums over: all but heads (or groups).
AXES = {
  'y': (0, 1, 3),
  'state': (0, 2, 3),
  'x': (0, 1, 3),
  'dt': (0, 1),
  'A': (),
  'B': (0, 1, 3),
  'C': (0, 1, 3),
  'D': (1,),
  'initial_state': (0, 2, 3),
}
jitted = jax.jit(
  ssd, static_argnames=('chunk_size', 'return_final_state', 'implementation')
)

INPUTS = ('x', 'dt', 'A', 'B', 'C', 'D', 'initial_state')


@functools.cache
def make_case(length, groups=1, dtype='float32', kind='normal'):
  """Inputs, cotangents of y and the state, and the exact results."""
  rng = np.random.default_rng(length + 7 * groups)
  batch, heads, head_dim, state_dim = 2, 4, 8, 16

  def normal(*shape, dtype='float32'):
    return np.asarray(jnp.asarray(rng.normal(size=shape), dtype))

  args = {
    'x': normal(batch, length, heads, head_dim, dtype=dtype),
    'dt': np.exp(
      rng.uniform(np.log(1e-3), np.log(0.3), (batch, length, heads))
    ).astype(np.float32),
    'A': np.float32([-16, -1, *-rng.uniform(1, 16, heads - 2)]),
    'B': normal(batch, length, groups, state_dim, dtype=dtype),
    'C': normal(batch, length, groups, state_dim, dtype=dtype),
    'D': np.zeros((heads, head_dim), np.float32),
    'initial_state': normal(batch, heads, head_dim, state_dim),
  }
  if kind == 'stress':  # with and without memory, huge and no steps
    args['A'] = np.float32([-16, -1, -1e-4, -1e-4])
    args['dt'] = rng.choice(np.float32([0, 1e-3, 0.3, 3]), args['dt'].shape)
    args['dt'][:, length // 3 : length // 2] = 0
    args['x'] = args['x'] * np.float32(1e4)
    args['D'] += 1
  cotangents = (
    normal(batch, length, heads, head_dim, dtype=dtype),
    normal(batch, heads, head_dim, state_dim),
  )
  return args, cotangents, exact(args, *cotangents)


def exact(args, dy, dstate):
  """The recurrence and its adjoint, step by step in float64."""
  x, dt, A, B, C, D, state = (np.float64(args[name]) for name in INPUTS)
  dy, later = np.float64(dy), np.float64(dstate)
  groups, heads = B.shape[2], x.shape[2]
  B, C = (np.repeat(a, heads // groups, axis=2) for a in (B, C))
  decay = np.exp(dt * A)

  states, y = [state], np.empty_like(x)
  for t in range(x.shape[1]):
    state = decay[:, t, :, None, None] * state + np.einsum(
      'bh,bhp,bhn->bhpn', dt[:, t], x[:, t], B[:, t]
    )
    y[:, t] = np.einsum('bhpn,bhn->bhp', state, C[:, t]) + D * x[:, t]
    states.append(state)

  dx, ddt, da = np.empty_like(x), np.empty_like(dt), np.empty_like(dt)
  dB, dC = np.empty_like(B), np.empty_like(C)
  for t in reversed(range(x.shape[1])):
    later = later + dy[:, t, :, :, None] * C[:, t, :, None, :]
    from_B = np.einsum('bhpn,bhn->bhp', later, B[:, t])
    dx[:, t] = dt[:, t, :, None] * from_B + D * dy[:, t]
    dB[:, t] = np.einsum('bh,bhp,bhpn->bhn', dt[:, t], x[:, t], later)
    dC[:, t] = np.einsum('bhp,bhpn->bhn', dy[:, t], states[t + 1])
    da[:, t] = decay[:, t] * np.sum(later * states[t], axis=(2, 3))
    ddt[:, t] = A * da[:, t] + np.sum(from_B * x[:, t], axis=2)
    later = decay[:, t, :, None, None] * later

  def sum_group(a):
    return a.reshape(*a.shape[:2], groups, -1, a.shape[3]).sum(axis=3)

  return {
    'y': y,
    'state': states[-1],
    'x': dx,
    'dt': ddt,
    'A': np.sum(dt * da, axis=(0, 1)),
    'A_scale': np.sum(np.abs(dt * da), axis=(0, 1)),
    'B': sum_group(dB),
    'C': sum_group(dC),
    'D': np.sum(dy * x, axis=(0, 1)),
    'initial_state': later,
  }


def run(args, cotangents, compiler_options=None, **options):
  """y, final state and all gradients, by name."""

  @functools.partial(jax.jit, compiler_options=compiler_options)
  def value_and_gradients(args, cotangents):
    def f(args):
      return ssd(**args, return_final_state=True, **options)

    outputs, pullback = jax.vjp(f, args)
    return outputs, pullback(cotangents)[0]

  (y, state), gradients = value_and_gradients(args, cotangents)
  return {'y': y, 'state': state, **gradients}


def assert_close(got, want, tolerance):
  """Compares by name; tells how far and where when it is too far."""
  messages = []
  for name in got:
    g, w = np.float64(got[name]), want[name]
    assert g.shape == w.shape, (name, g.shape, w.shape)
    difference = np.abs(g - w)
    scale = want['A_scale'] if name == 'A' else w
    relative = np.sqrt(
      np.sum(difference**2, axis=AXES[name])
      / np.maximum(np.sum(scale**2, axis=AXES[name]), 1e-60)
    )
    limit = tolerance[name if name in tolerance else 'gradient']
    if not np.max(relative) <= limit:  # also for NaN
      where = np.unravel_index(np.argmax(difference), difference.shape)
      messages.append(
        f'{name}: relative {relative.max():.2e} > {limit:.0e} in head '
        f'{relative.argmax()}, absolute {difference.max():.2e} at '
        f'{tuple(map(int, where))}'
      )
  assert not messages, '\n'.join(messages)


# Rows of the grid that are compiled as for a user; the others, which are many,
# without LLVM's optimisations, which takes a third of the time.
FAST = {(1, 16), (3, 16), (66, 16), (198, 64), (257, 128)}
QUICK_COMPILE = {'xla_backend_optimization_level': 0}


def grid():
  """Every length with every chunk; groups and states take turns."""
  lengths = (1, 2, 3, 66, 197, 198, 255, 256, 257, 786, 3138)
  pairs = itertools.product(lengths, (16, 64, 128, 256))
  pairs = [(n, q) for n, q in pairs if q == 16 or q < 2 * n]
  rows = []
  for i, (length, chunk) in enumerate(pairs):
    row = pytest.param(
      length,
      chunk,
      (1, 2, 4)[i % 3],
      i % 2 == 0,
      marks=[] if (length, chunk) in FAST else pytest.mark.slow,
    )
    rows.append(row)
  return rows


@pytest.mark.parametrize(('length', 'chunk', 'groups', 'with_state'), grid())
@pytest.mark.parametrize('implementation', ALL)
def test_float32(implementation, length, chunk, groups, with_state):
  if implementation == 'reference' and chunk != 16:
    pytest.skip('the reference has no chunks')
  args, cotangents, want = make_case(length, groups)
  if not with_state:
    args = args | {'initial_state': np.zeros_like(args['initial_state'])}
    want = exact(args, *cotangents)
  got = run(args, cotangents, implementation=implementation, chunk_size=chunk)
  assert_close(got, want, FLOAT32)


@pytest.mark.parametrize(
  ('length', 'chunk'),
  [
    (198, 64),
    pytest.param(3, 16, marks=pytest.mark.slow),
    pytest.param(257, 16, marks=pytest.mark.slow),
    pytest.param(257, 256, marks=pytest.mark.slow),
    pytest.param(3138, 64, marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize('implementation', ALL)
def test_bfloat16(implementation, length, chunk):
  args, cotangents, want = make_case(length, 2, 'bfloat16')
  got = run(args, cotangents, implementation=implementation, chunk_size=chunk)
  assert {name: got[name].dtype for name in ('y', 'x', 'B', 'C', 'state')} == {
    **dict.fromkeys(('y', 'x', 'B', 'C'), jnp.bfloat16),
    'state': jnp.float32,
  }
  assert_close(got, want, BFLOAT16)


@pytest.mark.parametrize('implementation', ALL)
def test_stress(implementation):
  """Underflow, no decay, dt = 0 and x of 1e4: finite, and still exact."""
  args, cotangents, want = make_case(198, kind='stress')
  got = run(args, cotangents, implementation=implementation, chunk_size=64)
  for name, value in got.items():
    assert np.all(np.isfinite(value)), name
  # A step of dt = 3 that forgets everything has da = 0, and 3 times the
  # rounding of that is much beside sum |dt da| of the steps that remember.
  assert_close(got, want, FLOAT32 | {'A': 1e-3})


@pytest.mark.parametrize('implementation', CHUNKED)
def test_does_not_depend_on_the_chunk(implementation):
  args, _, _ = make_case(257)
  results = [
    jitted(**args, implementation=implementation, chunk_size=q)
    for q in (16, 256)
  ]
  want = {'y': np.float64(results[1])}
  assert_close({'y': results[0]}, want, {'y': CHUNK_DIFFERENCE})


@pytest.mark.parametrize('implementation', ALL)
def test_prefix_and_carried_state_are_the_whole(implementation):
  args, _, want = make_case(257)
  options = {'implementation': implementation, 'return_final_state': True}
  cut = 100
  parts, state = [], args['initial_state']
  for part in (slice(None, cut), slice(cut, None)):
    over_time = {k: args[k][:, part] for k in ('x', 'dt', 'B', 'C')}
    y, state = jitted(
      **(args | over_time | {'initial_state': state}), **options
    )
    parts.append(y)
  got = {'y': np.concatenate(parts, axis=1), 'state': state}
  assert_close(got, want, FLOAT32)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('implementation', ALL)
def test_causal_to_the_bit(implementation, dtype):
  args, _, _ = make_case(66, dtype=dtype)
  cut = 37
  changed = dict(args)
  for name in ('x', 'dt', 'B', 'C'):
    changed[name] = args[name].copy()
    changed[name][:, cut:] *= 2
  y, y_changed = (
    np.float32(jitted(**a, implementation=implementation, chunk_size=16))
    for a in (args, changed)
  )
  np.testing.assert_array_equal(y[:, :cut], y_changed[:, :cut])
  assert not np.array_equal(y[:, cut], y_changed[:, cut])


@pytest.mark.parametrize('implementation', ALL)
def test_forward_mode(implementation):
  """<cotangent, J tangent> is <J' cotangent, tangent>, exactly known."""
  args, cotangents, want = make_case(66)
  rng = np.random.default_rng(0)
  tangents = {
    k: rng.normal(size=v.shape).astype(np.float32) for k, v in args.items()
  }

  def f(args):
    return ssd(**args, return_final_state=True, implementation=implementation)

  _, outputs = jax.jvp(f, (args,), (tangents,))
  got = sum(
    np.sum(np.float64(o) * c) for o, c in zip(outputs, cotangents, strict=True)
  )
  terms = [np.sum(want[name] * tangents[name]) for name in INPUTS]
  assert abs(got - sum(terms)) <= FLOAT32['gradient'] * np.linalg.norm(terms)


@pytest.mark.parametrize('implementation', ALL)
def test_skip_and_initial_state(implementation):
  """D (H,) is D (H, P) with equal columns, None is zero, for both."""
  args, _, _ = make_case(66)
  f = jax.jit(
    lambda D, initial_state: ssd(
      **(args | {'D': D, 'initial_state': initial_state}),
      implementation=implementation,
    )
  )
  zeros = np.zeros_like(args['initial_state'])
  D = np.float32([1, -2, 0.5, 3])
  y = f(D, zeros)
  wide = np.repeat(D[:, None], args['x'].shape[-1], axis=1)
  np.testing.assert_array_equal(y, f(wide, zeros))
  np.testing.assert_array_equal(y, f(D, None))
  np.testing.assert_array_equal(f(None, zeros), f(0 * D, zeros))
  skip = D[:, None] * args['x']
  np.testing.assert_allclose(y - f(None, zeros), skip, rtol=1e-4, atol=1e-5)


def equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for inner in jaxprs_in_params(equation.params):
      yield from equations(inner)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('implementation', ALL)
def test_precision_in_the_jaxpr(implementation, dtype):
  """Float32 products are HIGHEST, exponentials and sums float32."""
  args, cotangents, _ = make_case(66, dtype=dtype)
  f = functools.partial(run, implementation=implementation, chunk_size=16)
  highest = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
  counts = {'dot_general': 0, 'exp': 0}
  for equation in equations(jax.make_jaxpr(f)(args, cotangents).jaxpr):
    name = equation.primitive.name
    if name in counts:
      counts[name] += 1
    if name == 'dot_general':
      assert equation.params['precision'] == highest
      assert equation.params['preferred_element_type'] == jnp.float32
    if name in ('exp', 'cumsum', 'reduce_sum'):
      assert equation.invars[0].aval.dtype == jnp.float32, equation
  assert counts['exp'] > 0
  assert (counts['dot_general'] > 0) == (implementation != 'reference')


def run_sharded(make_run, args, cotangents):
  """Results on eight devices, of a batch four times as large.

  The batch must not be gathered, and dA and dD have to be summed over all.

  Args:
    make_run: (mesh=, batch_axes=) -> jitted (args, cotangents) -> results.
    args, cotangents: of a batch of two.

  Returns:
    (results, args and cotangents of the whole batch).
  """
  whole = jax.tree.map(
    lambda a: np.concatenate([a] * 4) if a.ndim > 2 else a, (args, cotangents)
  )
  mesh = Mesh(np.array(jax.devices()[:8]), ('data',))

  def place(a):
    spec = PartitionSpec('data' if a.ndim > 2 else None)
    return jax.device_put(a, NamedSharding(mesh, spec))

  placed = jax.tree.map(place, whole)
  f = make_run(mesh=mesh, batch_axes='data').lower(*placed).compile()
  assert 'all-gather' not in f.as_text()
  assert 'all-reduce' in f.as_text()
  return f(*placed), whole


@pytest.mark.slow
@pytest.mark.parametrize('implementation', CHUNKED)
def test_batch_sharded_without_gathering(implementation):
  args, cotangents, _ = make_case(66)
  options = {'implementation': implementation, 'chunk_size': 16}

  def make_run(**mesh):
    return jax.jit(functools.partial(run, **options, **mesh))

  got, whole = run_sharded(make_run, args, cotangents)
  for name, want in run(*whole, **options).items():
    np.testing.assert_allclose(got[name], want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_scan_is_linear_in_length():
  """Temporaries of the gradient double with L; no whole copy in the loop."""
  temporaries = []
  for length in (512, 1024):
    x = jax.ShapeDtypeStruct((2, length, 4, 16), jnp.float32)
    dt = jax.ShapeDtypeStruct((2, length, 4), jnp.float32)
    A = jax.ShapeDtypeStruct((4,), jnp.float32)
    B = jax.ShapeDtypeStruct((2, length, 1, 16), jnp.float32)
    loss = lambda *args: jnp.sum(  # noqa: E731
      ssd(*args, implementation='xla_scan') ** 2
    )
    f = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))
    compiled = f.lower(x, dt, A, B, B).compile()
    temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    whole = f'f32[2,{length},4,16]'
    assert not [
      line
      for line in compiled.as_text().splitlines()
      if ' copy(' in line and f'= {whole}' in line
    ]
  assert temporaries[1] <= 2.2 * temporaries[0]


@pytest.mark.parametrize('implementation', ALL)
@pytest.mark.parametrize('name', SHAPES)
def test_named_shapes(name, implementation):
  s = SHAPES[name]
  struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
  x = struct(s.batch, s.length, s.heads, s.head_dim)
  B = struct(s.batch, s.length, s.groups, s.state_dim)
  y, state = jax.eval_shape(
    functools.partial(
      ssd, implementation=implementation, return_final_state=True
    ),
    x,
    struct(s.batch, s.length, s.heads),
    struct(s.heads),
    B,
    B,
  )
  assert (y.shape, y.dtype) == (x.shape, jnp.bfloat16)
  assert state.shape == (s.batch, s.heads, s.head_dim, s.state_dim)
  assert state.dtype == jnp.float32
