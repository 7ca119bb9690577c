"""The GPU kernel of the gradient of `ssd`; `pallas_gpu.py` says how it works.

With g = dY, S the state that enters a chunk, T the gradient of the one that
leaves it, decay_ij from token j to i and M = C B' o decay,

  W = g X' o decay o dt_j
  dX = dt_j (M' g + to_end_j B T') + D g
  dB = W' C + dt_j to_end_j X T            dC = W B + from_start_i g S

dt enters as a factor of X and through a = dt A in the exponents of the decays.
With F = W o C B' below the diagonal, U_i = from_start_i g_i (C S')_i what comes
from the state in front, V_j = dt_j to_end_j X_j (B T')_j what goes to the one
behind,

  da_k = sum_{i >= k} (sum_j F_ij - sum_j F_ji + U_i) + sum_{i < k} V_i
         + whole sum(S o T)

Row and column sums of F are of the same float32 numbers: they have to cancel.
Tiles (Q, Q) are transposed, rows j and columns i, so that a product takes them
from registers, where its left operand may be.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .pallas_gpu_call import LOG2_E, Decays, call, dot, load, pairs, store


def gradients(blocks, interpret, x, dt, rate, b, c, skip, g, S, T):
  """Gradients of x, dt, A, b, c and skip, of all chunks at once.

  Args:
    g: gradient of y, (B, L, H, P) in x's dtype.
    S, T: state before each chunk and gradient of the one after it,
      (B, c, H, P, N) in x's dtype.
  """
  spec = _Specs(blocks)
  chunks = spec.grid[1]
  sums = blocks.batch, blocks.length, blocks.head_blocks, blocks.state_dim
  per_chunk = blocks.batch, chunks, blocks.heads
  skips = (*per_chunk, blocks.head_dim), jnp.float32, spec.per_chunk_channel
  found = call(
    functools.partial(_kernel, blocks),
    spec.grid,
    {
      'x': (x, spec.wide),
      'dt': (dt, spec.dt),
      'rate': (rate, spec.per_head),
      'b': (b, spec.narrow),
      'c': (c, spec.narrow),
      'skip': (skip, spec.per_channel),
      'g': (g, spec.wide),
      'S': (S, spec.state),
      'T': (T, spec.state),
    },
    {
      'dx': (x.shape, x.dtype, spec.wide),
      'ddt': (dt.shape, jnp.float32, spec.dt),
      'dA': (per_chunk, jnp.float32, spec.per_chunk),
      'db': (sums, jnp.float32, spec.sums),
      'dc': (sums, jnp.float32, spec.sums),
      'dskip': None if skip is None else skips,
    },
    warps=blocks.warps,
    stages=1,  # a second one costs registers, which are spilled already
    interpret=interpret,
    name='ssd_bwd',
  )

  def over_blocks(v):  # (B, L, head blocks, N) -> (B, L, G, N)
    return jnp.sum(v.reshape(*b.shape[:3], -1, b.shape[3]), axis=3)

  db, dc = (over_blocks(found[name]).astype(b.dtype) for name in ('db', 'dc'))
  dA = jnp.sum(found['dA'], axis=(0, 1))
  dskip = None if skip is None else jnp.sum(found['dskip'], axis=(0, 1))
  return found['dx'], found['ddt'], dA, db, dc, dskip


class _Specs:
  """BlockSpecs of a program per block of heads, chunk and image."""

  def __init__(self, blocks):
    p, n, q = blocks.head_dim, blocks.state_dim, blocks.chunk
    block = blocks.head_block
    group_blocks = blocks.heads // blocks.groups // block
    spec = pl.BlockSpec
    self.grid = blocks.head_blocks, pl.cdiv(blocks.length, q), blocks.batch
    self.wide = spec((None, q, block, p), lambda h, k, i: (i, k, h, 0))
    self.dt = spec((None, block, q), lambda h, k, i: (i, h, k))
    self.narrow = spec(
      (None, q, None, n), lambda h, k, i: (i, k, lax.div(h, group_blocks), 0)
    )
    self.sums = spec((None, q, None, n), lambda h, k, i: (i, k, h, 0))
    self.state = spec(
      (None, None, block, p, n), lambda h, k, i: (i, k, h, 0, 0)
    )
    self.per_head = spec((block,), lambda h, k, i: (h,))
    self.per_channel = spec((block, p), lambda h, k, i: (h, 0))
    self.per_chunk = spec((None, None, block), lambda h, k, i: (i, k, h))
    self.per_chunk_channel = spec(
      (None, None, block, p), lambda h, k, i: (i, k, h, 0)
    )


def _kernel(blocks, refs):
  q = blocks.chunk
  mask = pl.program_id(1) * q + jnp.arange(q) < blocks.length
  b, c = (load(ref, mask) for ref in (refs.b, refs.c))  # (Q, N)

  def one_head(h, sums):
    db, dc = sums
    x, g = (load(ref.at[:, h, :], mask) for ref in (refs.x, refs.g))  # (Q, P)
    S, T = refs.S[h, :, :], refs.T[h, :, :]  # (P, N)
    dt, rate = refs.dt[h, :], refs.rate[h]
    decays = Decays(dt * rate, blocks.exact)
    i, j = pairs(q, 1, h)

    # Elementwise products of tiles, summed: on the tensor cores.
    s_t = jnp.sum(_diagonal(dot(S, T, (0, 0)), h))
    if refs.skip is not None:
      refs.dskip[h, :] = _diagonal(dot(g, x, (0, 0)), h)

    # Within the chunk. Of the orders tried this spills the fewest registers.
    decay = decays.between(1, i >= j)
    m = dot(b, c, (1, 1)) * decay
    w = dot(x, g, (1, 1)) * dt[:, None]
    f = jnp.where(i > j, w * m, 0.0)
    pull = jnp.sum(f, axis=0) - jnp.sum(f, axis=1)
    w = (w * decay).astype(b.dtype)
    db += dot(w, c)
    dc += dot(w, b, (0, 0))
    dx = dot(m.astype(x.dtype), g)

    # Through the state behind it.
    to_end = decays.to_end()
    db += (dt * to_end)[:, None] * dot(x, T)
    b_t = to_end[:, None] * dot(b, T, (1, 1))  # (Q, P)
    v = dt * jnp.sum(x.astype(jnp.float32) * b_t, axis=1)
    dx += b_t
    ddt = jnp.sum(x.astype(jnp.float32) * dx, axis=1)
    dx *= dt[:, None]
    if refs.skip is not None:
      dx += refs.skip[h, :][None, :] * g.astype(jnp.float32)
    store(refs.dx.at[:, h, :], dx, mask)

    # From the state before it.
    from_start = decays.from_start()
    dc += from_start[:, None] * dot(g, S)
    u = g.astype(jnp.float32) * dot(c, S, (1, 1))
    pull += from_start * jnp.sum(u, axis=1)

    # sum_{i >= k} pull_i + sum_{i < k} v_i, without a sum from the right
    rest = v - pull
    da = jnp.sum(pull) + jnp.cumsum(rest) - rest + decays.whole() * s_t
    refs.ddt[h, :] = ddt + da * rate * (1 / LOG2_E)
    refs.dA[h] = jnp.sum(da * dt)
    return db, dc

  zeros = jnp.zeros((q, blocks.state_dim), jnp.float32)
  db, dc = lax.fori_loop(0, blocks.head_block, one_head, (zeros, zeros))
  store(refs.db, db, mask)
  store(refs.dc, dc, mask)


def _diagonal(tile, step):
  i, j = pairs(tile.shape[0], 0, step)
  return jnp.sum(jnp.where(i == j, tile, 0.0), axis=1)
