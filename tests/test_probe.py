"""Neighbours and linear classifiers on features, against scikit-learn."""

import types

import jax
import numpy as np
import pytest
from sklearn import linear_model, metrics, neighbors
from test_train import run, tiny

from linearizer_jax import (
  checkpoint,
  load,
  models,
  probe,
  sharding,
  train,
)
from linearizer_jax.convert.load import fit_positions
from linearizer_jax.data import pipeline
from linearizer_jax.models.teachers import IMAGENET
from linearizer_jax.tasks import classify

CLASSES = 5


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh()


def clouds(count, seed, width=12, distance=1.0):
  """Overlapping clouds around class centers: (features, labels)."""
  rng = np.random.default_rng(seed)
  centers = np.random.default_rng(0).normal(size=(CLASSES, width))
  labels = rng.integers(0, CLASSES, count)
  noise = rng.normal(size=(count, width))
  return np.float32(distance * centers[labels] + noise), np.int32(labels)


# ------------------------------------------------------- nearest neighbours


def naive_neighbours(bank, queries, k):
  """One query after the other, in float64."""
  bank, queries = (
    x / np.linalg.norm(np.float64(x), axis=1, keepdims=True)
    for x in (bank, queries)
  )
  indices = [np.argsort(-bank @ q, kind='stable')[:k] for q in queries]
  return np.array(
    [bank[i] @ q for i, q in zip(indices, queries, strict=True)]
  ), indices


def test_neighbours_are_those_of_a_loop_over_queries(mesh, monkeypatch):
  bank, queries = clouds(61, 1)[0], clouds(37, 2)[0]
  cosines, indices = naive_neighbours(bank, queries, 7)
  for block, part in ((2048, 16384), (2, 13), (3, 5)):
    monkeypatch.setattr(probe, 'BLOCK', block)
    monkeypatch.setattr(probe, 'BANK', part)
    found = probe.nearest(bank, queries, 7, mesh)
    np.testing.assert_array_equal(found[1], indices)
    np.testing.assert_allclose(found[0], cosines, atol=1e-6)


@pytest.mark.parametrize('k', [1, 20])
def test_votes_are_weighted_as_scikit_learn_is_told_to(mesh, k):
  known, asked = clouds(200, 1), clouds(90, 2)
  theirs = neighbors.KNeighborsClassifier(
    k, metric='cosine', weights=lambda distance: np.exp((1 - distance) / 0.07)
  ).fit(*known)
  ours = probe.knn_accuracy(known, asked, CLASSES, mesh, k=k, temperature=0.07)
  assert ours == pytest.approx(100 * theirs.score(*asked))
  assert 30 < ours < 95  # neither chance nor too easy to tell


def test_temperature_weighs_near_against_many(mesh):
  angle = np.array([0.1, 0.5, 0.5])
  bank = np.float32(np.stack([np.cos(angle), np.sin(angle)], 1))
  known = bank, np.array([0, 1, 1])
  asked = np.float32([[1, 0]]), np.array([0])
  for temperature, accuracy in ((0.07, 100.0), (1.0, 0.0)):
    found = probe.knn_accuracy(
      known, asked, 2, mesh, k=3, temperature=temperature
    )
    assert found == accuracy


# -------------------------------------------------------- linear classifier


@pytest.fixture(scope='module')
def known():
  x, y = clouds(300, 1)
  x[:, 3] = 7.0  # a constant channel
  x[:, 4] *= 1e-4  # and one on another scale
  return x, y


@pytest.fixture(scope='module')
def asked():
  x, y = clouds(150, 2)
  x[:, 3] = 7.0
  x[:, 4] *= 1e-4
  return x, y


def standard(known, x):
  deviation = known[0].std(0)
  deviation[3] = 1
  return (x - known[0].mean(0)) / deviation


def regression(known, l2):
  """scikit-learn's classifier of the same objective."""
  x, y = known
  found = linear_model.LogisticRegression(
    C=1 / (l2 * len(x)), tol=1e-8, max_iter=1000
  )
  return found.fit(x, y)


def test_linear_classifier_is_scikit_learns(mesh, known, asked):
  l2 = 1e-2
  ours = probe.linear_accuracy(known, asked, CLASSES, mesh, strengths=(l2,))
  theirs = regression((standard(known, known[0]), known[1]), l2)
  accuracy = 100 * theirs.score(standard(known, asked[0]), asked[1])
  assert ours == (pytest.approx(accuracy), l2)
  assert 50 < accuracy < 95

  fit, _ = probe._programs(mesh)
  data = tuple(probe._blocks(part, mesh) for part in known)
  counts = probe._blocks(np.ones(len(known[0]), np.float32), mesh)
  scale = probe._standard(known[0])
  kernel, bias = fit(data, counts, scale, l2, num_classes=CLASSES)
  # A number added to every class would change nothing.
  for found, wanted in (
    (kernel.T, theirs.coef_),
    (bias - bias.mean(), theirs.intercept_ - theirs.intercept_.mean()),
  ):
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_strength_is_the_best_on_a_held_out_tenth(mesh, known, asked):
  strengths = (1e-5, 1e-1, 10.0)
  x, y = standard(known, known[0]), known[1]
  order = np.random.default_rng(0).permutation(300)
  held, kept = order[:30], order[30:]

  def quality(l2):
    theirs = regression((x[kept], y[kept]), l2)
    chances = theirs.predict_proba(x[held])
    loss = metrics.log_loss(y[held], chances, labels=range(CLASSES))
    return theirs.score(x[held], y[held]), -loss

  found = probe.linear_accuracy(
    known, asked, CLASSES, mesh, strengths=strengths
  )
  best = max(strengths, key=quality)
  theirs = regression((x, y), best)
  accuracy = 100 * theirs.score(standard(known, asked[0]), asked[1])
  assert found == (pytest.approx(accuracy), best)


def test_what_can_be_told_apart_is(mesh):
  known, asked = (clouds(n, n, distance=20.0) for n in (300, 150))
  found = probe.linear_accuracy(known, asked, CLASSES, mesh, strengths=(1e-3,))
  assert found[0] == 100


# ------------------------------------------------------------- whole stages


def test_top1_and_top5_are_scikit_learns():
  rng = np.random.default_rng(0)
  logits = np.float32(rng.normal(size=(64, 12)))
  label = np.int32(rng.integers(0, 12, 64))
  model = types.SimpleNamespace(apply=lambda *_: (logits, {}))
  task = classify.Classify(model, 'student', *IMAGENET, None)
  batch = {'image': np.zeros((64, 2, 2, 3), np.uint8), 'label': label}
  values = task.evaluate({'student': {}}, {}, batch, None)
  for name, k in (('accuracy', 1), ('top5', 5)):
    wanted = metrics.top_k_accuracy_score(label, logits, k=k, labels=range(12))
    assert np.mean(values[name]) == pytest.approx(100 * wanted)


@pytest.fixture(scope='module')
def distilled(tmp_path_factory):
  """A work directory whose student has no head."""
  workdir = tmp_path_factory.mktemp('distilled')
  run(tiny('distill'), workdir)
  return workdir


# 20 images in batches of 8: the last one is filled up.
PROBED = {
  'data.num_examples': 20,
  'data.num_classes': 4,
  'data.labels_per_class': 4,
  'evaluate.metrics': ('knn', 'linear'),
  'evaluate.knn_neighbours': 3,
  'evaluate.linear_l2': (1e-2,),
}


def test_a_student_without_head_is_probed(distilled, tmp_path):
  config = tiny('evaluate', init=str(distilled), **PROBED)
  result = run(config, tmp_path, jax.devices()[:4])
  assert set(result) == {
    'knn_class', 'knn_patches', 'linear_class', 'linear_patches',
    'linear_class_l2', 'linear_patches_l2', 'seconds', 'steps',
  }  # fmt: skip
  model, variables, preprocess = load(distilled, num_classes=0)
  features = {}
  for split in ('train', 'test'):
    batches = pipeline.make_eval_batches(
      config['data'], batch_size=20, split=split
    )
    (batch,) = batches
    valid = batch['valid']
    assert valid.sum() == (16 if split == 'train' else 20)
    _, out = jax.jit(model.apply)(variables, preprocess(batch['image']))
    features[split] = (
      {'class': out['class'][valid], 'patches': out['normed'].mean(1)[valid]},
      batch['label'][valid],
    )
  (known, known_labels), (asked, labels) = features.values()
  for kind in ('class', 'patches'):
    theirs = neighbors.KNeighborsClassifier(
      3, metric='cosine', weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(known[kind], known_labels)
    accuracy = 100 * theirs.score(asked[kind], labels)
    assert result[f'knn_{kind}'] == pytest.approx(accuracy)


def test_a_student_without_head_names_no_class(distilled, tmp_path):
  config = tiny('evaluate', init=str(distilled))
  with pytest.raises(ValueError, match='has no head, so it names no class'):
    run(config, tmp_path)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'init': ''}, "config.init is '': there is no student to evaluate"),
    ({'task': 'zeroshot', 'init': ''}, "task is 'zeroshot', but config.init"),
    ({'evaluate.metrics': ('knn', 'top5')}, 'config.evaluate.metrics is'),
    ({'evaluate.metrics': ()}, 'config.evaluate.metrics is'),
    ({'evaluate.knn_neighbours': 17}, 'knn_neighbours is 17.* the 16 training'),
    ({'evaluate.knn_neighbours': 0}, 'knn_neighbours is 0'),
    ({'evaluate.knn_temperature': 0.0}, 'knn_temperature is 0'),
    ({'evaluate.linear_l2': (0.0,)}, 'config.evaluate.linear_l2 is'),
    ({'data.labels_per_class': 6}, 'labels_per_class is 6, but class 0 has'),
    ({'data.labels_per_class': 0}, 'labels_per_class is 0'),
  ],
)
def test_stages_that_cannot_be_evaluated_are_refused_early(changes, words):
  config = tiny('evaluate', **(PROBED | {'init': 'DIR'} | changes))
  with pytest.raises(ValueError, match=words):
    train.check_stage(
      checkpoint.resolve_stage(config, 'stage'), jax.devices()[:1]
    )


def test_features_that_are_not_finite_stop_the_evaluation(mesh):
  batch = {
    'image': np.zeros((8, 2, 2, 3), np.uint8),
    'label': np.zeros(8, np.int32),
    'valid': np.ones(8, bool),
  }

  @jax.jit
  def step(params, batch):
    x = batch['image'].mean((1, 2)) / 0
    return {'class': x, 'label': batch['label'], 'valid': batch['valid']}

  with pytest.raises(FloatingPointError, match="features 'class'"):
    probe.extract(step, {}, [batch], mesh)


# ------------------------------------------------------ another resolution


@pytest.mark.parametrize(
  ('name', 'fields'),
  [
    ('vit_tiny_patch16', dict(num_heads=2)),
    ('siglip_base_patch16', dict(num_heads=2)),  # no class token
    ('adventurer_tiny_patch16', dict(head_dim=8, state_dim=4)),
  ],
)
def test_positions_are_resized_as_the_network_does(name, fields):
  old, new = (
    models.create_model(
      name,
      **dict(width=16, depth=1, patch_size=4, image_size=size, num_classes=0),
      **fields,
    )
    for size in (16, (24, 20))
  )
  images = np.random.default_rng(0).normal(size=(2, 24, 20, 3))
  variables = jax.jit(old.init)(jax.random.key(0), np.zeros((1, 16, 16, 3)))
  params = jax.tree.map(np.asarray, variables['params'])
  _, wanted = jax.jit(old.apply)(variables, images)
  fitted = fit_positions(params, old, new)
  _, found = jax.jit(new.apply)({'params': fitted}, images)
  for kind in ('normed', 'class'):
    np.testing.assert_allclose(found[kind], wanted[kind], atol=1e-5)
  assert fit_positions(params, old, old) is params


@pytest.mark.slow
def test_fine_tuning_goes_on_at_another_resolution(distilled, tmp_path):
  config = tiny(
    init=str(distilled),
    **{'data.image_size': 48, 'student.image_size': 48, 'steps': 1},
  )
  run(config, tmp_path)
  params, _ = checkpoint.load_params(tmp_path)
  assert params['positional_embedding'].shape == (1 + 6 * 6, 16)
