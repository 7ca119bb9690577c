"""Label maps: what segmentations make of images, beside the true labels."""

import math
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from linearizer_jax import checkpoint, evaluate
from linearizer_jax.convert import load
from linearizer_jax.data import config as data_config
from linearizer_jax.data import dense, transforms
from linearizer_jax.models import segmenter
from linearizer_jax.tasks.segment import Segment

# Okabe and Ito's eight and four more, as far apart as those whether or not an
# eye tells red from green or blue from yellow.
COLORS = (
  *('#56B4E9', '#772200', '#F0E442', '#CC79A7', '#E69F00', '#009E73'),
  *('#8800FF', '#001188', '#0072B2', '#D55E00', '#AAFF99', '#000000'),
)
FRAME_WIDTH = 2.4  # inches


class Run(NamedTuple):
  """A trained segmentation.

  task: `Segment`, with `params` and `frozen` as it takes them.
  data: `DataConfig` of its training.
  """

  task: Any
  params: Any
  frozen: Any
  data: Any


def load_run(source, stage=None):
  """The `Run` of a work directory.

  Args:
    source: a work directory.
    stage: name of a stage; the last finished one when None.

  Raises:
    ValueError: no such directory or stage, or one that is no segmentation.
  """
  info = checkpoint.describe(source, stage=stage)
  if info['config']['task'] != 'segment':
    raise ValueError(
      f'the stage {info["stage"]!r} of {source} is no segmentation: its '
      f'config.task is {info["config"]["task"]!r}.'
    )
  model, variables, preprocess = load.load(source, stage=info['stage'])
  config = ml_collections.ConfigDict(info['config'])
  heads = dict(variables['params'])
  params = {'student': heads.pop('backbone'), 'heads': heads}
  task = Segment(model, 'student', preprocess.mean, preprocess.std, config)
  data = data_config.parse(info['config']['data'])
  return Run(task, params, variables, data)


def predict(run, source):
  """Classes of all pixels of the images of a source.

  As an evaluation computes them: the image at the run's `data.short_side`,
  through its windows, logits resized to the size of the labels.

  Args:
    run: `Run`.
    source: of `data.dense`.

  Returns:
    List of uint8 (h, w), one an image, of the size of its labels.

  Raises:
    ValueError: an image cannot be decoded, or does not fit its labels.
  """
  logits_of = jax.jit(run.task.logits)
  found = [None] * len(source)
  plan = dense.eval_plan(source, run.data, 1)
  for step, ((index,), *_) in enumerate(plan):
    batch = dense.eval_batch(source, run.data, plan, 0, 1, step)
    if not batch['valid'].all():
      transforms.decoded(source[index], 'RGB')  # says what is wrong
    images = {name: batch[name] for name in ('image', 'size')}
    logits = logits_of(run.params, run.frozen, images)
    (height, width), label_size = batch['size'][0], batch['label_size'][0]
    logits = segmenter.resize(logits[:, :height, :width], tuple(label_size))
    found[index] = np.asarray(logits[0].argmax(-1), np.uint8)
  return found


def scores(label, predicted, num_classes):
  """`evaluate.segmentation_metrics` of one image: uint8 (h, w) against another.

  Raises:
    ValueError: no pixel is labelled.
  """
  kept = label != dense.IGNORED
  pairs = label[kept].astype(np.int64) * num_classes + predicted[kept]
  confusion = np.bincount(pairs, minlength=num_classes**2)
  return evaluate.segmentation_metrics(
    confusion.reshape(num_classes, num_classes)
  )


def draw_label_maps(runs, images, labels, path, names=()):
  """Draws images, their labels and the predictions of runs, a row an image.

  Ignored pixels are white; below a prediction stand mIoU and pixel accuracy of
  that image. The legend has the classes that are to be seen.

  Args:
    runs: {name: `Run`}, all of the same classes.
    images, labels: files, one label file an image; ids as the runs' data
      configs say.
    path: file to write; its ending says what kind.
    names: of the classes, in order; ids when empty.

  Raises:
    ValueError: another number of labels or names, runs of different classes,
      or files that do not fit each other.
  """
  from matplotlib import figure

  _check(runs, images, labels, names)
  data = next(iter(runs.values())).data
  source = dense.files(zip(images, labels, strict=True), data)
  examples = [source[index] for index in range(len(source))]
  predicted = {name: predict(run, source) for name, run in runs.items()}

  rows, columns = len(examples), 2 + len(runs)
  height, width = examples[0]['label'].shape
  canvas = figure.Figure(
    figsize=(
      FRAME_WIDTH * columns,
      (FRAME_WIDTH * height / width + 0.25) * rows + 0.8,
    ),
    layout='constrained',
  )
  axes = canvas.subplots(rows, columns, squeeze=False)
  colors, seen = palette(data.num_classes), set()
  for n, (line, example) in enumerate(zip(axes, examples, strict=True)):
    label = example['label']
    line[0].imshow(transforms.decoded(example, 'RGB'))
    panels = [label, *(maps[n] for maps in predicted.values())]
    for axis, panel in zip(line[1:], panels, strict=True):
      axis.imshow(colors[panel], interpolation='nearest')
      seen |= set(np.unique(panel))
    for axis, panel in zip(line[2:], panels[1:], strict=True):
      found = scores(label, panel, data.num_classes)
      axis.set_xlabel(
        f'mIoU {found["mIoU"]:.0f}, pixels {found["pixel_accuracy"]:.0f} %',
        fontsize=9,
      )
    for axis in line:
      axis.set(xticks=[], yticks=[])
  for axis, title in zip(axes[0], ('image', 'label', *runs), strict=True):
    axis.set_title(title, fontsize=10)
  _legend(canvas, columns, sorted(seen), colors, names)
  canvas.savefig(path, dpi=150)


def _check(runs, images, labels, names):
  """Raises the errors of `draw_label_maps` that need no file."""
  data = next(iter(runs.values())).data
  for name, run in runs.items():
    if run.data.num_classes != data.num_classes:
      raise ValueError(
        f'{name} was trained on {run.data.num_classes} classes, '
        f'{next(iter(runs))} on {data.num_classes}: draw them apart.'
      )
  if len(images) != len(labels):
    raise ValueError(
      f'--images has {len(images)} files, --labels {len(labels)}; expected one '
      'label file an image, in the same order.'
    )
  if names and len(names) != data.num_classes:
    raise ValueError(
      f'--names has {len(names)} names, the runs have {data.num_classes} '
      'classes.'
    )


def _legend(canvas, columns, classes, colors, names):
  """Names or ids of the classes that are to be seen, below a figure."""
  from matplotlib import patches

  titles = dict(enumerate(names)) | {dense.IGNORED: 'ignored'}
  handles = [
    patches.Patch(
      facecolor=colors[n] / 255,
      edgecolor='black',
      linewidth=0.5,
      label=titles.get(n, str(n)),
    )
    for n in classes
  ]
  lines = math.ceil(len(handles) / int(FRAME_WIDTH * columns))
  canvas.legend(
    handles=handles,
    loc='outside lower center',
    ncols=math.ceil(len(handles) / lines),
    frameon=False,
    fontsize=9,
  )


def palette(num_classes):
  """Colours of the ids of a label map, uint8 (256, 3); ignored is white.

  Of more classes than `COLORS` the rest is drawn at random, always the same.
  """
  found = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)
  known = [bytes.fromhex(color[1:]) for color in COLORS[:num_classes]]
  found[: len(known)] = np.frombuffer(b''.join(known), np.uint8).reshape(-1, 3)
  found[dense.IGNORED] = 255
  return found
