"""Teachers: every family against transformers, and refusal of bad weights."""

import json
import os
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from linearizer_jax.convert import FAMILIES, check, load, tables, weights
from linearizer_jax.models import create_model, vit
from linearizer_jax.models.layers import resize_positions
from linearizer_jax.models.teachers import TEACHERS, teacher_input_size
from linearizer_jax.tasks.inputs import resize_images

DEPTH, PATCH, SIZE = 6, 4, 24
# As for the real models, but small; head width 16, MLP not 4 x width.
SMALL = dict(
  width=48,
  depth=DEPTH,
  num_heads=3,
  mlp_dim=160,
  patch_size=PATCH,
  image_size=SIZE,
)
HF_SMALL = dict(
  hidden_size=48,
  num_hidden_layers=DEPTH,
  num_attention_heads=3,
  patch_size=PATCH,
  image_size=SIZE,
)
# Relative L2 of a block's output, the project's promise. bfloat16 rounds each
# product to 8 bits, some 0.3 % together, and the residual stream is float32.
TOLERANCE = {'float32': 1e-5, 'bfloat16': 1e-2}


def hf_clip():
  import transformers

  config = transformers.CLIPVisionConfig(
    **HF_SMALL, intermediate_size=160, projection_dim=32
  )
  return transformers.CLIPVisionModelWithProjection(config)


def hf_openclip():
  import transformers

  config = transformers.CLIPVisionConfig(
    **HF_SMALL, intermediate_size=160, projection_dim=32, hidden_act='gelu'
  )
  return transformers.CLIPVisionModelWithProjection(config)


def hf_dinov2():
  import transformers

  # MLP width is a whole multiple of the width there.
  config = transformers.Dinov2Config(**HF_SMALL, mlp_ratio=4)
  return transformers.Dinov2Model(config)


def hf_dinov2_registers():
  import transformers

  config = transformers.Dinov2WithRegistersConfig(**HF_SMALL, mlp_ratio=4)
  return transformers.Dinov2WithRegistersModel(config)


def hf_siglip():
  import transformers

  config = transformers.SiglipVisionConfig(**HF_SMALL, intermediate_size=160)
  return transformers.SiglipVisionModel(config)


def hf_mae():
  import transformers

  config = transformers.ViTMAEConfig(
    **HF_SMALL, intermediate_size=160, mask_ratio=0.0
  )
  return transformers.ViTMAEModel(config)


def hf_supervised():
  import transformers

  config = transformers.ViTConfig(
    **HF_SMALL, intermediate_size=160, num_labels=7
  )
  return transformers.ViTForImageClassification(config)


# Teacher -> (transformers model, fields that shrink ours).
REFERENCES = {
  'clip_base_patch16': (hf_clip, dict(SMALL, projection_dim=32)),
  'openclip_base_patch16': (hf_openclip, dict(SMALL, projection_dim=32)),
  'dinov2_base_patch14': (hf_dinov2, dict(SMALL, mlp_dim=192)),
  'dinov2_base_patch14_registers': (
    hf_dinov2_registers,
    dict(SMALL, mlp_dim=192),
  ),
  'siglip_base_patch16': (hf_siglip, SMALL),
  'mae_base_patch16': (hf_mae, SMALL),
  'supervised_base_patch16': (hf_supervised, dict(SMALL, num_classes=7)),
}


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  """name -> (transformers model with random weights, folder it is saved in)."""
  torch = pytest.importorskip('torch')
  pytest.importorskip('transformers')
  made = {}

  def make(name):
    if name not in made:
      torch.manual_seed(0)
      model = REFERENCES[name][0]().eval()
      with torch.no_grad():
        for x in model.parameters():  # biases, scales and positions too
          x.add_(0.05 * torch.randn_like(x))
      folder = tmp_path_factory.mktemp(name)
      model.save_pretrained(folder)
      made[name] = model, folder
    return made[name]

  return make


def hf_outputs(model, images):
  """Hidden state of every block, (B, T, D), and the pooled outputs."""
  import torch

  extra = {'interpolate_pos_encoding': True}
  if type(model).__name__.startswith('Dinov2'):
    extra = {}  # always does
  if type(model).__name__ == 'ViTMAEModel':
    length = images.shape[1] * images.shape[2] // PATCH**2
    extra['noise'] = torch.arange(length).expand(len(images), length).float()
  with torch.no_grad():
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    return model(pixels, output_hidden_states=True, **extra)


def relative_error(ours, theirs):
  theirs = np.asarray(theirs, np.float64)
  difference = np.asarray(ours, np.float64) - theirs
  return np.linalg.norm(difference) / np.linalg.norm(theirs)


def random_images(height, width, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal((2, height, width, 3), np.float32)


def our_state(model, out, n):
  """Block n's tokens (B, T, D) without registers."""
  patches = np.asarray(out[f'block{n:02d}'], np.float32)
  if not model.class_token:
    return patches
  first = np.asarray(out[f'block{n:02d}_class'], np.float32)
  return np.concatenate([first[:, None], patches], 1)


@pytest.mark.parametrize(
  ('dtype', 'size'),
  [('float32', (24, 24)), ('float32', (32, 20)), ('bfloat16', (24, 24))],
)
@pytest.mark.parametrize('name', REFERENCES)
def test_every_block_equals_transformers(reference, name, dtype, size):
  """At the grid of the weights and, positions resized, at another one."""
  hf, folder = reference(name)
  images = random_images(*size)
  theirs = hf_outputs(hf, images)
  model, variables, _ = load.load_teacher(
    name, folder, dtype=dtype, **REFERENCES[name][1]
  )
  # The file's config decides the activation; the table has to agree with it.
  assert model.activation == create_model(name).activation
  logits, out = jax.jit(model.apply)(variables, images)
  registers = slice(model.class_token, model.class_token + model.num_registers)
  errors = {
    f'block {n}': relative_error(
      our_state(model, out, n),
      np.delete(theirs.hidden_states[n + 1].numpy(), registers, 1),
    )
    for n in range(DEPTH)
  }
  if dtype == 'float32':
    errors |= final_errors(name, theirs, logits, out, registers)
  too_large = {k: x for k, x in errors.items() if not x <= TOLERANCE[dtype]}
  assert not too_large


def final_errors(name, theirs, logits, out, registers):
  """Of what comes after the last block."""
  if 'clip' in name:
    return {'projected': relative_error(out['projected_class'], theirs[0])}
  if name.startswith('supervised'):
    return {'logits': relative_error(logits, theirs.logits)}
  last = np.delete(theirs.last_hidden_state.numpy(), registers, 1)
  patches = out['normed'].shape[1]
  errors = {'normed': relative_error(out['normed'], last[:, -patches:])}
  pooled = theirs.pooler_output if 'siglip' in name else last[:, 0]
  return errors | {'class': relative_error(out['class'], pooled)}


@pytest.mark.parametrize('name', ['clip_base_patch16', 'mae_base_patch16'])
def test_check_of_published_weights(name, reference, monkeypatch, capsys):
  _, folder = reference(name)
  fields = vit.VARIANTS[name] | REFERENCES[name][1]
  monkeypatch.setitem(vit.VARIANTS, name, fields)
  found = check.check(str(folder), name=name, steps=4)
  assert len(found['blocks']) == DEPTH
  assert found['losses'][-1] < found['losses'][0]
  assert f'{max(found["blocks"]):12.1e}' in capsys.readouterr().out
  with monkeypatch.context() as patch:
    patch.setattr(check, '_errors', lambda *_: [0.0] * (DEPTH - 1) + [np.nan])
    with pytest.raises(ValueError, match=f'block {DEPTH - 1} of .* by nan'):
      check.check(str(folder), name=name, steps=0)
  monkeypatch.setattr(check, 'TOLERANCE', 0.0)
  with pytest.raises(ValueError, match='differs from transformers by'):
    check.check(str(folder), name=name, steps=0)
  with pytest.raises(ValueError, match='Give --name'):
    check.check(str(folder))


def test_map_statistics():
  rng = np.random.default_rng(0)
  tokens = rng.standard_normal((2, 9, 16)) + 1.0
  tokens[1, 4, 3] = 60.0
  cosine, largest = check.map_statistics(tokens)
  unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
  pairs = [
    unit[b, i] @ unit[b, j]
    for b in range(2)
    for i in range(9)
    for j in range(9)
    if i != j
  ]
  np.testing.assert_allclose(cosine, np.mean(pairs))
  row = tokens[1, 4]
  np.testing.assert_allclose(largest, (60 - row.mean()) / row.std())


@pytest.mark.slow
def test_full_size_clip_equals_transformers():
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  config = transformers.CLIPVisionConfig(patch_size=16)
  hf = transformers.CLIPVisionModelWithProjection(config).eval()
  tensors = {name: x.numpy() for name, x in hf.state_dict().items()}
  images = random_images(224, 224)[:1]
  theirs = hf_outputs(hf, images)
  for dtype, tolerance in TOLERANCE.items():
    model = create_model('clip_base_patch16', dtype=dtype)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)['params']
    params = tables.from_state_dict(FAMILIES['clip'], tensors, shapes)
    _, out = jax.jit(model.apply)({'params': params}, images)
    for n in range(12):
      state = theirs.hidden_states[n + 1]
      assert relative_error(our_state(model, out, n), state) <= tolerance


@pytest.mark.parametrize('name', REFERENCES)
def test_names_go_both_ways(reference, name):
  """Written names and bytes are those of the published file."""
  _, folder = reference(name)
  _, variables, row = load.load_teacher(name, folder, **REFERENCES[name][1])
  file = load_file(folder / 'model.safetensors')
  written = tables.to_state_dict(FAMILIES[row.family][0], variables['params'])
  prefix = FAMILIES[row.family][0]['prefix']
  file = {
    key if key in written else prefix + key: value
    for key, value in file.items()
  }
  assert file.keys() - written.keys() <= {'dinov2.embeddings.mask_token'}
  assert written.keys() <= file.keys()
  for key, value in written.items():
    np.testing.assert_array_equal(value, file[key], key)


# The tests below need no torch: a small CLIP tower, made here.
CLIP_FIELDS = dict(
  width=16, depth=2, num_heads=2, patch_size=4, image_size=8, projection_dim=4
)


@pytest.fixture(scope='module')
def clip_params():
  model = create_model('clip_base_patch16', **CLIP_FIELDS)
  images = jnp.zeros((1, 8, 8, 3))
  params = jax.jit(model.init)(jax.random.key(0), images)['params']
  return jax.tree.map(np.asarray, params)


def clip_tensors(params, spelling=0):
  return tables.to_state_dict(FAMILIES['clip'][spelling], params)


def load_clip(path):
  _, variables, _ = load.load_teacher('clip_base_patch16', path, **CLIP_FIELDS)
  return variables['params']


def assert_same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_spellings_of_clip_are_bit_equal(clip_params, tmp_path):
  hf, openai = (clip_tensors(clip_params, n) for n in (0, 1))
  text = {'logit_scale': np.ones((1,), np.float32)}
  bare = {
    name.removeprefix('vision_model.'): x
    for name, x in hf.items()
    if name.startswith('vision_model.')
  }
  files = {
    'hugging_face': hf | text | {'text_model.x': np.ones(2, np.float32)},
    'openclip': openai | text | {'transformer.x': np.ones(2, np.float32)},
  }
  for name, tensors in files.items():
    path = tmp_path / f'{name}.safetensors'
    save_file(tensors, path)
    assert_same(load_clip(path), clip_params)
  # Newer transformers write the tower without prefix and projection.
  save_file(bare, tmp_path / 'bare.safetensors')
  without = {k: v for k, v in clip_params.items() if k != 'proj'}
  _, variables, _ = load.load_teacher(
    'clip_base_patch16',
    tmp_path / 'bare.safetensors',
    **{**CLIP_FIELDS, 'projection_dim': 0},
  )
  assert_same(variables['params'], without)


def test_torch_files_give_the_same_parameters(clip_params, tmp_path):
  """OpenAI's TorchScript archive and OpenCLIP's training checkpoint."""
  torch = pytest.importorskip('torch')
  tensors = {
    name: torch.from_numpy(x.copy())
    for name, x in clip_tensors(clip_params, 1).items()
  }
  root = torch.nn.Module()
  for name, x in tensors.items():
    *path, leaf = name.split('.')
    module = root
    for part in path:
      if not hasattr(module, part):
        module.add_module(part, torch.nn.Module())
      module = getattr(module, part)
    module.register_parameter(leaf, torch.nn.Parameter(x))
  root.register_buffer('vocab_size', torch.tensor(49408))
  torch.jit.script(root).save(str(tmp_path / 'archive.pt'))
  assert_same(load_clip(tmp_path / 'archive.pt'), clip_params)

  torch.save(
    {'epoch': 3, 'state_dict': {'module.' + k: x for k, x in tensors.items()}},
    tmp_path / 'training.pt',
  )
  assert_same(load_clip(tmp_path / 'training.pt'), clip_params)


def test_bfloat16_and_float16_files_are_read(clip_params, tmp_path):
  for dtype in (jnp.bfloat16, np.float16):
    path = tmp_path / f'{np.dtype(dtype).name}.safetensors'
    rounded = jax.tree.map(lambda x, d=dtype: x.astype(d), clip_params)
    save_file(clip_tensors(rounded), path)
    expected = jax.tree.map(lambda x: x.astype(np.float32), rounded)
    assert_same(load_clip(path), expected)


def test_activation_comes_with_the_weights(clip_params, tmp_path):
  save_file(clip_tensors(clip_params), tmp_path / 'model.safetensors')

  def activation():
    model, _, _ = load.load_teacher(
      'clip_base_patch16', tmp_path, **CLIP_FIELDS
    )
    return model.activation

  assert activation() == 'quick_gelu'
  config = tmp_path / 'config.json'
  config.write_text(json.dumps({'vision_config': {'hidden_act': 'gelu'}}))
  assert activation() == 'gelu'
  with pytest.raises(ValueError, match="asks for activation 'gelu', the model"):
    weights.load_weights(tmp_path, 'clip', clip_params, activation='quick_gelu')
  weights.load_weights(tmp_path, 'clip', clip_params, activation='gelu')
  config.write_text(json.dumps({'hidden_act': 'gelu_pytorch_tanh'}))
  assert activation() == 'gelu_tanh'
  config.write_text(json.dumps({'hidden_act': 'swish'}))
  with pytest.raises(ValueError, match=r"config.json asks .*'swish'"):
    activation()
  config.unlink()
  config = tmp_path / 'open_clip_config.json'
  config.write_text(json.dumps({'model_cfg': {'vision_cfg': {}}}))
  assert activation() == 'gelu'


def test_positions_are_resized_for_another_image_size(
  clip_params, tmp_path, monkeypatch
):
  name = 'clip_base_patch16'
  fields = vit.VARIANTS[name] | CLIP_FIELDS
  monkeypatch.setitem(vit.VARIANTS, name, fields)
  save_file(clip_tensors(clip_params), tmp_path / 'model.safetensors')
  loaded = load.load(tmp_path, name=name, image_size=(12, 16))
  assert loaded.model.image_size == loaded.preprocess.image_size == (12, 16)
  old = clip_params['positional_embedding']
  found = loaded.variables['params']['positional_embedding']
  np.testing.assert_array_equal(found[0], old[0])
  patches = resize_positions(old[None, 1:], (2, 2), (3, 4), False)[0]
  np.testing.assert_array_equal(found[1:], patches)
  # What a config beside the weights says of their size goes first.
  config = {'hidden_act': 'quick_gelu', 'image_size': 16}
  (tmp_path / 'config.json').write_text(json.dumps({'vision_config': config}))
  with pytest.raises(ValueError, match=r'\(5, 16\) instead of \(17, 16\)'):
    load.load(tmp_path, name=name, image_size=12)


def spoiled(tensors, how):
  """A mistake in the tensors, and what the error must say."""
  layer = 'vision_model.encoder.layers.1.'
  if how == 'renamed':
    tensors[layer + 'mlp.fc3.bias'] = tensors.pop(layer + 'mlp.fc2.bias')
    return (
      'missing: vision_model.encoder.layers.1.mlp.fc2.bias; '
      'extra: vision_model.encoder.layers.1.mlp.fc3.bias'
    )
  if how == 'shallower':
    for name in [name for name in tensors if name.startswith(layer)]:
      del tensors[name]
    return f'missing: {layer}layer_norm1.bias, .* and 10 more'
  if how == 'deeper':
    tensors[layer.replace('1', '2') + 'layer_norm1.bias'] = np.zeros(16)
    return r'extra: vision_model.encoder.layers.2.layer_norm1.bias\.'
  if how == 'wider':
    name = 'vision_model.embeddings.class_embedding'
    tensors[name] = np.zeros(32, np.float32)
    return rf'of another shape: {name} \(\(32,\) instead of \(16,\)\)'
  if how == 'other patch size':
    name = 'vision_model.embeddings.patch_embedding.weight'
    tensors[name] = np.zeros((16, 3, 8, 8), np.float32)
    return r'\(16, 3, 8, 8\) instead of \(16, 3, 4, 4\)'
  tensors[layer + 'mlp.fc2.bias'][3] = np.nan
  return 'NaN or infinite values in resblocks_1/mlp/c_proj/bias'


@pytest.mark.parametrize(
  'how',
  ['renamed', 'shallower', 'deeper', 'wider', 'other patch size', 'nan'],
)
def test_weights_that_do_not_fit_are_refused(clip_params, tmp_path, how):
  tensors = {k: x.copy() for k, x in clip_tensors(clip_params).items()}
  message = spoiled(tensors, how)
  path = tmp_path / 'spoiled.safetensors'
  save_file(tensors, path)
  with pytest.raises(ValueError, match=message) as error:
    load_clip(path)
  assert str(path) in str(error.value)
  assert '\n' not in str(error.value)


def test_bare_file_of_a_deeper_tower_is_refused(clip_params, tmp_path):
  """Without prefix, its blocks must not pass for those of a text tower."""
  tensors = {
    name.removeprefix('visual.'): x
    for name, x in clip_tensors(clip_params, 1).items()
  }
  tensors['transformer.resblocks.2.ln_1.bias'] = np.zeros(16, np.float32)
  save_file(tensors, tmp_path / 'bare.safetensors')
  with pytest.raises(
    ValueError, match=r'extra: transformer.resblocks.2.ln_1.bias\.'
  ):
    load_clip(tmp_path / 'bare.safetensors')


def test_another_family_is_refused(clip_params, tmp_path):
  save_file(clip_tensors(clip_params), tmp_path / 'clip.safetensors')
  with pytest.raises(ValueError, match=r'missing: .*; extra: .* more'):
    load.load_teacher('dinov2_small_patch14', tmp_path / 'clip.safetensors')


def test_truncated_and_foreign_files_are_refused(clip_params, tmp_path):
  path = tmp_path / 'weights.safetensors'
  save_file(clip_tensors(clip_params), path)
  whole = path.read_bytes()
  for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match='is damaged, truncated'):
      load_clip(path)
  (tmp_path / 'weights.h5').write_bytes(whole)
  with pytest.raises(ValueError, match='no kind of weights file'):
    load_clip(tmp_path / 'weights.h5')


class Bomb:
  """Would leave a folder behind if its pickle were executed."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


def test_code_in_a_torch_file_is_never_executed(tmp_path):
  torch = pytest.importorskip('torch')
  left_behind = tmp_path / 'executed'
  torch.save({'model': Bomb(left_behind)}, tmp_path / 'zip.pt')
  (tmp_path / 'plain.pt').write_bytes(pickle.dumps(Bomb(left_behind), 2))
  (tmp_path / 'noise.pt').write_bytes(b'nothing like a checkpoint')
  for name in ('zip.pt', 'plain.pt', 'noise.pt'):
    with pytest.raises(ValueError, match='never executed here'):
      load_clip(tmp_path / name)
  assert not left_behind.exists()


def archive(path, pickled, storage=b'', compression=zipfile.ZIP_STORED):
  """A TorchScript archive with a pickle of our own."""
  with zipfile.ZipFile(path, 'w', compression) as f:
    f.writestr('a/data.pkl', pickled)
    f.writestr('a/data/0', storage)
    f.writestr('a/constants.pkl', b'')


def tensor_pickle(shape, strides=(1,), kind=b'FloatStorage'):
  """{'x': tensor of `shape`} as torch.jit.save pickles it."""
  ints = lambda values: b'(' + b''.join(b'K%c' % n for n in values) + b't'  # noqa: E731
  storage = b'(X\7\0\0\0storagectorch\n' + kind + b'\nX\1\0\0\0000'
  storage += b'X\3\0\0\0cpuK\4tQ'
  tensor = b'ctorch._utils\n_rebuild_tensor_v2\n(' + storage + b'K\0'
  tensor += ints(shape) + ints(strides) + b'\x89}tR'
  return b'\x80\2c__torch__\nM\n)\x81}(X\1\0\0\0x' + tensor + b'ub.'


def test_code_in_a_torchscript_archive_is_never_executed(tmp_path):
  path, left_behind = tmp_path / 'archive.pt', tmp_path / 'executed'
  module = {'x': Bomb(left_behind), 'y': Bomb(left_behind)}
  archive(path, pickle.dumps(module, protocol=2))
  with pytest.raises(ValueError, match='missing: '):  # a call, not a tensor
    load_clip(path)
  archive(path, pickle.dumps(Bomb(left_behind), protocol=5))
  with pytest.raises(ValueError, match='is damaged, truncated'):
    load_clip(path)
  assert not left_behind.exists()


def test_torchscript_tensors_stay_inside_their_storage(tmp_path):
  path = tmp_path / 'archive.pt'
  storage = np.arange(4, dtype=np.float32).tobytes()
  archive(path, tensor_pickle((4,)), storage)
  np.testing.assert_array_equal(
    weights.read_tensors(path)['x'], np.arange(4, dtype=np.float32)
  )
  for pickled, compression in (
    (tensor_pickle((5,)), zipfile.ZIP_STORED),
    (tensor_pickle((2,), (4,)), zipfile.ZIP_STORED),
    (tensor_pickle((4,), kind=b'QInt8Storage'), zipfile.ZIP_STORED),
    (tensor_pickle((4,)), zipfile.ZIP_DEFLATED),
  ):
    archive(path, pickled, storage, compression)
    with pytest.raises(ValueError, match='is damaged, truncated'):
      weights.read_tensors(path)


def test_mutated_torchscript_pickles_are_refused_or_read(tmp_path):
  """Never another error than ValueError."""
  rng = np.random.default_rng(0)
  storage = np.arange(4, dtype=np.float32).tobytes()
  whole = tensor_pickle((2, 2), (2, 1))
  path = tmp_path / 'archive.pt'
  refused = 0
  for _ in range(500):
    mutated = bytearray(whole)
    for position in rng.integers(0, len(whole), rng.integers(1, 4)):
      mutated[position] = rng.integers(256)
    archive(path, bytes(mutated), storage)
    try:
      weights.read_tensors(path)
    except ValueError:
      refused += 1
  assert refused > 200


def test_checksums(tmp_path, monkeypatch):
  name = TEACHERS['clip_base_patch16'].archive.rpartition('/')[-1]
  file = tmp_path / name
  file.write_bytes(b'not what was published')
  with pytest.raises(ValueError, match=r'damaged: its SHA-256 is .*5806e77cd'):
    load.load_teacher('clip_base_patch16', file)
  # The cache of the hub: a link to a blob named after its SHA-256.
  blob = tmp_path / ('0' * 64)
  blob.write_bytes(b'half a download')
  link = tmp_path / 'model.safetensors'
  link.symlink_to(blob)
  monkeypatch.setattr(
    weights.huggingface_hub, 'hf_hub_download', lambda *_, **__: str(link)
  )
  with pytest.raises(ValueError, match='the published one is 0000'):
    weights.find_weights('openai/clip-vit-base-patch16')


def test_missing_weights_say_what_to_do(tmp_path, monkeypatch):
  with pytest.raises(FileNotFoundError, match=r'config\.teacher\.weights'):
    weights.find_weights(tmp_path / 'nowhere' / 'model.safetensors')
  with pytest.raises(FileNotFoundError, match='holds none of model'):
    weights.find_weights(tmp_path)
  with pytest.raises(ValueError, match='no published weights'):
    load.load_teacher('vit_tiny_patch16')
  with pytest.raises(ValueError, match=r"no teacher 'clip'.*clip_base_patch16"):
    load.load_teacher('clip')

  calls = []

  def no_network(repository, name, local_files_only):
    calls.append(local_files_only)
    raise weights.hub_errors.LocalEntryNotFoundError('offline')

  monkeypatch.setattr(weights.huggingface_hub, 'hf_hub_download', no_network)
  with pytest.raises(FileNotFoundError) as error:
    load.load_teacher('clip_base_patch16')
  assert 'cannot be reached' in str(error.value)
  assert (
    'https://huggingface.co/openai/clip-vit-base-patch16/resolve/main/'
    'model.safetensors'
  ) in str(error.value)
  assert calls == [False, True, True, True]  # waits for the network once


def test_random_teacher_and_its_input_size():
  model, variables, row = load.load_teacher(
    'vit_tiny_patch16',
    'random',
    depth=1,
    dtype='bfloat16',
  )
  assert model.depth == 1
  assert model.dtype == jnp.bfloat16
  assert row.image_size == 224
  grids = [(14, 14), (20, 32)]
  assert [teacher_input_size(grid, 14) for grid in grids] == [
    (196, 196),
    (280, 448),
  ]
  _, out = jax.eval_shape(
    model.apply, variables, jax.ShapeDtypeStruct((1, 64, 48, 3), jnp.float32)
  )
  assert out['block00'].shape == (1, 12, 192)


@pytest.mark.parametrize('size', [(196, 196), (250, 180), (112, 448)])
def test_teacher_images_resize_as_in_torch(size):
  torch = pytest.importorskip('torch')
  images = random_images(224, 224)
  theirs = torch.nn.functional.interpolate(
    torch.from_numpy(images).permute(0, 3, 1, 2),
    size=size,
    mode='bicubic',
    align_corners=False,
    antialias=True,
  )
  np.testing.assert_allclose(
    resize_images(images, size),
    theirs.permute(0, 2, 3, 1).numpy(),
    rtol=0,
    atol=1e-5,
  )
  assert resize_images(images, (224, 224)) is images


def test_every_teacher_is_whole():
  """A row names a model, a family, and three means and deviations."""
  assert TEACHERS.keys() == vit.VARIANTS.keys()
  for name, row in TEACHERS.items():
    assert row.model in vit.VARIANTS
    assert (row.source is None) == (row.family is None)
    assert row.family is None or row.family in FAMILIES, name
    assert row.image_size % vit.VARIANTS[row.model]['patch_size'] == 0
    assert len(row.mean) == len(row.std) == 3


@pytest.mark.parametrize('family', FAMILIES)
def test_every_parameter_of_a_family_has_a_name(family):
  """For the real sizes, in every spelling, without repeats."""
  for row in TEACHERS.values():
    if row.family != family:
      continue
    model = create_model(row.model, depth=2)
    images = jax.ShapeDtypeStruct((1, *[row.image_size] * 2, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)['params']
    for table in FAMILIES[family]:
      rows = tables._expanded(table, tables._paths(shapes))
      assert rows.keys() == tables._paths(shapes).keys()
      names = [name for names, _ in rows.values() for name in names]
      assert len(names) == len(set(names))
