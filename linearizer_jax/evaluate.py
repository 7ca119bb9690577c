"""Metrics over a data set: every image counts once."""

import jax


def evaluate(eval_step, params, frozen, batches, key, place):
  """Means of the per-image metrics of a task over all valid images.

  Args:
    eval_step: jitted function of `steps.make_eval_step`.
    params, frozen: as the step takes them.
    batches: iterable of dicts with 'image', 'label' and bool 'valid', NumPy.
    key: random key; the n-th batch gets the n-th fold of it, so that two
      evaluations see the same masks.
    place: puts a NumPy batch on the devices.

  Returns:
    {metric: float}; 'count' is the number of images.

  Raises:
    ValueError: there is no image.
  """
  totals = None
  for n, batch in enumerate(batches):
    sums = eval_step(params, frozen, place(batch), jax.random.fold_in(key, n))
    totals = (
      sums if totals is None else jax.tree.map(lambda a, b: a + b, totals, sums)
    )
  totals = {name: float(v) for name, v in jax.device_get(totals or {}).items()}
  count = totals.pop('count', 0)
  if not count:
    raise ValueError(
      'the evaluation split is empty; change config.data.eval_split.'
    )
  return {name: v / count for name, v in totals.items()} | {'count': count}
