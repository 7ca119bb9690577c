"""Time and memory of the implementations of `ssd` at named shapes.

  python kernels/bench.py --shapes cpu_198 cpu_786 \
    --implementations default reference xla --out bench.json
  python kernels/bench.py --chip v5e --out tpu.json   # without a TPU
  python kernels/bench.py --all --mamba_ssm DIR   # against peers, on a GPU

With --all, on a CPU or GPU, every program has a process of its own, is compared
with float64 and, on a GPU, timed beside the Triton kernels of mamba_ssm and
flash attention; files are written after each shape (kernels/compare). The rest
is without it.

The programs of one shape run in turns, so that a busy machine slows all of
them; times are medians of calls from Python that wait for the result: on an
accelerator that wait is part of them, and most of a short one (--all hides it).
Peak memory is XLA's temporary bytes, and FLOPs and bytes are its cost analysis,
which counts the body of a loop once and of a Pallas kernel what that declares.
With --chip nothing runs: the programs are compiled by libtpu for a chip that is
not there, and have no times; --bundles adds the exact length of the schedule of
every Pallas kernel. On a TPU the compiler chooses the layout of arguments and
results, as it does for a scan in the middle of a model.
"""

import argparse
import functools
import json
import os
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout

from linearizer_jax.kernels import cost
from linearizer_jax.kernels.ssd import api, ssd
from linearizer_jax.kernels.ssd.shapes import SHAPES

DOCS = pathlib.Path(__file__).parents[1] / 'docs/benchmarks.md'
ROUNDS = (3, 30)  # fewest and most, whatever --seconds
COMPARING = 430.0  # --seconds of --all
TOPOLOGIES = {
  'v4': 'v4:2x2x1',
  'v5e': 'v5e:2x2',
  'v5p': 'v5p:2x2x1',
  'v6e': 'v6e:2x2',
}


def main():
  options = parse_arguments()
  if options.all and not options.chip:
    compare(options)
    return
  dumps = None
  if options.bundles:
    dumps = tempfile.mkdtemp()
    cost.dump_schedules(dumps)
  device = tpu_device(options.chip) if options.chip else jax.devices()[0]
  rows = []
  for name in options.shapes:
    shape = SHAPES[name]
    inputs = make_inputs(shape, options.dtype)
    for direction, function in (
      ('forward', forward),
      ('forward+backward', forward_backward),
    ):
      new = [
        {'shape': name, 'direction': direction, 'implementation': i}
        for i in options.implementations
      ]
      calls = []
      for row in new:
        run = function(shape, row['implementation'])
        traced = trace(run, inputs, device)
        compiled = traced.lower().compile()
        row |= static_figures(compiled)
        if dumps:
          row['bundles'] = cost.take_schedules(dumps, traced.jaxpr.jaxpr)
        calls.append(None)
        if row['temporary_mib'] < 1024 * options.max_gib and not options.chip:
          placed = jax.device_put(inputs, compiled.input_formats[0])
          calls[-1] = functools.partial(compiled, *placed)
      medians = median_times(calls, options.seconds)
      for row, median in zip(new, medians, strict=True):
        row['milliseconds'] = median
        print(json.dumps(row), flush=True)
      rows += new

  print('\n' + markdown(rows))
  if options.bundles:
    print('\n' + schedules(rows))
  if options.out:
    about = {
      'device': device.device_kind,
      'platform': device.platform,
      'jax': jax.__version__,
      'dtype': options.dtype,
      'shapes': {name: vars(SHAPES[name]) for name in options.shapes},
    }
    with open(options.out, 'w', encoding='utf-8') as f:
      json.dump(about | {'rows': rows}, f, indent=2)


def compare(options):
  """The comparison with peers; see kernels/compare."""
  from linearizer_jax.kernels.compare import run, table
  from linearizer_jax.kernels.compare.worker import WorkerError

  command = 'python kernels/bench.py --all'
  told = vars(options) | {
    'mamba_ssm': options.mamba_ssm and 'DIR',
    'seconds': options.seconds if options.seconds != COMPARING else None,
  }
  names = 'shapes', 'implementations', 'dtype', 'max_gib', 'mamba_ssm'
  for name in (*names, 'seconds'):
    if value := told[name]:
      several = value if isinstance(value, list) else [f'{value}']
      command += f' --{name} {" ".join(several)}'
  try:
    results = run.run(options, command)
  except (ValueError, WorkerError) as error:
    raise SystemExit(f'bench.py --all: {error}') from error
  print('\n' + table.shapes(results))


def parse_arguments():
  """Shapes and implementations by name; what suits the device by default."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--chip', choices=TOPOLOGIES, help='compile for this TPU')
  parser.add_argument('--shapes', nargs='+', choices=SHAPES)
  parser.add_argument(
    '--implementations',
    nargs='+',
    choices=['default', *api.IMPLEMENTATIONS],
  )
  parser.add_argument(
    '--all',
    action='store_true',
    help='against float64 and the peers of the device, with --out and --docs; '
    'with --chip every shape, and every implementation of a TPU',
  )
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'))
  parser.add_argument(
    '--seconds',
    type=float,
    help='per shape and direction (default 10), with --all for everything '
    f'(default {COMPARING:g})',
  )
  parser.add_argument(
    '--max_gib',
    type=float,
    help='programs with more temporary memory are compiled but not run '
    '(default 8, none on a GPU with --all)',
  )
  parser.add_argument(
    '--bundles',
    action='store_true',
    help='with --chip: instruction bundles of every Pallas kernel',
  )
  parser.add_argument(
    '--mamba_ssm',
    help='with --all, on a GPU: folder of an unpacked mamba_ssm, at least '
    '2.2.5; it is not installed, and its extension is not needed',
  )
  parser.add_argument('--out', help='a JSON file to write')
  parser.add_argument(
    '--docs', help=f'with --all: page with the tables (default {DOCS})'
  )
  options = parser.parse_args()
  if options.bundles and not options.chip:
    parser.error('--bundles needs --chip')
  if options.all and not options.chip:
    return _for_all(parser, options)
  platform = 'tpu' if options.chip else jax.devices()[0].platform
  on_cpu = platform == 'cpu'
  if options.all:
    options.shapes = list(SHAPES)
    options.implementations = [
      name
      for name in api.IMPLEMENTATIONS
      if 'pallas' not in name or name.endswith(platform)
    ]
  options.shapes = options.shapes or [
    name for name in SHAPES if name.startswith('cpu_') == on_cpu
  ]
  options.implementations = options.implementations or (
    ['pallas_tpu', 'xla_scan', 'xla']
    if platform == 'tpu'
    else ['default', 'reference', 'xla']
  )
  options.dtype = options.dtype or ('float32' if on_cpu else 'bfloat16')
  options.seconds = options.seconds or 10
  options.max_gib = options.max_gib or 8
  return options


def _for_all(parser, options):
  """Options of --all; what would fail after minutes is an error now."""
  from linearizer_jax.kernels.compare import mamba

  options.seconds = options.seconds or COMPARING
  options.out, options.docs = options.out or 'bench.json', options.docs or DOCS
  for path in (options.out, options.docs):
    if not pathlib.Path(path).resolve().parent.is_dir():
      parser.error(f'there is no folder for {path}')
  if options.mamba_ssm:
    try:
      mamba.find(options.mamba_ssm)
    except (ValueError, OSError) as error:
      parser.error(str(error))
  return options


def tpu_device(chip):
  """One device of a TPU that is not there."""
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  topology = topologies.get_topology_desc(
    platform='tpu', topology_name=TOPOLOGIES[chip]
  )
  return topology.devices[0]


def trace(function, inputs, device):
  """A function of arrays like `inputs`, for a device that may not be there."""
  layout = Layout.AUTO if device.platform == 'tpu' else None
  at = Format(layout, jax.sharding.SingleDeviceSharding(device))
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs
  )
  return jax.jit(function, in_shardings=at, out_shardings=at).trace(*shapes)


def draw_inputs(s):
  """x (B, L, H P), dt, A, B, C, D of a shape, and a cotangent of y, float32."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.standard_normal(shape, np.float32)

  dt = np.exp(rng.uniform(np.log(1e-3), np.log(0.3), (s.batch, s.length, 1)))
  x = normal(s.batch, s.length, s.heads * s.head_dim)
  args = (
    x,
    np.repeat(dt.astype(np.float32), s.heads, axis=2),
    -np.linspace(1, 16, s.heads, dtype=np.float32),
    normal(s.batch, s.length, s.groups, s.state_dim),
    normal(s.batch, s.length, s.groups, s.state_dim),
    np.ones(s.heads, np.float32),
  )
  return args, np.flip(x, axis=1).copy()


def make_inputs(s, dtype):
  """`draw_inputs` on the device: x, B, C and the cotangent in dtype."""
  (x, dt, A, B, C, D), cotangent = draw_inputs(s)
  x, B, C, cotangent = (jnp.asarray(a, dtype) for a in (x, B, C, cotangent))
  dt, A, D = (jnp.asarray(a) for a in (dt, A, D))
  return (x, dt, A, B, C, D), cotangent


def forward(shape, implementation):
  """args, cotangent -> y, both (B, L, H P) as the mixer holds them.

  A TPU would copy (B, L, H, P) with P < 128 into that layout and back.
  """
  name = None if implementation == 'default' else implementation

  def run(args, _):
    x, *rest = args
    heads = (*x.shape[:2], shape.heads, shape.head_dim)
    return ssd(x.reshape(heads), *rest, implementation=name).reshape(x.shape)

  return run


def forward_backward(shape, implementation):
  """args, cotangent -> y and the gradients of args."""
  run = forward(shape, implementation)

  def value_and_gradients(args, cotangent):
    y, pullback = jax.vjp(lambda args: run(args, None), args)
    return y, pullback(cotangent)

  return value_and_gradients


def static_figures(compiled):
  """What XLA says about a program without running it."""
  cost = compiled.cost_analysis() or {}
  memory = compiled.memory_analysis()
  return {
    'temporary_mib': memory.temp_size_in_bytes / 2**20,
    'gflop': cost.get('flops', 0) / 1e9,
    'mib_accessed': cost.get('bytes accessed', 0) / 2**20,
  }


def first_line(error):
  """Why a program has no figures: the error's kind, and what it says first."""
  text = str(error).strip().splitlines() or ['']
  return f'{type(error).__name__}: {text[0][:200]}'


def median_times(calls, seconds):
  """Milliseconds of each call without arguments, in turns; None for None."""
  runnable = [call for call in calls if call is not None]
  times = {id(call): [] for call in runnable}
  for call in runnable:
    jax.block_until_ready(call())
  fewest, most = ROUNDS
  start = time.perf_counter()
  for i in range(most):
    if i >= fewest and time.perf_counter() - start > seconds:
      break
    for call in runnable:
      before = time.perf_counter()
      jax.block_until_ready(call())
      times[id(call)].append(1e3 * (time.perf_counter() - before))
  return [
    None if call is None else float(np.median(times[id(call)]))
    for call in calls
  ]


def markdown(rows):
  """One line per shape and implementation."""
  lines = [
    '| shape | implementation | forward ms | temporary MiB | moved MiB '
    '| fwd+bwd ms | temporary MiB | moved MiB |',
    '|---|---|---|---|---|---|---|---|',
  ]
  table = {}
  for row in rows:
    ms = row['milliseconds']
    table.setdefault((row['shape'], row['implementation']), []).extend(
      [
        '-' if ms is None else f'{ms:.1f}' if ms >= 10 else f'{ms:.3g}',
        f'{row["temporary_mib"]:.0f}',
        f'{row["mib_accessed"]:.0f}',
      ]
    )
  lines += [f'| {" | ".join([*key, *v])} |' for key, v in table.items()]
  return '\n'.join(lines)


def schedules(rows):
  """One line per Pallas kernel of a program: its bundles, one a cycle."""
  lines = [
    '| shape | direction | kernel | grid steps | bundles a step '
    '| per head and 128 tokens |',
    '|---|---|---|---|---|---|',
  ]
  for row in rows:
    s = SHAPES[row['shape']]
    units = s.batch * s.heads * s.length / 128
    lines += [
      f'| {row["shape"]} | {row["direction"]} | {name} | {steps} | {bundles} '
      f'| {steps * bundles / units:.1f} |'
      for name, (steps, bundles) in row['bundles'].items()
    ]
  return '\n'.join(lines)


if __name__ == '__main__':
  main()
