"""Programs of JAX that are timed: implementations of the scan, attention."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from linearizer_jax import chips
from linearizer_jax.kernels import bench
from linearizer_jax.kernels.compare import counts, exact


class JaxProgram:
  """One function at one shape, forward and with backward; see the package.

  Args:
    shape: `Shape`.
    dtype: 'float32' or 'bfloat16'.
    max_gib: a program that needs more temporary memory is not run; None runs
      whatever fits.
  """

  folder = None  # of the exact results, where there are such

  def __init__(self, shape, dtype, max_gib=None):
    self.shape, self.dtype, self.max_gib = shape, dtype, max_gib
    self.device = jax.devices()[0]
    self._calls = {}

  def about(self):
    """What is known of the device, and its published peaks."""
    return {
      'device': self.device.device_kind,
      'platform': self.device.platform,
      'jax': jax.__version__,
      'peak_flops': chips.peak_flops(self.device),
      'peak_bandwidth': chips.peak_bandwidth(self.device),
    }

  def prepare(self, direction, seconds):
    """Compiles, compares and gets ready to be sampled; the figures of a row."""
    del seconds
    inputs, function = self.inputs(), self.function(direction)
    start = time.monotonic()
    compiled = bench.trace(function, inputs, self.device).lower().compile()
    compiling = time.monotonic() - start
    memory = compiled.memory_analysis()
    used = memory.temp_size_in_bytes + memory.output_size_in_bytes
    row = {'mib': used / 2**20}
    if self.max_gib and used > self.max_gib * 2**30:
      return row | {'reason': f'needs more than {self.max_gib} GiB'}
    placed = jax.device_put(inputs, compiled.input_formats[0])
    call = functools.partial(compiled, *placed)
    result = jax.block_until_ready(call())
    if self.folder:
      row['errors'] = exact.errors(
        self.folder,
        [np.asarray(a, np.float32) for a in jax.tree.leaves(result)],
      )
    del result
    row['called_milliseconds'] = milliseconds = counts.settled(
      functools.partial(self._time, call)
    )
    calls = 1
    expected = counts.SETS * compiling
    if self._hides(milliseconds) and expected > counts.MANY_SECONDS:
      row['note'] = f'called one by one: it compiles in {compiling:.0f} s'
    elif self._hides(milliseconds):
      call, calls = self._many(function, inputs), counts.SETS
      milliseconds = counts.settled(functools.partial(self._time, call))
      milliseconds /= calls
    repeats = counts.repeats(milliseconds * calls)
    self._calls[direction] = call, repeats, calls
    return row

  def sample(self, direction):
    """Milliseconds of a call."""
    call, repeats, calls = self._calls[direction]
    return self._time(call, repeats) / calls

  def _hides(self, milliseconds):
    """Whether a call may be shorter than what Python takes to issue it."""
    return self.device.platform != 'cpu' and milliseconds < counts.MANY_BELOW_MS

  def _time(self, call, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
      result = call()
    jax.block_until_ready(result)
    return 1e3 * (time.perf_counter() - start) / repeats

  def _many(self, function, inputs):
    """A call of one program that runs the function on several sets."""
    sets = tuple(
      jax.tree.map(
        lambda a, i=i: jnp.roll(a, i, axis=1) if a.ndim > 1 else a, inputs
      )
      for i in range(counts.SETS)
    )

    def run(*sets):
      results = []
      for inputs in sets:
        if results:  # XLA would fuse what belongs to several calls
          results[-1], inputs = lax.optimization_barrier((results[-1], inputs))
        results.append(function(*inputs))
      return results

    compiled = bench.trace(run, sets, self.device).lower().compile()
    placed = jax.device_put(sets, compiled.input_formats[0])
    call = functools.partial(compiled, *placed)
    jax.block_until_ready(call())
    return call


class Scan(JaxProgram):
  """An implementation of `ssd` from the table.

  Args:
    implementation: its name.
    folder: of `exact.Exact.write`.
  """

  def __init__(self, implementation, folder, *args):
    super().__init__(*args)
    self.implementation, self.folder = implementation, folder

  def inputs(self):
    return bench.make_inputs(self.shape, self.dtype)

  def function(self, direction):
    make = bench.forward if direction == 'forward' else bench.forward_backward
    return make(self.shape, self.implementation)


class Attention(JaxProgram):
  """cuDNN's flash attention as `jax.nn` calls it, at the width of the scan."""

  def inputs(self):
    q, k, v, cotangent = (
      jnp.asarray(a, self.dtype) for a in counts.draw_attention(self.shape)
    )
    return (q, k, v), cotangent

  def function(self, direction):
    def forward(args, _):
      return jax.nn.dot_product_attention(*args, implementation='cudnn')

    def both(args, cotangent):
      y, pullback = jax.vjp(lambda args: forward(args, None), args)
      return y, pullback(cotangent)

    return forward if direction == 'forward' else both
