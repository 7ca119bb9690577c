"""The programs that are timed: inference, and the training step that trains.

Shape letters: B batch, H and W pixels.
"""

import dataclasses
import os
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from linearizer_jax import models, steps
from linearizer_jax.benchmark import flops
from linearizer_jax.kernels import bench
from linearizer_jax.models.teachers import IMAGENET
from linearizer_jax.tasks import classify

GIB = 2**30
CLASSES = 1000
CLASSIFY = {'label_smoothing': 0.1, 'mixup': 0.0, 'cutmix': 0.0}
# What a program may raise that this device cannot hold or compile.
REFUSALS = (RuntimeError, NotImplementedError)


@dataclasses.dataclass(frozen=True)
class Case:
  """One program: a network at one size, batch and direction.

  Attributes:
    model: name of a model.
    variant: 'student', 'teacher' or 'teacher, naive attention'.
    attention: `attention_implementation` of a teacher.
    size: (height, width) in pixels.
    batch: images.
    load: 'full' or 'one', what the batch stands for.
    direction: 'inference' or 'training'.
    dtype: of products, activations and residual stream; parameters of an
      inference are stored in it too, where they are matrices.
  """

  model: str
  variant: str
  attention: str | None
  size: tuple[int, int]
  batch: int
  load: str
  direction: str
  dtype: str

  def module(self):
    """The linen Module, its positions made for the size."""
    fields = {'dtype': self.dtype, 'residual_dtype': self.dtype}
    if self.attention:
      fields['attention_implementation'] = self.attention
    return models.create_model(
      self.model, num_classes=CLASSES, image_size=self.size, **fields
    )

  def program(self):
    """(function, shapes of its arguments, which of them are donated)."""
    return (_training if self.direction == 'training' else _inference)(self)

  def row(self):
    """What is known of the case without compiling it."""
    height, width = self.size
    arithmetic = flops.count(self.module(), self.size, self.direction)
    return dataclasses.asdict(self) | {
      'size': f'{height}x{width}',
      'pixels': height * width,
      'gflop_per_image': arithmetic / 1e9,
    }


class Program:
  """A compiled case; `start()` puts what it needs on the device.

  Attributes:
    figures: static ones: peak memory of the program and XLA's FLOPs.
  """

  def __init__(self, case, device):
    self.case, self.device = case, device
    function, self.shapes, donated = case.program()
    at = jax.sharding.SingleDeviceSharding(device)
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
      self.shapes,
    )
    jitted = jax.jit(function, donate_argnums=donated)
    self.compiled = jitted.lower(*shapes).compile()
    memory = self.compiled.memory_analysis()
    needed = (
      memory.argument_size_in_bytes
      + memory.temp_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
    )
    gflop = bench.static_figures(self.compiled)['gflop']
    self.figures = {
      'memory_gib': needed / GIB,
      'xla_gflop_per_image': gflop / case.batch,
    }

  def start(self):
    """A function of no arguments that runs the program once."""
    state, *rest = jax.device_put(_values(self.shapes), self.device)
    if self.case.direction == 'inference':
      return lambda: self.compiled(state, *rest)

    def step():
      nonlocal state  # donated: the next step takes what this one gave
      state, metrics = self.compiled(state, *rest)
      return metrics

    return step


def memory_limit(device):
  """Bytes that a program may take on a device."""
  stats = device.memory_stats() or {}
  if 'bytes_limit' in stats:
    return stats['bytes_limit']
  # Half of all memory. What is free would leave out the file cache, and not
  # every system tells it.
  return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // 2


def measure(programs, seconds, deadline, limit_gib):
  """Rows of one group of programs, timed in turns.

  Args:
    programs: {case: Program, or a reason for there being none}; a case is
      anything with the `program`, `row`, `batch` and `direction` of `Case`.
    seconds: to spend on rounds.
    deadline: of time.monotonic(); what would pass it is not timed.
    limit_gib: a program that needs more memory is not run.

  Returns:
    A list of rows: those of `Case.row` with 'batch', 'milliseconds',
    'images_per_second', 'memory_gib', 'xla_gflop_per_image',
    'device_peak_gib', each None where there is no such figure, and 'reason',
    None where the case was timed.
  """
  rows, calls, turn = [], {}, 0.0
  for case, program in programs.items():
    row = case.row() | {
      'milliseconds': None,
      'images_per_second': None,
      'memory_gib': None,
      'xla_gflop_per_image': None,
      'device_peak_gib': None,
      'reason': None,
    }
    rows.append(row)
    if isinstance(program, str):
      row['reason'] = program
      continue
    row |= program.figures
    if row['memory_gib'] > limit_gib:
      row['reason'] = (
        f'does not fit: {row["memory_gib"]:.1f} GiB of {limit_gib:.1f} GiB'
      )
      continue
    if time.monotonic() > deadline:
      row['reason'] = 'compiled, not run: the budget of seconds is spent'
      continue
    try:
      calls[id(row)] = call = program.start()
      before = _device_peak(program.device)
      jax.block_until_ready(call())
      began = time.monotonic()
      jax.block_until_ready(call())
      once = time.monotonic() - began
      after = _device_peak(program.device)
    except REFUSALS as error:
      row['reason'] = bench.first_line(error)
      calls.pop(id(row), None)
      continue
    row['device_peak_gib'] = after / GIB if after > before else None
    # The fewest rounds of all so far, and one before them to warm up.
    if time.monotonic() + (1 + bench.ROUNDS[0]) * (turn + once) > deadline:
      row['reason'] = f'one call takes {once:.1f} s, more than is left'
      del calls[id(row)]
      continue
    turn += once
  timed = [row for row in rows if id(row) in calls]
  try:
    medians = bench.median_times([calls[id(row)] for row in timed], seconds)
  except REFUSALS as error:  # each fits alone, but not beside the others
    for row in timed:
      row['reason'] = bench.first_line(error)
    return rows
  for row, median in zip(timed, medians, strict=True):
    row['milliseconds'] = median
    row['images_per_second'] = 1e3 * row['batch'] / median
  return rows


def _device_peak(device):
  """Most bytes in use so far, 0 where the device does not say."""
  return (device.memory_stats() or {}).get('peak_bytes_in_use', 0)


def _inference(case):
  """(params, images) -> logits, with the shapes of both."""
  model = case.module()
  images = jax.ShapeDtypeStruct((case.batch, *case.size, 3), case.dtype)
  params = _param_shapes(model, case.size)

  def stored(path, leaf):
    names = [entry.key for entry in path]
    matrix = names[-1] == 'kernel' and 'conv1d' not in names
    return jax.ShapeDtypeStruct(
      leaf.shape, case.dtype if matrix else leaf.dtype
    )

  params = jax.tree_util.tree_map_with_path(stored, params)

  def infer(params, images):
    return model.apply({'params': params}, images)[0]

  return infer, (params, images), ()


def _training(case):
  """The train step of a classification, AdamW, with the shapes it takes."""
  task = classify.Classify(
    model=case.module(),
    role='student',
    mean=IMAGENET[0],
    std=IMAGENET[1],
    config=ml_collections.ConfigDict({'classify': CLASSIFY}),
  )
  optimizer = optax.adamw(1.0, b2=0.98, weight_decay=0.05)
  step = steps.make_train_step(task, optimizer)
  params = {'student': _param_shapes(task.model, case.size)}
  shape = jax.ShapeDtypeStruct
  state = steps.TrainState(
    shape((), 'int32'), params, jax.eval_shape(optimizer.init, params), None
  )
  batch = {
    'image': shape((case.batch, *case.size, 3), 'uint8'),
    'label': shape((case.batch,), 'int32'),
  }
  key = jax.eval_shape(lambda: jax.random.key(0))
  return step, (state, {}, batch, key, shape((), 'float32')), (0,)


def _param_shapes(model, size):
  images = jnp.zeros((1, *size, 3))
  return jax.eval_shape(model.init, jax.random.key(0), images)['params']


def _values(shapes):
  """Random numbers for a tree of shapes: small, none alike, quick to make."""
  rng = np.random.default_rng(0)
  pool = 0.02 * rng.standard_normal(2**20, np.float32)

  def fill(path, leaf):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.random.key(0)
    if jnp.issubdtype(leaf.dtype, jnp.integer):
      return rng.integers(0, 200, leaf.shape).astype(leaf.dtype)
    values = np.resize(pool, leaf.shape)
    if 'nu' in [getattr(entry, 'name', None) for entry in path]:
      values = np.square(values)  # Adam's second moments
    return values.astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(fill, shapes)
