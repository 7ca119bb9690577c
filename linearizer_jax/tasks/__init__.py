"""Tasks: what is trained, on which loss, from which networks."""

import math

from linearizer_jax import models, sharding
from linearizer_jax.models import layers, segmenter, teachers
from linearizer_jax.tasks.classify import Classify
from linearizer_jax.tasks.distill import Distill
from linearizer_jax.tasks.mae import MaskedAutoencoder
from linearizer_jax.tasks.segment import Segment

# Tasks of no update: a stage that is its last evaluation.
EVALUATIONS = ('evaluate', 'zeroshot', 'evaluate_segment')
SEGMENTATIONS = ('segment', 'evaluate_segment')


def reads_head(config):
  """Whether a stage looks at logits; probes of features do not."""
  return config.task != 'evaluate' or 'top1' in config.evaluate.metrics


def reads_features(config):
  """Whether a stage has neighbours or a linear classifier judge features."""
  wanted = {'knn', 'linear'} & set(config.evaluate.metrics)
  return config.task == 'evaluate' and bool(wanted)


def image_shape(config):
  """(H, W, 3) of the images of a stage."""
  return (*layers.as_pair(config.data.image_size), 3)


def label_struct(config):
  """Shape of one image's label, and its dtype."""
  if config.data.dense:
    return layers.as_pair(config.data.image_size), 'uint8'
  return (), 'int32'


def networks(task, params, frozen):
  """{role: (Module, params, (mean, std), (H, W) of its input or None)}.

  None stands for the size of the images.
  """
  if isinstance(task, Distill):
    teacher = task.teacher, frozen['teacher'], task.teacher_stats
    student = task.student, params['student'], task.student_stats
    return {
      'teacher': (*teacher, task.teacher_size),
      'student': (*student, None),
    }
  model = task.model.backbone if isinstance(task, Segment) else task.model
  return {task.role: (model, params[task.role], (task.mean, task.std), None)}


def make_task(config, mesh, num_classes):
  """The task of a stage, from the tables of models.

  Args:
    config: resolved config of a stage, a ConfigDict.
    mesh: the mesh that runs it.
    num_classes: of the data.

  Returns:
    `Distill`, `Segment`, `MaskedAutoencoder`, or `Classify` for every other
    task.

  Raises:
    ValueError: an unknown task or model, fields, grids or depths that do not
      fit, a mask ratio out of range.
  """
  placement = {'mesh': mesh, 'batch_axes': sharding.BATCH_AXES}
  if config.train_role not in ('student', 'teacher'):
    raise ValueError(
      f"config.train_role is {config.train_role!r}; expected 'student' or "
      "'teacher'."
    )
  if config.data.dense != (config.task in SEGMENTATIONS):
    raise ValueError(
      f'config.task is {config.task!r} and config.data.dense '
      f'{config.data.dense}: segmentation, and nothing else, takes a label for '
      'each pixel. Change one of them.'
    )
  if config.task in SEGMENTATIONS:
    role = config.train_role
    backbone, stats = models.from_config(
      config, role, num_classes=0, **placement
    )
    model = segmenter.from_config(config, backbone, num_classes)
    return Segment(model, role, *stats, config)
  if config.task in ('classify', *EVALUATIONS):
    role = config.train_role
    classes = num_classes if reads_head(config) else 0
    model, stats = models.from_config(
      config, role, num_classes=classes, **placement
    )
    return Classify(model, role, *stats, config)
  if config.task == 'mae':
    role = config.train_role
    model, stats = models.from_config(config, role, num_classes=0, **placement)
    task = MaskedAutoencoder(model, role, *stats, config)
    size = layers.as_pair(config.data.image_size)
    task.check(math.prod(layers.patch_grid(size, model.patch_size)))
    return task
  if config.task != 'distill':
    raise ValueError(
      f"config.task is {config.task!r}; expected 'distill', 'classify', 'mae', "
      "'evaluate', 'zeroshot', 'segment' or 'evaluate_segment'."
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
  task = Distill(
    student=student,
    teacher=teacher,
    student_stats=student_stats,
    teacher_stats=teacher_stats,
    teacher_size=teachers.teacher_input_size(grid, teacher.patch_size),
    config=config,
  )
  task.check(grid[0] * grid[1])
  return task
