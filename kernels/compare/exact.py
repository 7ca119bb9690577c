"""The scan and its gradients in float64, and how far a program is from them."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from linearizer_jax.kernels import bench

OUTPUTS = ('y', 'dx', 'ddt', 'dA', 'dB', 'dC', 'dD')
_BLOCK = 16  # tokens whose states the gradient holds at a time


class Exact:
  """Computes what all programs of a shape are compared with.

  Args:
    shape: `Shape`.
    dtype: of x, B and C, 'float32' or 'bfloat16': all start from the same
      rounded numbers.
  """

  def __init__(self, shape, dtype):
    self.shape, self.dtype = shape, dtype

  def write(self, folder):
    """Writes y and every gradient as <folder>/<name>.npy, float64."""
    args, cotangent = bench.make_inputs(self.shape, self.dtype)
    with jax.enable_x64(True):
      args, cotangent = jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float64), (args, cotangent)
      )
      results = jax.device_get(jax.jit(self._run)(args, cotangent))
    for name, array in zip(OUTPUTS, results, strict=True):
      np.save(pathlib.Path(folder) / name, array)

  def _run(self, args, cotangent):
    def y(x, *rest):
      heads = (*x.shape[:2], self.shape.heads, self.shape.head_dim)
      return ssd_float64(x.reshape(heads), *rest).reshape(x.shape)

    result, pullback = jax.vjp(y, *args)
    return result, *pullback(cotangent)


def ssd_float64(x, dt, A, B, C, D):
  """The recurrence, token by token, in the dtype of its arguments.

  S_t = exp(dt_t A_h) S_{t-1} + dt_t x_t B_t',  y_t = S_t C_t + D_h x_t

  Written apart from `ssd_reference`, which computes in float32. States are
  computed again in the gradient, so that it holds one in 16 of them.

  Args:
    x, dt, A, B, C, D: as those of `ssd`, all of one dtype.

  Returns:
    y (B, L, H, P).
  """
  batch, length, heads, head_dim = x.shape
  repeats = heads // B.shape[2]

  def token(state, inputs):
    x_t, dt_t, B_t, C_t = inputs
    B_t, C_t = (jnp.repeat(a, repeats, axis=1) for a in (B_t, C_t))  # (B, H, N)
    decay = jnp.exp(dt_t * A)[..., None, None]
    update = (dt_t[..., None] * x_t)[..., None] * B_t[:, :, None]
    state = decay * state + update  # (B, H, P, N)
    return state, jnp.sum(state * C_t[:, :, None], -1) + D[:, None] * x_t

  def blocks(a):
    """(B, L, ...) -> (blocks, 16, B, ...); added tokens have dt = 0."""
    a = jnp.pad(a, [(0, 0), (0, -length % _BLOCK)] + [(0, 0)] * (a.ndim - 2))
    return jnp.moveaxis(a, 1, 0).reshape(-1, _BLOCK, batch, *a.shape[2:])

  start = jnp.zeros((batch, heads, head_dim, B.shape[-1]), x.dtype)
  _, y = lax.scan(
    jax.checkpoint(lambda state, block: lax.scan(token, state, block)),
    start,
    tuple(blocks(a) for a in (x, dt, B, C)),
  )
  y = y.reshape(-1, *y.shape[2:])[:length]
  return jnp.moveaxis(y, 0, 1)


def errors(folder, arrays):
  """Relative L2 distance of each array to the float64 one of its name.

  Args:
    folder: that `Exact.write` has filled.
    arrays: NumPy arrays of a program, in the order of `OUTPUTS`: y alone, or
      y and all gradients. A shape may differ where the size is the same.

  Returns:
    {name: |array - exact| / |exact|}, both norms over the whole array; None
    where the array holds what is not finite, nothing where there is no file.
  """
  found = {}
  for name, array in zip(OUTPUTS, arrays, strict=False):
    path = pathlib.Path(folder) / f'{name}.npy'
    if not path.exists():
      continue
    exact = np.load(path)
    difference = np.asarray(array, np.float64).ravel() - exact.ravel()
    ratio = np.linalg.norm(difference) / np.linalg.norm(exact.ravel())
    found[name] = float(ratio) if np.isfinite(ratio) else None
  return found
