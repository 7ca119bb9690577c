"""Where the weights of a stage come from, on the devices."""

import logging
import pathlib

import jax
import numpy as np

from linearizer_jax import checkpoint, models, tasks, zeroshot
from linearizer_jax.convert import load, weights
from linearizer_jax.models import teachers

_log = logging.getLogger('linearizer_jax')


def start_state(config, program, workdir, key):
  """A fresh train state; from other weights where `config.init` names some.

  What is only evaluated has to come from somewhere: `config.init`, or for a
  teacher `config.teacher.weights`.
  """
  params = program.init_params(key)
  evaluated = config.task in tasks.EVALUATIONS
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
    lambda old, new: (
      old
      if new is old  # cut over hosts, it could not be read here
      else jax.device_put(np.asarray(new, old.dtype), old.sharding)
    ),
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
