"""Teachers by name: architecture, weights, and the preprocessing they expect.

A table without I/O; `linearizer_jax.convert.load.load_teacher` reads weights.
"""

import dataclasses

from linearizer_jax.models import vit
from linearizer_jax.models.layers import as_pair

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (
  (0.48145466, 0.4578275, 0.40821073),
  (0.26862954, 0.26130258, 0.27577711),
)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A row of TEACHERS.

  Fields:
    model: name for `create_model`.
    family: a key of `linearizer_jax.convert.FAMILIES`, or None for a model
      that is trained here.
    source: repository on the Hugging Face hub, or None.
    normalization: (mean, std) per RGB channel that the images are normalised
      with, where white is 1.
    archive: address of another published form of the weights whose last folder
      is the file's SHA-256, or None.
  """

  model: str
  family: str | None = None
  source: str | None = None
  normalization: tuple = IMAGENET
  archive: str | None = None

  @property
  def mean(self):
    return self.normalization[0]

  @property
  def std(self):
    return self.normalization[1]

  @property
  def image_size(self):
    """Side in pixels that the position embeddings are made for."""
    return vit.VARIANTS[self.model].get('image_size', vit.ViT.image_size)


_OPENAI = 'https://openaipublic.azureedge.net/clip/models/'

TEACHERS = {
  # Trained here; their weights are checkpoints of this project.
  **{name: Teacher(name) for name in vit.VARIANTS if name.startswith('vit_')},
  'clip_base_patch32': Teacher(
    'clip_base_patch32',
    'clip',
    'openai/clip-vit-base-patch32',
    CLIP,
    f'{_OPENAI}40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af'
    '/ViT-B-32.pt',
  ),
  'clip_base_patch16': Teacher(
    'clip_base_patch16',
    'clip',
    'openai/clip-vit-base-patch16',
    CLIP,
    f'{_OPENAI}5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f'
    '/ViT-B-16.pt',
  ),
  'clip_large_patch14': Teacher(
    'clip_large_patch14',
    'clip',
    'openai/clip-vit-large-patch14',
    CLIP,
    f'{_OPENAI}b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836'
    '/ViT-L-14.pt',
  ),
  'clip_large_patch14_336': Teacher(
    'clip_large_patch14_336',
    'clip',
    'openai/clip-vit-large-patch14-336',
    CLIP,
    f'{_OPENAI}3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02'
    '/ViT-L-14-336px.pt',
  ),
  'openclip_base_patch32': Teacher(
    'openclip_base_patch32',
    'clip',
    'laion/CLIP-ViT-B-32-laion2B-s34B-b79K',
    CLIP,
  ),
  'openclip_base_patch16': Teacher(
    'openclip_base_patch16',
    'clip',
    'laion/CLIP-ViT-B-16-laion2B-s34B-b88K',
    CLIP,
  ),
  'openclip_large_patch14': Teacher(
    'openclip_large_patch14',
    'clip',
    'laion/CLIP-ViT-L-14-laion2B-s32B-b82K',
    HALF,  # unlike every other CLIP here
  ),
  'dinov2_small_patch14': Teacher(
    'dinov2_small_patch14', 'dinov2', 'facebook/dinov2-small'
  ),
  'dinov2_base_patch14': Teacher(
    'dinov2_base_patch14', 'dinov2', 'facebook/dinov2-base'
  ),
  'dinov2_large_patch14': Teacher(
    'dinov2_large_patch14', 'dinov2', 'facebook/dinov2-large'
  ),
  'dinov2_small_patch14_registers': Teacher(
    'dinov2_small_patch14_registers',
    'dinov2',
    'facebook/dinov2-with-registers-small',
  ),
  'dinov2_base_patch14_registers': Teacher(
    'dinov2_base_patch14_registers',
    'dinov2',
    'facebook/dinov2-with-registers-base',
  ),
  'dinov2_large_patch14_registers': Teacher(
    'dinov2_large_patch14_registers',
    'dinov2',
    'facebook/dinov2-with-registers-large',
  ),
  'siglip_base_patch16': Teacher(
    'siglip_base_patch16', 'siglip', 'google/siglip-base-patch16-224', HALF
  ),
  'siglip_base_patch16_384': Teacher(
    'siglip_base_patch16_384', 'siglip', 'google/siglip-base-patch16-384', HALF
  ),
  'siglip_large_patch16_256': Teacher(
    'siglip_large_patch16_256',
    'siglip',
    'google/siglip-large-patch16-256',
    HALF,
  ),
  'mae_base_patch16': Teacher(
    'mae_base_patch16', 'vit', 'facebook/vit-mae-base'
  ),
  'mae_large_patch16': Teacher(
    'mae_large_patch16', 'vit', 'facebook/vit-mae-large'
  ),
  'supervised_base_patch16': Teacher(
    'supervised_base_patch16', 'vit', 'google/vit-base-patch16-224', HALF
  ),
  'supervised_large_patch16': Teacher(
    'supervised_large_patch16', 'vit', 'google/vit-large-patch16-224', HALF
  ),
}


def teacher_input_size(student_grid, patch_size):
  """Pixels (height, width) that give the teacher the student's token grid.

  Args:
    student_grid: (rows, columns) of the student's patches, or an int.
    patch_size: the teacher's.
  """
  rows, columns = as_pair(student_grid)
  return rows * patch_size, columns * patch_size
