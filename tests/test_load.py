"""Students from released files, exports and runs; damaged ones are named."""

import argparse
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from students import ADVENTURER, SMALL, digits_run, random_params, write

import linearizer_jax
from linearizer_jax import checkpoint, start
from linearizer_jax.convert import __main__, export, load, tables, weights
from linearizer_jax.models import create_model

torch = pytest.importorskip('torch')


@pytest.fixture(scope='module')
def student_run(tmp_path_factory):
  return digits_run(tmp_path_factory.mktemp('run'))


def test_released_checkpoint(tmp_path):
  """The dict of the released .pth: weights, their average, a Namespace."""
  model = create_model('adventurer_tiny_patch16', **SMALL)
  raw, average = random_params(model), random_params(model, seed=5)

  def tensors(params):
    found = tables.to_state_dict(ADVENTURER, params)
    return {name: torch.from_numpy(x) for name, x in found.items()}

  path = tmp_path / 'released.pth'
  args = argparse.Namespace(lr=1e-3)
  saved = {'model': tensors(raw), 'args': args}
  for kept, ema, expected in (
    (tensors(average), True, average),
    (tensors(average), False, raw),
    (None, True, raw),
  ):
    torch.save(saved | {'model_ema': kept}, path)
    loaded = load.load(path, ema=ema)
    found = loaded.variables['params']
    jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert loaded.model.flip_blocks == 'released'
  assert loaded.preprocess.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize('legacy', [False, True])
def test_other_image_size(legacy, tmp_path):
  model = create_model('adventurer_tiny_patch16', **SMALL)
  params = random_params(model)
  file = write(tmp_path / 'in', model, params)
  loaded = load.load(file, image_size=(48, 40), legacy_positions=legacy)
  found = loaded.variables['params']['pos_embed']
  old = torch.from_numpy(params['pos_embed'])
  class_row, patches = old[:, -1:], old[:, :-1]
  if legacy:  # as the released fine-tuning code splits it
    class_row, patches = old[:, :1], old[:, 1:]
  grid = patches.mT.unflatten(-1, (8, 8))
  resized = torch.nn.functional.interpolate(
    grid, (12, 10), mode='bicubic', align_corners=False
  )
  parts = [resized.flatten(2).mT, class_row]
  expected = torch.cat(parts[::-1] if legacy else parts, 1).numpy()
  np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
  ('old', 'new'),
  [((14, 14), (24, 24)), ((14, 14), (28, 28)), ((28, 28), (14, 14)),
   ((16, 16), (14, 20))],
)  # fmt: skip
def test_positions_resize_as_in_torch(old, new):
  positions = np.random.default_rng(0).standard_normal(
    (1, old[0] * old[1] + 1, 8), np.float32
  )
  found = load.resize_pos_embed(positions, old, new)
  grid = torch.from_numpy(positions[:, :-1]).mT.unflatten(-1, old)
  expected = torch.nn.functional.interpolate(grid, new, mode='bicubic')
  expected = expected.flatten(2).mT.numpy()
  difference = export.relative_difference(found[:, :-1], expected)
  assert difference <= 1e-5
  np.testing.assert_array_equal(found[:, -1], positions[:, -1])


def test_load_from_a_run(student_run):
  run, params, _ = student_run
  model, variables, preprocess = linearizer_jax.load(run)
  jax.tree.map(np.testing.assert_array_equal, variables['params'], params)
  picture = Image.new('RGB', (50, 40), (255, 255, 255))
  images = preprocess(picture)
  assert images.shape == (1, *preprocess.image_size, 3)
  white = (1 - np.float32(preprocess.mean)) / np.float32(preprocess.std)
  np.testing.assert_allclose(images[0, 3, 3], white, rtol=1e-6)
  wide = preprocess(np.zeros((2, 32, 64, 3), np.uint8))
  maps = linearizer_jax.features(model, variables, wide, blocks=(-1,))
  assert {k: v.shape for k, v in maps.items()} == {'block01': (2, 4, 8, 64)}
  with pytest.raises(ValueError, match='blocks \\[2\\]'):
    linearizer_jax.features(model, variables, wide, blocks=(2,))
  headless = linearizer_jax.load(run, num_classes=0)
  assert headless.model.apply(headless.variables, images)[0] is None
  # What is asked for goes before the config of the run.
  other, changed, preprocess = linearizer_jax.load(
    run, dtype='bfloat16', flip_blocks='alternate', image_size=48
  )
  assert (other.dtype, other.flip_blocks) == (jnp.bfloat16, 'alternate')
  assert preprocess(picture).shape == (1, 48, 48, 3)
  old, new = params['pos_embed'], changed['params']['pos_embed']
  grids = (model.image_size // model.patch_size, 48 // model.patch_size)
  expected = load.resize_pos_embed(old, *((side, side) for side in grids))
  np.testing.assert_array_equal(new, expected)


def test_a_run_without_a_checkpoint_says_so(student_run, tmp_path):
  run, _, _ = student_run
  config = json.loads((run / 'config.json').read_text())
  checkpoint.claim_workdir(tmp_path / 'new', config)
  for path in ('finetune/checkpoints', 'finetune/checkpoints/3.orbax-tmp'):
    with pytest.raises(ValueError, match='has no finished checkpoint yet'):
      linearizer_jax.load(tmp_path / 'new')
    (tmp_path / 'new' / path).mkdir(parents=True)
  with pytest.raises(
    ValueError, match=r"'stage:nope' is no stage of .*finetune"
  ):
    start.load_network({}, 'stage:nope', 'teacher', {}, tmp_path / 'new')


def test_a_segmentation_is_not_evaluated_without_its_head(student_run):
  run, _, _ = student_run
  with pytest.raises(ValueError, match=r"'finetune' of .* is no segmentation"):
    start.load_segment_head({}, str(run), run)


def test_training_starts_from_released_weights(student_run, tmp_path):
  """`config.init` takes an export; head and mask token start fresh."""

  run, params, config = student_run
  export.export(run, tmp_path / 'out')
  config = config.copy_and_resolve_references()
  found = start.load_network(
    config, str(tmp_path / 'out'), 'student', params, tmp_path
  )
  jax.tree.map(np.testing.assert_array_equal, found, params)
  config.student.flip_blocks = (0,)  # an export says which blocks it flips
  with pytest.raises(ValueError, match=r'--config\.student\.flip_blocks='):
    start.load_network(
      config, str(tmp_path / 'out'), 'student', params, tmp_path
    )
  target = {k: v for k, v in params.items() if k != 'head'} | {
    'mask_token': np.ones((1, 1, 64), np.float32),
    'head': {'kernel': np.zeros((64, 3)), 'bias': np.zeros(3)},
  }
  merged = load.merge_params(
    target, found, 'out', may_lack=('head', 'mask_token')
  )
  np.testing.assert_array_equal(merged['mask_token'], target['mask_token'])
  assert merged['head']['kernel'].shape == (64, 3)


# -------------------------------------------------------------------- refusals


def broken(tensors, how):
  if how == 'missing':
    tensors['norm_f.scale'] = tensors.pop('norm_f.weight')
  elif how == 'nan':
    tensors['layers.1.mixer.D'][0] = np.nan
  elif how == 'shape':
    tensors['layers.1.mixer.D'] = tensors['layers.1.mixer.D'][:-1]
  return tensors


@pytest.mark.parametrize(
  ('how', 'message'),
  [
    ('missing', r'missing: norm_f\.weight; extra: norm_f\.scale'),
    ('nan', r'NaN or infinite values in layers_1/mixer/D'),
    ('shape', r'layers\.1\.mixer\.D \(\(7,\) instead of \(8,\)\)'),
  ],
)
def test_damaged_weights_are_named(how, message, tmp_path):
  model = create_model('adventurer_tiny_patch16', **SMALL)
  tensors = tables.to_state_dict(ADVENTURER, random_params(model))
  save_file(broken(tensors, how), tmp_path / 'a.safetensors')
  with pytest.raises(ValueError, match=message):
    load.load(tmp_path / 'a.safetensors')


def test_mutated_safetensors_headers_are_refused_or_read(tmp_path):
  """Never another error than ValueError, nor memory beyond the file's."""
  rng = np.random.default_rng(0)
  path = tmp_path / 'a.safetensors'
  save_file({'x': np.arange(6, dtype=np.float32), 'y': np.ones((2, 3))}, path)
  whole = path.read_bytes()
  header = 8 + int.from_bytes(whole[:8], 'little')
  refused, most = 0, 0
  for n in range(1000):
    mutated = bytearray(whole)
    for position in rng.integers(0, header, rng.integers(1, 4)):
      mutated[position] = rng.integers(256)
    if n % 4 == 0:  # sizes, offsets and brackets, which parse
      digits = [k for k in range(8, header) if chr(whole[k]).isdigit()]
      mutated = bytearray(whole)
      mutated[rng.choice(digits)] = rng.integers(ord('0'), ord('9') + 1)
    path.write_bytes(mutated)
    tracemalloc.start()
    try:
      tensors = weights.read_tensors(path)
      assert sum(x.nbytes for x in tensors.values()) <= len(whole)
    except ValueError as error:
      refused += 'is damaged, truncated' in str(error)
    most = max(most, tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  assert 800 < refused < 1000
  assert most < 1e6


def test_another_number_of_classes(tmp_path):
  model = create_model('adventurer_tiny_patch16', **SMALL)
  file = write(tmp_path / 'in', model, random_params(model))
  with pytest.raises(ValueError, match=r'head\.bias .*num_classes=0'):
    load.load(file, num_classes=3)
  assert 'head' not in load.load(file, num_classes=0).variables['params']


def test_a_student_that_comes_with_the_package(
  student_run, tmp_path, monkeypatch, capsys
):
  run, params, _ = student_run
  name = 'adventurer_imagenette'
  monkeypatch.setattr(load, 'WEIGHTS_FOLDER', tmp_path)
  with pytest.raises(FileNotFoundError, match=r'convert export --checkpoint'):
    linearizer_jax.load(name)
  command = ['export', f'--checkpoint={run}', f'--out={tmp_path / name}']
  with monkeypatch.context() as patch:
    patch.setattr(load, 'PACKAGED_BYTES', 1000)
    assert 'takes up to 1,000' in __main__.main(command)
  assert not any(tmp_path.iterdir())
  other = ['export', f'--checkpoint={run}', f'--out={tmp_path / "other"}']
  assert 'no student of the package' in __main__.main(other)
  assert not __main__.main(command)
  capsys.readouterr()
  card = (tmp_path / name / 'README.md').read_text()
  assert 'terms of ImageNet' in card
  loaded = linearizer_jax.load(name)
  jax.tree.map(
    np.testing.assert_array_equal, loaded.variables['params'], params
  )


def test_what_comes_with_the_package_is_small_and_loads():
  for name in load.PACKAGED:
    files = list((load.WEIGHTS_FOLDER / name).glob('*'))
    assert 0 < sum(path.stat().st_size for path in files) <= load.PACKAGED_BYTES
    model, variables, preprocess = linearizer_jax.load(name)
    noise = np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8)
    picture = Image.fromarray(noise)
    images = np.concatenate(
      [preprocess(picture), preprocess(Image.new('RGB', (90, 60), 'blue'))]
    )
    logits, _ = jax.jit(model.apply)(variables, images)
    assert logits.shape == (2, 10)
    # Trained: sure of something, and of different things.
    assert np.ptp(logits, axis=-1).min() > 1
    assert np.abs(logits[0] - logits[1]).max() > 1
