"""What a run would need on a TPU slice that is not there.

libtpu compiles for chips it does not have. The real train step is compiled, so
memory and traffic are the compiler's own figures, and arithmetic is counted in
the trace; the step time is a lower bound from the chip's peaks, never a
prediction.
"""

import json
import logging
import math
import os
import pathlib
from concurrent import futures

import jax
import ml_collections

from linearizer_jax import (
  arithmetic,
  optimizer,
  sharding,
  tasks,
  traffic,
  train,
)
from linearizer_jax.chips import CHIPS, GIB
from linearizer_jax.data import pipeline

_log = logging.getLogger('linearizer_jax')


def plan(config, topology, out=None):
  """Compiles a stage's train step for a slice; prints and returns its needs.

  The configured batch is compiled, halved while it does not fit, and half of
  that; memory is a straight line through both, and the largest batch that it
  allows is compiled to confirm it.

  Args:
    config: resolved config of a stage, a dict.
    topology: chip and shape of the slice, such as 'v5e:4x4'.
    out: a JSON file for the result, or None.

  Returns:
    dict of memory_bytes_per_chip, flops, bytes (both of a chip and step),
    hbm_bytes (what of the bytes is HBM's: the others stay in VMEM), traffic
    (these by source: `traffic.by_source`), step_seconds_bound,
    images_per_second, hours, batch_per_chip, configured_batch_fits and
    max_batch_per_chip.

  Raises:
    ValueError: no such slice, or nothing fits.
    ImportError: libtpu is missing.
  """
  chip, devices = _slice(topology)
  config = ml_collections.ConfigDict(config)
  unit = config.parallel.accumulate_steps  # a chip's batches are multiples
  parts = len(devices) * unit
  if unit < 1 or config.batch_size % parts or config.batch_size < parts:
    raise ValueError(
      f'config.batch_size is {config.batch_size}; it must be a multiple of '
      f'{parts} = {len(devices)} chips of {topology} x {unit} '
      'config.parallel.accumulate_steps (at least 1).'
    )
  each = config.batch_size // parts
  measured = {}  # by images a chip in each part of a batch

  def measure(*batches):
    """Side by side: XLA compiles mostly on one core."""
    new = [n for n in batches if n and n not in measured]
    with futures.ThreadPoolExecutor() as pool:
      found = pool.map(
        lambda n: _compile(config, devices, n * unit, chip.memory), new
      )
      measured.update(zip(new, found, strict=True))

  batch = each
  measure(batch, batch // 2)
  while not measured[batch]:
    if batch == 1:
      raise ValueError(
        f'not even one image a chip fits {topology}: shard the parameters with '
        "config.parallel.fsdp, or recompute with config.student.remat='full'."
      )
    batch //= 2
    measure(batch, batch // 2)
  most = batch
  if batch > 1 and measured[batch // 2]:
    most = _largest(measured, batch, chip.memory)
    measure(most)
    while not measured[most]:
      most = batch + (most - batch) // 2
      measure(most)
  result = _figures(config, measured[batch], chip, batch * parts)
  result |= {
    'topology': topology,
    'batch_per_chip': batch * unit,
    'configured_batch_fits': batch == each,
    'max_batch_per_chip': most * unit,
  }
  print(_table(result))
  if out:
    pathlib.Path(out).write_text(json.dumps(result, indent=2) + '\n')
  return result


def _slice(topology):
  """(Chip, devices) of 'v5e:4x4'."""
  kind, _, shape = topology.partition(':')
  if kind not in CHIPS or not shape:
    raise ValueError(
      f'--plan is {topology!r}; expected a chip and the shape of its slice, '
      f'such as v5e:4x4, with one of {", ".join(CHIPS)}.'
    )
  from jax.experimental import topologies

  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  # Chips are held by one process; compiling for them needs none.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  try:
    found = topologies.get_topology_desc(
      platform='tpu', topology_name=topology, **CHIPS[kind].options
    )
  except Exception as error:  # what it raises differs between versions of JAX
    if 'libtpu' in str(error) or 'initialize' in str(error):
      raise ImportError(
        'compiling for a TPU needs libtpu: install the extra [tpu] '
        f'({str(error).splitlines()[0]}).'
      ) from error
    raise ValueError(
      f'--plan={topology}: there is no such slice '
      f'({str(error).splitlines()[0]}).'
    ) from error
  return CHIPS[kind], found.devices


def _compile(config, devices, batch_per_chip, memory):
  """Bytes held, FLOPs, bytes moved, their sources, of a chip; None: no fit."""
  config = config.copy_and_resolve_references()
  config.batch_size = batch_per_chip * len(devices)
  mesh = sharding.make_mesh(devices, config.parallel.fsdp)
  task = tasks.make_task(
    config, mesh, pipeline.num_classes(config.data.to_dict())
  )
  tx = optimizer.make_optimizer(config)
  programs = train.make_programs(config, task, tx, mesh)
  split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  shape = (config.batch_size, *tasks.image_shape(config))
  label, dtype = tasks.label_struct(config)
  struct = jax.ShapeDtypeStruct
  batch = {
    'image': struct(shape, 'uint8', sharding=split),
    'label': struct((shape[0], *label), dtype, sharding=split),
  }
  key = jax.eval_shape(lambda: jax.random.key(0))
  key = struct(key.shape, key.dtype, sharding=whole)
  _log.info('compiling for %d images a chip', batch_per_chip)
  rate = struct((), 'float32', sharding=whole)
  traced = programs.train_step.trace(
    programs.state, programs.frozen, batch, key, rate
  )
  flops = arithmetic.count(traced.jaxpr) / len(devices)
  try:
    compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    _log.info('%d images a chip do not fit', batch_per_chip)
    return None
  held = compiled.memory_analysis()
  moved = compiled.cost_analysis()['bytes accessed']
  total = (
    held.argument_size_in_bytes
    + held.temp_size_in_bytes
    + held.output_size_in_bytes
    - held.alias_size_in_bytes
  )
  sources = traffic.by_source(compiled.as_text())
  found = total, flops, moved, sources
  _log.info(
    '%d images a chip: %.2f GiB, %.2f TFLOP, %.1f GB moved',
    *(batch_per_chip, found[0] / GIB, found[1] / 1e12, found[2] / 1e9),
  )
  return found if total <= memory else None


def _largest(measured, batch, memory):
  """The batch where the line through two measured ones meets the memory."""
  high, low = measured[batch][0], measured[batch // 2][0]
  slope = (high - low) / (batch - batch // 2)
  return batch + int((memory - high) / max(slope, 1))


def _figures(config, compiled, chip, batch_size):
  """The result but for what was searched."""
  held, flops, moved, sources = compiled
  hbm = sum(sources.values())  # the rest of `moved` stays in VMEM
  seconds = max(flops / chip.flops, hbm / chip.bandwidth)
  examples = pipeline.num_train_examples(config.data.to_dict())
  steps = config.steps or math.ceil(config.epochs * examples / batch_size)
  return {
    'memory_bytes_per_chip': held,
    'flops': flops,
    'bytes': moved,
    'hbm_bytes': hbm,
    'traffic': [[*key, value] for key, value in sources.items()],
    'step_seconds_bound': seconds,
    'images_per_second': batch_size / seconds,
    'hours': steps * seconds / 3600,
  }


def _table(result):
  """The result as lines a reader understands."""
  r = result
  lines = [
    f'{r["topology"]}, {r["batch_per_chip"]} images a chip:',
    f'  memory a chip       {r["memory_bytes_per_chip"] / GIB:10.2f} GiB',
    f'  arithmetic a step   {r["flops"] / 1e12:10.2f} TFLOP a chip',
    f'  traffic a step      {r["hbm_bytes"] / 1e9:10.1f} GB a chip over HBM',
    f'     by XLA, with VMEM{r["bytes"] / 1e9:10.1f} GB a chip',
    f'  a step takes at least {1e3 * r["step_seconds_bound"]:8.1f} ms',
    f'  images/s at most    {r["images_per_second"]:10.0f}',
    f'  the run at least    {r["hours"]:10.1f} hours',
    f'  largest batch       {r["max_batch_per_chip"]:10d} images a chip',
  ]
  if not r['configured_batch_fits']:
    lines.append('  The configured batch does not fit; this is a smaller one.')
  lines += ['the traffic over HBM:']
  lines += traffic.table(r['traffic'])
  return '\n'.join(lines)
