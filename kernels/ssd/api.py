"""`ssd`: checks its arguments and picks an implementation from a table.

Shape letters, everywhere in this repository: B batch, L tokens, D width,
H heads, P head dim, N state dim, G groups, R = H / G heads in a group,
Q chunk length, c chunks, K taps, M tokens of a map, V classes.
"""

import functools
import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from .. import placement
from . import pallas_gpu, pallas_tpu, reference, xla


def _without_options(function):
  """A row of plain JAX: it always carries a state, and XLA shards it."""

  def run(x, dt, A, B, C, D, initial_state, *, chunk_size, **options):
    del options
    if initial_state is None:
      initial_state = jnp.zeros((x.shape[0], *x.shape[2:], B.shape[-1]))
    return function(x, dt, A, B, C, D, initial_state, chunk_size)

  return run


# name -> f(x, dt, A, B, C, D, initial_state, *, chunk_size,
#   return_final_state, mesh, batch_axes) -> (y, final state).
# All arguments are checked and cast: dt, A, D, initial_state float32, D (H, P)
# or None. A row raises NotImplementedError for what it cannot do.
IMPLEMENTATIONS = {
  'reference': _without_options(reference.ssd_reference),
  'xla': _without_options(xla.ssd_xla),
  'xla_scan': _without_options(xla.ssd_xla_scan),
  'pallas_tpu': pallas_tpu.ssd_pallas_tpu,
  'pallas_gpu': pallas_gpu.ssd_pallas_gpu,
}

# Platform of the devices -> what `implementation=None` means there. On a GPU
# that is XLA for as long as 'pallas_gpu' has not been measured on one.
DEFAULT_IMPLEMENTATION = {'cpu': 'xla_scan', 'gpu': 'xla', 'tpu': 'pallas_tpu'}

_DTYPES = (jnp.float32, jnp.bfloat16)


def ssd(
  x: jax.Array,
  dt: jax.Array,
  A: jax.Array,
  B: jax.Array,
  C: jax.Array,
  D: jax.Array | None = None,
  *,
  chunk_size: int | None = None,
  initial_state: jax.Array | None = None,
  return_final_state: bool = False,
  implementation: str | None = None,
  mesh: Mesh | None = None,
  batch_axes: str | Sequence[str] | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """State space dual scan of Mamba-2 over the tokens of a batch.

  Per image and head, with g = h // (H / G) and S_0 = initial_state:

    S_t = exp(dt_t A_h) S_{t-1} + dt_t x_t B_{t,g}'
    y_t = S_t C_{t,g} + D_h x_t

  Source: Dao and Gu, arXiv 2405.21060, section 6 (the chunked form).

  Args:
    x: (B, L, H, P), float32 or bfloat16; any L from 1.
    dt: (B, L, H), at least 0: softplus has been applied.
    A: (H,), at most 0.
    B: (B, L, G, N) in x's dtype; G divides H.
    C: (B, L, G, N) in x's dtype.
    D: (H,) or (H, P), or None for no skip term.
    chunk_size: tokens in a chunk; None takes what was measured best. The
      result does not depend on it beyond rounding; 'reference' has no chunks.
    initial_state: (B, H, P, N), or None for zeros.
    return_final_state: whether to return the state after the last token.
    implementation: a name in `IMPLEMENTATIONS`, or None to choose by the
      platform of the devices: of `mesh`, else of a concrete x, else of the
      default device.
    mesh: the mesh that x is spread over, if any.
    batch_axes: axis or axes of `mesh` over which B is split.

  Returns:
    y (B, L, H, P) in x's dtype, or (y, final state (B, H, P, N) float32).

  Numerics: dt, decay, cumulative sums, states and all sums of products are
  float32; decay is the exponential of clamped differences of cumulative sums,
  masked first. Products take operands in x's dtype, float32 ones at
  Precision.HIGHEST. Forward and reverse mode; 'pallas_tpu' and
  'pallas_gpu' reverse alone.

  Raises:
    ValueError: for a shape, dtype, name or mesh axis that does not fit.
    NotImplementedError: where the implementation asked for cannot do it.
  """
  _check(x, dt, A, B, C, D, initial_state)
  placement.check_mesh(mesh, batch_axes)
  if chunk_size is not None and chunk_size < 1:
    raise ValueError(f'chunk_size must be at least 1, got {chunk_size}')
  if implementation is None:
    implementation = _choose(x, B, mesh, batch_axes)
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f'implementation={implementation!r} is not one of '
      f'{sorted(IMPLEMENTATIONS)} or None'
    )

  if D is not None:
    D = jnp.broadcast_to(D.reshape(x.shape[2], -1), x.shape[2:])
  D, initial_state = (
    a if a is None else a.astype(jnp.float32) for a in (D, initial_state)
  )
  y, state = IMPLEMENTATIONS[implementation](
    x,
    dt.astype(jnp.float32),
    A.astype(jnp.float32),
    B,
    C,
    D,
    initial_state,
    chunk_size=chunk_size,
    return_final_state=return_final_state,
    mesh=mesh,
    batch_axes=batch_axes,
  )
  return (y, state) if return_final_state else y


def _check(x, dt, A, B, C, D, initial_state):
  """Raises ValueError where a shape or a dtype does not fit the others."""
  if x.ndim != 4 or 0 in x.shape:
    raise ValueError(f'x must be (B, L, H, P), all at least 1, got {x.shape}')
  batch, length, heads, head_dim = x.shape
  if B.ndim != 4 or 0 in B.shape:
    raise ValueError(f'B must be (B, L, G, N), all at least 1, got {B.shape}')
  groups, state_dim = B.shape[2:]
  if heads % groups:
    raise ValueError(
      f'G must divide H: B has shape {B.shape}, G = {groups}, '
      f'x has shape {x.shape}, H = {heads}'
    )
  expected = {
    'dt': (dt, [(batch, length, heads)]),
    'A': (A, [(heads,)]),
    'B': (B, [(batch, length, groups, state_dim)]),
    'C': (C, [(batch, length, groups, state_dim)]),
    'D': (D, [(heads,), (heads, head_dim)]),
    'initial_state': (initial_state, [(batch, heads, head_dim, state_dim)]),
  }
  for name, (array, shapes) in expected.items():
    if array is not None and array.shape not in shapes:
      raise ValueError(
        f'{name} has shape {array.shape}, expected '
        f'{" or ".join(map(str, shapes))} for x of shape {x.shape}'
      )
  arrays = {'x': x} | {name: row[0] for name, row in expected.items()}
  for name, array in arrays.items():
    allowed = (x.dtype,) if name in 'BC' else _DTYPES
    if array is not None and array.dtype not in allowed:
      raise ValueError(
        f'{name} has dtype {array.dtype}, expected '
        f'{" or ".join(jnp.dtype(d).name for d in allowed)}'
      )


def _choose(x, B, mesh, batch_axes):
  """What `implementation=None` means for these arguments."""
  platform = placement.platform(x, mesh)
  implementation = DEFAULT_IMPLEMENTATION.get(platform, 'xla')
  reason = ''
  kernels = {'pallas_tpu': pallas_tpu, 'pallas_gpu': pallas_gpu}
  if implementation in kernels:
    try:
      kernels[implementation].choose_blocks(x, B)
    except NotImplementedError as error:
      implementation, reason = 'xla', f' ({error})'
    shards = placement.shards(mesh, batch_axes)
    if x.shape[0] % shards:  # as the one image that a model starts from
      implementation, reason = (
        'xla',
        f' (batch {x.shape[0]} on {shards} shards)',
      )
  _log_choice(platform, implementation, reason)
  return implementation


@functools.cache
def _log_choice(platform, implementation, reason):
  """Says once which implementation None stands for on a platform."""
  logging.getLogger('linearizer_jax').info(
    'ssd on %s: implementation %r%s', platform, implementation, reason
  )
