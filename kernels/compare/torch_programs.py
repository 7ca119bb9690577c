"""Programs of torch that are timed: mamba_ssm's scan, flash attention."""

import functools
import time

from linearizer_jax.kernels import bench
from linearizer_jax.kernels.compare import counts, exact, mamba

# Milliseconds that Triton tunes a configuration with; its own are 25 and 100.
TUNING = {'warmup': 3, 'rep': 15}


class TorchProgram:
  """One function at one shape, forward and with backward; see the package.

  Args:
    shape: `Shape`.
    dtype: 'float32' or 'bfloat16'.
  """

  folder = None  # of the exact results, where there are such
  device = 'cuda'

  def __init__(self, shape, dtype):
    import torch

    self.torch, self.shape, self.dtype = torch, shape, dtype
    self._calls, self._sets = {}, None

  def prepare(self, direction, seconds):
    """Tunes, compares and gets ready to be sampled; the figures of a row."""
    row, function = self.choose(direction, seconds)
    call = functools.partial(function, *self.sets()[0])
    result = call()
    if self.folder:
      arrays = [a.detach().float().cpu().numpy() for a in result]
      row['errors'] = exact.errors(self.folder, arrays)
    del result
    row |= {
      'mib': self._memory(call),
      'called_milliseconds': self._settled(call),
    }
    call, calls, failure = self._many(function)
    if failure:
      row['note'] = f'called one by one, for want of a CUDA graph: {failure}'
    repeats = counts.repeats(self._settled(call))
    self._calls[direction] = call, repeats, calls
    return row

  def sample(self, direction):
    """Milliseconds of a call."""
    call, repeats, calls = self._calls[direction]
    return self._time(call, repeats) / calls

  def sets(self):
    """Sets of arguments on the device: the first is the one compared."""
    if self._sets is None:

      def moved(a, by):
        return a.roll(by, 1) if a.ndim > 1 else a.clone()

      args, cotangent = self.inputs()
      self._sets = [
        ([moved(a, i).requires_grad_() for a in args], moved(cotangent, i))
        for i in range(counts.SETS)
      ]
    return self._sets

  def choose(self, direction, seconds):
    """(what a row says of the choice, function of args and cotangent)."""
    del seconds
    return {}, self.function(direction)

  def function(self, direction, **options):
    """args, cotangent -> (y,) or (y, gradients of args)."""

    def forward(args, _):
      with self.torch.no_grad():
        return (self.run(args, **options),)

    def both(args, cotangent):
      y = self.run(args, **options)
      return y, *self.torch.autograd.grad(y, args, cotangent)

    return forward if direction == 'forward' else both

  def on_device(self, array, dtype):
    """A float32 NumPy array as a tensor."""
    dtype = getattr(self.torch, dtype)
    return self.torch.from_numpy(array).to(self.device, dtype)

  def _settled(self, call):
    call()
    return counts.settled(functools.partial(self._time, call))

  def _time(self, call, repeats):
    self.torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
      call()
    self.torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / repeats

  def _memory(self, call):
    """MiB that a call takes at its peak beside its arguments."""
    cuda = self.torch.cuda
    cuda.synchronize()
    cuda.reset_peak_memory_stats()
    before = cuda.memory_allocated()
    call()
    cuda.synchronize()
    return (cuda.max_memory_allocated() - before) / 2**20

  def _many(self, function):
    """(what to call, how many calls that makes, why it is no graph or None)."""
    try:
      return self._graph(function), counts.SETS, None
    except RuntimeError as error:
      once = functools.partial(function, *self.sets()[0])
      return once, 1, bench.first_line(error)

  def _graph(self, function):
    """A replay of calls on all sets."""
    cuda = self.torch.cuda
    aside = cuda.Stream()
    aside.wait_stream(cuda.current_stream())
    with cuda.stream(aside):  # what is made on first use is made here
      function(*self.sets()[0])
    cuda.current_stream().wait_stream(aside)
    cuda.synchronize()
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
      for inputs in self.sets():
        function(*inputs)
    return graph.replay


class MambaScan(TorchProgram):
  """`mamba_chunk_scan_combined` at the fastest of its chunk sizes.

  Triton tunes every kernel for the shape, as in a process that runs this shape
  alone.

  Args:
    source: folder of mamba_ssm.
    folder: of `exact.Exact.write`.
  """

  def __init__(self, source, folder, *args):
    super().__init__(*args)
    import triton

    self.folder = folder
    triton.testing.do_bench = functools.partial(
      triton.testing.do_bench, **TUNING
    )
    self.scan = mamba.load(source).mamba_chunk_scan_combined

  def inputs(self):
    s, (args, cotangent) = self.shape, bench.draw_inputs(self.shape)
    dtypes = self.dtype, *('float32',) * 2, *(self.dtype,) * 2, 'float32'
    args = [self.on_device(*pair) for pair in zip(args, dtypes, strict=True)]
    heads = s.batch, s.length, s.heads, s.head_dim
    args[0] = args[0].reshape(heads)
    return args, self.on_device(cotangent, self.dtype).reshape(heads)

  def run(self, args, chunk):
    *args, D = args
    return self.scan(*args, chunk, D=D, dt_softplus=False)

  def choose(self, direction, seconds):
    """The fastest chunk size of those that there is time to tune."""
    end, tried, failed = time.monotonic() + seconds, {}, {}
    for chunk in mamba.CHUNKS:
      if tried and time.monotonic() > end:
        break
      function = self.function(direction, chunk=chunk)
      try:
        function(*self.sets()[0])  # tunes
        call, calls, _ = self._many(function)
        tried[chunk] = self._settled(call) / calls
      except Exception as error:  # the others may work
        failed[chunk] = bench.first_line(error)
    if not tried:
      raise RuntimeError(f'at no chunk size: {failed}')
    best = min(tried, key=tried.get)
    row = {'chunk_size': best, 'tried_chunk_sizes': tried | failed}
    return row, self.function(direction, chunk=best)


class Attention(TorchProgram):
  """`scaled_dot_product_attention` by one backend, at the scan's width.

  Args:
    backend: name in `torch.nn.attention.SDPBackend`.
  """

  def __init__(self, backend, *args):
    super().__init__(*args)
    self.backend = backend

  def inputs(self):
    # (B, heads, L, 64) as views of (B, L, heads, 64), as in a network.
    *args, cotangent = (
      self.on_device(a, self.dtype) for a in counts.draw_attention(self.shape)
    )
    return args, cotangent

  def run(self, args):
    from torch.nn import attention, functional

    backend = getattr(attention.SDPBackend, self.backend)
    with attention.sdpa_kernel(backend):
      q, k, v = (a.transpose(1, 2) for a in args)
      y = functional.scaled_dot_product_attention(q, k, v)
      return y.transpose(1, 2)
