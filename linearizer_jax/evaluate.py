"""Metrics over a data set: every image counts once."""

import jax
import numpy as np


def evaluate(eval_step, params, frozen, batches, key, place):
  """Metrics of a task over all valid images.

  Args:
    eval_step: jitted function of `steps.make_eval_step`.
    params, frozen: as the step takes them.
    batches: iterable of dicts with 'image', 'label' and bool 'valid', NumPy.
    key: random key; the n-th batch gets the n-th fold of it, so that two
      evaluations see the same masks.
    place: puts a NumPy batch on the devices.

  Returns:
    {metric: float}: means over the images, and of the sum of the matrices
    'confusion', where the task gives them, what `segmentation_metrics` says.
    'count' is the number of images. Sums over batches are float64.

  Raises:
    ValueError: there is no image.
  """
  totals, pending = {}, {}

  def add(sums):
    for name, value in jax.device_get(sums).items():
      totals[name] = totals.get(name, 0) + np.asarray(value, np.float64)

  for n, batch in enumerate(batches):
    sums = eval_step(params, frozen, place(batch), jax.random.fold_in(key, n))
    add(pending)  # the batch before, while this one is computed
    pending = sums
  add(pending)
  count = int(totals.pop('count', 0))
  if not count:
    raise ValueError(
      'the evaluation split is empty; change config.data.eval_split.'
    )
  confusion = totals.pop('confusion', None)
  values = {name: float(v) / count for name, v in totals.items()}
  if confusion is not None:
    values |= segmentation_metrics(confusion)
  return values | {'count': count}


def segmentation_metrics(confusion):
  """What one confusion matrix of a whole data set says, in percent.

  IoU of a class: pixels that are and are called it, over those that are or are
  called it. A class that is neither in the labels nor in the predictions has
  none, and is left out of the mean; one that is called but never there has
  IoU 0.

  Args:
    confusion: (V, V) counts of pixels, rows the labels, columns the
      predictions.

  Returns:
    {'mIoU', 'pixel_accuracy', 'mean_accuracy' (over the classes that occur in
    the labels), 'classes' (number of those in the mIoU), 'iou_000': ...}.

  Raises:
    ValueError: no pixel has a label.
  """
  confusion = np.asarray(confusion, np.float64)
  if not confusion.sum():
    raise ValueError(
      'no pixel of the evaluation split has a label; check '
      'config.data.ignore_labels and the label files.'
    )
  hits = np.diag(confusion)
  labelled, called = confusion.sum(1), confusion.sum(0)
  union = labelled + called - hits
  iou = {
    f'iou_{n:03d}': 100 * hits[n] / union[n] for n in np.flatnonzero(union)
  }
  found = labelled > 0
  values = {
    'mIoU': np.mean(list(iou.values())),
    'pixel_accuracy': 100 * hits.sum() / confusion.sum(),
    'mean_accuracy': 100 * np.mean(hits[found] / labelled[found]),
    'classes': len(iou),
  }
  return {name: float(value) for name, value in (values | iou).items()}
