"""Evaluation without training: by labels learnt, and by texts."""

import json

import jax
import ml_collections
import numpy as np
import pytest
from test_train import run, tiny

from linearizer_jax import checkpoint, models, zeroshot
from linearizer_jax.convert import load, text
from linearizer_jax.data import pipeline
from linearizer_jax.models import vit
from linearizer_jax.tasks import inputs

CLASSES = [f'class {n}' for n in range(10)]


def write_texts(path, width, count=10, seed=0):
  rows = np.random.default_rng(seed).standard_normal((count, width))
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  np.savez(path, embeddings=np.float32(rows), classes=np.array(CLASSES[:count]))
  return np.float32(rows)


def scored(config, features, texts):
  """Accuracy in percent of the cosine of each image's feature with texts."""
  hits, count = 0, 0
  for batch in pipeline.make_eval_batches(config['data'], batch_size=8):
    x = np.asarray(features(batch['image']), np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    right = (x @ texts.T).argmax(1) == batch['label']
    hits += right[batch['valid']].sum()
    count += batch['valid'].sum()
  return 100 * hits / count


def test_an_evaluation_equals_that_of_the_training(tmp_path):
  trained = run(tiny(), tmp_path / 'run')
  config = tiny('evaluate', init=str(tmp_path / 'run'))
  result = run(config, tmp_path / 'again')
  assert result['steps'] == 0
  assert result['accuracy'] == trained['accuracy']
  assert result['loss'] == trained['loss']
  with pytest.raises(ValueError, match='no student to evaluate'):
    run(tiny('evaluate'), tmp_path / 'nothing')


@pytest.fixture
def small_clip(monkeypatch):
  fields = dict(width=16, depth=2, num_heads=2, projection_dim=6)
  fields |= dict(patch_size=8, image_size=32)
  name = 'clip_base_patch16'
  monkeypatch.setitem(vit.VARIANTS, name, vit.VARIANTS[name] | fields)
  return name


def test_a_student_by_texts(small_clip, tmp_path):
  texts = write_texts(tmp_path / 'texts.npz', 6)
  changes = {'teacher.name': small_clip, 'teacher.num_heads': 2}
  distill = tiny('distill', **changes, **{'distill.class_weight': 1.0})
  run(distill, tmp_path / 'run')
  config = tiny(
    'zeroshot',
    init=str(tmp_path / 'run'),
    **{'classify.text_embeddings': str(tmp_path / 'texts.npz')},
  )
  result = run(config, tmp_path / 'zeroshot')

  params, info = checkpoint.load_params(tmp_path / 'run')
  heads, _ = checkpoint.load_params(tmp_path / 'run', role='heads')
  params.pop('mask_token')
  stage = ml_collections.ConfigDict(info['config'])
  model, stats = models.from_config(stage, 'student', num_classes=0)

  @jax.jit
  def features(images):
    _, out = model.apply({'params': params}, inputs.normalize(images, *stats))
    return out['class'] @ heads['class']['kernel'] + heads['class']['bias']

  assert result['accuracy'] == pytest.approx(scored(config, features, texts))


def test_a_teacher_by_texts(small_clip, tmp_path):
  """Published weights of a CLIP, given as a file."""
  from safetensors.numpy import save_file

  from linearizer_jax.convert import FAMILIES, tables

  texts = write_texts(tmp_path / 'texts.npz', 6)
  model, variables, row = load.load_teacher(small_clip, 'random')
  tensors = tables.to_state_dict(FAMILIES['clip'][0], variables['params'])
  save_file(tensors, tmp_path / 'clip.safetensors')
  changes = {
    'teacher.name': small_clip,
    'teacher.num_heads': 2,
    'teacher.weights': str(tmp_path / 'clip.safetensors'),
    'classify.text_embeddings': str(tmp_path / 'texts.npz'),
  }
  config = tiny('zeroshot', train_role='teacher', **changes)
  result = run(config, tmp_path / 'zeroshot')

  @jax.jit
  def features(images):
    images = inputs.normalize(images, row.mean, row.std)
    return model.apply(variables, images)[1]['projected_class']

  assert result['accuracy'] == pytest.approx(scored(config, features, texts))


@pytest.mark.slow
def test_a_published_teacher_is_probed_and_fine_tuned(small_clip, tmp_path):
  """The same file: no head to probe it, a fresh one to fine-tune it."""
  from safetensors.numpy import save_file

  from linearizer_jax.convert import FAMILIES, tables

  _, variables, _ = load.load_teacher(small_clip, 'random')
  tensors = tables.to_state_dict(FAMILIES['clip'][0], variables['params'])
  path = str(tmp_path / 'clip.safetensors')
  save_file(tensors, path)
  changes = {'teacher.name': small_clip, 'teacher.num_heads': 2, 'init': path}
  config = tiny(
    'evaluate',
    train_role='teacher',
    **changes,
    **{'evaluate.metrics': ('knn',), 'evaluate.knn_neighbours': 1},
  )
  result = run(config, tmp_path / 'probed')
  assert {'knn_class', 'knn_patches'} <= set(result)
  config = tiny(train_role='teacher', steps=1, **changes)
  config['optimizer'] |= {'learning_rate': 0.0, 'weight_decay': 0.0}
  run(config, tmp_path / 'tuned')
  params, info = checkpoint.load_params(tmp_path / 'tuned')
  assert info['role'] == 'teacher'
  assert params.pop('head')['kernel'].shape == (16, 10)
  jax.tree.map(np.testing.assert_array_equal, params, variables['params'])


def test_what_does_not_fit_is_refused(tmp_path):
  path = tmp_path / 'texts.npz'
  write_texts(path, 6)
  config = tiny('zeroshot', **{'classify.text_embeddings': str(path)})
  config = ml_collections.ConfigDict(config)
  with pytest.raises(ValueError, match=r'width 6, the class token is .* to 5'):
    zeroshot.head(config, np.zeros((16, 5)))
  with pytest.raises(ValueError, match='no space in common with texts'):
    zeroshot.head(config, None)
  config.classify.text_embeddings = 'nowhere.npz'
  with pytest.raises(ValueError, match=r"'nowhere\.npz', which is no file"):
    zeroshot.head(config, np.zeros((16, 6)))
  run(tiny('distill'), tmp_path / 'run')
  config = tiny(
    'zeroshot',
    init=str(tmp_path / 'run'),
    **{'classify.text_embeddings': str(path)},
  )
  with pytest.raises(ValueError, match='never learnt the class token'):
    run(config, tmp_path / 'zeroshot')


def test_embeddings_are_those_of_the_text_tower(tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  letters = 'abcdefghijklmnopqrstuvwxyz.0123456789'
  words = [c + end for c in letters for end in ('', '</w>')]
  words += ['<|startoftext|>', '<|endoftext|>']
  vocabulary = {word: n for n, word in enumerate(words)}
  (tmp_path / 'vocab.json').write_text(json.dumps(vocabulary))
  (tmp_path / 'merges.txt').write_text('#version: 0.2\n')
  tokenizer = transformers.CLIPTokenizer(
    str(tmp_path / 'vocab.json'), str(tmp_path / 'merges.txt')
  )
  small = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=32,
  )  # fmt: skip
  config = transformers.CLIPConfig(
    text_config=small
    | dict(
      vocab_size=len(words),
      projection_dim=6,
      bos_token_id=vocabulary['<|startoftext|>'],
      eos_token_id=vocabulary['<|endoftext|>'],
      pad_token_id=vocabulary['<|endoftext|>'],
    ),
    vision_config=small | dict(image_size=16, patch_size=8),
    projection_dim=6,
  )
  clip = transformers.CLIPModel(config).eval()
  clip.save_pretrained(tmp_path / 'clip')
  tokenizer.save_pretrained(tmp_path / 'clip')

  names, prompts = ['cat', 'dog'], ['a {}.', 'the {} {1}']
  out = tmp_path / 'texts.npz'
  text.embed_classes(tmp_path / 'clip', names, out, prompts)
  found = np.load(out)
  assert list(found['classes']) == names
  for name, row in zip(names, found['embeddings'], strict=True):
    each = []
    for prompt in prompts:
      tokens = tokenizer(prompt.replace('{}', name), return_tensors='pt')
      with torch.no_grad():
        hidden = clip.text_model(**tokens).pooler_output
        x = clip.text_projection(hidden)[0].numpy()
      each.append(x / np.linalg.norm(x))
    mean = np.mean(each, 0)
    np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)

  with pytest.raises(ValueError, match='cat is there twice'):
    text.embed_classes('clip', ['cat', 'cat'], out)
  with pytest.raises(ValueError, match="prompt 'a photo' needs one"):
    text.embed_classes('clip', names, out, ['a photo'])
  with pytest.raises(ValueError, match=r'ends in \.npz'):
    text.embed_classes('clip', names, tmp_path / 'texts')
