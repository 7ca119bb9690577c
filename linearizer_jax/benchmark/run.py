"""Times every case within a budget of seconds."""

import concurrent.futures
import logging
import os
import time

import jax

from linearizer_jax import models
from linearizer_jax.benchmark import programs
from linearizer_jax.kernels import bench
from linearizer_jax.models import vit

_log = logging.getLogger('linearizer_jax')
# Most wanted first: what the budget cuts off is the end.
PHASES = (
  ('inference', 'full'),
  ('training', 'full'),
  ('inference', 'one'),
  ('training', 'one'),
)
COMPILING = 0.6  # share of a phase's time after which nothing is compiled
NAIVE = 'teacher, naive attention'
# Patch tokens of a full batch: past these, images/s no longer rise.
TOKENS = {'cpu': 8 * 14**2}
ACCELERATOR_TOKENS = 256 * 14**2


def run(names, sizes, *, device, dtype, seconds, tokens=None, max_gib=None):
  """Rows of all cases: models x sizes x inference, training x full batch, one.

  Args:
    names: models; students and teachers are paired in order.
    sizes: [(height, width)] in pixels.
    device: a jax device.
    dtype: 'bfloat16' or 'float32'.
    seconds: of the whole; a phase that is short gives its time to the next.
    tokens: patch tokens of a full batch, by default what saturates the device.
    max_gib: a program that needs more is not run; the device's memory when
      None.

  Returns:
    A list of rows; see `programs.measure`.

  Raises:
    ValueError: unknown models, or sizes that do not fit the patches.
  """
  tokens = tokens or TOKENS.get(device.platform, ACCELERATOR_TOKENS)
  limit = max_gib or programs.memory_limit(device) / programs.GIB
  networks = variants(names, device.platform, dtype)
  end = time.monotonic() + seconds
  rows = []
  for i, (direction, load) in enumerate(PHASES):
    cases = [
      programs.Case(
        *network,
        size,
        full_batch(network[0], size, tokens) if load == 'full' else 1,
        load,
        direction,
        dtype,
      )
      for size in sizes
      for network in networks
      if load == 'full' or full_batch(network[0], size, tokens) > 1
    ]
    for case in cases:
      case.row()  # an impossible size is an error before anything is compiled
    slot = (end - time.monotonic()) / (len(PHASES) - i)
    deadline = time.monotonic() + slot
    made = compile_all(cases, device, time.monotonic() + COMPILING * slot)
    for j, size in enumerate(sizes):
      group = {case: made[case] for case in cases if case.size == size}
      # By the side: with equal shares the largest, slowest would have no time.
      share = sum(size) / sum(map(sum, sizes[j:]))
      each = share * max(deadline - time.monotonic(), 0) / 2  # half to warm up
      for row in programs.measure(group, each, deadline, limit):
        rows.append(row)
        _log.info('%s', describe(row))
  return rows


def variants(names, platform, dtype):
  """[(model, variant, attention)]: teachers with their fastest attention, and
  with the naive one beside it where that is another."""
  found = []
  for name in names:
    if name not in vit.VARIANTS:
      models.field_names(name)  # an unknown name is an error
      found.append((name, 'student', None))
    elif platform == 'gpu' and dtype == 'bfloat16':
      found += [(name, 'teacher', 'cudnn'), (name, NAIVE, 'xla')]
    else:
      found.append((name, 'teacher', 'xla'))
  return found


def full_batch(name, size, tokens):
  """Images that make about so many patch tokens, at least one."""
  patch = models.create_model(name).patch_size
  return max(1, round(tokens * patch**2 / (size[0] * size[1])))


def compile_all(cases, device, deadline, refusals=programs.REFUSALS):
  """{case: Program, or the reason why there is none}, several at a time."""

  def make(case):
    if time.monotonic() > deadline:
      return 'not compiled: the budget of seconds is spent (--seconds)'
    try:
      return programs.Program(case, device)
    except refusals as error:
      return bench.first_line(error)

  workers = max(1, (os.cpu_count() or 2) // 2)
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    return dict(zip(cases, pool.map(make, cases), strict=True))


def describe(row):
  """One row in a line."""
  result = row['reason'] or f'{row["images_per_second"]:.2f} images/s'
  return (
    f'{row["direction"]} {row["size"]} batch {row["batch"]} {row["model"]} '
    f'({row["variant"]}): {result}'
  )


def about(device, **settings):
  """What a file of results says of how they came to be."""
  stats = device.memory_stats() or {}
  return {
    'framework': 'jax',
    'device': device.device_kind,
    'platform': device.platform,
    'cores': os.cpu_count(),
    'device_memory_gib': stats.get('bytes_limit', 0) / programs.GIB or None,
    'jax': jax.__version__,
    **settings,
  }
