"""Tasks: what is trained, on which loss, from which networks."""

from linearizer_jax import models, sharding
from linearizer_jax.models import layers, teachers
from linearizer_jax.tasks.classify import Classify
from linearizer_jax.tasks.distill import Distill

# Tasks of no update: a stage that is its last evaluation.
EVALUATIONS = ('evaluate', 'zeroshot')


def image_shape(config):
  """(H, W, 3) of the images of a stage."""
  return (*layers.as_pair(config.data.image_size), 3)


def networks(task, params, frozen):
  """{role: (Module, params, (mean, std), (H, W) of its input or None)}.

  None stands for the size of the images. {} for a task of no such networks.
  """
  if isinstance(task, Distill):
    teacher = task.teacher, frozen['teacher'], task.teacher_stats
    student = task.student, params['student'], task.student_stats
    return {
      'teacher': (*teacher, task.teacher_size),
      'student': (*student, None),
    }
  if isinstance(task, Classify):
    network = task.model, params[task.role], (task.mean, task.std)
    return {task.role: (*network, None)}
  return {}


def make_task(config, mesh, num_classes):
  """The task of a stage, from the tables of models.

  Args:
    config: resolved config of a stage, a ConfigDict.
    mesh: the mesh that runs it.
    num_classes: of the data.

  Returns:
    `Distill`, or `Classify` for every other task.

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
    return Classify(model, role, *stats, config)
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
