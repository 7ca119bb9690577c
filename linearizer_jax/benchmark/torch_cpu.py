"""The exported student against a plain ViT, both in PyTorch on the CPU.

The ViT is what one would write today: fused in_proj, PyTorch's own scaled dot
product attention, layer norms, GELU. Weights of both are random.
"""

import os
import time

import numpy as np

from linearizer_jax import models
from linearizer_jax.benchmark import flops
from linearizer_jax.convert.export import MODEL_FIELDS
from linearizer_jax.models.adventurer import Adventurer, flip_schedule

CLASSES = 1000
BATCHES = {'one': 1, 'full': 8}
ROUNDS = (3, 50)


def run(names, sizes, *, seconds):
  """Results of inference at each size, one image and eight at a time.

  Args:
    names: models; the n-th student is compared with the n-th plain ViT.
    sizes: [(height, width)] in pixels.
    seconds: of the whole.

  Returns:
    {'framework', 'device', ..., 'rows'} with rows as of `run.run`; memory is
    not known.

  Raises:
    ImportError: torch is not installed.
    ValueError: an unknown model.
  """
  import torch

  rows, parts = [], len(sizes) * len(BATCHES)
  for size in sizes:
    networks = {}
    for name in names:
      module = models.create_model(name, num_classes=CLASSES, image_size=size)
      networks[name] = module, as_torch(module, size).eval()
    for load, batch in BATCHES.items():
      images = torch.randn(batch, 3, *size)
      with torch.inference_mode():
        medians = _medians(
          {name: network for name, (_, network) in networks.items()},
          images,
          seconds / parts,
        )
      for name, (module, _) in networks.items():
        student = isinstance(module, Adventurer)
        row = {
          'model': name,
          'variant': 'student' if student else 'teacher',
          'size': f'{size[0]}x{size[1]}',
          'pixels': size[0] * size[1],
          'batch': batch,
          'load': load,
          'direction': 'inference',
          'gflop_per_image': flops.count(module, size, 'inference') / 1e9,
          'memory_gib': None,
          'milliseconds': medians[name],
          'images_per_second': 1e3 * batch / medians[name],
          'reason': None,
        }
        rows.append(row)
  return {
    'framework': 'torch',
    'device': _processor(),
    'platform': 'cpu',
    'cores': os.cpu_count(),
    'torch': torch.__version__,
    'threads': torch.get_num_threads(),
    'dtype': 'float32',
    'seconds': seconds,
    'rows': rows,
  }


def _medians(networks, images, seconds):
  """Milliseconds of each network, run in turns."""
  times = {name: [] for name in networks}
  for network in networks.values():
    network(images)
  fewest, most = ROUNDS
  start = time.perf_counter()
  for i in range(most):
    if i >= fewest and time.perf_counter() - start > seconds:
      break
    for name, network in networks.items():
      before = time.perf_counter()
      network(images)
      times[name].append(1e3 * (time.perf_counter() - before))
  return {name: float(np.median(values)) for name, values in times.items()}


def as_torch(module, size):
  """The torch module of a linen one: the exported student, or a plain ViT."""
  if isinstance(module, Adventurer):
    from linearizer_jax.convert import torch_adventurer

    fields = {field: getattr(module, field) for field in MODEL_FIELDS}
    flips = flip_schedule(module.flip_blocks, module.depth)
    return torch_adventurer.Adventurer(**fields, flip_blocks=flips)
  tokens = size[0] * size[1] // module.patch_size**2 + 1
  return make_vit(
    module.width, module.depth, module.num_heads, module.patch_size, tokens
  )


def make_vit(width, depth, num_heads, patch_size, tokens):
  """A ViT of torch layers with a class token and a head."""
  import torch
  from torch import nn
  from torch.nn import functional as F

  class Attention(nn.Module):
    def __init__(self):
      super().__init__()
      self.in_proj = nn.Linear(width, 3 * width)
      self.out_proj = nn.Linear(width, width)

    def forward(self, x):
      heads = self.in_proj(x).unflatten(-1, (3, num_heads, -1))
      q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, heads, T, D / heads) each
      y = F.scaled_dot_product_attention(q, k, v)
      return self.out_proj(y.transpose(1, 2).flatten(2))

  class Block(nn.Module):
    def __init__(self):
      super().__init__()
      self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
      self.attn = Attention()
      self.mlp = nn.Sequential(
        nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
      )

    def forward(self, x):
      x = x + self.attn(self.ln_1(x))
      return x + self.mlp(self.ln_2(x))

  class ViT(nn.Module):
    def __init__(self):
      super().__init__()
      self.patches = nn.Conv2d(3, width, patch_size, patch_size)
      self.class_token = nn.Parameter(torch.zeros(1, 1, width))
      self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, width))
      self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
      self.norm = nn.LayerNorm(width)
      self.head = nn.Linear(width, CLASSES)

    def forward(self, images):
      x = self.patches(images).flatten(2).mT  # (B, L, D)
      first = self.class_token.expand(len(x), -1, -1)
      x = torch.cat([first, x], 1) + self.positions
      return self.head(self.norm(self.blocks(x))[:, 0])

  return ViT()


def _processor():
  """The name of this machine's processor, as the system knows it."""
  import platform

  try:
    with open('/proc/cpuinfo', encoding='utf-8') as lines:
      names = [line for line in lines if line.startswith('model name')]
    return names[0].split(':')[1].strip()
  except (OSError, IndexError):
    return platform.processor() or platform.machine()
