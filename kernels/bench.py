"""Time and memory of the implementations of `ssd` at named shapes.

  python kernels/bench.py --shapes cpu_198 cpu_786 \
    --implementations default reference xla --out bench.json
  python kernels/bench.py --chip v5e --out tpu.json   # without a TPU

The programs of one shape run in turns, so that a busy machine slows all of
them; times are medians. Peak memory is XLA's temporary bytes, and FLOPs and
bytes are its cost analysis, which counts the body of a loop once and of a
Pallas kernel what that declares. With --chip nothing runs: the programs are
compiled by libtpu for a chip that is not there, and have no times; --bundles
adds the exact length of the schedule of every Pallas kernel. On a TPU the
compiler chooses the layout of arguments and results, as it does for a scan in
the middle of a model.
"""

import argparse
import functools
import json
import os
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

ROUNDS = (3, 30)  # fewest and most, whatever --seconds
TOPOLOGIES = {
  'v4': 'v4:2x2x1',
  'v5e': 'v5e:2x2',
  'v5p': 'v5p:2x2x1',
  'v6e': 'v6e:2x2',
}


def main():
  options = parse_arguments()
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


def parse_arguments():
  """Shapes and implementations by name; what suits a CPU by default."""
  chip = argparse.ArgumentParser(add_help=False)
  chip.add_argument('--chip', choices=TOPOLOGIES, help='compile for this TPU')
  platform = 'tpu' if chip.parse_known_args()[0].chip else None
  platform = platform or jax.devices()[0].platform
  on_cpu = platform == 'cpu'
  parser = argparse.ArgumentParser(
    description=__doc__.split('\n')[0], parents=[chip]
  )
  parser.add_argument(
    '--shapes',
    nargs='+',
    choices=SHAPES,
    default=[name for name in SHAPES if name.startswith('cpu_') == on_cpu],
  )
  parser.add_argument(
    '--implementations',
    nargs='+',
    choices=['default', *api.IMPLEMENTATIONS],
    default=['pallas_tpu', 'xla_scan', 'xla']
    if platform == 'tpu'
    else ['default', 'reference', 'xla'],
  )
  parser.add_argument(
    '--all',
    action='store_true',
    help='every shape, and every implementation of this platform',
  )
  parser.add_argument('--dtype', default='float32' if on_cpu else 'bfloat16')
  parser.add_argument(
    '--seconds', type=float, default=10, help='per shape and direction'
  )
  parser.add_argument(
    '--max_gib',
    type=float,
    default=8,
    help='programs with more temporary memory are compiled but not run',
  )
  parser.add_argument(
    '--bundles',
    action='store_true',
    help='with --chip: instruction bundles of every Pallas kernel',
  )
  parser.add_argument('--out', help='a JSON file to write')
  options = parser.parse_args()
  if options.bundles and not options.chip:
    parser.error('--bundles needs --chip')
  if options.all:
    options.shapes = list(SHAPES)
    options.implementations = [
      name
      for name in api.IMPLEMENTATIONS
      if 'pallas' not in name or name.endswith(platform)
    ]
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


def make_inputs(s, dtype):
  """x (B, L, H P), dt, A, B, C, D of a shape, and a cotangent of y."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

  dt = np.exp(rng.uniform(np.log(1e-3), np.log(0.3), (s.batch, s.length, 1)))
  x = normal(s.batch, s.length, s.heads * s.head_dim)
  args = (
    x,
    jnp.broadcast_to(jnp.float32(dt), (*x.shape[:2], s.heads)),
    -jnp.linspace(1, 16, s.heads),
    normal(s.batch, s.length, s.groups, s.state_dim),
    normal(s.batch, s.length, s.groups, s.state_dim),
    jnp.ones(s.heads),
  )
  return args, jnp.flip(x, axis=1)


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
        '-' if ms is None else f'{ms:.1f}',
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
