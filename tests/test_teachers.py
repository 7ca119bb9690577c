"""Teachers: every family against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from linearizer_jax.convert import FAMILIES, check, load, tables
from linearizer_jax.models import create_model, vit
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


@pytest.mark.parametrize('name', ['nope', 'vit_tiny_patch8'])
def test_check_needs_a_row_with_published_weights(name):
  with pytest.raises(ValueError, match=f"no weights of '{name}' are published"):
    check.check('FOLDER', name=name)


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
