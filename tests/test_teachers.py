"""Teachers: every family against transformers, and refusal of bad weights."""

import json
import pathlib
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from linearizer_jax.convert import FAMILIES, load, tables
from linearizer_jax.models import create_model, vit
from linearizer_jax.models.teachers import TEACHERS, teacher_input_size

DEPTH, PATCH, SIZE = 12, 4, 24
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
# Relative L2 of a block's output. Float32: the figure the project promises.
# bfloat16: 24 branches rounded to 8 bits, on a float32 residual stream.
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


@pytest.mark.parametrize('size', [(24, 24), (32, 20), (12, 16)])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', REFERENCES)
def test_every_block_equals_transformers(reference, name, dtype, size):
  hf, folder = reference(name)
  fields = REFERENCES[name][1]
  model, variables, _ = load.load_teacher(name, folder, dtype=dtype, **fields)
  images = random_images(*size)
  logits, out = jax.jit(model.apply)(variables, images)
  theirs = hf_outputs(hf, images)
  front = model.class_token + model.num_registers
  errors = {}
  for n in range(DEPTH):
    state = theirs.hidden_states[n + 1].numpy()
    key = f'block{n:02d}'
    errors[key] = relative_error(out[key], state[:, front:])
    if model.class_token:
      errors[key + '_class'] = relative_error(out[key + '_class'], state[:, 0])
  if name.startswith(('clip', 'openclip')):
    errors['projected_class'] = relative_error(
      out['projected_class'], theirs.image_embeds
    )
  elif name.startswith('supervised'):
    errors['logits'] = relative_error(logits, theirs.logits)
  else:
    last = theirs.last_hidden_state.numpy()
    errors['normed'] = relative_error(out['normed'], last[:, front:])
    pooled = theirs.pooler_output if name[:6] == 'siglip' else last[:, 0]
    errors['class'] = relative_error(out['class'], pooled)
  worst = max(errors, key=errors.get)
  assert errors[worst] <= TOLERANCE[dtype], (worst, errors[worst])
