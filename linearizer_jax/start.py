"""Where the weights of a stage come from, on the devices."""

import logging
import pathlib
import shlex

import jax
import ml_collections
import numpy as np

from linearizer_jax import checkpoint, models, tasks, zeroshot
from linearizer_jax.convert import load, weights
from linearizer_jax.models import teachers
from linearizer_jax.models.adventurer import flip_schedule

_log = logging.getLogger('linearizer_jax')

# Fields of `config.student` and `config.teacher` that decide the parameters, or
# what they mean.
SIZES = (
  *('width', 'depth', 'patch_size', 'num_heads', 'class_token'),
  *('head_dim', 'state_dim'),
)


def weights_source(config):
  """Where the weights of a stage come from; '' where they start fresh.

  Args:
    config: resolved config of a stage, a ConfigDict.

  Raises:
    ValueError: a stage without updates that has nothing to evaluate.
  """
  if config.init or config.task not in tasks.EVALUATIONS:
    return config.init
  if config.train_role == 'teacher':
    return config.teacher.weights or config.teacher.name
  raise ValueError(
    f"config.task is {config.task!r}, but config.init is '': there is no "
    "student to evaluate. Set config.init to 'stage:NAME', the work "
    'directory of a run, or weights of an Adventurer.'
  )


def start_state(config, program, workdir, key):
  """A fresh train state; from other weights where `config.init` names some.

  What is only evaluated has to come from somewhere: `config.init`, or for a
  teacher `config.teacher.weights`.
  """
  source = weights_source(config)
  params = program.init_params(key)
  if not source:
    return program.init_state(params)
  (role,) = [r for r in ('student', 'teacher') if r in params]
  shapes, may_lack = params[role], ('mask_token',)
  if config.task != 'evaluate':  # its head starts fresh, or is made of texts
    shapes = {name: x for name, x in shapes.items() if name != 'head'}
    may_lack += ('head',)
  loaded = load_network(config, source, role, shapes, workdir)
  if config.task == 'evaluate_segment':
    params |= load_segment_head(params, source, workdir)
  if config.task == 'evaluate' and 'head' in shapes and 'head' not in loaded:
    raise ValueError(
      f'{source} has no head, so it names no class: fine-tune it, or set '
      "config.evaluate.metrics to ('knn', 'linear'), which need none."
    )
  if config.task == 'zeroshot':
    projection = loaded.get('proj')
    if role == 'student':
      projection = load_class_projection(config.init, workdir)
    loaded = loaded | {'head': zeroshot.head(config, projection)}
  merged = load.merge_params(params[role], loaded, source, may_lack=may_lack)
  params[role] = _placed(merged, params[role])
  return program.init_state(params)


def load_segment_head(params, source, workdir):
  """The head of a segmentation as it was trained, on the devices.

  Args:
    params: fresh ones, with 'heads' and where there is a batch norm
      'batch_stats'.
    source: a run, as `load_network` takes it, or an exported folder.
    workdir: of this run.

  Returns:
    Those two entries.

  Raises:
    ValueError: `source` has no such head, or one of other sizes or classes.
  """
  stage, made = None, ''
  if source.startswith('stage:'):
    stage, source = source.removeprefix('stage:'), workdir
  if any(pathlib.Path(source).glob('*/checkpoints')):
    found = checkpoint.describe(source, stage=stage)
    if found['config']['task'] != 'segment':
      raise ValueError(
        f'the stage {found["stage"]!r} of {source} is no segmentation, so it '
        'has no head to evaluate: point config.init to a run whose config.task '
        "is 'segment'."
      )
    heads, info = checkpoint.load_params(source, stage=stage, role='heads')
    loaded = {'heads': heads, 'batch_stats': info['batch_stats'] or {}}
    made = _made_with(info['config'])
  else:
    found = load.load(source).variables
    heads = {k: v for k, v in found['params'].items() if k != 'backbone'}
    loaded = {'heads': heads, 'batch_stats': found.get('batch_stats', {})}
  try:
    return {
      name: _placed(
        load.merge_params(
          params[name], loaded[name], f'{name} of {source}', may_lack=()
        ),
        params[name],
      )
      for name in ('heads', 'batch_stats')
      if name in params
    }
  except ValueError as error:
    raise ValueError(f'{error}{made}') from None


def _made_with(config):
  """What decides a segmenter's head, of the run that trained it."""
  fields = {
    f'segment.{name}': config['segment'][name]
    for name in ('head', 'channels', 'auxiliary_channels')
  }
  data = config['data']
  if data['num_classes'] is not None:  # else the data set knows it
    fields['data.num_classes'] = data['num_classes']
  flags = ' '.join(f'--config.{k}={value}' for k, value in fields.items())
  return f' They were made on {data["name"]!r} with {flags}'


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
  loaded = load.merge_params(
    program.frozen['teacher'], loaded, source, may_lack=()
  )
  return {'teacher': _placed(loaded, program.frozen['teacher'])}


def _placed(tree, like):
  """NumPy arrays on the devices, with the dtypes and shardings of `like`.

  What is of `like` itself stays: cut over hosts, it could not be read here.
  """

  def place(new, at):
    if new is at:
      return at
    return jax.device_put(np.asarray(new, at.dtype), at.sharding)

  return jax.tree.map(place, tree, like)


def load_network(config, source, role, shapes, workdir):
  """Parameters of one network from wherever the config says they are.

  Args:
    config: resolved config of the stage that needs them.
    source: 'stage:NAME' of this run, another run's work directory, or
      published weights of the network's family: a file, a folder or a hub id
      ('', or the name of the teacher, for the one in the table of teachers).
    role: 'student' or 'teacher'.
    shapes: parameter tree of the network, of anything with shape and dtype.
    workdir: of this run.

  Returns:
    Nested dict of NumPy arrays; positions are those of the network's grid,
    resized where the run's were of another.

  Raises:
    ValueError: nothing there, or of another network.
    FileNotFoundError: no such file, no network.
  """
  if source.startswith('stage:'):
    stage = source.removeprefix('stage:')
    known = checkpoint.read_config(workdir)['stages']
    if stage not in known:
      raise ValueError(
        f'{source!r} is no stage of {workdir}, which has {known}: add it to '
        'config.stages, or set config.teacher.weights or config.init to the '
        'work directory of a run that has it.'
      )
    params, info = checkpoint.load_params(workdir, stage=stage, role=role)
  elif source and any(pathlib.Path(source).glob('*/checkpoints')):
    params, info = checkpoint.load_params(source, role=role)
  else:
    row = teachers.TEACHERS.get(config[role].name)
    if row is None and source:
      found = load.load(
        source, image_size=config[role].image_size or config.data.image_size
      )
      old = getattr(found.model, 'backbone', found.model)
      new, _ = models.from_config(config, role)
      # A released file does not tell its flipped blocks, an export lists them.
      tells = not isinstance(getattr(old, 'flip_blocks', ''), str)
      names = (*SIZES, 'flip_blocks') if tells else SIZES
      check_sizes(source, role, old, new, names)
      params = found.variables['params']
      return params.get('backbone', params)  # of a segmenter
    if row is None or not row.family:
      raise ValueError(
        f'{source!r} holds no weights for {config[role].name}: expected '
        "'stage:NAME', the work directory of a run or, for a student, weights "
        'of an Adventurer. Change config.teacher.weights or config.init; other '
        "weights of a ViT need config.teacher.name to be their family's, as "
        'supervised_base_patch16 is for ViTs of transformers.'
      )
    own = source in ('', config[role].name)
    model, _ = models.from_config(config, role)
    return weights.load_weights(
      row.source if own else source,
      row.family,
      shapes,
      archive=row.archive,
      fields=dict(activation=model.activation, num_heads=model.num_heads),
    )
  _log.info('%s from %s, step %d', role, info['stage'], info['step'])
  old_config = ml_collections.ConfigDict(info['config'])
  (old, _), (new, _) = (
    models.from_config(c, role) for c in (old_config, config)
  )
  check_sizes(source, role, old, new, (*SIZES, 'flip_blocks'))
  return load.fit_positions(params, old, new)


def check_sizes(source, role, old, new, names=SIZES):
  """Compares the network that weights are of with the one that is to run.

  Args:
    source: of the weights, for the error.
    role: 'student' or 'teacher', the section of the config.
    old, new: Modules.
    names: fields to compare.

  Raises:
    ValueError: they differ; with the flags that make them agree.
  """
  if type(old) is not type(new):
    raise ValueError(
      f'the weights of {source} are of the kind {type(old).__name__}, but '
      f'config.{role}.name makes a network of the kind {type(new).__name__}: '
      'change it, or give other weights.'
    )

  def value(model, name):
    found = getattr(model, name, None)
    if name == 'flip_blocks' and found is not None:
      found = tuple(sorted(flip_schedule(found, model.depth)))
    return found

  flags = [
    shlex.quote(f'--config.{role}.{name}={value(old, name)}')
    for name in names
    if value(old, name) not in (None, value(new, name))
  ]
  if flags:
    raise ValueError(
      f'the weights of {source} are of a network of other sizes than '
      f'config.{role}; for theirs add {" ".join(flags)}'
    )
