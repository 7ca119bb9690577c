"""Files of weights: spellings, damage, code in them; none is downloaded."""

import json
import os
import pickle
import re
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from linearizer_jax import start
from linearizer_jax.convert import FAMILIES, load, tables, weights
from linearizer_jax.models import create_model, vit
from linearizer_jax.models.layers import resize_positions
from linearizer_jax.models.teachers import TEACHERS

# A small CLIP tower, made here: no test needs transformers.
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
    weights.load_weights(
      tmp_path, 'clip', clip_params, fields={'activation': 'quick_gelu'}
    )
  config.write_text(
    json.dumps({'hidden_act': 'gelu', 'num_attention_heads': 4})
  )
  ours = {'activation': 'gelu', 'num_heads': 4}
  weights.load_weights(tmp_path, 'clip', clip_params, fields=ours)
  with pytest.raises(
    ValueError,
    match=r'asks for num_heads 4, the model has 2 .*config\.teacher\.num_heads',
  ):
    weights.load_weights(
      tmp_path, 'clip', clip_params, fields=ours | {'num_heads': 2}
    )
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
  (tmp_path / 'runs').mkdir()
  monkeypatch.chdir(tmp_path)
  with pytest.raises(FileNotFoundError, match='no weights file runs/nothing'):
    weights.find_weights('runs/nothing')
  with pytest.raises(FileNotFoundError, match='none of model'):
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


def test_sizes_that_differ_are_said_as_flags():
  was = dict(width=64, head_dim=16, flip_blocks=[1, 3])
  names = (*start.SIZES, 'flip_blocks')
  old = create_model('adventurer_tiny_patch8', **was)
  new = create_model('adventurer_tiny_patch8', width=64)
  flags = "--config.student.head_dim=16 '--config.student.flip_blocks=(1, 3)'"
  with pytest.raises(ValueError, match=re.escape(f'add {flags}')):
    start.check_sizes('runs/a', 'student', old, new, names)
  vit_tiny = create_model('vit_tiny_patch8')
  with pytest.raises(ValueError, match=r'kind ViT, but .* kind Adventurer'):
    start.check_sizes('clip', 'student', vit_tiny, new)
  same = create_model('adventurer_tiny_patch8', flip_blocks=(2, 3))
  start.check_sizes(
    *('runs/a', 'student', same, create_model('adventurer_tiny_patch8'), names)
  )
