"""The training loop, the only one: any task, any number of devices.

`run_stage` reads like a page; sections stand in the order in which things come
to exist. Each stage of a run (train a teacher, distil, fine-tune) goes through
it with its own resolved config.
"""

import collections
import logging
import math
import pathlib
import signal
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from linearizer_jax import (
  checkpoint,
  evaluate,
  metrics,
  models,
  optimizer,
  sharding,
  steps,
  zeroshot,
)
from linearizer_jax.convert import load, weights
from linearizer_jax.data import pipeline
from linearizer_jax.models import layers, teachers

# Tasks of no update: a stage that is its last evaluation.
EVALUATIONS = ('evaluate', 'zeroshot')

_log = logging.getLogger('linearizer_jax')


def run_stage(config, workdir, devices=None):
  """Trains one stage to its end; a stage that is done is not run again.

  Args:
    config: resolved config of the stage, a dict (`checkpoint.resolve_stage`).
    workdir: folder of the run, claimed by `checkpoint.claim_workdir`.
    devices: devices to use, all when None.

  Returns:
    Metrics of the last evaluation, 'seconds' of training and 'steps'; what
    `<workdir>/<stage>/result.json` says.

  Raises:
    ValueError: the config does not fit itself, the data or the devices.
    FloatingPointError: loss or gradient is not finite; names the step.
    SystemExit: SIGTERM came; the state was saved.
  """
  stage = config['stage']
  directory = checkpoint.stage_dir(workdir, stage)
  if (directory / 'result.json').is_file():
    result = checkpoint.read_json(directory / 'result.json')
    _log.info('%s: done before: %s', stage, _line(result))
    return result
  config = ml_collections.ConfigDict(config)

  # ------------------------------------------------------------------ mesh
  mesh = sharding.make_mesh(devices, config.parallel.fsdp)
  batch_size = config.batch_size

  # ------------------------------------------------------------------ data
  data = config.data.to_dict()
  share = {
    'process_index': jax.process_index(),
    'process_count': jax.process_count(),
  }
  iterator = pipeline.make_train_iterator(
    data, batch_size=batch_size, seed=config.seed, **share
  )
  eval_batches = pipeline.make_eval_batches(
    data, batch_size=config.eval_batch_size, **share
  )
  steps_per_epoch = pipeline.num_train_examples(data) / batch_size
  total_steps = config.steps or math.ceil(config.epochs * steps_per_epoch)
  eval_every = round(config.log.eval_every_epochs * steps_per_epoch)

  # ---------------------------------------------------- models and programs
  task = make_task(config, mesh, pipeline.num_classes(data))
  schedule = optimizer.make_schedule(config, total_steps, steps_per_epoch)
  tx = optimizer.make_optimizer(config, schedule)
  program = make_programs(config, task, tx, mesh)
  if config.task in EVALUATIONS:
    total_steps = 0

  # ------------------------- parameters born sharded, or where the run stood
  seeds = jax.random.split(jax.random.key(config.seed), 4)
  init_key, train_key, eval_key, teacher_key = seeds
  frozen = load_frozen(config, program, workdir, teacher_key)
  manager = checkpoint.open_manager(
    directory / 'checkpoints', config.checkpoint
  )
  start_step = manager.latest_step() or 0
  if start_step:
    state = checkpoint.restore(manager, start_step, program.state, iterator)
    _log.info('%s: goes on after step %d', stage, start_step)
  else:
    state = start_state(config, program, workdir, init_key)
  _log.info(
    '%s: %d steps of %d images on %d x %s; %s parameters train, %s are frozen',
    *(stage, total_steps, batch_size, mesh.size),
    mesh.devices.flat[0].device_kind,
    *(f'{_count(tree):,}' for tree in (state.params, frozen)),
  )

  # ------------------------------------------------------------------ loop
  recorder = Recorder(workdir, stage, start_step, total_steps, batch_size)
  results = None

  def run_evaluation(step):
    place = lambda batch: sharding.global_batch(mesh, batch)  # noqa: E731
    averages = {'': state.params, 'ema_': state.ema}
    values = {}
    for prefix, params in averages.items():
      if params is not None:
        means = evaluate.evaluate(
          program.eval_step, params, frozen, eval_batches, eval_key, place
        )
        values |= {prefix + name: value for name, value in means.items()}
    recorder.evaluation(step, values)
    return values

  def due(step, every):
    return step == total_steps or (every and step % every == 0)

  try:
    for step in range(start_step + 1, total_steps + 1):
      batch = sharding.global_batch(mesh, next(iterator))
      state, values = program.train_step(state, frozen, batch, train_key)
      recorder.add(step, values)
      if due(step, config.log.every_steps):
        recorder.write(step, {'learning_rate': float(schedule(step - 1))})
      tracked = None
      if due(step, eval_every):
        results = run_evaluation(step)
        tracked = checkpoint.improvement(manager, config.checkpoint, results)
      stopping = recorder.stop_requested(manager, step)
      if stopping or tracked or due(step, config.checkpoint.every_steps):
        recorder.check()
        checkpoint.save(manager, step, state, iterator, tracked)
      if stopping and step < total_steps:
        _log.info('%s: stopped by a signal, step %d is saved', stage, step)
        sys.exit(128 + signal.SIGTERM)
    if results is None:  # stopped between the last save and the result
      results = run_evaluation(total_steps)
  finally:
    manager.close()  # a save under way is finished whatever happened
    iterator.close()
    recorder.close()

  result = results | {'seconds': recorder.seconds, 'steps': total_steps}
  if jax.process_index() == 0:
    checkpoint.write_json(directory / 'result.json', result)
  return result


# ------------------------------------------------------------------- models


def check_stage(config, devices=None):
  """Raises ValueError for a stage that could not start, before any starts."""
  config = ml_collections.ConfigDict(config)
  mesh = sharding.make_mesh(devices, config.parallel.fsdp)
  steps_at_once = config.parallel.accumulate_steps
  sharding.check_batch(mesh, config.batch_size, steps_at_once)
  sharding.check_batch(mesh, config.eval_batch_size, field='eval_batch_size')
  num_classes = pipeline.num_classes(config.data.to_dict())
  task = make_task(config, mesh, num_classes)
  shape = image_shape(config)
  jax.eval_shape(lambda key: task.init(key, shape), jax.random.key(0))


def image_shape(config):
  """(H, W, 3) of the images of a stage."""
  return (*layers.as_pair(config.data.image_size), 3)


def make_task(config, mesh, num_classes):
  """The task of a stage, from the tables of models.

  Args:
    config: resolved config of a stage, a ConfigDict.
    mesh: the mesh that runs it.
    num_classes: of the data.

  Returns:
    `steps.Distill`, or `steps.Classify` for every other task.

  Raises:
    ValueError: an unknown task or model, fields, grids or depths that do not
      fit, a mask ratio out of range.
  """
  placement = {'mesh': mesh, 'batch_axes': sharding.BATCH_AXES}
  if config.task in ('classify', *EVALUATIONS):
    role = config.train_role
    model, stats = models.from_config(
      config, role, num_classes=num_classes, **placement
    )
    return steps.Classify(model, role, *stats, config)
  if config.task != 'distill':
    raise ValueError(
      f"config.task is {config.task!r}; expected 'distill', 'classify', "
      "'evaluate' or 'zeroshot'."
    )
  needs_logits = bool(config.distill.logit_weight)
  classes = num_classes if needs_logits else 0
  student, student_stats = models.from_config(
    config,
    'student',
    num_classes=classes,
    use_mask_token=config.distill.mask_ratio > 0,
    **placement,
  )
  grid = layers.patch_grid(
    layers.as_pair(config.data.image_size), student.patch_size
  )
  teacher, teacher_stats = models.from_config(
    config, 'teacher', num_classes=classes, **placement
  )
  task = steps.Distill(
    student=student,
    teacher=teacher,
    student_stats=student_stats,
    teacher_stats=teacher_stats,
    teacher_size=teachers.teacher_input_size(grid, teacher.patch_size),
    config=config,
  )
  task.check(grid[0] * grid[1])
  return task


# ----------------------------------------------------------------- programs


class Programs(NamedTuple):
  """Compiled on first use; `state` and `frozen` are their arguments' shapes.

  init_params: key -> params.
  init_frozen: key -> random parameters of a frozen teacher.
  init_state: params -> TrainState; params are donated.
  train_step: (state, frozen, batch, key) -> (state, metrics); state donated.
  eval_step: (params, frozen, batch, key) -> sums.
  """

  state: Any
  frozen: Any
  init_params: Any
  init_frozen: Any
  init_state: Any
  train_step: Any
  eval_step: Any


def make_programs(config, task, tx, mesh):
  """The jitted functions of a stage, with the sharding of all they touch.

  Nothing is computed or placed: the mesh may be of devices that are not there.

  Args:
    config: resolved config of a stage, a ConfigDict.
    task, tx: the task and its optimizer.
    mesh: from `sharding.make_mesh`.

  Returns:
    `Programs`.
  """
  ema_decay = config.optimizer.ema_decay

  def init_params(key):
    return task.init(key, image_shape(config))

  def init_state(params):
    copy = jax.tree.map(jnp.copy, params) if ema_decay else None
    return steps.TrainState(jnp.int32(0), params, tx.init(params), copy)

  key = jax.eval_shape(lambda: jax.random.key(0))
  params = sharding.with_sharding(mesh, jax.eval_shape(init_params, key))
  state = sharding.with_sharding(mesh, jax.eval_shape(init_state, params))
  frozen = sharding.with_sharding(mesh, jax.eval_shape(task.init_frozen, key))
  params_at, state_at, frozen_at = (
    jax.tree.map(lambda x: x.sharding, tree) for tree in (params, state, frozen)
  )
  whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  # On CPU, optimising the random numbers of a fresh model takes the compiler
  # longer than the train step.
  on_cpu = mesh.devices.flat[0].platform == 'cpu'
  once = {'xla_backend_optimization_level': 0} if on_cpu else None
  train_step = steps.make_train_step(
    task,
    tx,
    accumulate_steps=config.parallel.accumulate_steps,
    ema_decay=ema_decay,
  )
  return Programs(
    state=state,
    frozen=frozen,
    init_params=jax.jit(
      init_params, out_shardings=params_at, compiler_options=once
    ),
    init_frozen=jax.jit(
      task.init_frozen, out_shardings=frozen_at, compiler_options=once
    ),
    init_state=jax.jit(init_state, out_shardings=state_at, donate_argnums=0),
    train_step=jax.jit(
      train_step,
      in_shardings=(state_at, frozen_at, split, whole),
      out_shardings=(state_at, whole),
      donate_argnums=0,
    ),
    eval_step=jax.jit(
      steps.make_eval_step(task),
      in_shardings=(params_at, frozen_at, split, whole),
      out_shardings=whole,
    ),
  )


# ------------------------------------------------------------------ weights


def start_state(config, program, workdir, key):
  """A fresh train state; from other weights where `config.init` names some.

  What is only evaluated has to come from somewhere: `config.init`, or for a
  teacher `config.teacher.weights`.
  """
  params = program.init_params(key)
  evaluated = config.task in EVALUATIONS
  if not (config.init or evaluated):
    return program.init_state(params)
  (role,) = [r for r in ('student', 'teacher') if r in params]
  source = config.init or (config.teacher.weights if role == 'teacher' else '')
  if evaluated and role == 'student' and not source:
    raise ValueError(
      f"config.task is {config.task!r}, but config.init is '': there is no "
      "student to evaluate. Set config.init to 'stage:NAME', the work "
      'directory of a run, or weights of an Adventurer.'
    )
  shapes, may_lack = params[role], ('head', 'mask_token')
  if config.task == 'zeroshot':  # its head is made, not read
    shapes = {name: x for name, x in shapes.items() if name != 'head'}
  elif evaluated:
    may_lack = ('mask_token',)
  loaded = load_network(config, source, role, shapes, workdir)
  if config.task == 'zeroshot':
    projection = loaded.get('proj')
    if role == 'student':
      projection = load_class_projection(config.init, workdir)
    loaded = loaded | {'head': zeroshot.head(config, projection)}
  params[role] = jax.tree.map(
    lambda old, new: jax.device_put(np.asarray(new, old.dtype), old.sharding),
    params[role],
    checkpoint.merge_params(params[role], loaded, source, may_lack=may_lack),
  )
  return program.init_state(params)


def load_class_projection(source, workdir):
  """The layer from a student's class token to the teacher's, which it learnt.

  Raises:
    ValueError: `source` is no run, or one without `class_weight`.
  """
  stage = None
  if source.startswith('stage:'):
    stage, source = source.removeprefix('stage:'), workdir
  heads, _ = checkpoint.load_params(source, stage=stage, role='heads')
  if 'class' not in heads:
    raise ValueError(
      f'the student of {source} never learnt the class token of its teacher: '
      'zero-shot needs a distillation with config.distill.class_weight above 0.'
    )
  return heads['class']


def load_frozen(config, program, workdir, key):
  """The teacher's parameters on the devices; {} where there is no teacher."""
  if not program.frozen:
    return {}
  source = config.teacher.weights
  if source == 'random':
    return program.init_frozen(key)
  loaded = load_network(
    config, source, 'teacher', program.frozen['teacher'], workdir
  )
  loaded = checkpoint.merge_params(
    program.frozen['teacher'], loaded, source, may_lack=()
  )
  return {
    'teacher': jax.tree.map(
      lambda new, at: jax.device_put(np.asarray(new, at.dtype), at.sharding),
      loaded,
      program.frozen['teacher'],
    )
  }


def load_network(config, source, role, shapes, workdir):
  """Parameters of one network from wherever the config says they are.

  Args:
    config: resolved config of the stage that needs them.
    source: 'stage:NAME' of this run, another run's work directory, or
      published weights of the network's family: a file, a folder or a hub id
      ('' for the one in the table of teachers).
    role: 'student' or 'teacher'.
    shapes: parameter tree of the network, of anything with shape and dtype.
    workdir: of this run.

  Returns:
    Nested dict of NumPy arrays.

  Raises:
    ValueError: nothing there, or of another network.
    FileNotFoundError: no such file, no network.
  """
  if source.startswith('stage:'):
    params, info = checkpoint.load_params(
      workdir, stage=source.removeprefix('stage:'), role=role
    )
  elif source and any(pathlib.Path(source).glob('*/checkpoints')):
    params, info = checkpoint.load_params(source, role=role)
  else:
    row = teachers.TEACHERS.get(config[role].name)
    if row is None and source:
      found = load.load(
        source, image_size=config[role].image_size or config.data.image_size
      )
      return found.variables['params']
    if row is None or not row.family:
      raise ValueError(
        f'{source!r} holds no weights for {config[role].name}: expected '
        "'stage:NAME', the work directory of a run or, for a student, weights "
        'of an Adventurer. Change config.teacher.weights or config.init.'
      )
    return weights.load_weights(
      source or row.source,
      row.family,
      shapes,
      archive=row.archive,
      activation=models.create_model(row.model).activation,
    )
  _log.info('%s from %s, step %d', role, info['stage'], info['step'])
  return params


# ------------------------------------------------------------------ records


class Recorder:
  """Everything a run says while it goes on: files, log lines, bar, faults.

  Args:
    workdir, stage: of the run.
    start_step, total_steps: updates taken before, and in all.
    batch_size: images in an update.
  """

  # Updates the host may run ahead of the devices.
  LEAD = 2

  def __init__(self, workdir, stage, start_step, total_steps, batch_size):
    first = jax.process_index() == 0
    self._stage, self._batch_size = stage, batch_size
    self._writer = metrics.MetricWriter(workdir, stage, start_step, first)
    self._bar = metrics.progress_bar(
      stage, start_step, total_steps, batch_size, first
    )
    self._pending = collections.deque()
    self._values = {}
    self._stop = False
    self._old_handler = signal.signal(signal.SIGTERM, self._on_signal)
    self.seconds = sum(
      record['interval_seconds']
      for record in metrics.read(workdir)
      if record['stage'] == stage and 'interval_seconds' in record
    )
    self._since, self._since_step = time.perf_counter(), start_step

  def add(self, step, values):
    """Takes an update's metrics, on the devices; looks at older ones."""
    self._pending.append((step, values))
    while len(self._pending) > self.LEAD:
      self._look(*self._pending.popleft())
    self._bar.update(self._batch_size)

  def check(self):
    """Waits for every update so far and looks at it."""
    while self._pending:
      self._look(*self._pending.popleft())

  def write(self, step, values):
    """Records the update `step`, with the time since the last record."""
    self.check()
    now = time.perf_counter()
    interval = now - self._since
    images = (step - self._since_step) * self._batch_size
    self._since, self._since_step = now, step
    self.seconds += interval
    timing = {
      'interval_seconds': interval,
      'images_per_second': images / interval,
    }
    self._writer.write(step, 'train', self._values | values | timing)
    self._bar.set_postfix(loss=f'{self._values["loss"]:.4f}')

  def evaluation(self, step, values):
    """Records an evaluation; its time is not training time."""
    self._writer.write(step, 'eval', values)
    _log.info('%s: step %d: %s', self._stage, step, _line(values))
    self._since = time.perf_counter()
    self._since_step = step

  def stop_requested(self, manager, step):
    """Whether SIGTERM came, to any process of the run."""
    if jax.process_count() > 1:
      return manager.reached_preemption(step)
    return self._stop

  def close(self):
    signal.signal(signal.SIGTERM, self._old_handler)
    self._bar.close()
    self._writer.close()

  def _look(self, step, values):
    self._values = {k: float(v) for k, v in jax.device_get(values).items()}
    for name in ('loss', 'gradient_norm'):
      if not math.isfinite(self._values[name]):
        raise FloatingPointError(
          f'{name} is {self._values[name]} at step {step} of stage '
          f'{self._stage!r}. The run stops; checkpoints saved before are good. '
          'Lower config.optimizer.learning_rate, set '
          'config.optimizer.clip_norm, or change config.seed, and start again.'
        )

  def _on_signal(self, number, frame):
    del number, frame
    self._stop = True


def _line(values):
  """Metrics as one short line."""
  return ', '.join(
    f'{name} {value:.4g}'
    for name, value in values.items()
    if isinstance(value, int | float) and '_stage' not in name
  )


def _count(tree):
  """Number of scalars in a tree of arrays."""
  return sum(x.size for x in jax.tree.leaves(tree))
