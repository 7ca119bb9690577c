"""The train step of a distillation: images per second, share of the peak."""

import contextlib
import dataclasses
import pathlib
import runpy
import sys
import time
from typing import Any

import jax

from linearizer_jax import chips, optimizer, sharding, steps, tasks
from linearizer_jax.benchmark import flops, programs
from linearizer_jax.benchmark import run as benchmark
from linearizer_jax.kernels.compare.worker import Worker, WorkerError
from linearizer_jax.kernels.ssd import api

STARTING = 0.15  # share of the time of a process of its own, for its start


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
  """One train step; as `programs.Case`.

  Attributes:
    config: ConfigDict of a distillation, with the batch and the scan.
    device: that runs it.
  """

  config: Any
  device: Any
  direction = 'training'

  @property
  def batch(self):
    return self.config.batch_size

  def task(self):
    mesh = sharding.make_mesh([self.device])
    return tasks.make_task(self.config, mesh, programs.CLASSES)

  def program(self):
    """The step that `train.make_programs` jits, with the shapes it takes."""
    config, task = self.config, self.task()
    tx, size = optimizer.make_optimizer(config), tasks.image_shape(config)
    ema_decay = config.optimizer.ema_decay
    step = steps.make_train_step(
      task,
      tx,
      accumulate_steps=config.parallel.accumulate_steps,
      ema_decay=ema_decay,
      skip_nonfinite=config.optimizer.max_nonfinite_steps > 0,
    )
    struct = jax.ShapeDtypeStruct
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(lambda key: task.init(key, size), key)
    state = steps.TrainState(
      struct((), 'int32'),
      params,
      jax.eval_shape(tx.init, params),
      params if ema_decay else None,
    )
    batch = {
      'image': struct((self.batch, *size), 'uint8'),
      'label': struct((self.batch,), 'int32'),
    }
    frozen = jax.eval_shape(task.init_frozen, key)
    return step, (state, frozen, batch, key, struct((), 'float32')), (0,)

  def row(self):
    """What is known without compiling; FLOPs of the method.

    Products of the teacher's forward pass, and of the student's three times:
    the backward pass is twice its forward. Losses are left out.
    """
    task = self.task()
    size = tasks.image_shape(self.config)[:2]
    arithmetic = flops.count(task.student, size, 'training')
    arithmetic += flops.count(task.teacher, task.teacher_size, 'inference')
    return {
      'implementation': self.config.student.ssd_implementation,
      'batch': self.batch,
      'gflop_per_image': arithmetic / 1e9,
    }


def run(path, *, device, batch, implementations, seconds, max_gib=None):
  """Rows of a distillation's step with each implementation of the scan.

  Args:
    path: of the config, with an argument after a colon where it has one.
    device: a jax device.
    batch: images in a step.
    implementations: names in `api.IMPLEMENTATIONS`; None for what the platform
      takes by default, XLA's and the kernels written for it.
    seconds: of the whole.
    max_gib: a program that needs more is not run; the device's memory when
      None.

  Returns:
    Results as `__main__` writes them; rows as of `programs.measure`, with
    'implementation', 'gflop_per_image' (of the method) and
    'flops_utilization', None where the device's peak is not known.

  Raises:
    ValueError: no distillation, or one that does not fit itself.
  """
  end = time.monotonic() + seconds
  cases = make_cases(path, device, batch, implementations)
  made = benchmark.compile_all(
    cases,
    device,
    time.monotonic() + benchmark.COMPILING * seconds,
    refusals=Exception,  # one that fails becomes a row, the others go on
  )
  limit = max_gib or programs.memory_limit(device) / programs.GIB
  each = max(end - time.monotonic(), 0) / 2  # half for warming up
  rows = programs.measure(made, each, end, limit)
  peak = chips.peak_flops(device)
  for row in rows:
    speed, share = row['images_per_second'], None
    if speed and peak:
      share = 1e9 * row['gflop_per_image'] * speed / peak
    row['flops_utilization'] = share
  about = {'config': path, 'batch': batch, 'seconds': seconds}
  return benchmark.about(device, **about) | {'rows': rows}


def run_apart(path, *, device, batch, implementations, seconds, max_gib=None):
  """As `run`, but one after another, each in a process of its own.

  A kernel that hangs or breaks its connection with the device takes nothing
  else with it. This process must not hold the device's memory.
  """
  end, rows = time.monotonic() + seconds, []
  cases = make_cases(path, device, batch, implementations)
  for i, case in enumerate(cases):
    left = (end - time.monotonic()) / (len(cases) - i)
    options = {
      'batch': batch,
      'implementations': [case.config.student.ssd_implementation],
      'seconds': (1 - STARTING) * left,
      'max_gib': max_gib,
    }
    with contextlib.closing(Worker(Alone)) as alone:
      try:
        rows += alone.ask('rows', path, options, timeout=left)
      except WorkerError as error:
        (row,) = programs.measure({case: str(error)}, 0, 0, 0)
        rows.append(row | {'flops_utilization': None})
  about = {'config': path, 'batch': batch, 'seconds': seconds}
  return benchmark.about(device, **about) | {'rows': rows}


class Alone:
  """`run` on the first device, for a `Worker`."""

  def rows(self, path, options):
    return run(path, device=jax.devices()[0], **options)['rows']


def make_cases(path, device, batch, implementations):
  """A `Case` for each implementation, or those of the platform.

  Raises:
    ValueError: no distillation, or one that does not fit itself.
  """
  platform, cases = device.platform, []
  names = implementations or dict.fromkeys(
    [
      api.DEFAULT_IMPLEMENTATION.get(platform, 'xla'),
      *(name for name in api.IMPLEMENTATIONS if name.endswith(platform)),
      'xla',
    ]
  )
  for name in names:
    config = load_config(path)
    config.batch_size, config.student.ssd_implementation = batch, name
    cases.append(Case(config, device))
    cases[-1].row()  # what does not fit is an error before anything is compiled
  return cases


def load_config(path):
  """The config of 'configs/distill_base.py:argument'.

  Raises:
    ValueError: no such file, or not of a distillation.
  """
  file, _, argument = path.partition(':')
  file = pathlib.Path(file).resolve()
  if not file.is_file():
    raise ValueError(f'--distill={path}: there is no file {file}.')
  if str(file.parents[1]) not in sys.path:  # configs import each other
    sys.path.insert(0, str(file.parents[1]))
  config = runpy.run_path(str(file))['get_config'](argument or None)
  if config.task != 'distill':
    raise ValueError(
      f'--distill={path}: its config.task is {config.task!r}, expected '
      "'distill'."
    )
  return config


def markdown(results):
  """The results as Markdown."""
  lines = [
    f'```bash\n{results["command"]}\n```\n',
    f'{results["device"]}, jax {results["jax"]}, {results["batch"]} images a '
    'step, random images and weights. Medians of steps. Utilisation '
    'is that of bfloat16 products at peak: of the method, three passes of the '
    'student and one of the teacher, without what is computed twice.',
    '',
    '| scan | images/s | ms | utilisation | GFLOP an image | GiB |',
    '|---|---|---|---|---|---|',
  ]
  reasons = []
  for row in results['rows']:
    if row['reason']:
      reasons.append(f'- {row["implementation"]}: {row["reason"]}.')
    share, memory = row['flops_utilization'], row['memory_gib']
    cells = [
      row['implementation'],
      _number(row['images_per_second']),
      _number(row['milliseconds']),
      '-' if share is None else f'{100 * share:.1f}%',
      _number(row['gflop_per_image']),
      _number(memory),
    ]
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join([*lines, '', *reasons]).strip()


def _number(value):
  """Four digits, or a dash."""
  if value is None:
    return '-'
  return f'{value:.0f}' if value >= 1000 else f'{value:.4g}'
