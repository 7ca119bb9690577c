"""Students to PyTorch and back, and what is refused on the way.

The exported module is compared with ours, and ours with an independent forward
pass in test_adventurer.py. Loading is in test_load.py.
"""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from students import (
  ADVENTURER,
  SMALL,
  digits_run,
  random_params,
  shapes_of,
  workdir_with,
  write,
)

from linearizer_jax import checkpoint
from linearizer_jax.convert import __main__, export, load, tables
from linearizer_jax.kernels.ssd import ssd
from linearizer_jax.models import create_model, list_models

torch = pytest.importorskip('torch')
from linearizer_jax.convert import torch_adventurer  # noqa: E402

# The same float32 sums in another order; measured: 2e-6 (test_full_sizes).
TOLERANCE = 1e-5
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


def images_of(model, size, seed=1):
  random = np.random.default_rng(seed).standard_normal((2, *size, 3))
  return random.astype(np.float32)


def nchw(images):
  return torch.from_numpy(np.transpose(images, (0, 3, 1, 2)).copy())


@pytest.fixture(scope='module')
def student_run(tmp_path_factory):
  return digits_run(tmp_path_factory.mktemp('run'))


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
