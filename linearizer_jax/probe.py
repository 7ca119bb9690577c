"""What frozen features are worth: nearest neighbours and a linear classifier.

Both see the class token and the mean of the patch tokens, after the final
norm, of every training and evaluation image under evaluation preprocessing.
Every process holds all features on its host, 2 N D float32 for N images: 7.9 GB
for ImageNet's training images at width 768, and half as much again while they
are joined. For the linear classifier the devices share one kind of the training
features, 3.9 GB in all; for the neighbours they take a block at a time.

Shape letters: N images, D width, V classes, R rows of a block, Q queries.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from linearizer_jax import sharding

METRICS = ('top1', 'knn', 'linear')
KINDS = ('class', 'patches')
BLOCK = 2048  # rows a device looks at at once
BANK = 16384  # training features that queries are compared with at once
HELD_OUT = 0.1  # share of the training features that L2 is chosen on
HIGHEST = jax.lax.Precision.HIGHEST
ROWS_CUT = PartitionSpec(None, sharding.BATCH_AXES)

_log = logging.getLogger('linearizer_jax')


def check(options, num_train):
  """Raises ValueError for fields of `config.evaluate` that do not fit.

  Args:
    options: `config.evaluate`.
    num_train: number of training images, after `config.data.labels_per_class`.
  """
  unknown = set(options.metrics) - set(METRICS)
  if unknown or not options.metrics:
    raise ValueError(
      f'config.evaluate.metrics is {tuple(options.metrics)}; expected some of '
      f'{METRICS}.'
    )
  if 'knn' in options.metrics:
    if not 1 <= options.knn_neighbours <= num_train:
      raise ValueError(
        f'config.evaluate.knn_neighbours is {options.knn_neighbours}; it must '
        f'lie between 1 and the {num_train} training images.'
      )
    if options.knn_temperature <= 0:
      raise ValueError(
        f'config.evaluate.knn_temperature is {options.knn_temperature}; it '
        'must be above 0.'
      )
  if 'linear' in options.metrics:
    strengths = options.linear_l2
    if not strengths or min(strengths) <= 0:
      raise ValueError(
        f'config.evaluate.linear_l2 is {tuple(strengths)}; expected one or '
        'more strengths above 0.'
      )
    if num_train < 2:
      raise ValueError(
        'the linear classifier holds out one of its training images and needs '
        'another: raise config.data.labels_per_class.'
      )


def evaluate(step, params, options, batches, num_classes, mesh):
  """Test accuracies of the classifiers that `options.metrics` names.

  Args:
    step: jitted (params, batch) -> dict of arrays (B, ...), replicated: KINDS,
      'label' and bool 'valid' (`steps.make_features_step`).
    params: of `step`, on the devices of `mesh`.
    options: `config.evaluate`, with `metrics`, `knn_neighbours`,
      `knn_temperature` and `linear_l2`.
    batches: (training, evaluation) images, each an iterable of this process's
      NumPy batches, as of `pipeline.make_eval_batches`.
    num_classes: V.
    mesh: from `sharding.make_mesh`.

  Returns:
    {name: float}: 'knn_class', 'knn_patches', 'linear_class' and
    'linear_patches' in percent, and the L2 chosen for a linear classifier,
    'linear_class_l2', 'linear_patches_l2'.

  Raises:
    ValueError: as `check`.
    FloatingPointError: a feature is not finite.
  """
  features = [extract(step, params, part, mesh) for part in batches]
  check(options, len(features[0]['label']))
  values = {}
  for kind in KINDS:
    train, test = ((part[kind], part['label']) for part in features)
    if 'knn' in options.metrics:
      values[f'knn_{kind}'] = knn_accuracy(
        train,
        test,
        num_classes,
        mesh,
        k=options.knn_neighbours,
        temperature=options.knn_temperature,
      )
    if 'linear' in options.metrics:
      accuracy, l2 = linear_accuracy(
        train, test, num_classes, mesh, strengths=options.linear_l2
      )
      values |= {f'linear_{kind}': accuracy, f'linear_{kind}_l2': l2}
  return values


def extract(step, params, batches, mesh):
  """Features and labels of every valid image, in order, on the host.

  Args:
    step, params: as `evaluate`.
    batches: iterable of this process's NumPy batches.
    mesh: that runs `step`.

  Returns:
    Dict of NumPy arrays (N, ...) without 'valid'.

  Raises:
    FloatingPointError: a feature is not finite.
  """
  parts = {}
  for batch in batches:
    out = jax.device_get(step(params, sharding.global_batch(mesh, batch)))
    valid = out.pop('valid')
    for name, rows in out.items():
      parts.setdefault(name, []).append(rows[valid])
  whole = {}
  for name in list(parts):  # one after the other: the parts take as much again
    whole[name] = np.concatenate(parts.pop(name))
    if not np.isfinite(whole[name]).all():
      raise FloatingPointError(
        f'features {name!r} are not finite: the weights are of a run that '
        'diverged, or config.student.dtype is too narrow for them.'
      )
  size = sum(x.nbytes for x in whole.values())
  _log.info('features of %d images, %.3f GB', len(whole['label']), size / 1e9)
  return whole


# ------------------------------------------------------- nearest neighbours


def knn_accuracy(train, test, num_classes, mesh, *, k, temperature):
  """Top-1 accuracy of weighted votes of the nearest neighbours.

  The k training images of the highest cosine c vote for their class, each with
  weight exp(c / temperature). Source: DINO (arXiv 2104.14294), section 4.1; Wu
  et al. (arXiv 1805.01978), section 3.4.

  Args:
    train: training features (N, D) float32 and labels (N,) int.
    test: the same of the images to classify, (Q, D) and (Q,).
    num_classes: V, labels are below.
    mesh: computes the cosines, in float32.
    k: neighbours, at most N.
    temperature: above 0.

  Returns:
    Percent. Of equal votes the lower class counts, of equal cosines the
    earlier image.
  """
  cosines, indices = nearest(train[0], test[0], k, mesh)
  # Votes count in proportion: the nearest one's weight is 1.
  weights = np.exp((cosines - cosines[:, :1]) / temperature)
  votes = np.zeros((len(cosines), num_classes), np.float32)
  np.add.at(votes, (np.arange(len(votes))[:, None], train[1][indices]), weights)
  return 100 * float(np.mean(votes.argmax(1) == test[1]))


def nearest(bank, queries, k, mesh):
  """The k rows of `bank` of the highest cosine with each query.

  Args:
    bank: (N, D) float32 NumPy array, N >= k.
    queries: (Q, D) float32.
    k: neighbours.
    mesh: queries are cut over its devices; the bank passes in blocks.

  Returns:
    (cosines, indices), NumPy (Q, k) float32 and int32, highest first.
  """
  whole, join = sharding.replicated(mesh), _join_program(mesh)
  blocks = _blocks(queries, mesh)
  shape = (*blocks.shape[:2], k)
  best = (
    _place(np.full(shape, -np.inf, np.float32), mesh),
    _place(np.zeros(shape, np.int32), mesh),
  )
  size = min(BANK, len(bank))
  for start in range(0, len(bank), size):
    rows = bank[start : start + size]
    indices = np.full(size, -1, np.int32)
    indices[: len(rows)] = np.arange(start, start + len(rows))
    rows = np.pad(rows, ((0, size - len(rows)), (0, 0)))
    best = join(best, blocks, rows, indices)
  return tuple(
    np.asarray(jax.device_put(x, whole)).reshape(-1, k)[: len(queries)]
    for x in best
  )


@functools.cache
def _join_program(mesh):
  """`_join` on each device's own queries, compiled once for both kinds."""
  best, all_rows = (ROWS_CUT, ROWS_CUT), PartitionSpec()
  join = jax.shard_map(
    _join,
    mesh=mesh,
    in_specs=(best, ROWS_CUT, all_rows, all_rows),
    out_specs=best,
  )
  return jax.jit(join, donate_argnums=0)


def _join(best, queries, rows, indices):
  """The best of those so far and of new `rows`, whose index is -1 where none.

  Shapes: best (blocks, R, k) twice, queries (blocks, R, D), rows (n, D).
  """
  rows = _unit(rows)

  def block(inputs):
    (cosine, index), q = inputs
    new = jnp.matmul(_unit(q), rows.T, precision=HIGHEST)  # (R, n)
    new = jnp.where(indices >= 0, new, -jnp.inf)
    cosine = jnp.concatenate([cosine, new], 1)
    new = jnp.broadcast_to(indices, new.shape)
    index = jnp.concatenate([index, new], 1)
    cosine, at = jax.lax.top_k(cosine, best[0].shape[-1])
    return cosine, jnp.take_along_axis(index, at, 1)

  return jax.lax.map(block, (best, queries))


def _unit(x):
  """Rows of unit length; a row of zeros stays."""
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


# -------------------------------------------------------- linear classifier


def linear_accuracy(train, test, num_classes, mesh, *, strengths):
  """Top-1 accuracy of multinomial logistic regression on frozen features.

  Features are standardised by the training features' mean and deviation. L2 is
  the strength with the best accuracy on a tenth of the training features (of
  equal ones that with the lower loss there); with it the classifier is fitted
  anew to all of them. Nothing is random but the tenth, which is always the
  same.

  Args:
    train: training features (N, D) float32 and labels (N,) int, N >= 2.
    test: the same of the images to classify, (Q, D) and (Q,).
    num_classes: V, labels are below.
    mesh: its devices share the rows.
    strengths: of L2, see `fit`.

  Returns:
    (percent, strength chosen).
  """
  fit_on, score_on = _programs(mesh)
  x, y = train
  scale = _standard(x)
  order = np.random.default_rng(0).permutation(len(x))
  held = np.zeros(len(x), bool)
  held[order[: max(1, round(HELD_OUT * len(x)))]] = True
  data = _blocks(x, mesh), _blocks(y, mesh)
  kept, left_out, every = (
    _blocks(np.float32(rows), mesh) for rows in (~held, held, np.ones(len(x)))
  )

  def quality(strength):
    weights = fit_on(data, kept, scale, strength, num_classes=num_classes)
    hits, loss = score_on(weights, data, left_out, scale)
    return float(hits), -float(loss)

  best = max(strengths, key=quality) if len(strengths) > 1 else strengths[0]
  weights = fit_on(data, every, scale, best, num_classes=num_classes)
  data = tuple(_blocks(part, mesh) for part in test)
  every = _blocks(np.ones(len(test[0]), np.float32), mesh)
  hits, _ = score_on(weights, data, every, scale)
  return 100 * float(hits) / len(test[0]), best


@functools.cache
def _programs(mesh):
  """`fit` and `score`, compiled once for both kinds of features."""
  whole = sharding.replicated(mesh)
  return (
    jax.jit(fit, static_argnames='num_classes', out_shardings=whole),
    jax.jit(score, out_shardings=whole),
  )


def fit(data, counts, scale, l2, *, num_classes, max_steps=200, tolerance=1e-5):
  """Weights of the multinomial logistic regression, by L-BFGS from zero.

    mean over rows of cross-entropy(x W + b, y)  +  l2 / 2 |W|^2

  which is scikit-learn's LogisticRegression with C = 1 / (l2 N).

  Args:
    data: features (blocks, R, D) float32 and labels (blocks, R) int.
    counts: (blocks, R) float32, 1 for a row that counts and 0 for another.
    scale: (mean, deviation) of the features, (D,) each.
    l2: scalar.
    num_classes: V.
    max_steps: of L-BFGS.
    tolerance: of the norm of the gradient, where it stops.

  Returns:
    (W, b): (D, V) and (V,), float32, of the standardised features.
  """

  def objective(weights):
    return _loss(weights, data, counts, scale) + l2 / 2 * jnp.sum(
      weights[0] ** 2
    )

  solver = optax.lbfgs()
  value_and_grad = optax.value_and_grad_from_state(objective)

  def step(carry):
    weights, state = carry
    value, grad = value_and_grad(weights, state=state)
    updates, state = solver.update(
      grad, state, weights, value=value, grad=grad, value_fn=objective
    )
    return optax.apply_updates(weights, updates), state

  def goes_on(carry):
    state = carry[1]
    count = optax.tree.get(state, 'count')
    norm = optax.tree.norm(optax.tree.get(state, 'grad'))
    return (count == 0) | ((count < max_steps) & (norm > tolerance))

  start = jnp.zeros((data[0].shape[-1], num_classes)), jnp.zeros(num_classes)
  return jax.lax.while_loop(goes_on, step, (start, solver.init(start)))[0]


def score(weights, data, counts, scale):
  """(number of hits, mean cross-entropy) of the rows that count."""

  def block(_, part):
    x, y, counted = part
    hits = _logits(weights, x, scale).argmax(-1) == y
    return None, jnp.sum(hits * counted)

  hits = jax.lax.scan(block, None, (*data, counts))[1].sum()
  return hits, _loss(weights, data, counts, scale)


def _loss(weights, data, counts, scale):
  """Mean cross-entropy, logits of one block at a time."""

  @jax.checkpoint
  def block(total, part):
    x, y, counted = part
    values = optax.softmax_cross_entropy_with_integer_labels(
      _logits(weights, x, scale), y
    )
    return total + jnp.sum(values * counted), None

  total, _ = jax.lax.scan(block, 0.0, (*data, counts))
  return total / counts.sum()


def _logits(weights, x, scale):
  mean, deviation = scale
  kernel, bias = weights
  return jnp.matmul((x - mean) / deviation, kernel, precision=HIGHEST) + bias


def _standard(x):
  """Mean and deviation of each column, (D,) float32; 1 where constant."""
  mean = x.mean(0, dtype=np.float64)
  parts = np.array_split(x, -(-len(x) // BANK))  # no copy of x in float64
  variance = sum(np.square(part - mean).sum(0) for part in parts) / len(x)
  deviation = np.sqrt(variance)
  constant = deviation <= 1e-6 * np.abs(mean)
  return np.float32(mean), np.float32(np.where(constant, 1.0, deviation))


# ------------------------------------------------------------------- blocks


def _blocks(x, mesh):
  """(n, ...) as (blocks, R, ...), zeros at the end, R cut over the devices."""
  rows = mesh.size * min(BLOCK, -(-len(x) // mesh.size))
  blocks = -(-len(x) // rows)
  padded = np.zeros((blocks * rows, *x.shape[1:]), x.dtype)
  padded[: len(x)] = x
  return _place(padded.reshape(blocks, rows, *x.shape[1:]), mesh)


def _place(x, mesh):
  """Puts (blocks, R, ...) on the devices of all processes, R cut over them."""
  at = NamedSharding(mesh, ROWS_CUT)
  return jax.make_array_from_callback(x.shape, at, lambda index: x[index])
