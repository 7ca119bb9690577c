"""The training loop, the only one: any task, any number of devices.

`run_stage` reads like a page; sections stand in the order in which things come
to exist. Each stage of a run (train a teacher, distil, fine-tune) goes through
it with its own resolved config.
"""

import functools
import logging
import math
import signal
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from linearizer_jax import (
  arithmetic,
  checkpoint,
  checksums,
  chips,
  evaluate,
  hosts,
  maps,
  optimizer,
  probe,
  recorder,
  sharding,
  start,
  steps,
  tasks,
)
from linearizer_jax.data import pipeline

_log = logging.getLogger('linearizer_jax')


def run_stage(config, workdir, devices=None, shared=None):
  """Trains one stage to its end; a stage that is done is not run again.

  Args:
    config: resolved config of the stage, a dict (`checkpoint.resolve_stage`).
    workdir: folder of the run, claimed by `checkpoint.claim_workdir`.
    devices: devices to use, all when None.
    shared: dict of the run, which `shared_programs` fills and reads.

  Returns:
    Metrics of the last evaluation, 'seconds' of training and 'steps'; what
    `<workdir>/<stage>/result.json` says.

  Raises:
    ValueError: the config does not fit itself, the data or the devices.
    FloatingPointError: loss or gradient is not finite, more often than
      `optimizer.max_nonfinite_steps` allows; names the step.
    OSError: a checkpoint could not be written; those before are good.
    SystemExit: SIGTERM came; the state was saved.
  """
  stage = config['stage']
  directory = checkpoint.stage_dir(workdir, stage)
  if hosts.as_first_sees((directory / 'result.json').is_file()):
    result = checkpoint.read_json(directory / 'result.json')
    _log.info('%s: done before: %s', stage, recorder.as_line(result))
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
  whole_split = functools.partial(
    pipeline.make_eval_batches, data, batch_size=config.eval_batch_size, **share
  )
  eval_batches = whole_split()
  total_steps, steps_per_epoch = _length(config, data)
  eval_every = round(config.log.eval_every_epochs * steps_per_epoch)
  draw_every = round(config.log.images_every_epochs * steps_per_epoch)

  # ---------------------------------------------------- models and programs
  rates = optimizer.learning_rates(config, total_steps, steps_per_epoch)
  num_classes = pipeline.num_classes(data)
  program = shared_programs(config, mesh, num_classes, shared)

  # ------------------------- parameters born sharded, or where the run stood
  seeds = jax.random.split(jax.random.key(config.seed), 4)
  init_key, train_key, eval_key, teacher_key = seeds
  frozen = start.load_frozen(config, program, workdir, teacher_key)
  saved = directory / 'checkpoints'
  checksums.set_aside_damaged(saved)
  manager = checkpoint.open_manager(saved, config.checkpoint)
  start_step = manager.latest_step() or 0
  if start_step:
    state = checkpoint.restore(manager, start_step, program.state)
    iterator.set_state({'step': start_step})
    _log.info('%s: goes on after step %d', stage, start_step)
  else:
    state = start.start_state(config, program, workdir, init_key)
  _log.info(
    '%s: %d steps of %d images on %d x %s; %s parameters and %s frozen ones',
    *(stage, total_steps, batch_size, mesh.size),
    mesh.devices.flat[0].device_kind,
    *(f'{_count(tree):,}' for tree in (state.params, frozen)),
  )

  # ------------------------------------------------------------------ loop
  draw = None
  if draw_every:
    task = tasks.make_task(config, mesh, num_classes)
    draw = maps.map_drawer(task, mesh, data, share)
  record = recorder.Recorder(
    *(workdir, stage, start_step, total_steps, batch_size),
    profile_steps=config.log.profile_steps,
    max_nonfinite_steps=config.optimizer.max_nonfinite_steps,
  )
  record.peak_flops = chips.peak_flops(mesh.devices.flat[0])
  results = None

  def run_evaluation(step):
    place = lambda batch: sharding.global_batch(mesh, batch)  # noqa: E731
    averages = {'': state.params, 'ema_': state.ema}
    values = {}
    if tasks.reads_features(config):
      train_split = pipeline.DataConfig(**data).train_split
      values = probe.evaluate(
        program.features_step,
        state.params,
        config.evaluate,
        (whole_split(split=train_split), eval_batches),
        num_classes,
        mesh,
      )
    for prefix, params in averages.items():
      if params is not None and tasks.reads_head(config):
        means = evaluate.evaluate(
          program.eval_step,
          params,
          steps.constants(state, frozen),
          eval_batches,
          eval_key,
          place,
        )
        values |= {prefix + name: value for name, value in means.items()}
    record.evaluation(step, values)
    return values

  def due(step, every):
    return step == total_steps or (every and step % every == 0)

  try:
    for step in range(start_step + 1, total_steps + 1):
      batch = sharding.global_batch(mesh, record.fetch(step, iterator))
      arguments = frozen, batch, train_key, rates[step - 1]
      if step == start_step + 1:  # all compile before any waits for another
        traced = program.train_step.trace(state, *arguments)
        record.flops = arithmetic.count(traced.jaxpr) / mesh.size
        traced.lower().compile()
        hosts.wait_for_all('compiled')
      state, values = program.train_step(state, *arguments)
      record.add(step, values)
      if due(step, config.log.every_steps):
        record.write(step, {'learning_rate': float(rates[step - 1])})
      if draw and due(step, draw_every):
        record.image(step, 'maps', draw(state.params, frozen))
      tracked = None
      if due(step, eval_every):
        results = run_evaluation(step)
        tracked = checkpoint.improvement(manager, config.checkpoint, results)
      stopping = record.stop_requested()
      if stopping or tracked or due(step, config.checkpoint.every_steps):
        record.check()
        checkpoint.save(manager, step, state, tracked)
      if stopping and step < total_steps:
        _log.info('%s: stopped by a signal, step %d is saved', stage, step)
        sys.exit(128 + signal.SIGTERM)
    if results is None:  # stopped between the last save and the result
      results = run_evaluation(total_steps)
  finally:
    try:
      checkpoint.close(manager)  # a save under way is finished whatever happens
    finally:
      iterator.close()
      record.close()

  result = results | {'seconds': record.seconds, 'steps': total_steps}
  if hosts.is_first():
    checkpoint.write_json(directory / 'result.json', result)
  return result


def check_stages(configs, devices=None):
  """`check_stage` of each kind: it does not see the seed of a row."""
  unseen = ('stage', 'seed', 'init')
  kinds = {
    repr({k: v for k, v in config.items() if k not in unseen}): config
    for config in configs
  }
  for config in kinds.values():
    check_stage(config, devices)


def check_stage(config, devices=None):
  """Raises ValueError for a stage that could not start, before any starts."""
  config = ml_collections.ConfigDict(config)
  mesh = sharding.make_mesh(devices, config.parallel.fsdp)
  steps_at_once = config.parallel.accumulate_steps
  sharding.check_batch(mesh, config.batch_size, steps_at_once)
  sharding.check_batch(mesh, config.eval_batch_size, field='eval_batch_size')
  if config.seed < 0:
    raise ValueError(f'config.seed is {config.seed}; expected at least 0.')
  if len(config.log.profile_steps) != 2:
    raise ValueError(
      f'config.log.profile_steps is {config.log.profile_steps}; expected '
      '(first update, how many).'
    )
  data = config.data.to_dict()
  num_classes = pipeline.num_classes(data)
  if config.data.labels_per_class is not None:  # looks at every label
    pipeline.make_train_iterator(data, batch_size=mesh.size, seed=0).close()
  if config.task == 'evaluate':
    probe.check(config.evaluate, pipeline.num_train_examples(data))
  optimizer.learning_rates(config, *_length(config, data))
  start.weights_source(config)
  task = tasks.make_task(config, mesh, num_classes)
  shape = tasks.image_shape(config)
  jax.eval_shape(lambda key: task.init(key, shape), jax.random.key(0))


def _length(config, data):
  """Updates of a stage, and of an epoch."""
  per_epoch = pipeline.num_train_examples(data) / config.batch_size
  if config.task in tasks.EVALUATIONS:
    return 0, per_epoch
  updates = config.steps or math.ceil(config.epochs * per_epoch)
  if updates < 1:
    raise ValueError(
      f'config.epochs is {config.epochs}, config.steps {config.steps}: there '
      'is nothing to train. Raise config.epochs, or set config.steps.'
    )
  return updates, per_epoch


# ----------------------------------------------------------------- programs


class Programs(NamedTuple):
  """Compiled on first use; `state` and `frozen` are their arguments' shapes.

  init_params: key -> params, with 'batch_stats' where there is a batch norm.
  init_frozen: key -> random parameters of a frozen teacher.
  init_state: params -> TrainState; params are donated.
  train_step: (state, frozen, batch, key, rate) -> (state, metrics); state
    donated, rate float32.
  eval_step: (params, frozen, batch, key) -> sums.
  features_step: (params, batch) -> features, of a classification alone.
  """

  state: Any
  frozen: Any
  init_params: Any
  init_frozen: Any
  init_state: Any
  train_step: Any
  eval_step: Any
  features_step: Any


# Fields that a program is made of; rates, lengths, labels and files are not.
PROGRAM_FIELDS = (
  *('task', 'train_role', 'student', 'teacher', 'distill', 'classify'),
  *('segment', 'mae', 'evaluate', 'optimizer', 'parallel'),
)


def shared_programs(config, mesh, num_classes, shared=None):
  """The stage's `make_programs`, those of an earlier stage alike in all of it.

  Args:
    config: resolved config of a stage, a ConfigDict.
    mesh: from `sharding.make_mesh`.
    num_classes: of the data.
    shared: dict of what was made before, or None.

  Returns:
    `Programs`.
  """
  shared = {} if shared is None else shared
  fields = {name: config[name] for name in PROGRAM_FIELDS}
  fields = ml_collections.ConfigDict(fields).to_dict()
  fields['optimizer'].pop('learning_rate')
  fields['teacher'].pop('weights')
  windows = config.data.eval_window, config.data.eval_stride
  key = repr((fields, tasks.image_shape(config), windows)), mesh, num_classes
  if key not in shared:
    task = tasks.make_task(config, mesh, num_classes)
    tx = optimizer.make_optimizer(config)
    shared[key] = make_programs(config, task, tx, mesh)
  return shared[key]


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
  # Weights that no update follows have no average.
  updated = config.task not in tasks.EVALUATIONS
  ema_decay = config.optimizer.ema_decay if updated else 0.0

  def init_params(key):
    return task.init(key, tasks.image_shape(config))

  def init_state(params):
    params = dict(params)
    batch_stats = params.pop('batch_stats', None)
    copy = jax.tree.map(jnp.copy, params) if ema_decay else None
    return steps.TrainState(
      jnp.int32(0), params, tx.init(params), copy, batch_stats
    )

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
    skip_nonfinite=config.optimizer.max_nonfinite_steps > 0,
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
      in_shardings=(state_at, frozen_at, split, whole, whole),
      out_shardings=(state_at, whole),
      donate_argnums=0,
    ),
    eval_step=jax.jit(
      steps.make_eval_step(task),
      in_shardings=(
        state_at.params,
        steps.constants(state_at, frozen_at),
        split,
        whole,
      ),
      out_shardings=whole,
    ),
    features_step=jax.jit(
      steps.make_features_step(task),
      in_shardings=(state_at.params, split),
      out_shardings=whole,
    ),
  )


def _count(tree):
  """Number of scalars in a tree of arrays."""
  return sum(x.size for x in jax.tree.leaves(tree))
