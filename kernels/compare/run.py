"""Runs the comparison: shapes, processes, a budget of seconds, files."""

import contextlib
import functools
import importlib.metadata
import json
import os
import pathlib
import tempfile
import time

import numpy as np

from linearizer_jax.kernels import bench, sections
from linearizer_jax.kernels.compare import (
  counts,
  exact,
  jax_programs,
  mamba,
  table,
  torch_programs,
)
from linearizer_jax.kernels.compare.worker import Worker, WorkerError
from linearizer_jax.kernels.ssd import api
from linearizer_jax.kernels.ssd.shapes import SHAPES

PREPARING = 0.85  # share of the time after which nothing is compiled
SAMPLING = 20  # most seconds a direction is sampled
PATIENCE = 45  # fewest seconds that an answer is waited for
COMPILING = 60  # seconds that the first shape has more, for Triton's compiler
DEFAULT_SHAPES = {
  'cpu': ('cpu_198', 'cpu_786'),
  'gpu': ('base_224', 'base_512', 'base_2048'),
}


def run(options, command):
  """Measures every shape; writes the files after each of them.

  Args:
    options: of `bench.parse_arguments`: shapes, implementations, dtype,
      max_gib (each None for what suits the device), mamba_ssm, seconds, out,
      docs.
    command: that it was started by.

  Returns:
    What the JSON file holds.

  Raises:
    ValueError: a device that this cannot be run on, or not with these options.
    WorkerError: JAX finds no device.
  """
  # Processes share the device, so none may take most of its memory at once.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  end = time.monotonic() + options.seconds
  asked = Worker(jax_programs.JaxProgram, None, None)
  results = asked.ask('about', timeout=options.seconds)
  asked.close()
  platform = results['platform']
  _check(platform, options)
  on_cpu = platform == 'cpu'
  dtype = options.dtype or ('float32' if on_cpu else 'bfloat16')
  max_gib = options.max_gib or (8 if on_cpu else None)
  names = options.shapes or DEFAULT_SHAPES[platform]
  results |= {
    'command': command,
    'dtype': dtype,
    'seconds': options.seconds,
    'shapes': {name: vars(SHAPES[name]) for name in names},
    'rows': [],
  }
  if platform == 'gpu':
    results |= versions('torch', 'triton')
  wait_for_triton, more = lambda timeout: None, 0
  if options.mamba_ssm:
    results['mamba_ssm'] = mamba.find(options.mamba_ssm)[1]
    wait_for_triton = start_compilers(options.mamba_ssm, names, dtype)
    more = min(COMPILING, options.seconds / 4)
  hung = set()
  for i, name in enumerate(names):
    share = more + (end - time.monotonic() - more) / (len(names) - i)
    more = 0
    results['rows'] += measure(
      name,
      functools.partial(
        programs, platform, options, SHAPES[name], dtype, max_gib
      ),
      dtype,
      results,
      time.monotonic() + share,
      wait_for_triton,
      hung,
    )
    write(results, options)
  return results


def _check(platform, options):
  """Raises ValueError for a device that the comparison cannot use."""
  if platform not in DEFAULT_SHAPES:
    raise ValueError(
      f'--all compares on a CPU or a GPU, this is a {platform.upper()}: every '
      'program has a process of its own, and only one of them could hold it. '
      'Leave --all out.'
    )
  if options.mamba_ssm and platform != 'gpu':
    raise ValueError(
      '--mamba_ssm needs a GPU, and JAX has found none. On a machine that has '
      'one, the extra [cuda] is missing.'
    )


def versions(*names):
  """{package: version} of those that are installed."""
  found = {}
  for name in names:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def programs(platform, options, shape, dtype, max_gib, folder):
  """{name: arguments of its Worker}, the most wanted first."""
  names = options.implementations or sorted(
    (
      name
      for name in api.IMPLEMENTATIONS
      if name.endswith(platform) or 'pallas' not in name
      if platform == 'cpu' or name != 'reference'
    ),
    key=lambda name: not name.endswith(platform),
  )
  what = shape, dtype
  found = {
    name: (jax_programs.Scan, name, folder, *what, max_gib) for name in names
  }
  if platform == 'gpu':
    source, attention = options.mamba_ssm, torch_programs.Attention
    peers = {
      'mamba_ssm': (torch_programs.MambaScan, source, folder, *what),
      'attention, cuDNN in JAX': (jax_programs.Attention, *what),
      'attention, flash in torch': (attention, 'FLASH_ATTENTION', *what),
      'attention, cuDNN in torch': (attention, 'CUDNN_ATTENTION', *what),
    }
    last = {n: found.pop(n) for n in ('xla_scan',) if n in found}
    found |= peers | last
  return found


def start_compilers(folder, names, dtype):
  """Compiles Triton's kernels in the background; returns how to wait for it."""
  parts = max(1, min(12, (os.cpu_count() or 1) - 4))
  shapes = [SHAPES[name] for name in names]
  workers = [
    Worker(mamba.Compiler, folder, part, parts) for part in range(parts)
  ]
  for worker in workers:
    worker.send('compile', shapes, dtype)

  def wait(timeout):
    late = time.monotonic() + timeout
    while workers:
      worker = workers.pop()
      try:
        worker.receive(late - time.monotonic())
      except WorkerError as error:  # tuning compiles what is missing
        print(f'compiling mamba_ssm beforehand: {error}', flush=True)
      worker.close()

  return wait


def measure(name, make_programs, dtype, peaks, end, wait_for_triton, hung):
  """Rows of one shape: in each direction prepared, then sampled in turns.

  Forward is timed before the first backward runs: one that breaks its process
  does not take the other's times with it.

  Args:
    name: of the shape.
    make_programs: folder of exact results -> {program: arguments of Worker}.
    dtype: of the run.
    peaks: mapping with the device's 'peak_flops' and 'peak_bandwidth'.
    end: of time.monotonic().
    wait_for_triton: called with seconds before anything is prepared: neither
      XLA nor Triton tunes beside compilers that use the device.
    hung: (kernel of ours, direction) that gave no answer at an earlier shape,
      which are not waited for again; those of this shape are added.

  Returns:
    A row for each program and direction: 'shape', 'program', 'direction',
    'milliseconds', 'samples', 'error' (the largest of 'errors'), 'reason' where
    there is no time, what `prepare` gives, and `counts.derived`.
  """
  shape, rows = SHAPES[name], []
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:

    def start(*arguments):
      return stack.enter_context(contextlib.closing(Worker(*arguments)))

    reference = start(exact.Exact, shape, dtype)
    workers = {
      program: start(*arguments)
      for program, arguments in make_programs(folder).items()
    }
    try:
      left = PREPARING * (end - time.monotonic())
      reference.ask('write', folder, timeout=max(left / 2, 0))
    except WorkerError as error:
      print(f'{name}: no float64 to compare with: {error}', flush=True)
    reference.close()  # and what it holds of the device's memory
    wait_for_triton((end - time.monotonic()) / 2)
    for i, direction in enumerate(counts.DIRECTIONS):
      left = (end - time.monotonic()) / (len(counts.DIRECTIONS) - i)
      stop = time.monotonic() + left
      prepared = []
      for program, worker in workers.items():
        row = {'shape': name, 'program': program, 'direction': direction}
        # A backward pass contains the forward one.
        if any((program, d) in hung for d in counts.DIRECTIONS[: i + 1]):
          worker = None
        row |= prepare(worker, direction, stop - (1 - PREPARING) * left)
        if is_hung(row):
          hung.add((program, direction))
        prepared.append(row)
      sample(prepared, workers, min(stop - time.monotonic(), SAMPLING))
      rows += prepared
  for row in rows:
    row |= counts.derived(row, shape, dtype, peaks)
    print(json.dumps(row), flush=True)
  return rows


def prepare(worker, direction, end):
  """The part of a row that is known before it is sampled."""
  row = {'milliseconds': None, 'error': None, 'reason': None}
  if worker is None:
    return row | {'reason': 'not run: it hung before'}
  left = end - time.monotonic()
  if left <= 0:
    return row | {'reason': 'the budget of seconds is spent (--seconds)'}
  try:
    # One that hangs leaves time to the others.
    patience = max(left / 2, PATIENCE)
    row |= worker.ask('prepare', direction, left / 3, timeout=patience)
  except WorkerError as error:
    return row | {'reason': str(error)}
  errors = row.get('errors', {})
  if errors and None not in errors.values():
    row['error'] = max(errors.values())
  wrong = [
    f'{name} ' + ('not finite' if error is None else f'off by {error:.2g}')
    for name, error in errors.items()
    if error is None or error > counts.WRONG
  ]
  if wrong:  # however fast it is
    row['reason'] = f'wrong results: {", ".join(wrong)}'
  return row


def is_hung(row):
  """Whether a kernel of ours gave no answer; peers may have been slow."""
  ours = row['program'].startswith('pallas')
  return ours and (row['reason'] or '').startswith('no answer')


def sample(rows, workers, seconds):
  """Puts the median time of each row that is prepared into it."""
  calls = {
    i: functools.partial(
      workers[row['program']].ask,
      'sample',
      row['direction'],
      timeout=PATIENCE,
    )
    for i, row in enumerate(rows)
    if not row['reason']
  }
  for i, (values, reason) in in_turns(calls, seconds).items():
    rows[i]['reason'] = reason
    if values:
      rows[i]['milliseconds'] = float(np.median(values))
      rows[i]['samples'] = len(values)


def in_turns(calls, seconds):
  """Samples of all calls, one each a round; what fails is left out from then.

  Args:
    calls: {key: function that gives milliseconds or raises `WorkerError`}.
    seconds: after which no round starts, once there were the fewest.

  Returns:
    {key: (list of milliseconds, reason of its end or None)}.
  """
  found = {key: ([], None) for key in calls}
  start = time.monotonic()
  for i in range(bench.ROUNDS[1]):
    if i >= bench.ROUNDS[0] and time.monotonic() - start > seconds:
      break
    for key, (values, reason) in found.items():
      if reason is None:
        try:
          values.append(calls[key]())
        except WorkerError as error:
          found[key] = [], str(error)
  return found


def write(results, options):
  """The JSON file, and the section of the page."""
  if options.out:
    text = json.dumps(results, indent=2) + '\n'
    pathlib.Path(options.out).write_text(text, encoding='utf-8')
  if options.docs:
    sections.rewrite(
      options.docs, f'scan {results["platform"]}', table.page(results)
    )
