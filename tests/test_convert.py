"""Students to PyTorch and back, released Adventurers in, and what is refused.

The exported module is compared with ours, and ours with an independent forward
pass in test_adventurer.py.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import linearizer_jax
from configs import digits
from linearizer_jax import checkpoint, start
from linearizer_jax.convert import (
  FAMILIES,
  __main__,
  export,
  load,
  tables,
  weights,
)
from linearizer_jax.kernels.ssd import ssd
from linearizer_jax.models import create_model, list_models

torch = pytest.importorskip('torch')
from linearizer_jax.convert import torch_adventurer  # noqa: E402

(ADVENTURER,) = FAMILIES['adventurer']
# The same float32 sums in another order; measured: 2e-6 (test_full_sizes).
TOLERANCE = 1e-5
SMALL = dict(
  width=64,
  depth=5,
  patch_size=4,
  image_size=32,
  num_classes=7,
  head_dim=16,
  state_dim=8,
)
MIXER_LAYERS = (
  'norm.weight',
  'norm_mlp.weight',
  'mixer.in_proj.weight',
  'mixer.conv1d.weight',
  'mixer.conv1d.bias',
  'mixer.dt_bias',
  'mixer.A_log',
  'mixer.D',
  'mixer.norm.weight',
  'mixer.out_proj.weight',
  'mlp.w1.weight',
  'mlp.w1.bias',
  'mlp.w2.weight',
  'mlp.w2.bias',
  'mlp.w3.weight',
  'mlp.w3.bias',
)


def released_names(depth):
  """Keys of the released state_dict (method, section 3)."""
  return {
    'cls_token',
    'pos_embed',
    'patch_embed.proj.weight',
    'patch_embed.proj.bias',
    'norm_f.weight',
    'head.weight',
    'head.bias',
    *(f'layers.{n}.{name}' for n in range(depth) for name in MIXER_LAYERS),
  }


def shapes_of(model):
  size = model.image_size
  height, width = (size, size) if isinstance(size, int) else size
  images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), images)['params']


def random_params(model, seed=0):
  """Like trained ones, and quicker than `init`: every array is random."""
  rng = np.random.default_rng(seed)

  def draw(path, x):
    value = rng.standard_normal(x.shape, np.float32)
    name = path[-1].key
    if name == 'kernel':
      return value / math.sqrt(math.prod(x.shape[:-1]))
    if name in ('scale', 'D'):
      return 1 + value / 10
    if name == 'A_log':
      return value / 2 + 1
    return value / 10 - 3 * (name == 'dt_bias')

  return jax.tree_util.tree_map_with_path(draw, shapes_of(model))


def write(folder, model, params, **more):
  """Weights as released, with a config where fields cannot be read off."""
  folder.mkdir(exist_ok=True)
  save_file(tables.to_state_dict(ADVENTURER, params), folder / 'a.safetensors')
  if more:
    (folder / 'config.json').write_text(json.dumps({'model': more}))
  return folder / 'a.safetensors'


def images_of(model, size, seed=1):
  random = np.random.default_rng(seed).standard_normal((2, *size, 3))
  return random.astype(np.float32)


def nchw(images):
  return torch.from_numpy(np.transpose(images, (0, 3, 1, 2)).copy())


def workdir_with(path, params, stage='finetune', step=3, **student):
  """A work directory of a digits run whose last stage holds `params`."""
  config = digits.get_config('smoke').to_dict()
  config['student'] |= student
  checkpoint.claim_workdir(path, config)
  directory = checkpoint.stage_dir(path, stage)
  checkpoint.save_params(directory / 'checkpoints', step, {'student': params})
  result = {'accuracy': 12.5, 'seconds': 1.0, 'steps': step}
  checkpoint.write_json(directory / 'result.json', result)
  resolved = checkpoint.resolve_stage(config, stage)
  return path, ml_collections.ConfigDict(resolved)


@pytest.fixture(scope='module')
def student_run(tmp_path_factory):
  """(work directory, params, resolved config) of a small student."""
  path = tmp_path_factory.mktemp('run')
  config = checkpoint.resolve_stage(
    digits.get_config('smoke').to_dict(), 'finetune'
  )
  config = ml_collections.ConfigDict(config)
  model, _ = linearizer_jax.models.from_config(
    config, 'student', num_classes=10
  )
  params = random_params(model)
  workdir_with(path, params)
  return path, params, config


# ------------------------------------------------------------ names and layout


@pytest.mark.parametrize(
  'name', [n for n in list_models() if n.startswith('adventurer')]
)
def test_released_names_and_shapes(name):
  model = create_model(name)
  zeros = jax.tree.map(
    lambda x: np.broadcast_to(np.float32(0), x.shape), shapes_of(model)
  )
  tensors = tables.to_state_dict(ADVENTURER, zeros)
  assert set(tensors) == released_names(model.depth)
  d, p = model.width, model.patch_size
  expected = {
    'cls_token': (1, 1, d),
    'pos_embed': (1, (224 // p) ** 2 + 1, d),
    'patch_embed.proj.weight': (d, 3, p, p),
    'layers.0.mixer.in_proj.weight': (4 * d + 128 + d // 32, d),
    'layers.0.mixer.conv1d.weight': (2 * d + 128, 1, 4),
    'layers.0.mixer.A_log': (d // 32,),
    'layers.0.mixer.norm.weight': (2 * d,),
    'layers.0.mixer.out_proj.weight': (d, 2 * d),
    'layers.0.mlp.w1.weight': (int(2.5 * d), d),
    'layers.0.mlp.w3.weight': (d, int(2.5 * d)),
    'head.weight': (1000, d),
  }
  assert {k: tensors[k].shape for k in expected} == expected


@pytest.mark.parametrize(
  'size',
  [
    'tiny',
    pytest.param('small', marks=pytest.mark.slow),
    pytest.param('base', marks=pytest.mark.slow),
    pytest.param('large', marks=pytest.mark.slow),
  ],
)
def test_full_sizes(size, tmp_path):
  """Both ways bit-equal; the exported module equals ours at three sizes.

  The figures are printed: `pytest -m '' -k full_sizes -s`.
  """
  model = create_model(f'adventurer_{size}_patch16')
  params = random_params(model)
  file = write(tmp_path / 'released', model, params)
  loaded = load.load(file)
  jax.tree.map(
    np.testing.assert_array_equal, loaded.variables['params'], params
  )
  assert loaded.model.width == model.width
  assert loaded.model.depth == model.depth

  differences = export.export(file, tmp_path / 'out')
  assert differences[export.WEIGHTS] <= TOLERANCE
  print(f'\n{size} 224 x 224: {differences[export.WEIGHTS]:.1e}')
  other = torch_adventurer.load(tmp_path / 'out')
  blocks = (model.depth // 2 - 1, model.depth - 1)
  for image_size in ((448, 448), (320, 512)):
    images = images_of(model, image_size)[:1]
    with torch.no_grad():
      logits = other(nchw(images)).numpy()
      maps = other.features(nchw(images), blocks)
    ours, out = jax.jit(model.apply)({'params': params}, images)
    found = {n: maps[f'block{n:02d}'].flatten(2).mT.numpy() for n in blocks}
    errors = [export.relative_difference(logits, ours)] + [
      export.relative_difference(found[n], np.asarray(out[f'block{n:02d}']))
      for n in blocks
    ]
    print(f'{size} {image_size}: logits, maps', *(f'{x:.1e}' for x in errors))
    assert np.max(errors) <= TOLERANCE
  if model.depth > 12:
    return  # the gradient of 24 blocks compiles for minutes
  images = images_of(model, (224, 224))[:1]
  errors = gradient_differences(model, params, other, images)
  print(f'{size} gradient: {max(errors.values()):.1e}')
  assert not {name: x for name, x in errors.items() if not x <= 1e-4}


def gradient_differences(model, params, other, images):
  """{parameter: largest relative difference} of a loss, ours and in torch."""

  def loss(params):
    return (model.apply({'params': params}, images)[0] ** 2).mean()

  expected = tables.to_state_dict(ADVENTURER, jax.jit(jax.grad(loss))(params))
  other(nchw(images)).square().mean().backward()
  found = dict(other.named_parameters())
  assert set(found) == set(expected)
  return {
    name: export.relative_difference(found[name].grad.numpy(), gradient)
    for name, gradient in expected.items()
  }


@pytest.mark.slow
@pytest.mark.parametrize('size', ['tiny', 'small', 'base', 'large'])
def test_patches_of_8_are_bit_equal(size, tmp_path):
  model = create_model(f'adventurer_{size}_patch8')
  params = random_params(model)
  loaded = load.load(write(tmp_path / 'in', model, params))
  jax.tree.map(
    np.testing.assert_array_equal, loaded.variables['params'], params
  )
  assert (loaded.model.width, loaded.model.patch_size) == (model.width, 8)


@pytest.mark.parametrize('flips', ['alternate', (0, 4), 'released'])
def test_flips_groups_and_gradients(flips, tmp_path, caplog):
  model = create_model(
    'adventurer_tiny_patch16', **SMALL, num_groups=2, flip_blocks=flips
  )
  params = random_params(model)
  file = write(
    tmp_path / 'in',
    model,
    params,
    num_groups=2,
    state_dim=SMALL['state_dim'],
    flip_blocks=flips,
  )
  export.export(file, tmp_path / 'out')
  assert ('would load these weights' in caplog.text) == (flips != 'released')
  other = torch_adventurer.load(tmp_path / 'out')

  images = images_of(model, (32, 32))
  with pytest.raises(ValueError, match='32 x 34 pixels: both'):
    other(torch.zeros(1, 3, 32, 34))  # a convolution would drop two columns
  errors = gradient_differences(model, params, other, images)
  assert not {name: x for name, x in errors.items() if not x <= 1e-4}


@pytest.mark.parametrize(
  ('length', 'heads', 'groups'), [(1, 2, 1), (65, 4, 2), (198, 4, 4)]
)
def test_torch_scan(length, heads, groups):
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  x, d = normal(2, length, heads, 16), normal(heads)
  b, c = normal(2, length, groups, 8), normal(2, length, groups, 8)
  dt = np.exp(rng.uniform(-7, 1, (2, length, heads))).astype(np.float32)
  a = -rng.uniform(1e-4, 16, heads).astype(np.float32)
  ours = ssd(x, dt, a, b, c, d, implementation='reference')
  args = (x, dt, a, b, c, d)
  found = torch_adventurer.ssd(*map(torch.from_numpy, args))
  assert export.relative_difference(found.numpy(), ours) <= TOLERANCE


def test_cuda_takes_the_scan_of_mamba_ssm(monkeypatch):
  """Its arguments are ours, in its order; dt has had its softplus."""

  class OnCuda(torch.Tensor):
    is_cuda = True

  def theirs(x, dt, A, B, C, chunk_size, D=None):
    assert chunk_size == 256
    parts = (part.as_subclass(torch.Tensor) for part in (x, dt, A, B, C, D))
    monkeypatch.setattr(torch_adventurer, 'mamba_chunk_scan_combined', None)
    return torch_adventurer.ssd(*parts)

  x, dt = torch.randn(1, 9, 4, 8), torch.rand(1, 9, 4)
  rest = (-torch.rand(4), torch.randn(1, 9, 2, 4), torch.randn(1, 9, 2, 4))
  expected = torch_adventurer.ssd(x, dt, *rest, torch.ones(4))
  monkeypatch.setattr(torch_adventurer, 'mamba_chunk_scan_combined', theirs)
  found = torch_adventurer.ssd(x.as_subclass(OnCuda), dt, *rest, torch.ones(4))
  assert torch.equal(found.as_subclass(torch.Tensor), expected)


# -------------------------------------------------------------- there and back


def test_export_and_import_are_bit_equal(student_run, tmp_path, capsys):
  run, params, config = student_run
  out, back = tmp_path / 'out', tmp_path / 'back'
  assert not __main__.main(['export', f'--checkpoint={run}', f'--out={out}'])
  assert 'largest relative difference' in capsys.readouterr().out
  assert {path.name for path in out.iterdir()} == {
    'README.md',
    'config.json',
    'model.safetensors',
    'modeling_adventurer.py',
  }
  card = (out / 'README.md').read_text()
  assert 'accuracy 12.5' in card
  assert '`finetune`, step 3' in card
  assert not __main__.main(['import', f'--folder={out}', f'--out={back}'])
  restored, info = checkpoint.load_params(back)
  assert info['step'] == 3
  jax.tree.map(np.testing.assert_array_equal, restored, params)
  assert info['config']['data']['name'] == config.data.name
  again = load.load(back)
  assert again.model == load.load(run).model
  assert again.preprocess == load.load(run).preprocess


def test_a_run_below_the_home_directory_is_named(student_run, monkeypatch):
  run, _, _ = student_run
  monkeypatch.setenv('HOME', str(run.parent))
  assert export._provenance(f'~/{run.name}', None, None)['step'] == 3


def test_mask_token_is_never_written(student_run, tmp_path):
  _, params, _ = student_run
  params = params | {'mask_token': np.ones((1, 1, 64), np.float32)}
  params.pop('head')
  # Trained on a TPU; what is exported is compared on a CPU in float32.
  run, _ = workdir_with(
    tmp_path / 'run',
    params,
    'distill',
    dtype='bfloat16',
    residual_dtype='bfloat16',
    ssd_implementation='pallas_tpu',
  )
  assert export.export(run, tmp_path / 'out')[export.WEIGHTS] <= TOLERANCE
  tensors = load_file(tmp_path / 'out' / 'model.safetensors')
  assert not {'mask_token', 'head.weight'} & set(tensors)
  model = torch_adventurer.load(tmp_path / 'out')
  assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 64)


def test_onnx(student_run, tmp_path):
  onnxruntime = pytest.importorskip('onnxruntime')
  pytest.importorskip('onnxscript')
  run, _, _ = student_run
  differences = export.export(run, tmp_path / 'out', onnx=True)
  assert differences[export.ONNX] <= 1e-4
  session = onnxruntime.InferenceSession(
    tmp_path / 'out' / 'model.onnx', providers=['CPUExecutionProvider']
  )
  for batch in (1, 5):  # neither is what the export traced
    images = np.zeros((batch, 3, 32, 32), np.float32)
    assert session.run(None, {'images': images})[0].shape == (batch, 10)


@pytest.mark.slow
@pytest.mark.parametrize('image_size', [224, 448])
def test_onnx_of_the_base_model(image_size, tmp_path):
  """All blocks, 198 and 786 tokens: three chunks and twelve."""
  pytest.importorskip('onnxruntime')
  pytest.importorskip('onnxscript')
  model = create_model('adventurer_base_patch16', image_size=image_size)
  file = write(tmp_path / 'in', model, random_params(model))
  differences = export.export(file, tmp_path / 'out', onnx=True)
  print('\n', image_size, {k: f'{x:.1e}' for k, x in differences.items()})
  assert differences[export.ONNX] <= 1e-4


def test_an_export_needs_torch_and_safetensors_alone(student_run, tmp_path):
  """In a process that can import nothing else of what we use."""
  run, _, _ = student_run
  export.export(run, tmp_path / 'out')
  code = """
import sys
for name in sys.argv[1].split(','):
  sys.modules[name] = None
import modeling_adventurer
model = modeling_adventurer.load('.')
import torch
print(tuple(model(torch.zeros(2, 3, 32, 32)).shape))
"""
  absent = 'jax,jaxlib,flax,linearizer_jax,transformers,onnx,onnxscript,einops'
  done = subprocess.run(
    [sys.executable, '-c', code, absent],
    cwd=tmp_path / 'out',
    env=os.environ | {'PYTHONPATH': str(tmp_path / 'out')},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.stdout == '(2, 10)\n', done.stderr


# ------------------------------------------------------------------------- load


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
  assert difference <= TOLERANCE
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


def test_training_starts_from_released_weights(student_run, tmp_path):
  """`config.init` takes an export; head and mask token start fresh."""

  run, params, config = student_run
  export.export(run, tmp_path / 'out')
  config = config.copy_and_resolve_references()
  found = start.load_network(
    config, str(tmp_path / 'out'), 'student', params, tmp_path
  )
  jax.tree.map(np.testing.assert_array_equal, found, params)
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


def test_a_failed_export_leaves_nothing(student_run, tmp_path, monkeypatch):
  run, _, _ = student_run
  monkeypatch.setitem(export.TOLERANCE, export.WEIGHTS, 0.0)
  with pytest.raises(ValueError, match='differs from the model by'):
    export.export(run, tmp_path / 'out')
  assert not list(tmp_path.iterdir())

  def full(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(export, 'save_file', full)
  with pytest.raises(OSError, match='No space'):
    export.export(run, tmp_path / 'out')
  assert not list(tmp_path.iterdir())


def test_refusals_say_what_to_do(student_run, tmp_path, capsys):
  run, _, _ = student_run
  (tmp_path / 'file').write_text('mine')
  arguments = ['export', f'--checkpoint={run}', f'--out={tmp_path}']
  assert 'give another --out' in __main__.main(arguments)
  with pytest.raises(ValueError, match='give another --out'):
    export.import_folder(run, tmp_path)
  with pytest.raises(ValueError, match='was not exported from a run'):
    export.import_folder(run / 'finetune', tmp_path / 'new')
  assert {path.name for path in tmp_path.iterdir()} == {'file'}
  save_file({'x': np.zeros(1)}, tmp_path / 'x.safetensors')
  with pytest.raises(ValueError, match='say which one'):
    load.load(tmp_path / 'x.safetensors')


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
