"""The exported student against a plain ViT, both in PyTorch on the CPU.

The ViT is what one would write today: fused in_proj, PyTorch's own scaled dot
product attention, layer norms, GELU. Weights of both are random.
"""

import logging
import os
import statistics
import time

from linearizer_jax import models
from linearizer_jax.benchmark import flops
from linearizer_jax.benchmark.run import describe
from linearizer_jax.convert.export import MODEL_FIELDS
from linearizer_jax.models.adventurer import Adventurer, flip_schedule

_log = logging.getLogger('linearizer_jax')
CLASSES = 1000
BATCHES = {'one': 1, 'full': 8}
MOST = 50  # repeats, whatever the budget


def run(names, sizes, *, seconds):
  """Results of inference at each size, one image and eight at a time.

  Args:
    names: models; the n-th student is compared with the n-th plain ViT.
    sizes: [(height, width)] in pixels.
    seconds: of the whole. A size and batch whose calls, judged by earlier ones
      and by FLOPs, would take longer than what is left is not run; the first
      one always is.

  Returns:
    {'framework', 'device', ..., 'rows'} with rows as of
    `benchmark.programs.measure` and 'repeats', of how many times the figure is
    the median; memory is not known.

  Raises:
    ImportError: torch is not installed.
    ValueError: an unknown model, or sizes that do not fit its patches.
  """
  import torch

  end = time.monotonic() + seconds
  groups = [
    (size, [_row(name, size, load) for name in names])
    for size in sizes
    for load in BATCHES
  ]
  pace = {}  # model -> seconds per GFLOP, as seen last
  for i, (size, rows) in enumerate(groups):
    needed = _seconds(rows, pace)
    if pace and time.monotonic() + needed > end:
      for row in rows:
        row['reason'] = (
          f'one call of each takes {needed:.3g} s, more than is left'
        )
    else:
      _measure(size, rows, pace, end, groups[i + 1 :])
    for row in rows:
      _log.info('%s', describe(row))
  return {
    'framework': 'torch',
    'device': _processor(),
    'platform': 'cpu',
    'cores': os.cpu_count(),
    'torch': torch.__version__,
    'threads': torch.get_num_threads(),
    'dtype': 'float32',
    'seconds': seconds,
    'rows': [row for _, rows in groups for row in rows],
  }


def _module(name, size):
  return models.create_model(name, num_classes=CLASSES, image_size=size)


def _row(name, size, load):
  """What is known of a network at a size and batch before it runs."""
  module = _module(name, size)
  return {
    'model': name,
    'variant': 'student' if isinstance(module, Adventurer) else 'teacher',
    'size': f'{size[0]}x{size[1]}',
    'pixels': size[0] * size[1],
    'batch': BATCHES[load],
    'load': load,
    'direction': 'inference',
    'gflop_per_image': flops.count(module, size, 'inference') / 1e9,
    'memory_gib': None,
    'milliseconds': None,
    'images_per_second': None,
    'repeats': None,
    'reason': None,
  }


def _measure(size, rows, pace, end, later):
  """Fills the rows of networks that run in turns, and sets their pace.

  Args:
    size: (height, width) in pixels.
    rows: of one size and batch.
    pace: {model: seconds per GFLOP}, what was seen last; changed in place.
    end: of the budget, as of time.monotonic().
    later: (size, rows) of what comes after these.
  """
  import torch

  def learn(times):
    for row, seconds in zip(rows, times, strict=True):
      pace[row['model']] = seconds / row['batch'] / row['gflop_per_image']

  networks = [
    as_torch(_module(row['model'], size), size).eval() for row in rows
  ]
  images = torch.randn(rows[0]['batch'], 3, *size)
  with torch.inference_mode():
    rounds = [_round(networks, images)]
    learn(rounds[0])
    now = time.monotonic()
    until = now + _spare(later, pace, end - now) / (1 + len(later))
    while len(rounds) <= MOST and time.monotonic() + sum(rounds[-1]) <= until:
      rounds.append(_round(networks, images))
  # The first round warms up; it counts where there was no time for another.
  times = list(zip(*(rounds[1:] or rounds), strict=True))
  medians = [statistics.median(of_one) for of_one in times]
  learn(medians)
  for row, median in zip(rows, medians, strict=True):
    row['milliseconds'] = 1e3 * median
    row['images_per_second'] = row['batch'] / median
    row['repeats'] = len(times[0])


def _seconds(rows, pace):
  """What a call of each will take; 0 for networks that have not run."""
  return sum(
    row['batch'] * row['gflop_per_image'] * pace.get(row['model'], 0)
    for row in rows
  )


def _spare(groups, pace, left):
  """Of the seconds left, what a call of everything that fits will not take."""
  for _, rows in groups:
    needed = _seconds(rows, pace)
    left -= needed if needed <= left else 0
  return left


def _round(networks, images):
  """Seconds of a call of each network."""
  times = []
  for network in networks:
    before = time.monotonic()
    network(images)
    times.append(time.monotonic() - before)
  return times


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
